"""Which pairs a model learns the right thing from: truncated influence, and its proxies that need no gradient.

Zhang et al., "Towards Understanding Valuable Preference Data for Large Language Model Alignment", arXiv 2510.13212.
The influence of a pair d is IF(d) = <grad loss(theta; d), gbar>, gbar the mean gradient over validation pairs: what one
SGD step on d takes off the validation loss, per unit of learning rate. Pairs of medium influence are kept: very large
values mark noisy pairs, small and negative ones useless or harmful pairs.

No gradient per pair is formed. IF(d) is the derivative of loss(theta; d) along gbar, so two passes that only score give
it for all pairs: (loss(theta + e gbar; d) - loss(theta - e gbar; d)) / 2e.

Scores belong to a model. They carry its id, and everything that selects by them asks which model is to be trained.
"""

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastpref import losses
from fastpref._logps import causal_lm
from fastpref._progress import reporting
from fastpref.curate.margins import implicit_margins

STEPS = (1e-3, 3e-4, 1e-4, 3e-5, 1e-5)  # tried in turn; a step that is too long bends, one too short drowns in rounding
_GOOD, _BAD = 0.01, 0.05  # relative error of the influence of the validation pairs on themselves


@dataclass(frozen=True)
class PairLogps:
    """Log-probs of pairs under one model, in nats."""

    chosen: np.ndarray  # float64 [pairs]
    rejected: np.ndarray  # float64 [pairs]
    model_id: str
    template: str | None = None  # what tells how text became tokens: chat template and truncation


@dataclass(frozen=True)
class PairScores:
    """A value of every pair for training one model."""

    values: np.ndarray  # float64 [pairs]
    signal: str  # "influence", "loss_diff" or "irm"
    model_id: str
    beta: float
    template: str | None = None
    # Of influence: the step that was taken, and the mean influence of the validation pairs on themselves that it gives,
    # over its exact value, the squared norm of their mean gradient.
    step: float = math.nan
    check: float = math.nan


class Kept(NamedTuple):
    """Pairs inside a percentile interval of every score."""

    keep: np.ndarray  # bool [pairs]
    lo: float  # percentiles
    hi: float
    bounds: list[tuple[float, float]]  # per score, the values at lo and hi
    model_id: str

    @property
    def rate(self) -> float:
        return float(self.keep.mean()) if self.keep.size else math.nan


# ---- scores ----


