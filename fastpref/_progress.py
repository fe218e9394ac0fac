"""How far a long run is: to a function of the caller, or as a bar on a terminal."""

import contextlib
import shutil
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def reporting(progress, total: int | None, what: str) -> Iterator[Callable[[int], None]]:
    """Gives `report(done)`. progress: None or False for silence, a function of (done, total), or True: a bar of tqdm on
    stderr, if that is a terminal. total: None where nobody knows. Raises TypeError for anything else."""
    if progress is None or progress is False:
        yield lambda done: None
    elif progress is not True:
        if not callable(progress):
            raise TypeError(f"progress must be a bool or a function of (done, total), got {type(progress).__name__}")
        yield lambda done: progress(done, total)
    elif not sys.stderr.isatty():
        yield lambda done: None
    else:
        from tqdm import tqdm

        # Without a size of its own, tqdm draws nothing on a pseudo-terminal that says it is 0 by 0.
        size = shutil.get_terminal_size()
        with tqdm(desc=what, total=total, ncols=size.columns, nrows=size.lines, leave=False, file=sys.stderr) as bar:
            yield lambda done: bar.update(done - bar.n)
