"""The controlled task of the recipes: a small policy truly trained by gradient, a known reward, judges that err.

A prompt is a feature vector, a response a sequence of at most `LENGTH` tokens of which token 0 ends it. The true reward
is known: each token has a utility that depends on the prompt (bilinear), and `PENALTY` is the cost of each forbidden
transition between two tokens and of each token more or fewer than the prompt wants; the best response of a prompt
follows from dynamic programming. The policy is autoregressive, a
perceptron on (prompt, tokens so far, last token, position); the reference is cloned from a mediocre teacher. Judges
return the true reward with errors of one kind each.

Everything of a seed (world, reference, prompts, samples, errors of the judges) is drawn anew. What is compared at a
seed starts from one reference, takes as many steps on batches of one size, and is evaluated on the same held-out
prompts with the same random numbers; the effect of a seed is the mean over prompts of the paired differences, and the
interval is Student's over seeds. The unit of reward is one standard deviation of the true reward over the reference's
responses to one prompt.
"""

import copy
import functools
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastpref import preference_loss, sequence_logps, token_logps
from fastpref.curate import implicit_margins

FEATURES, LENGTH, VOCAB, END, NOTHING = 8, 8, 16, 0, -100
PENALTY, FORBIDDEN = 1.5, 0.2  # of a broken constraint; share of the transitions that are forbidden
TEACHER_TEMPERATURE, TEACHER_END = 2.5, 1 / 6
BETA = 0.1
# The rate and the steps of Size were settled on plain DPO (max against min of 16 true rewards), at three seeds that no
# recipe uses: of rates 1e-2, 3e-2, 1e-1 and of 100, 200, 400 steps the ones of the highest mean reward.


@dataclass(frozen=True)
class Size:
    """How much of everything; the same in every arm."""

    width: int = 32  # hidden units of the policy
    clone_steps: int = 200
    steps: int = 200
    batch: int = 64  # pairs
    rate: float = 3e-2  # of Adam, falling linearly to 0
    prompts: int = 1024  # that pairs are built for, where a recipe does not say otherwise
    held_out: int = 400  # prompts
    samples: int = 8  # responses per held-out prompt

    def scaled(self, prompts: int) -> int:
        """So many prompts in the full size, as many fewer as this size has."""
        return max(8, prompts * self.prompts // Size.prompts)


TINY = Size(width=8, clone_steps=20, steps=6, batch=16, prompts=64, held_out=8, samples=2)


class World(NamedTuple):
    utility: Tensor  # [VOCAB, FEATURES]: utility of a token = utility @ prompt
    forbidden: Tensor  # [VOCAB, VOCAB] bool, from the one token to the next
    length: Tensor  # [FEATURES]: a prompt wants 4 + round(length @ prompt) tokens, from 1 to LENGTH - 1
    unit: float  # the standard deviation that rewards are divided by


class Setting(NamedTuple):
    """What all arms of a seed share."""

    seed: int
    size: Size
    world: World
    reference: nn.Module
    prompts: Tensor  # [held out, FEATURES]
    noise: Tensor  # [held out * samples, LENGTH, VOCAB] of the evaluation's draws


class Pairs(NamedTuple):
    """Training pairs; responses are labels [N, LENGTH], NOTHING after the end."""

    prompts: Tensor  # [N, FEATURES]
    chosen: Tensor  # [N, LENGTH]
    rejected: Tensor
    gap: Tensor | None = None  # [N] rating of chosen - rating of rejected
    goal: Tensor | None = None  # [N] score that is asked for

    def take(self, index) -> "Pairs":
        index = torch.as_tensor(index)
        return Pairs(*(None if part is None else part[index] for part in self))


class Outcome(NamedTuple):
    """Of one arm at one seed."""

    reward: np.ndarray  # [held out] mean true reward of the samples
    kl: float  # mean log-ratio of policy to reference over them

    @property
    def mean(self) -> float:
        return float(self.reward.mean())


# ---- the world ----


def rng(seed: int, purpose: str) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(purpose.encode())])


