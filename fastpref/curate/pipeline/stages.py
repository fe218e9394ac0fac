"""The stages of the pipeline: functions State -> State, each of which does one thing by one of this package's methods.

What a stage decides goes into the state, what it found into its summary, and what the user should know is warned.
"""

import os
import warnings
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from fastpref.curate import hygiene as checks
from fastpref.curate import length, margins, routing
from fastpref.curate.files.samples import read_samples, text_hashes
from fastpref.curate.files.table import Samples
from fastpref.curate.files.writing import write_problems
from fastpref.curate.hygiene import Flag
from fastpref.curate.pairs import DropReason, PairSelection, select_pairs
from fastpref.curate.pipeline.config import CurateConfig
from fastpref.curate.pipeline.state import LeftOut, PairReason, State, as_json
from fastpref.curate.scale import to_logit
from fastpref.errors import InputError


def read(config, progress=None) -> State:
    """The state before the first stage, from the file."""
    options = config.read
    fields = [name for name, _ in _declared(options)]
    if options.implicit is not None and not os.path.exists(options.implicit):
        if options.implicit.endswith(".npy"):
            raise InputError(f"cannot read {options.implicit}: no such file of implicit rewards")
        if not fields:
            raise InputError(f"read.scores must be given beside the field {options.implicit!r} of implicit rewards")
        fields.append(options.implicit)
    samples = read_samples(
        config.input,
        score_fields=fields or None,
        source_field=options.sources,
        length_field=options.lengths,
        workers=options.workers,
        progress=progress,
    )
    if not samples.prompts:
        if config.write.bad_rows is not None:
            write_problems(samples.problems, config.write.bad_rows)
        first = f", the first of {len(samples.problems)} bad ones: {samples.problems[0]}" if samples.problems else ""
        raise InputError(f"{config.input} holds no row of scored samples{first}")
    return start(samples, config)


def start(samples: Samples, config: CurateConfig) -> State:
    score = primary_score(samples, config)
    return State(
        samples,
        score=score,
        left_out=np.where(np.isnan(score), LeftOut.NO_SCORE, LeftOut.KEPT).astype(np.uint8),
        choosable=np.ones(len(score), bool),
        flags=np.zeros(len(score), np.uint8),
        taken=np.ones(samples.prompts, bool),
    )


def _hygiene(state, config) -> State:
    samples, options = state.samples, config.hygiene
    banned = [text_hashes(path) for path in options.decontaminate]
    found = checks.hygiene(
        state.score,
        offsets=samples.offsets,
        text_hash=samples.text_hash,
        blank=samples.blank,
        prompt_hash=samples.prompt_hash,
        sources=samples.sources,
        banned_hash=np.concatenate(banned) if banned else None,
        repeated_share=options.repeated_share,
        repeated_least=options.repeated_least,
    )
    # A copy is no further sample and a blank no text: pools without them are what every method means. What a text
    # under many prompts is, and whether a prompt must not be trained on, is for the user to say.
    reasons = {Flag.BLANK: LeftOut.BLANK, Flag.DUPLICATE: LeftOut.DUPLICATE}
    if options.apply:
        reasons |= {Flag.REPEATED_TEXT: LeftOut.REPEATED_TEXT, Flag.CONTAMINATED: LeftOut.CONTAMINATED}
    for flag, reason in reasons.items():
        state = _leave_out(state, found.reason & flag != 0, reason)
    flagged = found.repeated
    worst = [
        {"prompts": int(n), "source": _source_name(samples, first), "characters": int(samples.lengths[first])}
        for n, first in zip(flagged.prompts[:5], flagged.first[:5], strict=True)
    ]
    summary = found.counts() | {
        "clamped": _clamped(samples, config),
        "copies_std": found.copies_std,
        "repeated_limit": found.repeated_limit,
        "most_repeated": worst,
        "applied": options.apply,
    }
    return _rescored(replace(state, flags=found.reason), found.scores, "hygiene", summary)


