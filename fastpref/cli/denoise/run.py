"""`fastpref denoise`: reads, chooses between robust PCA and Bradley-Terry by what was read, and writes whole files."""

import contextlib
import os
import time
from collections.abc import Iterator

import torch

from fastpref._progress import StageBars
from fastpref._warnings import collected_warnings
from fastpref._whole_file import format_of, whole_file
from fastpref.cli.denoise import files, matrices
from fastpref.cli.denoise.options import COMPARISON_OPTIONS, MATRIX_OPTIONS, DenoiseOptions, check_ending
from fastpref.errors import InputError

PLOTS = (".pdf", ".png", ".svg")


def denoise_file(options: DenoiseOptions) -> dict:
    """Writes the output files and returns the summary, ready for JSON. Raises InputError for what the user can mend."""
    started = time.perf_counter()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    source, out = options.input, options.output_file
    outputs = [path for path in (out, options.flagged, options.plot) if path is not None]
    for index, path in enumerate(outputs):
        for other in [source, *outputs[:index]]:
            if os.path.realpath(path) == os.path.realpath(other):
                raise InputError(f"{path} would overwrite {'IN' if other == source else 'another output'}")
    if options.plot is not None:
        check_ending("--plot", options.plot, PLOTS)
        import fastpref.cli.denoise.plots  # noqa: F401  needs matplotlib: say so before the run rather than after it
    with _library_errors(), contextlib.ExitStack() as stack:
        progress = stack.enter_context(StageBars())
        progress.begin_stage("reading")
        run = _prepared(options)
        temporary = {path: stack.enter_context(whole_file(path)) for path in outputs}
        with collected_warnings(RuntimeWarning) as messages:
            summary = run(temporary, progress)
    return {
        "input": source,
        "output": out,
        **summary,
        "warnings": summary["warnings"] + messages,
        "seconds": time.perf_counter() - started,
    }


def sentence(summary: dict) -> str:
    """Returns the summary in a line."""

    def typical(name):
        number = summary[name]
        return number["median"] if isinstance(number, dict) else number

    rate, iterations = typical("outlier_rate"), typical("iterations")
    if summary["kind"] == "comparisons":
        found = f"scores of {summary['items']} items from {summary['comparisons']} comparisons"
        found += f" in {summary['graphs']} graphs" * (summary["graphs"] > 1)
    else:
        found = f"{' x '.join(map(str, summary['shape']))}, rank {typical('rank'):g}"
    corrupted = "nothing observed" if rate is None else f"{rate:.2%} corrupted"
    return f"{summary['output']}: {found}, {corrupted}, {iterations:g} iterations, {summary['seconds']:.1f} s"


def _prepared(options: DenoiseOptions):
    """Reads the input and checks flags and endings against it; returns function(temporary, progress) -> summary."""
    format = format_of(options.input)
    if format in (".npy", ".npz"):
        options.refuse((*COMPARISON_OPTIONS, "layout"), "a matrix")
        if options.columns:
            raise InputError("--columns is not for a matrix")
        return matrices.prepare_array(files.read_array(options.input, options.array, options.max_dense), options)
    from fastpref.cli.denoise import comparisons, tables  # need pyarrow

    if format not in tables.FORMATS:
        raise InputError(f"IN must end in .npy, .npz, {', '.join(tables.FORMATS)}, got {options.input}")
    options.refuse(("array",), "a table")
    table, layout = tables.read_table(options.input, options.layout, options.columns)
    if layout == "triples":
        options.refuse(COMPARISON_OPTIONS, "triples, which are a matrix")
        return matrices.prepare_triples(table, options)
    options.refuse(MATRIX_OPTIONS, f"comparisons, which {options.input} holds ({layout})")
    return comparisons.prepare_comparisons(table, layout, options)


@contextlib.contextmanager
def _library_errors() -> Iterator[None]:
    """Turns errors of the library's arguments, of files and of memory into InputError."""
    try:
        yield
    except InputError:
        raise
    except (TypeError, ValueError, torch.linalg.LinAlgError) as error:
        raise InputError(str(error).partition("\n")[0]) from error
    except OSError as error:
        raise InputError(f"cannot write: {error.strerror or error}") from error
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            raise InputError("not enough memory") from error
        raise
