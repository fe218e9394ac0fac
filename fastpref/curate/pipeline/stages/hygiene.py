"""Stage hygiene: copies, blanks, texts under many prompts, texts that must not be trained on."""

from dataclasses import dataclass, replace

import numpy as np

from fastpref.curate.files.samples import text_hashes
from fastpref.curate.hygiene import Flag, hygiene
from fastpref.curate.pipeline.options import Options
from fastpref.curate.pipeline.scores import clamped_scores
from fastpref.curate.pipeline.state import LeftOut, State


@dataclass(frozen=True)
class HygieneOptions(Options):
    apply: bool = False  # also leave out repeated texts and contaminated prompts, rather than report them
    repeated_share: float = 0.01
    repeated_least: int = 3
    decontaminate: tuple[str, ...] = ()  # files whose prompts must not be trained on


def check_texts(state: State, config) -> State:
    samples, options = state.samples, config.hygiene
    banned = [text_hashes(path) for path in options.decontaminate]
    found = hygiene(
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
        state = state.leave_out(found.reason & flag != 0, reason)
    flagged = found.repeated
    worst = [
        {"prompts": int(n), "source": _source_name(samples, first), "characters": int(samples.lengths[first])}
        for n, first in zip(flagged.prompts[:5], flagged.first[:5], strict=True)
    ]
    summary = found.counts() | {
        "clamped": clamped_scores(samples, config),
        "copies_std": found.copies_std,
        "repeated_limit": found.repeated_limit,
        "most_repeated": worst,
        "applied": options.apply,
    }
    return replace(state, flags=found.reason).rescored(found.scores).with_summary("hygiene", summary)


def _source_name(samples, response) -> str | None:
    if samples.sources is None or samples.sources[response] < 0:
        return None
    return samples.source_names[samples.sources[response]]