def _audit(state, config) -> State:
    samples, options = state.samples, config.audit
    if samples.sources is None:
        return _with_summary(state, "audit", {"skipped": "no sources"})
    from fastpref.curate import clean

    rule = config.construct.on_degenerate
    # By the rule of this run: another one later, on what --work kept, does not bring the audit back. What warns or
    # fails here would do so again, or not, of the pools that are left.
    unaudited = _select(state, config, on_degenerate="ignore" if rule in ("warn", "error") else rule)
    try:
        found = clean.audit(
            primary_score(samples, config),  # copies and canned texts too: they are what gives a source away
            samples.sources,
            offsets=samples.offsets,
            names=samples.source_names,
            selection=unaudited,
            rank=options.rank,
            threshold=options.threshold,
            seed=config.seed,
        )
    except ValueError as error:
        return _refused(state, config, "audit", error)
    masks = clean.exclude(samples.sources, found.flagged, options.exclude)
    table = [
        {
            "source": samples.source_names[s],
            "unexplained": found.unexplained[s],
            "low": found.low[s],
            "high": found.high[s],
            "z": found.z[s],
            "flagged": found.flagged[s],
            "reference": found.reference[s],
            "prompts": found.prompts[s],
            "would_supply_chosen": found.as_chosen[s],
            "would_supply_rejected": found.as_rejected[s],
        }
        for s in found.order
    ]
    flagged = [row for row in table if row["flagged"]]
    if flagged and options.exclude == "none":
        names = ", ".join(f"{row['source']} (z {row['z']:.1f})" for row in flagged)
        supply = sum(row["would_supply_chosen"] for row in flagged)
        warnings.warn(
            f"flagged sources are left in: {names}; they supply the chosen response of {supply} pairs. "
            'exclude="both" leaves them out',
            UserWarning,
            stacklevel=2,
        )
    state = replace(state, choosable=state.choosable & masks.choosable)
    state = _leave_out(state, ~masks.valid, LeftOut.FLAGGED_SOURCE)
    summary = {
        "prompts": found.audited_prompts,
        "rank": found.rank,
        "exclude": options.exclude,
        "flagged": [row["source"] for row in flagged],
        "reference": [row["source"] for row in table if row["reference"]],
        "would_supply_chosen": sum(row["would_supply_chosen"] for row in flagged),
        "would_supply_rejected": sum(row["would_supply_rejected"] for row in flagged),
        "sources": table,
    }
    return _with_summary(state, "audit", summary)


def _clean(state, config) -> State:
    samples, options = state.samples, config.clean
    if options.action == "none" or samples.sources is None:
        why = "not asked for" if options.action == "none" else "no sources"
        return _with_summary(state, "clean", {"skipped": why})
    from fastpref.curate import clean

    try:
        found = clean.denoise_scores(
            state.score,
            samples.sources,
            offsets=samples.offsets,
            valid=state.valid,
            action=options.action,
            rank=options.rank,
            threshold=options.threshold,
        )
    except ValueError as error:
        return _refused(state, config, "clean", error)
    if options.action == "mask":
        state = _leave_out(state, found.flagged, LeftOut.CORRUPTED_SCORE)
    summary = {
        "action": options.action,
        "flagged": int(found.flagged.sum()),
        "scores": int(state.valid.sum()),
        "best_changed": found.chosen_changed,
        "prompts": found.prompts,
        "noise_scale": found.scale,
        "rank": found.rank,
        "converged": found.converged,
    }
    scores = np.where(state.valid, found.scores, state.score)
    return _rescored(state, scores, "clean", summary)


def _refused(state, config, stage, error) -> State:
    """Nothing done, which is worth a warning where the sources were asked for rather than found in the file."""
    if config.read.sources is not None:
        warnings.warn(f"{stage} did nothing: {error}", UserWarning, stacklevel=3)
    return _with_summary(state, stage, {"skipped": str(error)})


def _length(state, config) -> State:
    samples, control = state.samples, config.length.control
    if control != "within_source":
        # "match" chooses among responses, which is done where the pairs are made
        return _with_summary(state, "length", {"control": control})
    found = length.remove_length(
        np.where(state.valid, state.score, np.nan),
        samples.lengths,
        sources=samples.sources,
        flagged=~state.choosable,
        offsets=samples.offsets,
    )
    scores = np.where(state.valid, found.scores, state.score)
    return _rescored(state, scores, "length", {"control": control, "slope": found.slope})


