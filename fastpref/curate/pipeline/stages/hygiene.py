"""Stage hygiene: copies, blanks, texts under many prompts, texts not to be trained on, and scores that are none."""

import warnings
from dataclasses import dataclass, replace

import numpy as np

from fastpref.curate.files.samples import text_hashes
from fastpref.curate.hygiene import Flag, hygiene
from fastpref.curate.notices import DataWarning
from fastpref.curate.pipeline.options import Options
from fastpref.curate.pipeline.scores import clamped_scores, primary_field
from fastpref.curate.pipeline.state import LeftOut, State
from fastpref.curate.pools import per_prompt
from fastpref.curate.suspects import find_contradictions, find_marks

MOST_LISTED = 1000  # contradicting responses, those furthest apart; all of them are counted, and left out if asked for


@dataclass(frozen=True)
class HygieneOptions(Options):
    apply: bool = False  # also leave out what is otherwise reported: repeated and banned texts, contradicted scores
    repeated_share: float = 0.01
    repeated_least: int = 3
    decontaminate: tuple[str, ...] = ()  # files whose prompts must not be trained on


def check_texts(state: State, config) -> State:
    samples, options = state.samples, config.hygiene
    banned = [text_hashes(path) for path in options.decontaminate]
    unscored = np.isnan(state.score)
    found = hygiene(
        # published pairs need no score: without one, equal sides are copies all the same
        np.where(unscored, 0.0, state.score) if state.published else state.score,
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
        state = state.leave_out(found.reason & flag != 0, reason)
    contradicted, listed = _contradicting_scores(state, config)
    if options.apply:
        state = state.leave_out(contradicted, LeftOut.CONTRADICTED_SCORE)
    flagged = found.repeated
    worst = [
        {"prompts": int(n), "source": _source_name(samples, first), "characters": int(samples.lengths[first])}
        for n, first in zip(flagged.prompts[:5], flagged.first[:5], strict=True)
    ]
    summary = found.counts() | {
        "no_score": int(unscored.sum()) if samples.scored else 0,
        "clamped": clamped_scores(samples, config),
        "copies_std": found.copies_std,
        "repeated_limit": found.repeated_limit,
        "most_repeated": worst,
        "one_response": _prompts_with_one_response(samples),
        "marks": _marks(samples),
        "contradicted": int(contradicted.sum()),
        "contradicting": listed,
        "applied": options.apply,
    }
    scores = np.where(unscored, np.nan, found.scores) if state.published else found.scores
    flags = found.reason | np.where(contradicted, Flag.CONTRADICTED, 0).astype(np.uint8)
    return replace(state, flags=flags).rescored(scores).with_summary("hygiene", summary)


def _source_name(samples, response) -> str | None:
    if samples.sources is None or samples.sources[response] < 0:
        return None
    return samples.source_names[samples.sources[response]]


def _prompts_with_one_response(samples) -> int:
    alone = int((np.diff(samples.offsets) == 1).sum())
    if alone:
        text = f"{alone} of {samples.prompts} prompts have one response: no pair can be made of them"
        warnings.warn(DataWarning("one-response", text), stacklevel=3)
    return alone


def _marks(samples) -> list[dict]:
    """Values that probably stand for no score, of every column."""
    marks = [
        {"scores": name} | mark._asdict()
        for name, column in (samples.scores.items() if samples.scored else ())
        for mark in find_marks(column, samples.offsets)
    ]
    for mark in marks:
        text = (
            f"{mark['value']:g} stands as {mark['scores']} of {mark['responses']} responses under {mark['prompts']} "
            f"prompts, outside of all other scores; if it means that there is none: --missing {mark['value']:g}"
        )
        warnings.warn(DataWarning("sentinel-scores", text), stacklevel=3)
    return marks


def _contradicting_scores(state, config) -> tuple[np.ndarray, list[dict]]:
    """bool [responses], whose first score another one contradicts; and the worst of them, as the summary lists them."""
    samples, primary = state.samples, primary_field(state.samples, config)
    contradicted = np.zeros(samples.responses, bool)
    if primary is None:
        return contradicted, []
    others = samples.scores | samples.beside
    columns = {primary.name: samples.scores[primary.name]} | others
    found = find_contradictions({name: np.where(state.valid, column, np.nan) for name, column in columns.items()})
    contradicted[found.response] = True
    names, prompt = list(columns), per_prompt(samples.offsets)
    listed = [
        {
            "row": int(samples.row[prompt[response]]),
            "response": int(response - samples.offsets[prompt[response]]),
            "source": _source_name(samples, response),
            primary.name: float(columns[primary.name][response]),
            names[column]: float(columns[names[column]][response]),
            "deviations": round(float(distance), 1),
            "index": int(response),
        }
        for response, column, distance in zip(*(known[:MOST_LISTED] for known in found), strict=True)
    ]
    return contradicted, listed