def pair_influence(
    model: nn.Module,
    train: Iterable,
    validation: Iterable,
    *,
    logps_fn: Callable | None = None,
    reference: nn.Module | None = None,
    train_given: Mapping[str, Any] | None = None,
    validation_given: Mapping[str, Any] | None = None,
    loss="sigmoid",
    beta: float = 0.1,
    loss_options: Mapping[str, Any] | None = None,
    parameters: Sequence[str] | None = None,
    step: float | None = None,
    model_id: str | None = None,
    template: str | None = None,
    progress=None,
) -> PairScores:
    """The influence of every training pair on the mean loss of the validation pairs.

    model: any module. Its parameters are moved by step * |theta| along the validation gradient and back, and are
        afterwards what they were, bit for bit, after an error too; it is scored in evaluation mode.
    train, validation: batches, in the order of the pairs; each is read once, and those of validation are kept.
    logps_fn: (model, batch) -> (chosen, rejected), log-probs [b] with a gradient, or a `losses.Pairs` with them. None:
        the model is a causal LM of transformers and a batch holds input_ids, attention_mask and completion_mask
        [2b, T], the first half chosen, as TRL's collator and `pair_batches` make them.
    reference: a second model, scored on the same batches, for losses that need one.
    train_given, validation_given: what else the loss needs, fields of `losses.Pairs` by name, [pairs] each: rating_gap,
        chosen_length, ..., or in place of a reference ref_chosen_logps and ref_rejected_logps (of a policy without its
        PEFT adapter, say, from `pair_logps` under `policy.disable_adapter()`).
    loss, beta, loss_options: of `losses.pair_loss`; a loss of single pairs.
    parameters: names of those that count; None: all that require a gradient (with PEFT, the adapter's). They must be
        float32 or float64: a thousandth is lost in bfloat16.
    step: the length of the move over that of the parameters: e = step * |theta| / |gbar|. None: the first of 1e-3,
        3e-4, ... 1e-5 with which the influence of the validation pairs on themselves, known exactly, comes out within
        1 %, or else the best of them; each one tried costs two passes over the validation pairs.
    model_id: a name to know the model by; None: a hash of its parameters.
    template: how text became tokens, to keep scores apart that differ in it.
    progress: a function of (pairs done, of how many or None), or True for a bar on a terminal.

    Warns when that influence (`PairScores.check`) is more than 5 % wrong: the step is then too long for this model, or
    too short for its precision; and counts pairs without a finite loss, whose influence is NaN.
    Raises ValueError for a loss that couples pairs, parameters of low precision, batches that do not fit what is given
    or are padded on the left, and a validation gradient that is not finite.
    """
    if step is not None and not (isinstance(step, int | float) and 0 < step < math.inf):
        raise ValueError(f"step must be a positive number or None, got {step!r}")
    objective = _Objective(logps_fn, reference, loss, beta, loss_options)
    moved = _selected(model, parameters)
    given = _Given("train_given", train_given, reference)
    if reference is not None and {id(p) for p in moved} & {id(p) for p in reference.parameters()}:
        raise ValueError("reference must not share the parameters that are moved: pass its log-probs as train_given")
    name = model_id or causal_lm.model_id(model)
    validation = list(validation)
    with contextlib.ExitStack() as stack:
        for part in (model, reference):
            if part is not None:
                stack.enter_context(causal_lm.evaluating(part))
        gradient = _mean_gradient(objective, model, moved, validation, validation_given)
        norm = _norm(gradient)
        if not math.isfinite(norm):
            raise ValueError("validation must give a finite gradient, got one with NaN or infinities")
        if norm == 0:
            warnings.warn("the validation loss has no gradient: every influence is 0", UserWarning, stacklevel=2)
        move = stack.enter_context(_movable(moved, [part / (norm or 1.0) for part in gradient]))
        report = stack.enter_context(reporting(progress, None, "influence"))
        length = _norm(moved) or 1.0
        slopes = functools.partial(_slopes, objective, model, move=move)
        tried = []  # (step, mean influence of the validation pairs on themselves over its exact value)
        for candidate in STEPS if step is None else (step,):
            own = _Given("validation_given", validation_given, reference)
            own = slopes(validation, own, distance=candidate * length, report=lambda done: None)
            tried.append((candidate, float(own.mean()) / norm if norm else 1.0))
            if abs(tried[-1][1] - 1) <= _GOOD:
                break
        step, check = min(tried, key=lambda pair: (math.isnan(pair[1]), abs(pair[1] - 1)))
        values = norm * slopes(train, given, distance=step * length, report=report)
    if not abs(check - 1) <= _BAD:
        told = ", ".join(f"{ratio:.3g} at step={candidate:g}" for candidate, ratio in tried)
        warnings.warn(
            f"the mean influence of the validation pairs on themselves, over its exact value, is {told}: no such step "
            "is both short for this model and long for its precision",
            UserWarning,
            stacklevel=2,
        )
    if broken := int((~np.isfinite(values)).sum()):
        warnings.warn(f"{broken} of {len(values)} training pairs have no finite loss", UserWarning, stacklevel=2)
    return PairScores(values, "influence", name, float(beta), template, step, check)


def pair_logps(
    model, batches: Iterable, *, logps_fn: Callable | None = None, model_id=None, template=None, progress=None
) -> PairLogps:
    """Log-probs of pairs under a model, without gradients; arguments as in pair_influence."""
    objective = _Objective(logps_fn, None, "sigmoid", 1.0, None)
    chosen, rejected, done = [np.zeros(0)], [np.zeros(0)], 0
    with causal_lm.evaluating(model), torch.no_grad(), reporting(progress, None, "scoring") as report:
        for batch in batches:
            pairs = objective.pairs(model, batch)
            chosen.append(pairs.chosen_logps.cpu().numpy())
            rejected.append(pairs.rejected_logps.cpu().numpy())
            report(done := done + len(chosen[-1]))
    return PairLogps(np.concatenate(chosen), np.concatenate(rejected), model_id or causal_lm.model_id(model), template)


def loss_diff(
    policy: PairLogps,
    validated: PairLogps,
    reference: PairLogps | None = None,
    *,
    loss="sigmoid",
    beta: float = 0.1,
    loss_options: Mapping[str, Any] | None = None,
    given: Mapping[str, Any] | None = None,
) -> PairScores:
    """loss(theta; d) - loss(theta_val; d), theta_val being theta trained for one epoch on validation pairs.

    policy, validated, reference: log-probs of the same pairs under the three, from `pair_logps`. given: further fields
    of `losses.Pairs`, [pairs] each. The scores belong to the policy.
    """
    objective = _Objective(None, None, loss, beta, loss_options)
    given = _Given("given", given, reference)
    fields = given.next(len(policy.chosen))
    given.finish()
    _check_alike("validated", validated, policy)
    if reference is not None:
        _check_alike("reference", reference, policy)
        fields |= {"ref_chosen_logps": reference.chosen, "ref_rejected_logps": reference.rejected}
    before, after = (
        objective.losses(losses.Pairs(_vector(logps.chosen), _vector(logps.rejected)), fields)
        for logps in (policy, validated)
    )
    return PairScores((before - after).numpy(), "loss_diff", policy.model_id, float(beta), policy.template)