def _construct(state, config) -> State:
    samples, options = state.samples, config.construct
    selection = _select(state, config, on_degenerate=options.on_degenerate)
    if "length" in config.order and config.length.control == "match":
        selection = length.match_length(
            selection,
            state.score,
            samples.lengths,
            band=config.length.band,
            min_gap=options.min_gap,
            max_gap=options.max_gap,
            valid=state.valid & _taken(state),
            offsets=samples.offsets,
        )
    pairs = selection.table()
    del pairs["score_chosen"], pairs["score_rejected"]  # they are those of the responses, by their index
    pairs["reason"] = np.full(len(pairs["prompt"]), PairReason.KEPT, np.int8)
    pairs["route"] = np.full(len(pairs["prompt"]), routing.Route.PREF, np.int8)
    dropped = selection.dropped()
    if not state.taken.all():
        untaken = np.count_nonzero(~state.taken) * options.pairs_per_prompt
        dropped[DropReason.TOO_FEW.name.lower()] -= untaken
        dropped = {name: count for name, count in dropped.items() if count} | {"not_selected": untaken}
    summary = {
        "rule": selection.rule,
        "scale": selection.scale,
        "pairs": len(pairs["prompt"]),
        "dropped": dropped,
        "share_below_min": selection.share_below_min,
        "share_rejected_min": selection.share_rejected_min,
        "median_percentile": selection.median_percentile,
        "median_pool": np.median(selection.n_pool),
    }
    return _with_summary(replace(state, pairs=pairs), "construct", summary)


def _select_stage(state, config) -> State:
    options = config.select
    wanted = {"k": options.k} if options.k is not None else {"fraction": options.fraction}
    if state.pairs is None:
        return _select_prompts(state, wanted)
    columns = _votes(state, config)
    if options.how not in (*margins.COMBINATIONS, *columns):
        raise InputError(
            f"select.how must be one of {', '.join([*margins.COMBINATIONS, *columns])}, got {options.how!r}"
        )
    asked = options.k is not None or options.fraction is not None
    if len(columns) == 1 and not asked:
        return _with_summary(state, "select", {"skipped": "every pair is kept"})
    kept = np.flatnonzero(state.kept)
    votes = {name: state.margin(column)[kept] for name, column in columns.items()}
    kinds = {name: "implicit" if name == "implicit" else "external" for name in votes}
    # A single vote ranks by itself, whatever its scale.
    how = options.how if len(votes) > 1 else next(iter(votes))
    rules = {"how": how, "kinds": kinds, "lower": options.lower, "upper": options.upper}
    rules["require_positive"] = options.require_positive
    found = margins.bees(votes, **rules)
    pairs = dict(state.pairs)
    for name, vote in votes.items():
        pairs[f"margin_{name}"] = _spread(vote, kept, len(pairs["prompt"]))
        pairs[f"p_{name}"] = _spread(margins.normalised_margins(vote, found.sources[name]), kept, len(pairs["prompt"]))
    pairs["select_score"] = _spread(found.score, kept, len(pairs["prompt"]))
    if found.p is not None:
        pairs["p_joint"] = _spread(found.p, kept, len(pairs["prompt"]))
    summary = {
        "how": how,
        "sources": {name: source._asdict() for name, source in found.sources.items()},
        "pearson": found.pearson,
        "spearman": found.spearman,
    }
    if asked:
        if options.k is not None and options.k > len(kept):
            raise InputError(f"select.k must be at most the {len(kept)} pairs there are, got {options.k}")
        top = margins.select_top(found, **wanted)
        reason = pairs["reason"].copy()
        reason[kept] = PairReason.NOT_SELECTED
        reason[kept[top.indices]] = PairReason.KEPT
        pairs["reason"] = reason
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # said above
            beside = margins.compare_selections(votes, len(top.indices), seed=config.seed, **rules)
        summary |= {
            "pairs": len(kept),
            "selected": len(top.indices),
            "threshold": top.threshold,
            "tied_at_cut": top.tied_at_cut,
            "share_at_one": top.share_at_one,
            "beside": beside.table(),
        }
    return _with_summary(replace(state, pairs=pairs), "select", summary)


