"""`fastpref demo`: scored samples -> pairs -> RDPO on a small transformer -> what it learnt and what it cost.

Small enough for two CPU cores and three minutes, but with a table of 32,768 rows, so that logits [sequences, tokens,
vocabulary] would dominate memory as they do in a real run. Training and evaluation go from hidden states to log-probs
and never form them; the cost is measured with and without. Every number it returns is measured in this run.
"""

import copy
import hashlib
import math
import sys
import time
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastpref
from fastpref._progress import open_bar
from fastpref.cli.demo.cost import Batch, linear_loss, measure_cost
from fastpref.cli.demo.report import accuracy, spearman
from fastpref.cli.demo.samples import embedded_samples
from fastpref.curate import PairSelection, ScoredSamples, read_scored_samples, select_pairs, to_logit
from fastpref.errors import InputError

try:
    import tqdm  # noqa: F401  for the bar: a missing one is said here rather than after the tokenizer
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
except ImportError as error:
    raise InputError(f'fastpref demo needs {error.name}: pip install "fastpref[demo]"') from error

VOCABULARY = 32_768  # rows of the table, however many of them the tokenizer uses
WIDTH, LAYERS, HEADS = 128, 2, 4
MAX_TOKENS = 128  # prompt and response together
PAIRS_PER_STEP = 4
BETA = 0.1
WARMUP_LEARNING_RATE, LEARNING_RATE = 2e-3, 3e-4
HELD_OUT_SHARE = 0.4
MATCHED_LENGTH_RATIO = 1.2  # longer / shorter in characters, at most
TOKENIZER_CHARACTERS = 4_000_000  # enough for the merges, and learnt in seconds
COST_STEPS = 5
IGNORE = -100
PROBLEMS_SHOWN = 10


@dataclass(frozen=True)
class DemoOptions:
    """The flags of `fastpref demo`, which its --help explains."""

    data: str | None = None
    score_field: str | None = None
    score_scale: str = "auto"
    max_prompts: int = 1000
    steps: int = 40
    seeds: int = 3
    seed: int = 0
    threads: int | None = None


def run_demo(options: DemoOptions) -> dict:
    """Returns the numbers of the whole run, ready for JSON. Raises InputError for an input with too little to learn."""
    started = time.perf_counter()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    samples, data = load_samples(options)
    with Progress(1 + options.seeds * 2 * options.steps + COST_STEPS) as progress:
        progress.describe("tokenizer")
        task, pairs = make_task(samples, options.score_scale)
        progress.advance()
        training, model, batches = train_and_evaluate(task, options, progress)
        progress.describe("cost")
        cost = measure_cost(model, batches, BETA, training["beta_rating"], progress.advance)
    return {
        "versions": {"fastpref": fastpref.__version__, "torch": torch.__version__},
        "threads": torch.get_num_threads(),
        "data": data,
        "pairs": pairs,
        "training": training,
        "cost": cost,
        "seconds": time.perf_counter() - started,
    }


class Progress:
    """A bar on stderr on a terminal; elsewhere a line at most every ten seconds, so that a log stays readable."""

    def __init__(self, steps):
        self.steps, self.done, self.stage = steps, 0, ""
        self.bar = open_bar(None, steps)
        self.last_line = time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self.bar is not None:
            self.bar.close()

    def describe(self, stage):
        self.stage = stage
        if self.bar is not None:
            self.bar.set_description(stage)

    def advance(self):
        self.done += 1
        if self.bar is not None:
            self.bar.update()
        elif time.monotonic() - self.last_line > 10:
            self.last_line = time.monotonic()
            print(f"{self.done} of {self.steps} steps ({self.stage})", file=sys.stderr, flush=True)


# ---- samples to pairs


def load_samples(options) -> tuple[ScoredSamples, dict]:
    samples = embedded_samples() if options.data is None else read_scored_samples(options.data, options.score_field)
    for problem in samples.problems[:PROBLEMS_SHOWN]:
        print(problem, file=sys.stderr)
    if len(samples.problems) > PROBLEMS_SHOWN:
        print(f"{samples.path}: {len(samples.problems) - PROBLEMS_SHOWN} more malformed rows", file=sys.stderr)
    if not samples.prompts:
        raise InputError(f"{samples.path} holds no usable row ({len(samples.problems)} malformed)")
    used = samples.head(options.max_prompts)
    return used, {
        "source": samples.path,
        "malformed_rows": len(samples.problems),
        "prompts_read": len(samples.prompts),
        "prompts": len(used.prompts),
        "responses": sum(map(len, used.responses)),
        "score_field": samples.score_field,
    }