def irm(policy: PairLogps, reference: PairLogps, *, beta: float = 0.1) -> PairScores:
    """The implicit reward margin, beta * ((log pi - log pi_ref)(chosen) - (log pi - log pi_ref)(rejected))."""
    _check_alike("reference", reference, policy)
    margin = implicit_margins(policy.chosen, policy.rejected, reference.chosen, reference.rejected)
    return PairScores(beta * margin, "irm", policy.model_id, float(beta), policy.template)


def pair_batches(prompts, chosen, rejected, *, max_tokens: int = 16384) -> list[dict[str, Tensor]]:
    """Batches of pairs in their order, padded on the right, from token ids: one sequence of integers per prompt, chosen
    and rejected response (which ends with its EOS).

    max_tokens: of a batch, padding included; one pair at least.
    Returns input_ids, attention_mask and completion_mask, int64 [2b, T], the first half chosen.
    """
    if not len(prompts) == len(chosen) == len(rejected):
        raise ValueError(
            "prompts, chosen and rejected must be of the same pairs, "
            f"got {len(prompts)}, {len(chosen)} and {len(rejected)}"
        )
    lengths = [len(p) + max(len(c), len(r)) for p, c, r in zip(prompts, chosen, rejected, strict=True)]
    batches, begin = [], 0
    while begin < len(lengths):
        end, width = begin + 1, lengths[begin]
        while end < len(lengths) and 2 * (end + 1 - begin) * max(width, lengths[end]) <= max_tokens:
            width, end = max(width, lengths[end]), end + 1
        rows = [(prompts[i], side[i]) for side in (chosen, rejected) for i in range(begin, end)]
        ids, attention, completion = np.zeros((3, len(rows), width), dtype=np.int64)
        for row, (prompt, response) in enumerate(rows):
            last = len(prompt) + len(response)
            ids[row, : len(prompt)], ids[row, len(prompt) : last] = prompt, response
            attention[row, :last], completion[row, len(prompt) : last] = 1, 1
        names = ("input_ids", "attention_mask", "completion_mask")
        batches.append(dict(zip(names, map(torch.from_numpy, (ids, attention, completion)), strict=True)))
        begin = end
    return batches


# ---- selection ----


def truncated(scores: PairScores, model, *, lo: float = 20.0, hi: float = 80.0) -> Kept:
    """Keeps the pairs of medium score, between the percentiles lo (inclusive) and hi (exclusive; 100: no upper limit).

    model: the one to be trained on them, or its id: scores of another are refused with a ValueError.
    A NaN score is never kept, and does not count in the percentiles.
    """
    return intersection([scores], model, lo=lo, hi=hi)


def intersection(scores: Sequence[PairScores], model, *, lo: float = 20.0, hi: float = 80.0) -> Kept:
    """Keeps the pairs whose every score is medium, as `truncated` does for one: LossDiff and IRM together.

    Raises ValueError for scores of different models, templates or beta, or of another model than the one to be trained.
    """
    if not 0 <= lo < hi <= 100:
        raise ValueError(f"lo and hi must be percentiles with 0 <= lo < hi <= 100, got {lo!r} and {hi!r}")
    name = _check_scores(scores, model)
    return _kept(scores, name, lo, hi)


def keep_rate(scores: PairScores | Sequence[PairScores], rate: float, model) -> Kept:
    """The narrowest interval of percentiles with lo = 100 - hi that keeps the share `rate` of the pairs, or more.

    For several scores that of their intersection. Raises ValueError where fewer pairs than that have a score.
    """
    scores = [scores] if isinstance(scores, PairScores) else list(scores)
    name = _check_scores(scores, model)
    widest = _kept(scores, name, 0.0, 100.0)
    if not 0 < rate <= widest.rate:
        raise ValueError(f"rate must lie in (0, {widest.rate:.4g}], the share of pairs with a score, got {rate!r}")
    narrow, wide = 0.0, 50.0  # half-widths that keep too few, and enough
    while wide - narrow > 1e-9:
        middle = (narrow + wide) / 2
        if _kept(scores, name, 50 - middle, 50 + middle).rate >= rate:
            wide = middle
        else:
            narrow = middle
    return _kept(scores, name, 50 - wide, 50 + wide)