def _select_prompts(state, wanted) -> State:
    """Before construction there are no pairs to select, only prompts: by the span of their scores."""
    if set(wanted.values()) == {None}:
        return _with_summary(state, "select", {"skipped": "every prompt is kept"})
    found = margins.select_prompts(state.score, valid=state.valid, offsets=state.samples.offsets, **wanted)
    taken = np.zeros(len(state.taken), bool)
    taken[found.prompts] = True
    summary = {"prompts": len(taken), "selected": int(taken.sum()), "tied_at_cut": found.tied_at_cut}
    return _with_summary(replace(state, taken=taken), "select", summary)


def _route(state, config) -> State:
    tau, kept = config.route.tau, np.flatnonzero(state.kept)
    if tau == "auto":
        tau = routing.JUDGE_TAU if config.read.score_range == (1.0, 10.0) else routing.DEFAULT_TAU
    margin = state.margin(state.score)[kept]
    pairs = dict(state.pairs)
    pairs["easy_to_hard"] = np.full(len(pairs["prompt"]), -1)
    pairs["easy_to_hard"][kept[routing.easy_to_hard(margin)]] = np.arange(len(kept))
    if tau == "none":
        return _with_summary(replace(state, pairs=pairs), "route", {"skipped": "not asked for"})
    found = routing.route_by_margin(margin, tau, inclusive=config.route.inclusive)
    pairs["route"] = pairs["route"].copy()
    pairs["route"][kept] = found.route
    sent = int((found.route == routing.Route.SFT).sum())
    summary = {"tau": found.tau, "inclusive": found.inclusive, "asked": tau, "sft": sent, "share_sft": found.share_sft}
    return _with_summary(replace(state, pairs=pairs), "route", summary)


STAGES: dict[str, Callable[[State, CurateConfig], State]] = {
    "hygiene": _hygiene,
    "audit": _audit,
    "clean": _clean,
    "length": _length,
    "construct": _construct,
    "select": _select_stage,
    "route": _route,
}


def _select(state, config, on_degenerate) -> PairSelection:
    options = config.construct
    return select_pairs(
        state.score,
        options.chosen,
        options.rejected,
        valid=state.valid & _taken(state),
        offsets=state.samples.offsets,
        choosable=state.choosable,
        scale=options.scale,
        ddof=options.ddof,
        on_degenerate=on_degenerate,
        min_chosen=options.min_chosen,
        min_gap=options.min_gap,
        max_gap=options.max_gap,
        pairs_per_prompt=options.pairs_per_prompt,
        seed=config.seed,
    )


def _taken(state) -> np.ndarray:
    """bool [responses], those of the prompts that were not left out."""
    return np.repeat(state.taken, np.diff(state.samples.offsets))


# ---- what a stage does to the state


def _leave_out(state, which, reason) -> State:
    """Responses that leave from here on, and the pairs made with them; a response keeps its first reason."""
    left_out = np.where(which & state.valid, reason, state.left_out).astype(np.uint8)
    return _checked_pairs(replace(state, left_out=left_out))


def _rescored(state, scores, stage, summary) -> State:
    left_out = np.where(np.isnan(scores) & state.valid, LeftOut.NO_SCORE, state.left_out).astype(np.uint8)
    return _with_summary(_checked_pairs(replace(state, score=scores, left_out=left_out)), stage, summary)


def _checked_pairs(state) -> State:
    """After construction the pairs stay, but those that would not be made any more are dropped."""
    if state.pairs is None:
        return state
    kept, valid = state.kept, state.valid
    missing = kept & ~((valid & state.choosable)[state.place("chosen")] & valid[state.place("rejected")])
    worse = kept & ~missing & ~(state.margin(state.score) > 0)
    reason = np.where(missing, PairReason.LEFT_OUT, np.where(worse, PairReason.NOT_BETTER, state.pairs["reason"]))
    return replace(state, pairs=state.pairs | {"reason": reason.astype(np.int8)})


def _with_summary(state, stage, summary) -> State:
    return replace(state, summaries=state.summaries | {stage: as_json(summary)})


def _spread(values, where, size) -> np.ndarray:
    """[size] float64, NaN elsewhere."""
    out = np.full(size, np.nan)
    out[where] = values
    return out


