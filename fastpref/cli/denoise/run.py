"""`fastpref denoise`: chooses between robust PCA and Bradley-Terry by what was read, and writes whole files."""

import contextlib
from collections.abc import Iterator

import torch

from fastpref._warnings import collected_warnings
from fastpref._whole_file import whole_file
from fastpref.cli.denoise.inputs import Input
from fastpref.cli.denoise.options import DenoiseOptions
from fastpref.errors import InputError


def denoise_input(given: Input, options: DenoiseOptions, progress) -> dict:
    """Solves what `open_input` gave and writes the output files.

    Args:
        given: From `open_input` with the same options.
        options: Of the command.
        progress: StageBars.

    Returns:
        The summary, ready for JSON, but for the seconds, which reading began.

    Raises:
        InputError: For what the user can mend.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    outputs = [path for path in (options.output_file, options.flagged, options.plot) if path is not None]
    if options.plot is not None:
        import fastpref.cli.denoise.plots  # noqa: F401  needs matplotlib: say so before the run rather than after it
    with _library_errors(), contextlib.ExitStack() as stack:
        temporary = {path: stack.enter_context(whole_file(path)) for path in outputs}
        with collected_warnings(RuntimeWarning) as messages:
            if given.comparisons is not None:
                from fastpref.cli.denoise.comparisons import denoise_comparisons  # needs pyarrow

                summary = denoise_comparisons(given.comparisons, options, temporary, progress)
            else:
                from fastpref.cli.denoise.matrices import denoise_matrix

                summary = denoise_matrix(given, options, temporary, progress)
    return {
        "input": options.name,
        "output": options.output_file,
        "read_as": given.read_as,
        **summary,
        "warnings": [*given.warnings, *summary["warnings"], *messages],
    }


def summary_lines(summary: dict) -> list[str]:
    """Returns the summary in a line; of a table a line before it says how it was read."""

    def typical(name):
        number = summary[name]
        return number["median"] if isinstance(number, dict) else number

    rate, iterations = typical("outlier_rate"), typical("iterations")
    if summary["kind"] == "comparisons":
        found = f"scores of {summary['items']} items from {summary['comparisons']} comparisons"
        found += f" in {summary['graphs']} graphs" * (summary["graphs"] > 1)
        found += f", {summary['ties']:g} ties" * bool(summary["ties"])
        found += f", {summary['unused']} rows unused" * bool(summary["unused"])
    else:
        found = f"{' x '.join(map(str, summary['shape']))}, rank {typical('rank'):g}"
        found += f", {summary['undetermined']} cells without a value" * bool(summary["undetermined"])
    corrupted = "nothing observed" if rate is None else f"{rate:.2%} corrupted"
    line = f"{summary['output']}: {found}, {corrupted}, {iterations:g} iterations, {summary['seconds']:.1f} s"
    return [line] if summary["read_as"] is None else [summary["read_as"], line]


@contextlib.contextmanager
def _library_errors() -> Iterator[None]:
    """Turns errors of the library's arguments, of files and of memory into InputError."""
    try:
        yield
    except InputError:
        raise
    except (TypeError, ValueError, torch.linalg.LinAlgError) as error:
        raise InputError(" ".join(str(error).split())) from error
    except OSError as error:
        raise InputError(f"cannot write: {error.strerror or error}") from error
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            raise InputError("not enough memory") from error
        raise
