"""Preference losses as plain torch functions on vectors: one number per pair in, one loss per pair out.

A pair's gradient coefficient exists only after both sequences are summed, and then it is one number per sequence. So a
loss needs no kernel: it is a pure function of the few [B] vectors of `Pairs`, unreduced, and a new loss touches this
file alone. `LOSSES` maps each name to its function; the entry *is* the function (`LOSSES["rdpo"] is rdpo`).

Notation: lr = log π − log π_ref summed over a completion (w chosen, l rejected), Δ = lr_w − lr_l, L = β·Δ, r = β·lr,
len = scored tokens, a = log π / len, g = rating gap r(chosen) − r(rejected), ls = log-sigmoid.

Three methods are called "R-DPO" elsewhere. Here `rdpo` uses ratings (Viano et al.), `length_dpo` penalises length
(Park et al.) and `robust` corrects for label noise (Chowdhury et al.). TDPO needs a full-vocabulary KL per token and is
deliberately absent.

Every loss takes `beta` and `reference_free` (reference terms are zero). Those of TRL's f-divergence family also take
`f_divergence` ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence") and `f_alpha`, which replace lr by a
score s(lr) (f-DPO, arXiv 2309.16240). Options are host numbers: no loss reads a device value. A NaN rating means "not
rated" and is selected out before any arithmetic, because 0·NaN would poison the gradient of the whole batch.
"""

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpref._rating_scale import RatingScale, of_gaps


class Pairs(NamedTuple):
    """What a loss may read about B pairs: vectors [B], fp32 or fp64; a loss names those it needs in `.needs`."""

    chosen_logps: Tensor  # Σ_t log π(token) over the scored completion tokens
    rejected_logps: Tensor
    ref_chosen_logps: Tensor | None = None  # the same under the reference model
    ref_rejected_logps: Tensor | None = None
    chosen_length: Tensor | None = None  # scored tokens
    rejected_length: Tensor | None = None
    rating_gap: Tensor | None = None  # r(chosen) − r(rejected); NaN = not rated
    chosen_logratios: Tensor | None = None  # Σ_t (policy − reference), summed per token; None = logps − ref_logps
    rejected_logratios: Tensor | None = None
    chosen_tail_logratios: Tensor | None = None  # that sum over the tokens beyond min(len_w, len_l); 0 where none
    rejected_tail_logratios: Tensor | None = None
    chosen_wpo_log_weight: Tensor | None = None  # mean_t[log π(token_t) − log Σ_v p_v²]
    rejected_wpo_log_weight: Tensor | None = None
    chosen_score: Tensor | None = None  # absolute score or win probability of each completion
    rejected_score: Tensor | None = None


class Logistic(NamedTuple):
    """Host scalars of the one family the native epilogue fuses, per pair:

    `a·softplus(−z) + b·softplus(z) + ½·c·(L − m)²`  with  `L = βΔ`, `z = L − offset·g`, `m = m0 + m1·g`.

    A NaN g is selected to 0; `drop_square_when_unrated` also drops the square of that pair.
    """

    a: float = 1.0
    b: float = 0.0
    c: float = 0.0
    m0: float = 0.0
    m1: float = 0.0
    offset: float = 0.0
    drop_square_when_unrated: bool = False


class LossTraits(NamedTuple):
    """What the caller of a loss must know before computing its inputs."""

    needs: frozenset[str] = frozenset()  # words of _NEEDS
    separable: bool = True  # the loss of pair i depends on pair i alone, so any group of whole pairs can be evaluated
    delta_only: bool = False  # tokens common to the start of both completions change nothing: they may be skipped


# word of LossTraits.needs -> fields of Pairs, what they hold, how to pass them
_NEEDS = {
    "reference": (("ref_chosen_logps", "ref_rejected_logps"), "summed reference log-probs", "ref_logps=..."),
    "length": (("chosen_length", "rejected_length"), "scored tokens per completion", None),
    "rating_gap": (("rating_gap",), "one float per pair", "rating_gap=..."),
    "tail": (("chosen_tail_logratios", "rejected_tail_logratios"), "log-ratios beyond the shorter completion", None),
    "wpo": (("chosen_wpo_log_weight", "rejected_wpo_log_weight"), "mean of logp − log Σp² per completion", None),
    "score": (("chosen_score", "rejected_score"), "one absolute score per completion", None),
}

LOSSES: dict[str, Callable[..., Tensor]] = {}


