"""`fastpref demo`: scored samples -> pairs -> RDPO on a small transformer -> what it learnt and what it cost.

The run is small enough for two CPU cores and three minutes, but its vocabulary table has 32,768 rows, so that the
[sequences, tokens, vocabulary] logits dominate memory as they do in a real run. Every number on the final screen is
measured in this run; an interval that overlaps another one is called "no difference".
"""

import copy
import ctypes
import gc
import hashlib
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import fastpref
from fastpref.curate import InputError, read_scored_samples, select_pairs, to_logit
from fastpref.demo_samples import embedded_samples

VOCABULARY = 32_768  # rows of the table, whatever number of them the tokenizer uses
WIDTH, LAYERS, HEADS = 128, 2, 4
MAX_TOKENS = 256  # prompt and response together
PAIRS_PER_STEP = 4
BETA = 0.1
HELD_OUT_SHARE = 0.3
MATCHED_LENGTH_RATIO = 1.2  # longer / shorter, in characters
TOKENIZER_CHARACTERS = 4_000_000  # enough for the merges; more only takes longer
COST_STEPS = 5
LOSS_TOLERANCE = 1e-5  # relative difference of the two losses beyond which the demo fails
BOOTSTRAP_DRAWS = 1000
IGNORE = -100
MB = 1e6


@dataclass(frozen=True)
class DemoOptions:
    """The flags of `fastpref demo`; see its --help."""

    data: str | None = None
    score_field: str | None = None
    score_scale: str = "auto"
    max_prompts: int = 1000
    steps: int = 60
    seeds: int = 3
    seed: int = 0
    threads: int | None = None


def run_demo(options) -> dict:
    """Runs everything and returns the numbers of both blocks, ready for JSON. Raises InputError for unusable input."""
    started = time.perf_counter()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    samples, data = load_samples(options)
    held_out = held_out_prompts(samples.prompts)
    rewards, scale = scale_scores(samples.score_matrix(), samples.score_field, options.score_scale)
    pairs = build_pairs(samples, rewards, held_out)

    tokenizer = train_tokenizer([[p, *r] for p, r, out in zip(samples.prompts, samples.responses, held_out) if not out])
    with Progress(options.seeds * 2 * options.steps) as progress:
        training, model, batch = train_and_evaluate(options, pairs, tokenizer, progress)
    return {
        "version": fastpref.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "data": data | {"score_scale": scale},
        "pairs": pairs.summary,
        "training": training,
        "cost": measure_cost(model, batch, training["beta_rating"]),
        "seconds": time.perf_counter() - started,
    }