@dataclass(frozen=True)
class Pairs:
    chosen: list[str]
    rejected: list[str]
    gap: np.ndarray  # [pairs] rating of chosen minus rating of rejected
    tokens: list["Tokens"]  # [2 * pairs], those of the chosen first

    def __len__(self):
        return len(self.gap)


@dataclass(frozen=True)
class Task:
    train: Pairs
    held_out: Pairs
    matched: Pairs  # held-out prompts, the same chosen, rejected from the responses of about its length


def make_task(samples, score_scale) -> tuple[Task, dict]:
    rewards, scale, clamped = scale_scores(samples, score_scale)
    selection = select_pairs(rewards, on_degenerate="ignore")  # the report says how often it is
    held_out = held_out_prompts(samples.prompts)
    train_pairs, held_out_pairs = int((selection.keep & ~held_out).sum()), int((selection.keep & held_out).sum())
    if train_pairs < PAIRS_PER_STEP or held_out_pairs < 2:
        raise InputError(
            f"{samples.path} gives {train_pairs} training and {held_out_pairs} held-out pairs, "
            f"at least {PAIRS_PER_STEP} and 2 are needed"
        )
    tokenizer = train_tokenizer(
        [p, *r] for p, r, out in zip(samples.prompts, samples.responses, held_out, strict=True) if not out
    )
    like_chosen = like_chosen_in_length(samples, selection, rewards.shape)
    matched = select_pairs(rewards, valid=like_chosen, on_degenerate="ignore")
    task = Task(
        train=pick_pairs(samples, selection, ~held_out, tokenizer),
        held_out=pick_pairs(samples, selection, held_out, tokenizer),
        matched=pick_pairs(samples, matched, held_out, tokenizer),
    )
    tokens = task.train.tokens + task.held_out.tokens
    return task, {
        "score_scale": scale,
        "clamped_scores": clamped,
        "kept": train_pairs + held_out_pairs,
        "dropped": selection.dropped(),
        "train": train_pairs,
        "held_out": held_out_pairs,
        "median_gap": float(np.median(selection.gap[selection.keep])),
        "target_below_min": selection.share_below_min,
        "rejected_is_min": selection.share_rejected_min,
        "rejected_percentile": selection.median_percentile,
        "most_frequent_chosen": max(Counter(task.train.chosen + task.held_out.chosen).values()),
        "vocabulary_used": tokenizer.get_vocab_size(),
        "max_tokens": MAX_TOKENS,
        "cut_share": sum(t.cut for t in tokens) / len(tokens),
    }


def like_chosen_in_length(samples, selection, shape) -> np.ndarray:
    """Returns [prompts, responses] bool: at most MATCHED_LENGTH_RATIO times as long or short as the chosen response."""
    log_length = np.full(shape, np.nan)
    for row, pool in zip(log_length, samples.responses, strict=True):
        row[: len(pool)] = np.log([max(len(response), 1) for response in pool])
    of_chosen = np.take_along_axis(log_length, selection.chosen[:, None], axis=1)
    return (np.abs(log_length - of_chosen) <= math.log(MATCHED_LENGTH_RATIO)) & selection.keep[:, None]


def scale_scores(samples, score_scale) -> tuple[np.ndarray, str, int]:
    """Returns ([prompts, responses] ratings, "raw" or "logit", number of scores of 0 or 1 that were moved inside)."""
    scores = samples.score_matrix()
    outside = int(((scores < 0) | (scores > 1)).sum())
    if score_scale == "auto":
        score_scale = "raw" if outside else "logit"
    if score_scale == "raw":
        return scores, score_scale, 0
    if outside:
        raise InputError(f"--score-scale logit needs scores in [0, 1], {outside} in {samples.path} are outside")
    return to_logit(scores), score_scale, int(((scores == 0) | (scores == 1)).sum())


def held_out_prompts(prompts) -> np.ndarray:
    """Returns [prompts] bool: whose hash is among the lowest HELD_OUT_SHARE, so that equal prompts stay together."""
    hashes = np.array([int.from_bytes(hashlib.sha256(p.encode()).digest()[:8], "big") for p in prompts], np.uint64)
    distinct = np.unique(hashes)
    return hashes < distinct[int(HELD_OUT_SHARE * len(distinct))]


def pick_pairs(samples, selection: PairSelection, prompts, tokenizer) -> Pairs:
    """Returns the kept pairs of the prompts that are True in `prompts` [prompts]."""
    rows = np.flatnonzero(selection.keep & prompts)
    chosen = [samples.responses[row][selection.chosen[row]] for row in rows]
    rejected = [samples.responses[row][selection.rejected[row]] for row in rows]
    tokens = encode_texts(tokenizer, [samples.prompts[row] for row in rows] * 2, chosen + rejected)
    return Pairs(chosen, rejected, selection.gap[rows], tokens)