def draw_prompts(seed: int, purpose: str, count: int) -> Tensor:
    return torch.from_numpy(rng(seed, "prompts " + purpose).standard_normal((count, FEATURES), dtype=np.float32))


def gumbel(generator: np.random.Generator, *shape) -> Tensor:
    exponential = generator.standard_exponential(shape, dtype=np.float32)
    return torch.from_numpy(-np.log(np.maximum(exponential, np.finfo(np.float32).tiny)))  # 0 does occur


def true_reward(world: World, prompts: Tensor, responses: Tensor) -> Tensor:
    """[N, FEATURES], [N, LENGTH] -> [N]: utilities less penalties, in units of `world.unit`."""
    tokens = responses.clamp(min=END)
    counts = tokens != END
    utility = (prompts @ world.utility.T).gather(1, tokens)
    broken = world.forbidden[tokens[:, :-1], tokens[:, 1:]] & counts[:, 1:]
    missed = (counts.sum(1) - wanted_length(world, prompts)).abs()
    return ((utility * counts).sum(1) - PENALTY * (broken.sum(1) + missed)) / world.unit


def wanted_length(world: World, prompts: Tensor) -> Tensor:
    """[N] tokens before the end."""
    return (4 + prompts @ world.length).round().clamp(1, LENGTH - 1)


def best_reward(world: World, prompts: Tensor) -> Tensor:
    """[N] the largest true reward of any response: dynamic programming over the last token."""
    utility = (prompts @ world.utility.T)[:, 1:]  # of the tokens that do not end
    step = -PENALTY * world.forbidden[1:, 1:].to(utility.dtype)
    wanted = wanted_length(world, prompts)
    best, last = -PENALTY * wanted, utility
    for length in range(1, LENGTH + 1):
        best = torch.maximum(best, last.amax(1) - PENALTY * (length - wanted).abs())
        last = (last.unsqueeze(2) + step).amax(1) + utility
    return best / world.unit


def lengths(responses: Tensor) -> Tensor:
    """[N, LENGTH] -> [N] tokens before the end."""
    return (responses > END).sum(1)


# ---- the policy ----


class Policy(nn.Sequential):
    """[N, LENGTH, inputs] -> logits [N, LENGTH, VOCAB]; inputs: prompt, goal, tokens so far, last token, position."""

    INPUTS = FEATURES + 1 + 2 * VOCAB + LENGTH

    def __init__(self, width: int, generator: np.random.Generator):
        super().__init__(nn.Linear(self.INPUTS, width), nn.Tanh(), nn.Linear(width, VOCAB))
        for layer in (self[0], self[2]):
            scale = 1 / math.sqrt(layer.in_features)
            layer.weight.data = torch.from_numpy(generator.normal(0, scale, layer.weight.shape).astype(np.float32))
            layer.bias.data.zero_()
        self[0].weight.data[:, FEATURES] = 0.0  # the goal, which the reference was not trained on


def inputs(prompts: Tensor, responses: Tensor, goal: Tensor | None = None) -> Tensor:
    """[N, LENGTH, Policy.INPUTS] of every position, which sees the tokens before it."""
    hot = nn.functional.one_hot(responses.clamp(min=END), VOCAB).to(prompts.dtype)
    last = nn.functional.pad(hot, (0, 0, 1, -1))  # [N, LENGTH, VOCAB]
    return torch.cat((_context(prompts, goal), last.cumsum(1), last, _positions(prompts)), 2)


def _context(prompts, goal) -> Tensor:
    goal = prompts.new_zeros(len(prompts)) if goal is None else goal
    return torch.cat((prompts, goal.unsqueeze(1)), 1).unsqueeze(1).expand(-1, LENGTH, -1)


def _positions(prompts) -> Tensor:
    return torch.eye(LENGTH, dtype=prompts.dtype).expand(len(prompts), -1, -1)