def _source_name(samples, response) -> str | None:
    if samples.sources is None or samples.sources[response] < 0:
        return None
    return samples.source_names[samples.sources[response]]


# ---- score columns


def _declared(read) -> list[tuple[str, str]]:
    """(field, "raw" or "logit") as in "field:logit"."""
    found = []
    for text in read.scores:
        name, _, scale = text.partition(":")
        if not name or scale not in ("", "raw", "logit"):
            raise InputError(f"scores must be FIELD or FIELD:logit, got {text!r}")
        if name in dict(found):
            raise InputError(f"scores must name a field once, got {name!r} twice")
        found.append((name, scale or "raw"))
    return found


def primary_field(samples: Samples, config: CurateConfig) -> tuple[str, str]:
    """The field that pairs are made by, and its scale."""
    return (_declared(config.read) or [(next(iter(samples.scores)), "raw")])[0]


def _linear(samples, name, scale) -> np.ndarray:
    column = samples.scores[name]
    try:
        return to_logit(column) if scale == "logit" else column
    except ValueError as error:
        raise InputError(f"{name}:logit: {error}") from error


def primary_score(samples: Samples, config: CurateConfig) -> np.ndarray:
    """float64 [responses], the score that pairs are made by as the file has it, on its declared scale."""
    return _linear(samples, *primary_field(samples, config))


def _clamped(samples, config) -> int:
    name, scale = primary_field(samples, config)
    return int(np.isin(samples.scores[name], (0.0, 1.0)).sum()) if scale == "logit" else 0


def _votes(state, config) -> dict[str, np.ndarray]:
    """Score columns by which pairs are selected: the working score, the others declared, and implicit rewards."""
    samples, read = state.samples, config.read
    votes = {primary_field(samples, config)[0]: state.score}
    votes |= {name: _linear(samples, name, scale) for name, scale in _declared(read)[1:]}
    if read.implicit is not None:
        votes["implicit"] = samples.scores.get(read.implicit)
        if votes["implicit"] is None:
            votes["implicit"] = _implicit_file(read.implicit, samples.responses)
    return votes


def _implicit_file(path, responses) -> np.ndarray:
    try:
        column = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"cannot read {path}: {str(error).partition(chr(10))[0]}") from error
    if not isinstance(column, np.ndarray) or column.shape != (responses,) or column.dtype.kind != "f":
        found = f"{column.dtype} {list(column.shape)}" if isinstance(column, np.ndarray) else "an archive"
        raise InputError(f"{path} must hold floating-point [{responses}], one per response of the file, got {found}")
    return column.astype(np.float64)


# ---- rows


def pair_columns(state: State, config: CurateConfig) -> dict[str, object]:
    """The kept pairs as `write_pairs` takes them: indices, scores, and what the stages know of each."""
    samples, kept = state.samples, state.kept
    at = {side: state.place(side)[kept] for side in ("chosen", "rejected")}
    name, scale = primary_field(samples, config)
    columns = {name: state.pairs[name][kept] for name in ("prompt", "chosen", "rejected")}
    columns["row"] = samples.row[columns["prompt"]]

    def both(column, end=""):
        columns.update({f"score_{side}{end}": column[place] for side, place in at.items()})

    primary = primary_score(samples, config)
    both(primary)
    if any((state.score[place] != primary[place]).any() for place in at.values()):
        both(state.score, "_used")  # the mean of copies, or replaced, or without the slope of length
    if scale != "raw" or len(samples.scores) > 1:
        for field, column in samples.scores.items():
            both(column, f"_{field}")
    for known in ("n_pool", "z_chosen", "z_rejected", "rank_rejected"):
        columns[known] = state.pairs[known][kept]
    made = state.summaries["construct"]
    field = name if scale == "raw" else f"{name}:{scale}"
    columns["rule"] = made["rule"]
    columns["scale"] = field if made["scale"] == "raw" else f"{field}, {made['scale']}"
    columns["reason"] = PairReason.KEPT.name.lower()
    columns["route"] = np.array([route.name.lower() for route in routing.Route], object)[state.pairs["route"][kept]]
    further = [known for known in state.pairs if known.startswith(("margin_", "p_", "select_", "easy_"))]
    return columns | {known: state.pairs[known][kept] for known in further}
