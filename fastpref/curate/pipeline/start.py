"""Where a run begins: what is read of every row, and the state before the first stage."""

import math
import os
from dataclasses import dataclass, field

import numpy as np

from fastpref.curate.files.samples import read_samples
from fastpref.curate.files.table import Samples
from fastpref.curate.files.writing import write_problems
from fastpref.curate.pipeline.options import Options, check_at_least_one
from fastpref.curate.pipeline.scores import declared_fields, primary_scores
from fastpref.curate.pipeline.state import LeftOut, State
from fastpref.errors import InputError


@dataclass(frozen=True)
class ReadOptions(Options):
    """What is read of every row. `scores` are "field" or "field:logit"; the first one constructs the pairs, the others
    vote when pairs are selected. `implicit` is a field, or a .npy with one implicit reward per response of the file,
    of `implicit_rewards` with beta=1: the bounds of `select` are in nats."""

    scores: tuple[str, ...] = ()  # none: the usual ones of the layout
    sources: str | None = None
    lengths: str | None = None
    implicit: str | None = None
    layout: str | None = None  # a name of `layouts`; None: the only one that fits
    columns: dict[str, str] = field(default_factory=dict)  # role -> column, where the file calls it otherwise
    keep: tuple[str, ...] = ()  # columns that reach the output
    missing: tuple[float, ...] = ()  # scores that stand for none
    score_range: tuple[float, ...] = ()  # (lowest, highest) the scores can be, such as (1, 10)
    workers: int | None = None

    def check(self) -> None:
        check_at_least_one("read.workers", self.workers)
        declared = self.score_range
        if declared and not (len(declared) == 2 and -math.inf < declared[0] < declared[1] < math.inf):
            raise InputError(f"read.score_range must be two numbers, the lower first, got {list(declared)}")


def reading_options(config) -> dict:
    """The arguments of `read_samples` that say what is read."""
    options = config.read
    fields = [field.name for field in declared_fields(options)]
    if options.implicit is not None and not os.path.exists(options.implicit):
        if options.implicit.endswith(".npy"):
            raise InputError(f"cannot read {options.implicit}: no such file of implicit rewards")
        if not fields:
            raise InputError(f"read.scores must be given beside the field {options.implicit!r} of implicit rewards")
        fields.append(options.implicit)
    return {
        "score_fields": fields or None,
        "source_field": options.sources,
        "length_field": options.lengths,
        "layout": options.layout,
        "columns": options.columns,
        "keep": options.keep,
        "missing": options.missing,
    }


def read_state(config, progress=None) -> State:
    """The state before the first stage, from the file."""
    options = reading_options(config)
    samples = read_samples(config.input, **options, workers=config.read.workers, progress=progress)
    if not samples.prompts:
        if config.write.bad_rows is not None:
            write_problems([*samples.problems, *samples.bad_responses], config.write.bad_rows)
        first = f", the first of {len(samples.problems)} bad ones: {samples.problems[0]}" if samples.problems else ""
        said = "".join(f", {count} left out: {reason}" for reason, count in samples.counts.items())
        raise InputError(f"{samples.path} holds no row that can be used{first}{said}")
    return first_state(samples, config)


def first_state(samples: Samples, config) -> State:
    """The state before the first stage, of samples that were read."""
    score = primary_scores(samples, config)
    published = keeps_published_sides(samples, config)
    if config.construct.labels != "published" and not samples.published:
        raise InputError(
            f"--labels {config.construct.labels} is for pairs whose sides are published, and {samples.path} holds "
            f"{samples.layout}"
        )
    if not published and not samples.scored:
        raise InputError(f"--labels {config.construct.labels} goes by scores, and {samples.path} has none")
    # what keeps its published side needs no score
    missing = np.isnan(score) & (not published)
    return State(
        samples,
        score=score,
        left_out=np.where(missing, LeftOut.NO_SCORE, LeftOut.KEPT).astype(np.uint8),
        choosable=np.ones(len(score), bool),
        flags=np.zeros(len(score), np.uint8),
        taken=np.ones(samples.prompts, bool),
        published=published,
    )


def keeps_published_sides(samples: Samples, config) -> bool:
    """Whether the file is one of pairs whose sides stay as they were published."""
    return samples.published and config.construct.labels != "scores"