@torch.no_grad()
def sample(next_logits: Callable[[Tensor], Tensor], prompts: Tensor, noise: Tensor, goal=None) -> Tensor:
    """Draws a response for each prompt [N, FEATURES] by Gumbel noise [N, LENGTH, VOCAB] -> labels [N, LENGTH].

    next_logits: [N, 1, inputs] -> [N, 1, VOCAB]. Equal noise makes the draws of similar policies similar.
    """
    state = inputs(prompts, torch.full((len(prompts), LENGTH), NOTHING), goal)
    so_far, last = (slice(FEATURES + 1 + i * VOCAB, FEATURES + 1 + (i + 1) * VOCAB) for i in range(2))
    seen = prompts.new_zeros(len(prompts), VOCAB)
    running = torch.ones(len(prompts), dtype=torch.bool)
    responses = torch.full((len(prompts), LENGTH), NOTHING)
    hot = torch.zeros_like(seen)
    for position in range(LENGTH):
        now = state[:, position : position + 1].clone()
        now[:, 0, so_far], now[:, 0, last] = seen, hot
        token = (next_logits(now)[:, 0] + noise[:, position]).argmax(1)
        responses[:, position] = torch.where(running, token, NOTHING)
        running = running & (token != END)
        hot = nn.functional.one_hot(token, VOCAB).to(seen.dtype)
        seen = seen + hot
    return responses


@torch.no_grad()
def logps(policy: Policy, prompts: Tensor, responses: Tensor, goal=None) -> Tensor:
    """[N] summed log-probs of the responses."""
    return sequence_logps(token_logps(policy(inputs(prompts, responses, goal)), responses), responses).sums


def teacher(world: World) -> Callable[[Tensor], Tensor]:
    """The mediocre policy that the reference is cloned from, as `sample` wants it."""

    def next_logits(state):
        last = state[:, :, FEATURES + 1 + VOCAB : FEATURES + 1 + 2 * VOCAB]
        value = state[:, :, :FEATURES] @ world.utility.T - PENALTY * (last @ world.forbidden.to(state.dtype))
        tokens = torch.log_softmax(value[:, :, 1:] / TEACHER_TEMPERATURE, 2) + math.log(1 - TEACHER_END)
        return torch.cat((torch.full_like(tokens[:, :, :1], math.log(TEACHER_END)), tokens), 2)

    return next_logits


@functools.lru_cache(maxsize=16)
def made_setting(seed: int, size: Size) -> Setting:
    draw = rng(seed, "world")
    utility = torch.from_numpy(draw.normal(0, 1 / math.sqrt(FEATURES), (VOCAB, FEATURES)).astype(np.float32))
    forbidden = torch.from_numpy(draw.random((VOCAB, VOCAB)) < FORBIDDEN) | torch.eye(VOCAB, dtype=torch.bool)
    forbidden[END], forbidden[:, END] = False, False
    direction = torch.from_numpy(draw.standard_normal(FEATURES).astype(np.float32))
    world = World(utility, forbidden, direction / direction.norm(), 1.0)
    reference = clone(world, size, size.width, seed)
    prompts = draw_prompts(seed, "held out", size.held_out)
    noise = gumbel(rng(seed, "evaluation"), size.held_out * size.samples, LENGTH, VOCAB)
    rewards = true_reward(world, prompts.repeat_interleave(size.samples, 0), _responses(reference, prompts, noise))
    unit = float(rewards.view(size.held_out, size.samples).var(1).mean().sqrt())
    return Setting(seed, size, world._replace(unit=unit), reference, prompts, noise)


def clone(world: World, size: Size, width: int, seed: int) -> Policy:
    """A policy trained on responses of the teacher."""
    prompts = draw_prompts(seed, "teacher", size.batch * 64)
    noise = gumbel(rng(seed, "teacher"), len(prompts), LENGTH, VOCAB)
    responses = sample(teacher(world), prompts, noise)
    policy = Policy(width, rng(seed, f"policy {width}"))
    states = inputs(prompts, responses)

    def loss(rows):
        found = token_logps(policy(states[rows]), responses[rows])
        return -found.sum() / (responses[rows] != NOTHING).sum()

    _descend(policy, loss, batches(len(prompts), size.clone_steps, 4 * size.batch, rng(seed, "clone")), 1e-2)
    return policy.requires_grad_(False)


# ---- training and evaluation ----


