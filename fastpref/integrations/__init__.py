"""Hosts that fastpref works inside.

trl  TRL's DPOTrainer on fastpref's kernels and losses: FastPrefDPOTrainer, FastPrefDPOConfig
ray  pairs from samples in a Ray dataset: pair_rows

A host is imported by its module alone; this package imports neither.
"""
