"""Hosts that fastpref works inside; each module imports its host, and is the only one that knows it."""
