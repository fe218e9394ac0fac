"""Scored samples and pairs as files: reading, rows, writing, batches."""