def _kept(scores, name, lo, hi) -> Kept:
    keep, bounds = np.ones(len(scores[0].values), dtype=bool), []
    for score in scores:
        values = score.values
        low, high = np.nan, np.nan
        if (finite := values[np.isfinite(values)]).size:
            low, high = (_percentile(finite, at) for at in (lo, hi))
        bounds.append((float(low), math.inf if hi == 100 else float(high)))
        keep &= np.isfinite(values) & (values >= low) & (values < bounds[-1][1])
    return Kept(keep, lo, hi, bounds, name)


def _percentile(values, at: float) -> float:
    """Linear between the two nearest. np.percentile rounds at / 100, and so may miss a value by an ulp where the
    percentile is one: the pairs with that value would be on the wrong side of a bound."""
    place = at * (len(values) - 1) / 100
    below = int(place)
    nearest = [below, min(below + 1, len(values) - 1)]
    lower, upper = np.partition(values, nearest)[nearest]
    return lower + (place - below) * (upper - lower)


def _check_scores(scores, model) -> str:
    """The id of the model, which all scores must belong to."""
    if not scores or not all(isinstance(score, PairScores) for score in scores):
        raise TypeError(f"scores must be PairScores, got {scores!r:.80}")
    first = scores[0]
    for score in scores[1:]:
        for field in ("model_id", "beta", "template"):
            if getattr(score, field) != getattr(first, field):
                raise ValueError(
                    f"scores must share one {field}, got {getattr(first, field)!r} ({first.signal}) and "
                    f"{getattr(score, field)!r} ({score.signal})"
                )
        if score.values.shape != first.values.shape:
            raise ValueError(
                f"scores must be of the same pairs, got {len(first.values)} ({first.signal}) and "
                f"{len(score.values)} ({score.signal})"
            )
    name = model if isinstance(model, str) else causal_lm.model_id(model)
    if name != first.model_id:
        raise ValueError(f"scores belong to the model {first.model_id}, and cannot select pairs for {name}")
    return name


def _check_alike(argument, logps: PairLogps, policy: PairLogps) -> None:
    if logps.template != policy.template:
        raise ValueError(f"{argument} must have policy's template {policy.template!r}, got {logps.template!r}")
    if logps.chosen.shape != policy.chosen.shape:
        raise ValueError(f"{argument} must hold policy's {len(policy.chosen)} pairs, got {len(logps.chosen)}")


# ---- losses of batches ----


class _Objective:
    """From a model and a batch to one loss per pair, in float64."""

    def __init__(self, logps_fn, reference, loss, beta, options):
        if not losses.traits(loss, options).separable:
            raise ValueError(f"loss must be one of single pairs, got {loss!r}, which couples the pairs of a batch")
        self.logps_fn, self.reference = logps_fn, reference
        self.loss, self.beta, self.options = loss, beta, options
        self.of_model = {}

    def pairs(self, model, batch) -> losses.Pairs:
        if self.logps_fn is not None:
            found = self.logps_fn(model, batch)
        else:
            if id(model) not in self.of_model:
                self.of_model[id(model)] = causal_lm.completion_logps(model)
            found = _halves(self.of_model[id(model)], batch)
        pairs = found if isinstance(found, losses.Pairs) else losses.Pairs(*found)
        return losses.Pairs(*(None if field is None else field.double() for field in pairs))

    def constants(self, batch, given: "_Given", count: int) -> dict[str, Tensor]:
        """What the loss reads besides the model's log-probs."""
        fields = given.next(count)
        if self.reference is not None:
            with torch.no_grad():
                against = self.pairs(self.reference, batch)
            fields |= {"ref_chosen_logps": against.chosen_logps, "ref_rejected_logps": against.rejected_logps}
        return fields

    def losses(self, pairs: losses.Pairs, fields: Mapping[str, Any]) -> Tensor:
        device = pairs.chosen_logps.device
        fields = {name: _vector(values).to(device) for name, values in fields.items()}
        return losses.pair_loss(pairs._replace(**fields), self.loss, beta=self.beta, options=self.options)


def _halves(score, batch) -> losses.Pairs:
    attention, completion = batch["attention_mask"], batch["completion_mask"]
    if len(completion) % 2:
        raise ValueError(f"a batch must hold as many rejected as chosen sequences, got {len(completion)} in all")
    if (attention[:, 1:] > attention[:, :-1]).any():
        raise ValueError("attention_mask of a batch must be padded on the right, got a 1 behind a 0")
    logps = score(batch["input_ids"], attention, completion)
    lengths = completion[:, 1:].sum(1).to(logps.device)
    return losses.Pairs(*logps.chunk(2), chosen_length=lengths.chunk(2)[0], rejected_length=lengths.chunk(2)[1])