def batches(count: int, steps: int, batch: int, generator: np.random.Generator) -> Tensor:
    """[steps, batch] indices: as many epochs as that takes, each in its own order."""
    epochs = -(-steps * batch // count)
    order = np.concatenate([generator.permutation(count) for _ in range(epochs)])
    return torch.from_numpy(order[: steps * batch].reshape(steps, batch))


def _descend(policy, loss, rows, rate) -> None:
    optimizer = torch.optim.Adam(policy.parameters(), lr=rate, foreach=True)
    for step, batch in enumerate(rows):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / len(rows))
        optimizer.zero_grad()
        loss(batch).backward()
        optimizer.step()


def train(setting: Setting, pairs: Pairs, *, start=None, loss="sigmoid", beta=BETA, options=None, order=None) -> Policy:
    """DPO, or any loss of fastpref, on the pairs; order: [steps, batch] indices, None: shuffled epochs.

    start: the policy to train, which is also the reference of the loss; None: the reference of the setting.
    """
    size = setting.size
    start = setting.reference if start is None else start
    if order is None:
        order = batches(len(pairs.prompts), size.steps, size.batch, rng(setting.seed, "batches"))
    policy = copy.deepcopy(start).requires_grad_(True)
    responses = torch.stack((pairs.chosen, pairs.rejected))  # [2, N, LENGTH]
    states = torch.stack([inputs(pairs.prompts, side, pairs.goal) for side in responses])
    reference = torch.stack([logps(start, pairs.prompts, side, pairs.goal) for side in responses])

    def step(rows):
        return preference_loss(
            policy(states[:, rows].flatten(0, 1)),
            responses[:, rows].flatten(0, 1),
            ref_logps=reference[:, rows].flatten(),
            loss=loss,
            loss_options=options,
            beta=beta,
            rating_gap=None if pairs.gap is None else pairs.gap[rows].float(),
        ).loss

    _descend(policy, step, order, size.rate)
    return policy.requires_grad_(False)


