"""Hosts that fastpref works inside.

trl  TRL's DPOTrainer on fastpref's kernels and losses: FastPrefDPOTrainer, FastPrefDPOConfig
ray  pairs from samples in a Ray dataset: pair_rows

A module is the only one that knows its host, and imports it; this package imports neither.
"""
