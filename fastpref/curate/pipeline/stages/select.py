"""Stage select: the pairs to keep, by their margins; before construct the prompts, by the span of their scores."""

import warnings
from dataclasses import dataclass, replace

import numpy as np

from fastpref.curate import margins
from fastpref.curate.notices import DataWarning, collected_notices
from fastpref.curate.pipeline.options import Options
from fastpref.curate.pipeline.scores import votes
from fastpref.curate.pipeline.state import PairReason, State
from fastpref.errors import InputError

DEFAULT_LOWER = -2.0  # of `bees`


@dataclass(frozen=True)
class SelectOptions(Options):
    """At most one of `fraction` and `k`; neither keeps every pair. The rest as the arguments of `bees`; `lower` is -2
    where it is not given."""

    fraction: float | None = None
    k: int | None = None
    how: str = "mul"
    lower: float | None = None
    upper: float | None = None
    require_positive: bool = False

    def check(self) -> None:
        if self.fraction is not None and self.k is not None:
            raise InputError("select.fraction and select.k must not both be given")

    @property
    def size(self) -> dict[str, float | int | None]:
        """The argument of `select_top` and `select_prompts` that says how many; None: all."""
        return {"k": self.k} if self.k is not None else {"fraction": self.fraction}

    @property
    def asked(self) -> bool:
        """Whether fewer than all are to be kept."""
        return self.k is not None or self.fraction is not None


def select_by_margin(state: State, config) -> State:
    options = config.select
    if state.pairs is None:
        return _select_prompts(state, options)
    columns = votes(state, config)
    if options.how not in (*margins.COMBINATIONS, *columns):
        raise InputError(
            f"select.how must be one of {', '.join([*margins.COMBINATIONS, *columns])}, got {options.how!r}"
        )
    if not columns and options.asked:
        raise InputError("select goes by margins, and the file has no scores")
    if len(columns) < 2 and not options.asked:
        return state.skipped("select", "every pair is kept")
    kept = np.flatnonzero(state.kept)
    of_pairs = {name: state.margin(column)[kept] for name, column in columns.items()}
    kinds = {name: "implicit" if name == "implicit" else "external" for name in of_pairs}
    # A single vote ranks by itself, whatever its scale.
    how = options.how if len(of_pairs) > 1 else next(iter(of_pairs))
    lower = DEFAULT_LOWER if options.lower is None else options.lower
    rules = {"how": how, "kinds": kinds, "lower": lower, "upper": options.upper}
    rules["require_positive"] = options.require_positive
    with collected_notices() as notices:
        found = margins.bees(of_pairs, **rules)
    _warn_of_votes(notices, options)
    pairs = dict(state.pairs)
    count = len(pairs["prompt"])
    for name, margin in of_pairs.items():
        pairs[f"margin_{name}"] = _spread_out(margin, kept, count)
        pairs[f"p_{name}"] = _spread_out(margins.normalised_margins(margin, found.sources[name]), kept, count)
    pairs["select_score"] = _spread_out(found.score, kept, count)
    if found.p is not None:
        pairs["p_joint"] = _spread_out(found.p, kept, count)
    summary = {
        "how": how,
        "sources": {name: source._asdict() for name, source in found.sources.items()},
        "pearson": found.pearson,
        "spearman": found.spearman,
    }
    if options.asked:
        if options.k is not None and options.k > len(kept):
            raise InputError(f"select.k must be at most the {len(kept)} pairs there are, got {options.k}")
        top = margins.select_top(found, **options.size)
        reason = pairs["reason"].copy()
        reason[kept] = PairReason.NOT_SELECTED
        reason[kept[top.indices]] = PairReason.KEPT
        pairs["reason"] = reason
        with collected_notices():  # said above
            beside = margins.compare_selections(of_pairs, len(top.indices), seed=config.seed, **rules)
        summary |= {
            "pairs": len(kept),
            "selected": len(top.indices),
            "threshold": top.threshold,
            "tied_at_cut": top.tied_at_cut,
            "share_at_one": top.share_at_one,
            "beside": beside.table(),
        }
    return replace(state, pairs=pairs).with_summary("select", summary)


def _select_prompts(state, options) -> State:
    """Before construction there are no pairs to select, only prompts: by the span of their scores."""
    if not options.asked:
        return state.skipped("select", "every prompt is kept")
    found = margins.select_prompts(state.score, valid=state.valid, offsets=state.samples.offsets, **options.size)
    taken = np.zeros(len(state.taken), bool)
    taken[found.prompts] = True
    summary = {"prompts": len(taken), "selected": int(taken.sum()), "tied_at_cut": found.tied_at_cut}
    return replace(state, taken=taken).with_summary("select", summary)


def _warn_of_votes(notices, options) -> None:
    """What `bees` warns of, where a selection was asked for; a bound that was not given is no mistake of the user's."""
    for notice in notices:
        if notice.id == "clip-bounds" and options.lower is None and options.upper is None:
            notice = notice._replace(id="default-bounds")
        if options.asked or notice.id == "votes-agree":
            warnings.warn(DataWarning(*notice), stacklevel=3)


def _spread_out(values, where, size) -> np.ndarray:
    """[size] float64, NaN elsewhere."""
    out = np.full(size, np.nan)
    out[where] = values
    return out