class _Given:
    """Fields of `losses.Pairs` for all pairs, handed out batch by batch; a reference brings its own."""

    def __init__(self, argument: str, fields: Mapping[str, Any] | None, reference):
        self.argument, self.at = argument, 0
        self.fields = {name: _vector(values) for name, values in (fields or {}).items()}
        unknown = set(self.fields) - (set(losses.Pairs._fields) - {"chosen_logps", "rejected_logps"})
        brought = {"ref_chosen_logps", "ref_rejected_logps"} if reference is not None else set()
        if twice := brought & set(self.fields):
            raise ValueError(f"{argument} must not hold what the reference gives, got {sorted(twice)}")
        if unknown:
            raise ValueError(
                f"{argument} must hold fields of losses.Pairs besides the log-probs, got {sorted(unknown)}"
            )

    def next(self, count: int) -> dict[str, Tensor]:
        begin, self.at = self.at, self.at + count
        self._check(lambda size: size >= self.at)
        return {name: values[begin : self.at] for name, values in self.fields.items()}

    def finish(self) -> None:
        self._check(lambda size: size == self.at)

    def _check(self, fits) -> None:
        for name, values in self.fields.items():
            if not fits(len(values)):
                raise ValueError(
                    f"{self.argument}[{name!r}] must have one entry per pair, got {len(values)} for {self.at} pairs"
                )


def _vector(values) -> Tensor:
    if isinstance(values, Tensor):
        return values.detach().double()
    return torch.from_numpy(np.array(values, dtype=np.float64))


# ---- the derivative along the validation gradient ----


def _selected(model, names) -> list[Tensor]:
    found = dict(model.named_parameters())
    if names is None:
        names = [name for name, parameter in found.items() if parameter.requires_grad]
    if unknown := [name for name in names if name not in found]:
        raise ValueError(f"parameters must be names of the model's parameters, got {unknown[:3]}")
    if not names:
        raise ValueError("parameters must not be empty: no parameter of the model requires a gradient")
    low = [name for name in names if found[name].dtype not in (torch.float32, torch.float64)]
    if low:
        raise ValueError(
            f"parameters must be float32 or float64, for the step is a small part of them; got {len(low)} others, "
            f"{low[0]} is {found[low[0]].dtype}: use model.float(), or adapters in float32"
        )
    return [found[name] for name in names]


@torch.enable_grad()
def _mean_gradient(objective, model, parameters, validation, given) -> list[Tensor]:
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    given, count = _Given("validation_given", given, objective.reference), 0
    total = [torch.zeros_like(parameter) for parameter in parameters]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        for batch in validation:
            pairs = objective.pairs(model, batch)
            found = objective.losses(pairs, objective.constants(batch, given, len(pairs.chosen_logps)))
            for part, gradient in zip(
                total, torch.autograd.grad(found.sum(), parameters, allow_unused=True), strict=True
            ):
                if gradient is not None:
                    part += gradient
            count += len(found)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
    given.finish()
    if not count:
        raise ValueError("validation must hold at least one pair, got none")
    return [part / count for part in total]


def _norm(tensors) -> float:
    return math.sqrt(sum(torch.linalg.vector_norm(t.detach(), dtype=torch.float64).item() ** 2 for t in tensors))


@contextlib.contextmanager
def _movable(parameters: list[Tensor], direction: list[Tensor]) -> Iterator[Callable[[float], None]]:
    """Gives `move(s)`: the parameters become what they were + s * direction. At the end they are what they were."""
    origin = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def move(distance: float) -> None:
        for parameter, start, along in zip(parameters, origin, direction, strict=True):
            parameter.copy_(start).add_(along, alpha=distance)

    try:
        yield move
    finally:
        with torch.no_grad():
            for parameter, start in zip(parameters, origin, strict=True):
                parameter.copy_(start)


@torch.no_grad()
def _slopes(objective, model, batches, given: _Given, move, distance: float, report) -> np.ndarray:
    """[pairs] float64: (loss at +distance - loss at -distance) / (2 distance)."""
    found, done = [np.zeros(0)], 0
    for batch in batches:
        move(distance)
        up = objective.pairs(model, batch)
        move(-distance)
        down = objective.pairs(model, batch)
        fields = objective.constants(batch, given, len(up.chosen_logps))
        change = objective.losses(up, fields) - objective.losses(down, fields)
        found.append((change / (2 * distance)).cpu().numpy())
        report(done := done + len(found[-1]))
    given.finish()
    return np.concatenate(found)