def get_loss(loss: str | Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function of that name; a callable is returned as it is."""
    if callable(loss):
        return loss
    if not isinstance(loss, str) or loss not in LOSSES:
        nearest = ", ".join(map(repr, difflib.get_close_matches(str(loss), LOSSES, n=3, cutoff=0.4))) or "none"
        raise ValueError(
            f"loss must be a name in fastpref.losses.LOSSES or a callable, got {loss!r}; nearest names: {nearest} "
            "(plain DPO is 'sigmoid'; sorted(fastpref.losses.LOSSES) shows all)"
        )
    return LOSSES[loss]


def traits(loss, options=None) -> LossTraits:
    """LossTraits of a name, a callable or a list of them, under its options (for a list: a list of options, or None).

    A user's callable has the traits it declares as attributes (see `pair_separable`) and no others.
    """
    if isinstance(loss, (list, tuple)):
        parts = [traits(*part) for part in zip(loss, _per_loss("loss_options", options, loss, None), strict=True)]
        return LossTraits(
            frozenset().union(*(part.needs for part in parts)),
            all(part.separable for part in parts),
            all(part.delta_only for part in parts),
        )
    function = get_loss(loss)
    if hasattr(function, "traits"):
        return function.traits(**(options or {}))
    separable, delta_only = getattr(function, "separable", False), getattr(function, "delta_only", False)
    return LossTraits(frozenset(getattr(function, "needs", ())), separable, delta_only)


def pair_separable(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Mark a user's loss: its value for pair i depends on pair i alone, so groups of pairs may be evaluated apart."""
    function.separable = True
    return function


def pair_loss(pairs: Pairs, loss: str | Callable[..., Tensor], *, beta: float = 0.1, options=None) -> Tensor:
    """One loss by name or callable -> [B]. A user's callable gets the pairs and its options, and binds β itself."""
    function = get_loss(loss)
    options = dict(options or {})
    name = getattr(function, "name", None)
    if LOSSES.get(name) is function:
        return function(pairs, **{"beta": beta, **options})
    name = getattr(function, "__name__", repr(function))
    losses = function(_resolve(pairs, name, traits(function).needs), **options)
    expected = list(pairs.chosen_logps.shape)
    if not isinstance(losses, Tensor) or list(losses.shape) != expected:
        got = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(f"{name} must return one loss per pair, a tensor of shape {expected}, got {got}")
    return losses


def mixture(pairs: Pairs, losses: Sequence, weights=None, options=None, beta: float = 0.1) -> Tensor:
    """Σ_k weight_k·loss_k -> [B]; MPO (arXiv 2411.10442) is `["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0]`.

    weights: one number per loss, default 1 each. options: one mapping (or None) per loss; it may override `beta`.
    """
    if isinstance(losses, str) or not losses:
        raise ValueError(f"losses must be a non-empty list of names or callables, got {losses!r}")
    weights = _per_loss("loss_weights", weights, losses, 1.0)
    options = _per_loss("loss_options", options, losses, None)
    terms = [
        weight * pair_loss(pairs, loss, beta=beta, options=own)
        for loss, weight, own in zip(losses, weights, options, strict=True)
    ]
    return sum(terms[1:], terms[0])


REDUCTIONS = ("mean", "sum", "none")


def check_reduction(reduction) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")


def _per_loss(argument, values, losses, default):
    values = [default] * len(losses) if values is None else values
    _require(
        not isinstance(values, (str, Mapping)) and len(values) == len(losses),
        argument,
        f"a list with one entry per loss ({len(losses)})",
        values,
    )
    return values


def _require(condition: bool, argument: str, expected: str, got) -> None:
    if not condition:
        raise ValueError(f"{argument} must be {expected}, got {got!r}")


def _require_positive(argument: str, value: float) -> None:
    # A tensor is refused rather than compared: the comparison would wait for the device.
    _require(not isinstance(value, Tensor) and 0 < value < math.inf, argument, "a positive number", value)


def _check_options(name: str, options, known) -> None:
    for option in options:
        if option not in known:
            near = "".join(f"; nearest is {match!r}" for match in difflib.get_close_matches(option, known, n=1))
            raise TypeError(f"{name}() got an unexpected keyword argument {option!r}{near}; it has {', '.join(known)}")


def _require_smoothing(label_smoothing: float) -> None:
    _require(0 <= label_smoothing < 0.5, "label_smoothing", "in [0, 0.5)", label_smoothing)


def _require_shape(field: str, value, shape: torch.Size) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{field} must be a tensor of shape {list(shape)}, got {type(value).__name__}")
    if value.shape != shape:
        raise ValueError(f"{field} must have shape {list(shape)} to match chosen_logps, got {list(value.shape)}")


def _resolve(pairs: Pairs, loss: str, needs: frozenset[str], reference_free: bool = False) -> Pairs:
    """The one door to a loss: every vector checked, both log-ratios filled in. Idempotent."""
    logps = pairs.chosen_logps
    if not isinstance(logps, Tensor) or logps.dim() != 1:
        got = list(logps.shape) if isinstance(logps, Tensor) else type(logps).__name__
        raise ValueError(f"chosen_logps must be a tensor of shape [B], got {got}")
    for field, value in zip(Pairs._fields, pairs, strict=True):
        if value is not None or field == "rejected_logps":
            _require_shape(field, value, logps.shape)

    chosen, rejected = pairs.chosen_logratios, pairs.rejected_logratios
    if reference_free:
        chosen, rejected = pairs.chosen_logps, pairs.rejected_logps
    if chosen is None and pairs.ref_chosen_logps is not None:
        chosen = pairs.chosen_logps - pairs.ref_chosen_logps
    if rejected is None and pairs.ref_rejected_logps is not None:
        rejected = pairs.rejected_logps - pairs.ref_rejected_logps

    for need, (fields, what, argument) in _NEEDS.items():
        if need not in needs:
            continue
        found = (chosen, rejected) if need == "reference" else [getattr(pairs, field) for field in fields]
        for field, value in zip(fields, found, strict=True):
            if value is None:
                remedy = f"preference_loss(..., {argument})" if argument else f"losses.Pairs(..., {field}=...)"
                raise ValueError(f"{loss} needs {field} ({what}); got None. Pass {remedy}")
    return _with_logratios(pairs, chosen, rejected)


def _with_logratios(pairs: Pairs, chosen, rejected) -> Pairs:
    # NamedTuple._replace breaks the graph under torch 2.6
    fields = dict(zip(Pairs._fields, pairs, strict=True))
    return Pairs(**{**fields, "chosen_logratios": chosen, "rejected_logratios": rejected})


# e^40 squared still fits fp32, so that the squared losses stay finite too; TRL's cap, e^80, squared does not.
_MAX_EXPONENT = 40.0


def _capped_exp(x: Tensor) -> Tensor:
    return x.clamp(max=_MAX_EXPONENT).exp()


def _divergence_score(logratio: Tensor, f_divergence: str, f_alpha: float) -> Tensor:
    """s(u): what a log-ratio becomes under an f-divergence; s'(u) = 1, e^−u, σ(−u), e^((α−1)u) in the order below."""
    if f_divergence == "reverse_kl":
        return logratio
    if f_divergence == "forward_kl":
        return -_capped_exp(-logratio)
    if f_divergence == "js_divergence":
        return F.logsigmoid(logratio)
    if f_divergence == "alpha_divergence":
        power = f_alpha - 1.0
        return logratio if abs(power) < 1e-6 else _capped_exp(power * logratio) / power
    raise ValueError(
        f"f_divergence must be 'reverse_kl', 'forward_kl', 'js_divergence' or 'alpha_divergence', got {f_divergence!r}"
    )


def _loss(*needs, separable=True, delta_only=False, f_divergences=False, coefficients=None, varies=None):
    """Enter `name(pairs, *, beta, <options>)` into LOSSES, with its facts as attributes.

    The formula sees checked pairs with both log-ratios filled in (reference-free and f-divergence forms included), so
    it is nothing but the formula. needs, separable and delta_only hold for the default options; `varies` maps the
    options to traits where an option changes them. `coefficients` maps them to the Logistic record, or to None where
    they leave that family: only then is the formula called.
    """
    fixed = LossTraits(frozenset(needs), separable, delta_only)

    def register(formula):
        name = formula.__name__
        own = [p for p in inspect.signature(formula).parameters.values() if p.kind is p.KEYWORD_ONLY]
        defaults = {p.name: p.default for p in own}

        @functools.wraps(formula)
        def loss(pairs, *, beta=0.1, reference_free=False, f_divergence="reverse_kl", f_alpha=0.5, **options):
            _require_positive("beta", beta)
            _check_options(name, options, defaults)
            if f_divergence != "reverse_kl" and not f_divergences:
                raise ValueError(f"f_divergence must be 'reverse_kl' for {name}, got {f_divergence!r}")
            pairs = _resolve(pairs, name, loss_traits(reference_free=reference_free, **options).needs, reference_free)
            if f_divergence != "reverse_kl":
                pairs = _with_logratios(
                    pairs,
                    _divergence_score(pairs.chosen_logratios, f_divergence, f_alpha),
                    _divergence_score(pairs.rejected_logratios, f_divergence, f_alpha),
                )
            record = None if coefficients is None else coefficients(**{**defaults, **options, "beta": beta})
            if record is not None:
                return logistic_pair_loss(pairs, beta, record)
            return formula(pairs, beta=beta, **options)

        def loss_traits(
            *, beta=0.1, reference_free=False, f_divergence="reverse_kl", f_alpha=0.5, **options
        ) -> LossTraits:
            """LossTraits under these options."""
            _check_options(name, options, defaults)
            found = varies({**defaults, **options}) if varies else fixed
            # A vector passed as an option is not sliced along with the pairs, so groups cannot be evaluated apart.
            vectors = any(isinstance(value, Tensor) and value.dim() > 0 for value in options.values())
            return LossTraits(
                found.needs - {"reference"} if reference_free else found.needs,
                found.separable and not vectors,
                found.delta_only and f_divergence == "reverse_kl",
            )

        def logistic(*, beta=0.1, reference_free=False, f_divergence="reverse_kl", f_alpha=0.5, **options):
            """The Logistic record under these options; None outside the family."""
            _require_positive("beta", beta)
            _check_options(name, options, defaults)
            return coefficients(**{**defaults, **options, "beta": beta}) if f_divergence == "reverse_kl" else None

        keyword = functools.partial(inspect.Parameter, kind=inspect.Parameter.KEYWORD_ONLY)
        shared = [keyword("reference_free", default=False)]
        if f_divergences:
            shared += [keyword("f_divergence", default="reverse_kl"), keyword("f_alpha", default=0.5)]
        pairs = inspect.Parameter("pairs", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=Pairs)
        loss.__signature__ = inspect.Signature([pairs, *own, *shared], return_annotation=Tensor)
        loss.name = name
        loss.traits = loss_traits
        loss.needs, loss.separable, loss.delta_only = loss_traits()
        loss.logistic = None if coefficients is None else logistic
        LOSSES[name] = loss
        return loss

    return register


def _logistic_loss(*needs, f_divergences=False):
    """Enter a loss that *is* its coefficients: the decorated function maps the options to the Logistic record."""

    def register(coefficients):
        return _loss(*needs, delta_only=True, f_divergences=f_divergences, coefficients=coefficients)(coefficients)

    return register


def logistic_pair_loss(pairs: Pairs, beta: float, coefficients: Logistic, reference_free: bool = False) -> Tensor:
    """The family of `Logistic` in torch -> [B]: the specification of the native epilogue. Zero terms are not formed."""
    a, b, c, m0, m1, offset, drop_square_when_unrated = coefficients
    needs = {"rating_gap"} if m1 or offset or drop_square_when_unrated else set()
    needs = needs if reference_free else needs | {"reference"}
    pairs = _resolve(pairs, "logistic_pair_loss", frozenset(needs), reference_free)
    margin = _margin(pairs, beta)
    gap = _zero_if_nan(pairs.rating_gap, margin) if m1 or offset else None
    terms = []
    if a or b:
        terms.append(_cross_entropy(margin - offset * gap if offset else margin, a, b))
    if c:
        square = 0.5 * c * (margin - (m0 + m1 * gap if m1 else m0)).square()
        terms.append(square.masked_fill(pairs.rating_gap.isnan(), 0.0) if drop_square_when_unrated else square)
    return sum(terms[1:], terms[0]) if terms else torch.zeros_like(margin)


def _margin(pairs: Pairs, beta: float) -> Tensor:
    """L."""
    return beta * (pairs.chosen_logratios - pairs.rejected_logratios)


def _rewards(pairs: Pairs, beta: float) -> tuple[Tensor, Tensor]:
    """r_w, r_l."""
    return beta * pairs.chosen_logratios, beta * pairs.rejected_logratios


def _rating(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """g with NaN selected to 0, and where it was a number."""
    return _zero_if_nan(pairs.rating_gap, pairs.chosen_logps), ~pairs.rating_gap.isnan()


def _zero_if_nan(value: Tensor, like: Tensor) -> Tensor:
    return value.to(like.dtype).nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf)


def _mean(logps: Tensor, length: Tensor) -> Tensor:
    """Sum to token mean; an empty completion has the mean 0."""
    return logps / length.clamp(min=1)


def _means(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """a_w, a_l."""
    return _mean(pairs.chosen_logps, pairs.chosen_length), _mean(pairs.rejected_logps, pairs.rejected_length)


def _mean_delta(pairs: Pairs) -> Tensor:
    """lr_w/len_w − lr_l/len_l."""
    return _mean(pairs.chosen_logratios, pairs.chosen_length) - _mean(pairs.rejected_logratios, pairs.rejected_length)


def _cross_entropy(z: Tensor, a=1.0, b=0.0) -> Tensor:
    """a·softplus(−z) + b·softplus(z). By log-sigmoid: F.softplus turns linear at 20, an error of 2e-9."""
    loss = -a * F.logsigmoid(z)
    return loss - b * F.logsigmoid(-z) if isinstance(b, Tensor) or b else loss


def _smoothed(z: Tensor, label_smoothing: float) -> Tensor:
    """The cDPO form, `−(1−ε)·ls(z) − ε·ls(−z)`."""
    _require_smoothing(label_smoothing)
    return _cross_entropy(z, 1.0 - label_smoothing, label_smoothing)


def _bernoulli_kl(z: Tensor, log_q, log_not_q) -> Tensor:
    """KL(Bernoulli(σ(z)) ‖ Bernoulli(q))."""
    return z.sigmoid() * (F.logsigmoid(z) - log_q) + (-z).sigmoid() * (F.logsigmoid(-z) - log_not_q)


def _squares(pairs: Pairs, chosen_target, rejected_target) -> Tensor:
    """(lr_w − t_w)² + (lr_l − t_l)²."""
    return (pairs.chosen_logratios - chosen_target).square() + (pairs.rejected_logratios - rejected_target).square()


@_logistic_loss("reference", f_divergences=True)
def sigmoid(*, beta: float = 0.1, label_smoothing: float = 0.0) -> Logistic:
    """DPO, `−ls(L)` (arXiv 2305.18290); with label_smoothing ε cDPO, `−(1−ε)·ls(L) − ε·ls(−L)` (Mitchell 2023)."""
    _require_smoothing(label_smoothing)
    return Logistic(a=1.0 - label_smoothing, b=label_smoothing)


@_logistic_loss("reference", f_divergences=True)
def robust(*, beta: float = 0.1, label_smoothing: float = 0.1) -> Logistic:
    """Robust DPO, `[−(1−ε)·ls(L) + ε·ls(−L)]/(1−2ε)` (arXiv 2403.00409): unbiased when labels flip with probability ε.

    ε is label_smoothing, in [0, ½); TRL's default is 0, which is DPO, so 0.1 is ours. Unbounded below for large L.
    """
    _require_smoothing(label_smoothing)
    return Logistic(a=(1 - label_smoothing) / (1 - 2 * label_smoothing), b=-label_smoothing / (1 - 2 * label_smoothing))


@_loss("reference", delta_only=True, f_divergences=True)
def hinge(pairs, *, beta: float = 0.1):
    """SLiC / RSO, `relu(1 − L)` (arXiv 2305.10425, 2309.06657)."""
    return torch.relu(1 - _margin(pairs, beta))


def _ipo_sum(*, beta, length_normalize) -> Logistic | None:
    # (Δ − 1/(2β))² = (L − ½)²/β²
    return None if length_normalize else Logistic(a=0.0, c=2.0 / beta**2, m0=0.5)


@_loss(
    f_divergences=True,
    coefficients=_ipo_sum,
    varies=lambda o: (
        LossTraits(frozenset({"reference", "length"}))
        if o["length_normalize"]
        else LossTraits(frozenset({"reference"}), delta_only=True)
    ),
)
def ipo(pairs, *, beta: float = 0.1, length_normalize: bool = True):
    """IPO, `(lr_w/len_w − lr_l/len_l − 1/(2β))²` (arXiv 2310.12036).

    length_normalize=True is TRL's form, which the authors confirmed to it; False takes the sums, `(Δ − 1/(2β))²`
    (TRL v0.24, OpenRLHF, NeMo), and belongs to the Logistic family.
    """
    return (_mean_delta(pairs) - 1 / (2 * beta)).square()


@_loss("reference", delta_only=True, f_divergences=True)
def exo_pair(pairs, *, beta: float = 0.1, label_smoothing: float = 1e-3):
    """EXO, `KL(Bern(σ(L)) ‖ Bern(1−ε))` (arXiv 2402.00856). ε = label_smoothing in (0, ½), which keeps it finite."""
    _require(0 < label_smoothing < 0.5, "label_smoothing", "in (0, 0.5)", label_smoothing)
    return _bernoulli_kl(_margin(pairs, beta), math.log1p(-label_smoothing), math.log(label_smoothing))


@_loss("reference", f_divergences=True)
def nca_pair(pairs, *, beta: float = 0.1):
    """NCA, `−ls(r_w) − ½·ls(−r_w) − ½·ls(−r_l)` (arXiv 2402.05369)."""
    chosen, rejected = _rewards(pairs, beta)
    return _cross_entropy(chosen, 1.0, 0.5) + 0.5 * _cross_entropy(-rejected)


def _reference_point(argument: str, value: float | Tensor, pairs: Pairs) -> float | Tensor:
    """What rewards are compared with: a number, or a scalar or [B] tensor without its gradient."""
    if isinstance(value, Tensor) and value.dim():
        _require_shape(argument, value, pairs.chosen_logps.shape)
    return value.detach() if isinstance(value, Tensor) else value


@_loss(
    f_divergences=True, varies=lambda o: LossTraits(frozenset({"reference"}), separable=not isinstance(o["delta"], str))
)
def bco_pair(pairs, *, beta: float = 0.1, delta: float | Tensor | str = 0.0):
    """BCO, `−ls(r_w − δ) − ls(−(r_l − δ))` (arXiv 2404.04656).

    delta: the reward shift δ, detached. 0 as in TRL; the paper's is a running mean of all rewards, passed as a float or
    tensor; "batch_mean" takes the mean of this batch's 2B rewards, which couples its pairs.
    """
    chosen, rejected = _rewards(pairs, beta)
    if isinstance(delta, str):
        _require(delta == "batch_mean", "delta", "a number, a tensor or 'batch_mean'", delta)
        delta = torch.cat((chosen, rejected)).mean()
    delta = _reference_point("delta", delta, pairs)
    return _cross_entropy(chosen - delta) + _cross_entropy(delta - rejected)


@_loss("reference", f_divergences=True)
def sppo_hard(pairs, *, beta: float = 0.1):
    """SPPO with hard labels, `(lr_w − 1/(2β))² + (lr_l + 1/(2β))²` (arXiv 2405.00675; its β is about 1e-3)."""
    return _squares(pairs, 1 / (2 * beta), -1 / (2 * beta))


@_loss("reference", "score")
def sppo(pairs, *, beta: float = 0.1):
    """SPPO, `½[(lr_w − (p_w − ½)/β)² + (lr_l − (p_l − ½)/β)²]` (uclaml/SPPO; arXiv 2405.00675).

    p_w, p_l are chosen_score and rejected_score: win probabilities against the policy. A pair with a NaN in either is
    not rated and gives 0.
    """
    rated = ~(pairs.chosen_score.isnan() | pairs.rejected_score.isnan())
    chosen = _zero_if_nan(pairs.chosen_score, pairs.chosen_logps)
    rejected = _zero_if_nan(pairs.rejected_score, pairs.chosen_logps)
    return torch.where(rated, 0.5 * _squares(pairs, (chosen - 0.5) / beta, (rejected - 0.5) / beta), 0.0)


@_loss("reference", separable=False, delta_only=True)
def aot(pairs, *, beta: float = 0.1, label_smoothing: float = 0.0):
    """AOT, paired: the cDPO form on `β(sort(log π_w − log π_l) − sort(log π_ref,w − log π_ref,l))` (arXiv 2406.05882).

    Entry k belongs to the k-th smallest difference, not to pair k: weights per pair have no meaning here.
    """
    policy = pairs.chosen_logps - pairs.rejected_logps
    # What is left of the policy without Δ is the reference, in whichever form it came; the policy's gradient cancels.
    reference = (policy - (pairs.chosen_logratios - pairs.rejected_logratios)).detach()
    return _smoothed(beta * (policy.sort().values - reference.sort().values), label_smoothing)


@_loss("reference", separable=False)
def aot_unpaired(pairs, *, beta: float = 0.1, label_smoothing: float = 0.0):
    """AOT, unpaired: the cDPO form on `β(sort(lr_w) − sort(lr_l))` (arXiv 2406.05882; once TRL's `aot_pair`).

    Entry k belongs to the k-th order statistics, not to pair k: weights per pair have no meaning here.
    """
    ranked = pairs.chosen_logratios.sort().values - pairs.rejected_logratios.sort().values
    return _smoothed(beta * ranked, label_smoothing)


@_loss("reference")
def apo_zero(pairs, *, beta: float = 0.1):
    """APO-zero, `1 − σ(r_w) + σ(r_l)`: chosen up, rejected down (arXiv 2408.06266)."""
    chosen, rejected = _rewards(pairs, beta)
    return (-chosen).sigmoid() + rejected.sigmoid()


@_loss("reference")
def apo_down(pairs, *, beta: float = 0.1):
    """APO-down, `σ(r_w) + 1 − σ(L)`: both down, rejected more (arXiv 2408.06266)."""
    chosen, rejected = _rewards(pairs, beta)
    return chosen.sigmoid() + (rejected - chosen).sigmoid()


@_loss("reference", delta_only=True, f_divergences=True)
def discopop(pairs, *, beta: float = 0.1, tau: float = 0.05):
    """DiscoPOP, `(1 − m)·(−ls(L)) + m·e^−L` with `m = σ(L/τ)` (arXiv 2406.08414). τ in (0, 1]: above, it explodes."""
    _require(0 < tau <= 1, "tau", "in (0, 1]", tau)
    margin = _margin(pairs, beta)
    # m·e^−L in one exponent: as a product it is 0·inf for a very negative L.
    return (-margin / tau).sigmoid() * _cross_entropy(margin) + (F.logsigmoid(margin / tau) - margin).exp()


@_loss("reference", "length")
def sigmoid_norm(pairs, *, beta: float = 0.1):
    """Length-normalised DPO, `−ls(β(lr_w/len_w − lr_l/len_l))` (Tülu 3, arXiv 2411.15124)."""
    return _cross_entropy(beta * _mean_delta(pairs))


@_loss("length")
def simpo(pairs, *, beta: float = 0.1, gamma: float = 0.5, label_smoothing: float = 0.0):
    """SimPO, `−ls(β(a_w − a_l) − γ)`, no reference (arXiv 2405.14734, where β is 2 to 10); cDPO smoothing allowed."""
    chosen, rejected = _means(pairs)
    return _smoothed(beta * (chosen - rejected) - gamma, label_smoothing)


@_loss(varies=lambda o: LossTraits(frozenset({"length"})) if o["alpha"] else LossTraits(delta_only=True))
def cpo(pairs, *, beta: float = 0.1, alpha: float = 1.0, label_smoothing: float = 0.0):
    """CPO, `−ls(β(log π_w − log π_l)) + α·NLL(chosen)`, no reference (arXiv 2401.08417).

    alpha: weight of the token-mean NLL, 1 as published; 0 leaves the preference term alone. cDPO smoothing allowed.
    """
    loss = _smoothed(beta * (pairs.chosen_logps - pairs.rejected_logps), label_smoothing)
    return loss + alpha * sft(pairs) if alpha else loss


@_loss("length")
def orpo(pairs, *, beta: float = 0.1):
    """ORPO, `NLL(chosen) − β·ls(o)`, o = log of the odds ratio, no reference (arXiv 2403.07691).

    `o = (a_w − a_l) − (log(1 − e^a_w) − log(1 − e^a_l))`; the NLL is the token mean over the completion.
    """
    chosen, rejected = (_log_odds(mean) for mean in _means(pairs))
    return sft(pairs) + beta * _cross_entropy(chosen - rejected)


def _log_odds(a: Tensor) -> Tensor:
    """log(e^a / (1 − e^a)) for a mean log-prob a ≤ 0, kept one rounding below 0, where it is infinite."""
    a = a.clamp(max=-torch.finfo(a.dtype).eps)
    return a - torch.where(a > -math.log(2), torch.log(-torch.expm1(a)), torch.log1p(-torch.exp(a)))


@_loss("length")
def alphapo(pairs, *, beta: float = 0.1, alpha: float = 0.25, gamma: float = 0.5, label_smoothing: float = 0.0):
    """AlphaPO: SimPO with a replaced by `(1 − e^(−α·a))/α` (arXiv 2501.03884); α = 0 is SimPO."""
    chosen, rejected = _means(pairs)
    if alpha:
        # The constant 1 cancels in the difference.
        chosen, rejected = -_capped_exp(-alpha * chosen) / alpha, -_capped_exp(-alpha * rejected) / alpha
    return _smoothed(beta * (chosen - rejected) - gamma, label_smoothing)


@_loss(varies=lambda o: LossTraits(frozenset({"reference"}), separable=o["z0"] is not None))
def kto(
    pairs,
    *,
    beta: float = 0.1,
    z0: float | Tensor | None = None,
    lambda_desirable: float = 1.0,
    lambda_undesirable: float = 1.0,
):
    """KTO on pairs, `½[λ_D(1 − σ(β(lr_w − z₀))) + λ_U(1 − σ(β(z₀ − lr_l)))]` (arXiv 2402.01306).

    z0: the reference point, an estimate of KL(π‖π_ref). The paper's is max(0, mean log-ratio of *mismatched* prompts
    and completions over all ranks), which takes forward passes this function cannot do: pass it as a number or tensor.
    None takes max(0, mean of this batch's 2B own log-ratios): no extra pass, but local to the rank, higher than the
    paper's (the completions fit their prompts) and coupling the pairs of the batch. z0=0 is ½·apo_zero.
    """
    if z0 is None:
        z0 = torch.cat((pairs.chosen_logratios, pairs.rejected_logratios)).mean().clamp(min=0)
    z0 = _reference_point("z0", z0, pairs)
    desirable = (beta * (z0 - pairs.chosen_logratios)).sigmoid()
    undesirable = (beta * (pairs.rejected_logratios - z0)).sigmoid()
    return 0.5 * (lambda_desirable * desirable + lambda_undesirable * undesirable)


@_loss("reference", separable=False, delta_only=True)
def beta_dpo(
    pairs,
    *,
    beta: float = 0.1,
    a: float = 0.6,
    keep: float = 0.8,
    running_mean: float | Tensor | None = None,
    running_std: float | Tensor | None = None,
    generator: torch.Generator | None = None,
):
    """β-DPO, `−ls(β_used·Δ)` on the kept pairs, 0 for the dropped (junkangwu/beta-DPO; arXiv 2407.08639).

    ⌊keep·B⌋ pairs (at least one) are drawn without replacement with weights `exp(−½((Δ − mean)/std)²)`, and
    `β_used = max(1e-3, β(1 + a·(mean(Δ_kept) − mean)))`, detached. mean and std are those of Δ: the authors' run over
    the steps (`m ← 0.9·m + 0.1·batch`), which the caller does and passes in; by default this batch's. The authors
    average over the kept pairs: a mean over B is `keep` times theirs. generator: makes the draw reproducible.
    """
    _require(0 < keep <= 1, "keep", "in (0, 1]", keep)
    delta = pairs.chosen_logratios - pairs.rejected_logratios
    if delta.numel() == 0:
        return _cross_entropy(delta)  # nothing to draw from
    observed = delta.detach()
    mean = observed.mean() if running_mean is None else running_mean
    std = observed.std(correction=0) if running_std is None else running_std
    standard = (observed - mean) / (std + torch.finfo(delta.dtype).eps)
    # Gumbel-top-k draws without replacement from log-weights: none underflows to 0, which multinomial refuses.
    uniform = torch.rand(delta.shape, generator=generator, dtype=delta.dtype, device=delta.device)
    priority = -0.5 * standard.square() - (-uniform.log()).log()
    kept = priority.topk(max(1, int(keep * delta.numel()))).indices
    beta_used = (beta * (1 + a * (observed[kept].mean() - mean))).clamp(min=1e-3)
    is_kept = torch.zeros_like(delta, dtype=torch.bool).index_fill(0, kept, True)
    return torch.where(is_kept, _cross_entropy(beta_used * delta), 0.0)


def _wpo_traits(options) -> LossTraits:
    base = traits(options["base"], options["options"])
    # The weights are means over tokens, so a common start does change them.
    return LossTraits(base.needs | {"wpo"}, base.separable, delta_only=False)


@_loss(varies=_wpo_traits)
def wpo(pairs, *, beta: float = 0.1, base="sigmoid", options=None, max_weight: float | None = 1.0):
    """WPO: `w_w·w_l·base`, w = exp(wpo_log_weight) detached (arXiv 2406.11827).

    base: the name of a loss, or a callable; options: its options. max_weight: cap on the product, 1 as in TRL, or None.
    """
    log_weight = (pairs.chosen_wpo_log_weight + pairs.rejected_wpo_log_weight).detach()
    if max_weight is not None:
        _require_positive("max_weight", max_weight)
        log_weight = log_weight.clamp(max=math.log(max_weight))
    return log_weight.exp() * pair_loss(pairs, base, beta=beta, options=options)


@_loss("reference", "tail", delta_only=True)
def ld_dpo(pairs, *, beta: float = 0.1, ld_alpha: float = 0.5):
    """LD-DPO: DPO with weight α on tokens beyond min(len_w, len_l), policy and reference alike (arXiv 2409.06411).

    ld_alpha in [0, 1]: 1 is DPO; the default is ours. The tail sums are taken as given, reference_free or not.
    """
    _require(0 <= ld_alpha <= 1, "ld_alpha", "in [0, 1]", ld_alpha)
    tail = pairs.chosen_tail_logratios - pairs.rejected_tail_logratios
    return _cross_entropy(_margin(pairs, beta) - beta * (1 - ld_alpha) * tail)


@_loss("reference", "length", delta_only=True)
def length_dpo(pairs, *, beta: float = 0.1, alpha: float = 0.01):
    """Length-penalised DPO, `−ls(L + α(len_w − len_l))`, known as R-DPO (Park et al., arXiv 2403.19159).

    From the reward r − α·len: a longer chosen answer is pushed less.
    """
    margin = _margin(pairs, beta)
    return _cross_entropy(margin + alpha * (pairs.chosen_length - pairs.rejected_length).to(margin.dtype))


@_loss("reference")
def dpop(pairs, *, beta: float = 0.1, lam: float = 50.0):
    """DPO-Positive, `−ls(β(Δ − λ·relu(−lr_w)))` (Smaug, arXiv 2402.13228): the chosen must not become less likely."""
    return _cross_entropy(_margin(pairs, beta) - beta * lam * torch.relu(-pairs.chosen_logratios))


@_loss("reference")
def dpo_shift(pairs, *, beta: float = 0.1, shift: float = 0.75):
    """DPO-Shift, `−ls(β(lr_w − λ_t·lr_l))` (Meaquadddd/DPO-Shift; arXiv 2502.07599).

    shift: λ_t in (0, 1]; the authors fix it (0.55 to 1) or move it linearly over the steps, which the caller does.
    """
    _require(0 < shift <= 1, "shift", "in (0, 1]", shift)
    return _cross_entropy(beta * (pairs.chosen_logratios - shift * pairs.rejected_logratios))


@_loss("reference", "rating_gap", delta_only=True)
def mmpo(pairs, *, beta: float = 0.1, gamma: float = 1.0):
    """MMPO, `−q·ls(L) − (1−q)·ls(−L)` with the soft label `q = σ(γ·g)` (arXiv 2410.03145). NaN g: DPO (q = 1)."""
    gap, rated = _rating(pairs)
    label = torch.where(rated, (gamma * gap).sigmoid(), 1.0)
    return _cross_entropy(_margin(pairs, beta), label, 1.0 - label)


@_loss(
    varies=lambda o: LossTraits(
        frozenset({"reference", "score" if o["score_ratio"] else "rating_gap"}), delta_only=True
    )
)
def odpo(pairs, *, beta: float = 0.1, alpha: float = 1.0, score_ratio: bool = False):
    """ODPO, `−ls(L − α·log g)` (rycolab/odpo; arXiv 2402.10571); with score_ratio `−ls(L − α·log(s_w/s_l))`.

    A gap g ≤ 0 gives 0, the limit g → 0+ (no margin is asked for); NaN g: DPO. With score_ratio, a score that is NaN or
    not positive has no logarithm: DPO.
    """
    if score_ratio:
        usable = (pairs.chosen_score > 0) & (pairs.rejected_score > 0)
        ratio = torch.where(usable, pairs.chosen_score, 1.0) / torch.where(usable, pairs.rejected_score, 1.0)
        return _cross_entropy(_margin(pairs, beta) - alpha * ratio.log().to(pairs.chosen_logps.dtype))
    gap, rated = _rating(pairs)
    loss = _cross_entropy(_margin(pairs, beta) - alpha * torch.where(gap > 0, gap, 1.0).log())
    return torch.where(rated & (gap <= 0), 0.0, loss)


# Margins are [B] like the pairs but not sliced with them.
@_loss(
    varies=lambda o: (
        LossTraits(frozenset({"reference", "rating_gap"}), delta_only=True)
        if o["margins"] is None
        else LossTraits(frozenset({"reference"}), separable=False, delta_only=True)
    )
)
def modpo(pairs, *, beta: float = 0.1, weights: Sequence[float] = (0.5, 0.5), margins: Sequence[Tensor] | None = None):
    """MODPO, `−ls((L − Σ_{k≥1} w_k·(R_k(y_w) − R_k(y_l)))/w_0)` (ZHZisZZ/modpo; arXiv 2310.03708).

    weights: w_0 > 0 of the preferences themselves, then one per margin. margins: reward gaps of the other objectives,
    [B] each; None takes rating_gap as the only one. A NaN gap counts as 0.
    """
    own, *others = weights
    _require_positive("weights[0]", own)
    gaps = [pairs.rating_gap] if margins is None else list(margins)
    _require(len(gaps) == len(others), "weights", f"1 + {len(gaps)} numbers, one per margin after the first", weights)
    margin = _margin(pairs, beta)
    for weight, gap in zip(others, gaps, strict=True):
        _require_shape("margins", gap, margin.shape)
        margin = margin - weight * _zero_if_nan(gap, margin)
    return _cross_entropy(margin / own)


@_loss("reference")
def cal_dpo(pairs, *, beta: float = 0.1):
    """Cal-DPO, `−ls(Δ) + ½[(lr_w − 1/(2β))² + (lr_l + 1/(2β))²]` (tengxiao1/Cal-DPO; arXiv 2412.14516; β ≈ 1e-3).

    The log-sigmoid is on Δ without β, as in the authors' code.
    """
    return _cross_entropy(_margin(pairs, 1.0)) + 0.5 * _squares(pairs, 1 / (2 * beta), -1 / (2 * beta))


def _rpo_sq(*, beta, mode, eta) -> Logistic | None:
    _require(mode in ("bwd", "fwd", "sq"), "mode", "'bwd', 'fwd' or 'sq'", mode)
    _require_positive("eta", eta)
    return Logistic(a=0.0, c=2.0, m1=eta, drop_square_when_unrated=True) if mode == "sq" else None


@_loss("reference", "rating_gap", delta_only=True, coefficients=_rpo_sq)
def rpo(pairs, *, beta: float = 0.1, mode: str = "bwd", eta: float = 1.0):
    """Reward-aware preference optimisation (NeMo-Aligner; Nemotron-4, arXiv 2406.11704).

    mode "bwd": `KL(Bern(σ(ηg)) ‖ Bern(σ(L)))`; "fwd": the arguments swapped; "sq": `(L − ηg)²`, of the Logistic family.
    eta is `gt_reward_scale`. NaN g: 0, for the loss knows nothing else.
    """
    gap, rated = _rating(pairs)
    student, teacher = _margin(pairs, beta), eta * gap
    source, target = (teacher, student) if mode == "bwd" else (student, teacher)
    return torch.where(rated, _bernoulli_kl(source, F.logsigmoid(target), F.logsigmoid(-target)), 0.0)


@_logistic_loss("reference", "rating_gap")
def rdpo(*, beta: float = 0.1, beta_rating: float = 0.3) -> Logistic:
    """Ratings DPO, `−ls(L − (β/β₁)·g)` (Viano et al., arXiv 2602.00603).

    Its optimum is π_ref·exp(r/β + r̂/β₁). beta_rating β₁ is in rating units per nat and must fit the scale of the
    ratings (see `rating_scale`); 0.3 is the authors'. β₁ → ∞ is DPO, β₁ → 0 trusts the ratings alone. NaN g: g = 0,
    which is DPO.
    """
    _require_positive("beta_rating", beta_rating)
    return Logistic(offset=beta / beta_rating)


@_logistic_loss("reference", "rating_gap")
def ripo(*, beta: float = 0.1, beta_rating: float = 0.3) -> Logistic:
    """Ratings IPO, `(L − (β/β₁)·g − ½)²` (Viano et al., arXiv 2602.00603): β² times IPO on sums, offset by the rating.

    beta_rating as in `rdpo`. NaN g: g = 0.
    """
    _require_positive("beta_rating", beta_rating)
    return Logistic(a=0.0, c=2.0, m0=0.5, m1=beta / beta_rating)


@_logistic_loss("reference", "rating_gap")
def ml_rdpo(*, beta: float = 0.1, variance: float = 1.0) -> Logistic:
    """Maximum-likelihood ratings DPO, `−ls(L) + (g − L)²/(2V)` (Viano et al., arXiv 2602.00603).

    The joint likelihood of the label, Bernoulli(σ(L)), and the gap, N(L, V). variance V is in rating units² (see
    `rating_scale`), 1/(2λ) of the additive form L_DPO + λ·(g − L)². V → ∞ is DPO. NaN g drops the square: DPO.
    """
    _require_positive("variance", variance)
    return Logistic(c=1.0 / variance, m1=1.0, drop_square_when_unrated=True)


@_logistic_loss("reference", "rating_gap")
def ddpo(*, beta: float = 0.1) -> Logistic:
    """Distilled DPO, `(g − L)²` (arXiv 2405.19316; the baseline of 2602.00603). NaN g: 0, nothing to distil."""
    return Logistic(a=0.0, c=2.0, m1=1.0, drop_square_when_unrated=True)


@_loss("reference", "length", "rating_gap")
def mixdpo(pairs, *, beta: float = 0.1, tau: float = 0.5, label_smoothing: float = 0.0):
    """MixDPO: `sft` where g < τ, cDPO elsewhere (JlPang863/QualityDPO; arXiv 2602.00954).

    The inequality is strict: g = τ stays with DPO. τ belongs to judge scores of 1 to 10; the authors' β is 0.01 and
    their ε 0.1 on base models. NaN g: DPO, as the authors' default scores imply.
    """
    preference = _smoothed(_margin(pairs, beta), label_smoothing)
    return torch.where(pairs.rating_gap < tau, sft(pairs), preference)


@_loss("length")
def sft(pairs, *, beta: float = 0.1):
    """Token-mean negative log-likelihood of the chosen completion, `−log π_w/len_w`; no reference, β unused."""
    return -_mean(pairs.chosen_logps, pairs.chosen_length)


def rating_scale(gap, beta: float) -> RatingScale:
    """What the scale of the rating gaps (array, list or tensor; NaN = not rated, ignored) means for RDPO and ML-RDPO.

    median: of |g| over the non-zero gaps, since a tie takes no offset whatever β₁ is. std: of all g.
    suggested_beta_rating: the β₁ = 2β·median at which RDPO's offset at the start, (β/β₁)·|g|, has the median ½.
    suggested_variance: mean of g², the residual variance of g − L at the start, where L = 0, and so the
    maximum-likelihood V there; ML-RDPO's square term then starts at ½ on average.
    initial_offset: the median offset that the authors' β₁ = 0.3 would give, in nats. Far above 1 it saturates RDPO:
    logit gaps of AlpacaEval win probabilities have the median 19.9, an offset of 6.6 at β = 0.1, so every pair gets
    the full gradient (0.998 of it) whatever the policy does; the suggestion is then β₁ = 4.
    """
    _require_positive("beta", beta)
    return of_gaps(gap.detach().cpu().double().numpy() if isinstance(gap, Tensor) else gap, beta)


__all__ = ["LOSSES", "Pairs", "pair_separable", "rating_scale", *LOSSES]
