"""Score columns of the samples: which were declared, on which scale, and which vote when pairs are selected."""

import re
from typing import NamedTuple

import numpy as np

from fastpref.curate.files.table import Samples
from fastpref.curate.pipeline.state import State
from fastpref.curate.scale import to_logit
from fastpref.errors import InputError

_RANK = re.compile(r"(.*[_-])?rank(s|ing|ings)?", re.IGNORECASE)
SCALES = ("raw", "logit", "best-high", "best-low")


class ScoreField(NamedTuple):
    name: str
    scale: str  # one of SCALES

    @property
    def declaration(self) -> str:
        """As in the config: "field" or "field:logit"."""
        return self.name if self.scale == "raw" else f"{self.name}:{self.scale}"


def declared_fields(read) -> list[ScoreField]:
    found = []
    for text in read.scores:
        name, _, scale = text.partition(":")
        if not name or scale not in ("", *SCALES):
            raise InputError(f"scores must be FIELD or FIELD with {', '.join(':' + s for s in SCALES)}, got {text!r}")
        if name in (known.name for known in found):
            raise InputError(f"scores must name a field once, got {name!r} twice")
        found.append(ScoreField(name, scale or "raw"))
    return found


def primary_field(samples: Samples, config) -> ScoreField | None:
    """The field that pairs are made by; None for published pairs without scores."""
    if not samples.scored:
        return None
    return (declared_fields(config.read) or [ScoreField(next(iter(samples.scores)), "raw")])[0]


def linear_scores(samples: Samples, field: ScoreField) -> np.ndarray:
    """float64 [responses], as the file has them, on the declared scale: the higher the better."""
    column = samples.scores[field.name]
    if field.scale == "raw" and _RANK.fullmatch(field.name):
        name = field.name
        raise InputError(f"{name} is a rank: say which end is best, --scores {name}:best-low or {name}:best-high")
    if field.scale == "best-low":
        return 0.0 - column  # without a negative zero
    try:
        return to_logit(column) if field.scale == "logit" else column
    except ValueError as error:
        raise InputError(f"{field.name}:logit: {error}") from error


def primary_scores(samples: Samples, config) -> np.ndarray:
    """float64 [responses], the scores that pairs are made by, before any stage; NaN where there are none."""
    field = primary_field(samples, config)
    return np.full(samples.responses, np.nan) if field is None else linear_scores(samples, field)


def clamped_scores(samples: Samples, config) -> int:
    """How many probabilities of exactly 0 or 1 became the logit of the clamp."""
    field = primary_field(samples, config)
    if field is None or field.scale != "logit":
        return 0
    return int(np.isin(samples.scores[field.name], (0.0, 1.0)).sum())


def votes(state: State, config) -> dict[str, np.ndarray]:
    """Score columns by which pairs are selected: the working score, the others declared, and implicit rewards."""
    samples, read = state.samples, config.read
    primary = primary_field(samples, config)
    found = {} if primary is None else {primary.name: state.score}
    if samples.scored:
        found |= {field.name: linear_scores(samples, field) for field in declared_fields(read)[1:]}
    if read.implicit is not None:
        found["implicit"] = samples.scores.get(read.implicit)
        if found["implicit"] is None:
            found["implicit"] = _implicit_rewards(read.implicit, samples.responses)
    return found


def _implicit_rewards(path, responses) -> np.ndarray:
    try:
        column = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"cannot read {path}: {str(error).partition(chr(10))[0]}") from error
    if not isinstance(column, np.ndarray) or column.shape != (responses,) or column.dtype.kind != "f":
        found = f"{column.dtype} {list(column.shape)}" if isinstance(column, np.ndarray) else "an archive"
        raise InputError(f"{path} must hold floating-point [{responses}], one per response of the file, got {found}")
    return column.astype(np.float64)
