"""How far a long run is: to a function of the caller, or as a bar on a terminal."""

import contextlib
import shutil
import sys
from collections.abc import Callable, Iterator


def open_bar(what: str | None, total: int | None, *, unit_scale: bool = False):
    """A bar of tqdm on stderr, or None where that is no terminal. Raises ImportError without tqdm."""
    if not sys.stderr.isatty():
        return None
    from tqdm import tqdm

    # Without a size of its own, tqdm draws nothing on a pseudo-terminal that says it is 0 by 0.
    size = shutil.get_terminal_size()
    place = {"ncols": size.columns, "nrows": size.lines, "leave": False, "file": sys.stderr}
    return tqdm(desc=what, total=total, unit_scale=unit_scale, **place)


@contextlib.contextmanager
def reporting(progress, total: int | None, what: str) -> Iterator[Callable[[int], None]]:
    """Gives `report(done)`. progress: None or False for silence, a function of (done, total), or True: a bar of tqdm on
    stderr, if that is a terminal. total: None where it is not known. Raises TypeError for anything else."""
    if progress is None or progress is False:
        yield lambda done: None
    elif progress is not True:
        if not callable(progress):
            raise TypeError(f"progress must be a bool or a function of (done, total), got {type(progress).__name__}")
        yield lambda done: progress(done, total)
    elif (bar := open_bar(what, total)) is None:
        yield lambda done: None
    else:
        with bar:
            yield lambda done: bar.update(done - bar.n)


class StageBars:
    """One bar after another, each for a stage of a run; nothing off a terminal or without tqdm.

    unit_scale: 1.5k for 1500.
    """

    def __init__(self, *, unit_scale: bool = False):
        self.unit_scale, self.stage, self.bar = unit_scale, None, None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self.bar is not None:
            self.bar.close()

    def begin_stage(self, stage: str, total: int | None = None) -> None:
        """What comes next. total: its steps, None where that is not known."""
        self.__exit__()
        self.stage = stage
        with contextlib.suppress(ImportError):
            self.bar = open_bar(stage, total, unit_scale=self.unit_scale)

    def advance(self, steps: int = 1, **numbers) -> None:
        """Steps that were done, and numbers to show beside them."""
        if self.bar is not None:
            self.bar.set_postfix(numbers, refresh=False)
            self.bar.update(steps)

    def report(self, stage: str, done: int, total: int | None) -> None:
        """The same as one call: `done` of the steps of `stage`, which begins where it is another one."""
        if stage != self.stage:
            self.begin_stage(stage, total)
        if self.bar is not None:
            self.bar.update(done - self.bar.n)