def warm_up(setting: Setting, pairs: Pairs, start=None) -> Policy:
    """The model of implicit margins: one epoch of DPO on 2,048 random pairs (Deng et al.: 2,000), or all if fewer."""
    size = setting.size
    draw = rng(setting.seed, "warm-up")
    some = draw.permutation(len(pairs.prompts))[: size.scaled(2048)]
    order = some[: len(some) // size.batch * size.batch].reshape(-1, size.batch)
    return train(setting, pairs, start=start, order=torch.from_numpy(order))


def implicit(pairs: Pairs, policy: Policy, reference: Policy) -> np.ndarray:
    """[N] implicit margins, without beta."""
    return implicit_margins(
        *(logps(p, pairs.prompts, side).numpy() for p in (policy, reference) for side in (pairs.chosen, pairs.rejected))
    )


def _responses(policy, prompts, noise, goal=None) -> Tensor:
    """[prompts * samples, LENGTH], the samples of a prompt together."""
    repeated = prompts.repeat_interleave(len(noise) // len(prompts), 0)
    return sample(policy, repeated, noise, goal)


def evaluate(setting: Setting, policy: Policy, goal: float | None = None) -> Outcome:
    """The true reward of samples on the held-out prompts, drawn with the random numbers of every other arm."""
    repeated = setting.prompts.repeat_interleave(setting.size.samples, 0)
    goal = None if goal is None else torch.full((len(repeated),), goal)
    responses = sample(policy, repeated, setting.noise, goal)
    reward = true_reward(setting.world, repeated, responses).view(len(setting.prompts), -1).mean(1)
    kl = logps(policy, repeated, responses, goal) - logps(setting.reference, repeated, responses)
    return Outcome(reward.double().numpy(), float(kl.mean()))


class Pool(NamedTuple):
    """n responses of the reference to each prompt, and their true rewards."""

    prompts: Tensor  # [P, FEATURES]
    responses: Tensor  # [P, n, LENGTH]
    reward: np.ndarray  # [P, n]

    def pairs(self, chosen, rejected, scores=None, keep=slice(None)) -> Pairs:
        """Pairs of columns [P] and, with scores [P, n], their gaps; keep: the prompts to take."""
        rows = torch.arange(len(self.prompts))[keep]
        chosen, rejected = torch.as_tensor(chosen)[keep], torch.as_tensor(rejected)[keep]
        if scores is None:
            gap = None
        else:
            scores = torch.as_tensor(scores)
            gap = scores[rows, chosen] - scores[rows, rejected]
        return Pairs(self.prompts[rows], self.responses[rows, chosen], self.responses[rows, rejected], gap)


def stronger(setting: Setting, by: float) -> Callable[[Tensor], Tensor]:
    """As `sample` wants it: the reference's logits moved so far towards those of DPO on true preferences."""
    weak, strong = setting.reference, _trained_on_truth(setting.seed, setting.size)
    return lambda state: torch.lerp(weak(state), strong(state), by)


@functools.lru_cache(maxsize=16)
def _trained_on_truth(seed: int, size: Size) -> Policy:
    made = made_setting(seed, size)
    pool = draw_pool(made, size.prompts, 16, "true preferences")
    return train(made, pool.pairs(pool.reward.argmax(1), pool.reward.argmin(1)))


def draw_pool(setting: Setting, count: int, n: int, purpose: str = "pool", policy=None) -> Pool:
    prompts = draw_prompts(setting.seed, purpose, count)
    noise = gumbel(rng(setting.seed, "responses " + purpose), count * n, LENGTH, VOCAB)
    responses = _responses(setting.reference if policy is None else policy, prompts, noise)
    reward = true_reward(setting.world, prompts.repeat_interleave(n, 0), responses)
    return Pool(prompts, responses.view(count, n, LENGTH), reward.double().numpy().reshape(count, n))


# ---- judges ----


def gaussian_judge(reward: np.ndarray, std: float, generator) -> np.ndarray:
    return reward + std * generator.standard_normal(reward.shape)


def heavy_tailed_judge(reward: np.ndarray, scale: float, generator) -> np.ndarray:
    """Errors by Student's t with three degrees of freedom: outliers, though a finite variance."""
    return reward + scale * generator.standard_t(3, reward.shape)


def flipped(chosen_first: np.ndarray, share: float, generator) -> np.ndarray:
    """Labels (bool) of which that share is the wrong way round."""
    return chosen_first ^ (generator.random(chosen_first.shape) < share)


# ---- claims ----


class Claim(NamedTuple):
    """What a paper says of an arm (or of numbers made of arms), as a number that should exceed `above`."""

    text: str
    source: str
    measure: Callable[[dict], float]  # the arms of one seed by name -> the effect
    above: float = 0.0
    # The least effect worth speaking of: an interval that ends below `above + least` refutes the claim.
    least: float = 0.1
    unit: str = "σ"


class Effect(NamedTuple):
    mean: float
    low: float  # 95 % interval
    high: float
    verdict: str


def judge_claim(claim: Claim, seeds: list[dict]) -> Effect:
    mean, low, high = interval([claim.measure(arms) for arms in seeds])
    if low > claim.above:
        return Effect(mean, low, high, "reproduces")
    return Effect(mean, low, high, "does not" if high < claim.above + claim.least else "inconclusive")


def interval(values) -> tuple[float, float, float]:
    """Mean and 95 % interval by Student's t over the values, at least two."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"values must be at least two numbers, got shape {list(values.shape)}")
    half = student_t(len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean()), float(values.mean() - half), float(values.mean() + half)


@functools.cache
def student_t(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, by bisection on its distribution function."""
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    low, high = 0.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        grid = np.linspace(0, middle, 2001)
        density = scale * (1 + grid**2 / freedom) ** (-(freedom + 1) / 2)
        below = middle / 2000 * (density.sum() - (density[0] + density[-1]) / 2)  # the trapezoidal rule
        low, high = (middle, high) if below < 0.475 else (low, middle)
    return low


def gain(better: str, worse: str) -> Callable[[dict], float]:
    """The measure of most claims: mean over held-out prompts of the paired difference of two arms."""
    return lambda arms: float((arms[better].reward - arms[worse].reward).mean())