# ---- text to tokens


@dataclass(frozen=True)
class Tokens:
    ids: tuple[int, ...]  # prompt, answer mark, response, end mark; at most MAX_TOKENS
    response_start: int
    cut: bool  # the end of the response did not fit


PADDING, ANSWER, END = range(3)


def train_tokenizer(pools) -> Tokenizer:
    """Learns byte-level BPE from the training prompts' texts; every pool gives its share of TOKENIZER_CHARACTERS."""
    pools = list(pools)
    share = TOKENIZER_CHARACTERS // len(pools)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<padding>", "<answer>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((" ".join(pool)[:share] for pool in pools), trainer)
    return tokenizer


def encode_texts(tokenizer, prompts, responses) -> list[Tokens]:
    encoded = zip(tokenizer.encode_batch(prompts), tokenizer.encode_batch(responses), strict=True)
    return [join_tokens(prompt.ids[: MAX_TOKENS // 2], response.ids) for prompt, response in encoded]


def join_tokens(prompt, response) -> Tokens:
    ids = (*prompt, ANSWER, *response, END)
    return Tokens(ids[:MAX_TOKENS], len(prompt) + 1, cut=len(ids) > MAX_TOKENS)


def pad_sequences(sequences) -> tuple[Tensor, Tensor]:
    """Returns ids and labels, both [sequences, longest] int64; labels are IGNORE on the prompt and the padding."""
    ids = torch.full((len(sequences), max(len(s.ids) for s in sequences)), PADDING)
    labels = torch.full_like(ids, IGNORE)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence.ids)] = torch.tensor(sequence.ids)
        labels[row, sequence.response_start : len(sequence.ids)] = torch.tensor(sequence.ids[sequence.response_start :])
    return ids, labels


# ---- model


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x):  # [sequences, tokens, WIDTH]
        heads = self.qkv(self.attention_norm(x)).unflatten(-1, (3 * HEADS, WIDTH // HEADS)).transpose(1, 2)
        attended = F.scaled_dot_product_attention(*heads.chunk(3, dim=1), is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class TinyTransformer(nn.Module):
    """Decoder-only; the head is the embedding table. Padding sits on the right, where causal attention ignores it."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Embedding(MAX_TOKENS, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.RMSNorm(WIDTH)
        for table in (self.embedding, self.position):
            nn.init.normal_(table.weight, std=0.05)

    def hidden_states(self, ids):  # [sequences, tokens] -> [sequences, tokens, WIDTH], what the head is applied to
        return self.norm(self.blocks(self.embedding(ids) + self.position.weight[: ids.shape[1]]))

    def forward(self, ids):  # [sequences, tokens] -> logits [sequences, tokens, VOCABULARY]
        return self.hidden_states(ids) @ self.embedding.weight.T


# ---- training


def train_and_evaluate(task, options, progress) -> tuple[dict, nn.Module, list[Batch]]:
    """Trains one model per seed, which draws its own weights, warm-up, reference and order of pairs.

    Returns the Training numbers, and the last model with COST_STEPS batches to measure the cost on.
    """
    beta_rating = fastpref.losses.rating_scale(task.train.gap, BETA).suggested_beta_rating
    measured = []
    for number in range(1, options.seeds + 1):
        generator = torch.manual_seed(options.seed + number - 1)
        reference = TinyTransformer()
        progress.describe(f"seed {number}: warm-up")
        warm_up(reference, task.train, options.steps, generator, progress)
        policy = copy.deepcopy(reference)
        progress.describe(f"seed {number}: RDPO")
        train_rdpo(policy, reference, task.train, options.steps, generator, beta_rating, progress)
        progress.describe(f"seed {number}: evaluation")
        measured.append(held_out_margins(policy, reference, task))
    untouched, held_out, matched = (np.stack(rows) for rows in zip(*measured, strict=True))
    training = training_numbers(task, untouched, held_out, matched, options.seed)
    settings = {"steps": options.steps, "pairs_per_step": PAIRS_PER_STEP, "beta": BETA, "beta_rating": beta_rating}
    batches = [reference_batch(reference, task.train, i) for i in pair_order(len(task.train), COST_STEPS, generator)]
    return settings | training, policy, batches


def pair_order(pairs, steps, generator) -> Tensor:
    """Returns [steps, PAIRS_PER_STEP] indices of training pairs: one shuffled epoch after the other."""
    epochs = math.ceil(steps * PAIRS_PER_STEP / pairs)
    order = torch.cat([torch.randperm(pairs, generator=generator) for _ in range(epochs)])
    return order[: steps * PAIRS_PER_STEP].view(steps, PAIRS_PER_STEP)


def warm_up(model, pairs, steps, generator, progress) -> None:
    """Takes supervised steps on chosen responses, without which the reference model would be noise."""
    optimizer = torch.optim.AdamW(model.parameters(), WARMUP_LEARNING_RATE, weight_decay=0.0)
    for indices in pair_order(len(pairs), steps, generator):
        ids, labels = pad_sequences([pairs.tokens[i] for i in indices])
        update_weights(model, optimizer, -label_logps(model, ids, labels).sum() / (labels != IGNORE).sum())
        progress.advance()


def train_rdpo(policy, reference, pairs, steps, generator, beta_rating, progress) -> None:
    optimizer = torch.optim.AdamW(policy.parameters(), LEARNING_RATE, weight_decay=0.0)
    for indices in pair_order(len(pairs), steps, generator):
        batch = reference_batch(reference, pairs, indices)
        hidden = policy.hidden_states(batch.ids)
        update_weights(policy, optimizer, linear_loss(hidden, policy.embedding.weight, batch, BETA, beta_rating).loss)
        progress.advance()


def label_logps(model, ids, labels) -> Tensor:
    """Returns [sequences, tokens] fp32, entry t for the label at t + 1, 0 where it is IGNORE; stores no logits."""
    return fastpref.linear_token_logps(model.hidden_states(ids), model.embedding.weight, labels, shift=True)


def update_weights(model, optimizer, loss) -> None:
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def reference_batch(reference, pairs, indices) -> Batch:
    """Returns the pairs at `indices`, chosen first, with the reference's log-probs."""
    ids, labels = pad_sequences([pairs.tokens[i] for i in [*indices, *(len(pairs) + indices)]])
    gap = torch.tensor(pairs.gap[indices], dtype=torch.float32)
    return Batch(ids, labels, label_logps(reference, ids, labels), gap)


# ---- evaluation


def held_out_margins(policy, reference, task) -> list[np.ndarray]:
    """Returns margins [pairs] float64: untouched model, held-out pairs; trained model, held-out and matched pairs.

    Trained: the implicit margin (without its factor beta) of the policy against its reference. Untouched: log-prob of
    chosen minus log-prob of rejected under the reference itself, whose margin against itself is 0 by definition.
    """
    tokens = task.held_out.tokens + task.matched.tokens  # the two share their chosen responses
    reference_logps = summed_logps(reference, tokens)
    log_ratios = summed_logps(policy, tokens) - reference_logps
    split = len(task.held_out.tokens)
    return [
        chosen - rejected
        for chosen, rejected in (
            np.split(logps, 2) for logps in (reference_logps[:split], log_ratios[:split], log_ratios[split:])
        )
    ]


@torch.no_grad()
def summed_logps(model, tokens) -> np.ndarray:
    """Returns [sequences] float64, log-probs. Equal responses are scored once, those of like length together."""
    distinct = sorted(set(tokens), key=lambda t: len(t.ids))
    sums = {}
    for start in range(0, len(distinct), 2 * PAIRS_PER_STEP):
        group = distinct[start : start + 2 * PAIRS_PER_STEP]
        ids, labels = pad_sequences(group)
        logps = label_logps(model, ids, labels).double().sum(-1).tolist()
        sums.update(zip(group, logps, strict=True))
    return np.array([sums[t] for t in tokens])


def training_numbers(task, untouched, held_out, matched, seed) -> dict:
    """Returns the rows of the Training block. untouched, held_out, matched: [seeds, pairs] margins."""
    generator = np.random.default_rng(seed)
    longer = longer_wins(task.held_out)
    return {
        "seeds": len(held_out),
        "held_out_accuracy": accuracy(held_out, generator),
        "longest_wins": accuracy(longer, generator),
        "untouched_model": accuracy(untouched, generator),
        "length_matched_accuracy": accuracy(matched, generator),
        "length_matched_longest_wins": accuracy(longer_wins(task.matched), generator),
        "spearman_margin_gap": spearman(held_out, task.held_out.gap, generator),
    }


def longer_wins(pairs) -> np.ndarray:
    """Returns [1, pairs], characters of chosen minus characters of rejected: a rule, so one "seed"."""
    return np.array([[len(c) - len(r) for c, r in zip(pairs.chosen, pairs.rejected, strict=True)]], dtype=float)
