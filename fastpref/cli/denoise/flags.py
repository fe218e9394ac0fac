"""The flags of `fastpref denoise`, and what it prints. It imports torch only for a run, not for --help."""

import argparse
import json
import sys
import time

from fastpref.cli.arguments import ColumnsAction, options_of, positive_integer, positive_number
from fastpref.cli.signals import sigterm_interrupts
from fastpref.errors import printable

DESCRIPTION = """\
Splits what IN holds into structure and corruption, and writes the structure to OUT.

IN is a matrix or comparisons:
  .npy, .npz           a matrix [m, n] or a batch [batch, m, n], NaN (int8: -128) missing: robust PCA, M = L + S. One
                       float16, float32, float64 or int8 matrix in a .npy is memory-mapped and never copied; other
                       integers become float32 or float64 first.
  a table              CSV with any of , ; | and tabs, JSON Lines, a JSON array, Parquet or Arrow; text also .gz or
                       .zst; one file or several, folders, globs, addresses that fsspec knows, - for stdin. Columns:
    triples  row, column, value             cells of a matrix, those without one missing: robust PCA
    votes    i, j, wins_i, wins_j [ties]    how often item i beat item j, j beat i, and neither: robust Bradley-Terry
             model_a, model_b, winner_model_a, winner_model_b, winner_tie       the same
    winners  winner, loser [tie] [count]    one vote a row, or count (weight) of them: the same
    battles  model_a, model_b, winner       likewise [count]: winner is model_a or model_b (a, b), tie, tie (bothbad) or
             (or i, j, winner)              both_bad, and a tie is half a win for each
    logits   i, j, value                    the logit of i beating j, log(p / (1 - p)): the same
  Columns called otherwise are named with --columns, and where several layouts fit, --layout chooses. Names are strings
  (in CSV always) or integers. With --columns prompt=NAME every prompt has scores of its own; a column judge (or
  judge=NAME) is counted, and judges who favour the item shown first are named. Rows without a vote, such as 0 and 0
  where no column counts ties, are not used, and counted. A size of 1e30 or more is a missing value.

OUT of a matrix is what --output says; of comparisons a .parquet, .csv or .jsonl with, for every item, its score (mean 0
in each component), component (compared among each other, directly or not) and rejected (share of its pairs flagged).
What the data do not determine has no value there (NaN, null): cells of rows and columns with too few entries, cells
between parts of a matrix that share no row and no column, and what lies beyond all entries in a fit that did not
converge. An output keeps the mode and the owner of the file that it replaces; its folder is made."""
EXIT_CODES = """\
Exit codes: 0 done; 1 done and written, but something did not converge, which stderr says; 2 the input, the flags or the
machine do not allow it: stderr says why in one line; 3 a defect of fastpref, with a traceback; 130 interrupted. Every
output is written whole or not at all.

With --rank, converged means that the iteration came to rest. Whether a low rank explains the matrix, the share of
corrupted entries, the noise scale and the plot show."""


def add_parser(commands) -> None:
    denoise = commands.add_parser(
        "denoise",
        help="a matrix or comparisons, some of them corrupted -> low rank or scores, and what is corrupted",
        description=DESCRIPTION,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    denoise.add_argument("inputs", metavar="IN", nargs="+", help="a matrix by its ending, a table by what is in it")
    denoise.add_argument("output_file", metavar="OUT", help="replaced if it is there")
    denoise.add_argument("--json", action="store_true", help="print a summary as JSON to stdout instead of one line")
    denoise.add_argument(
        "--plot",
        metavar="FILE",
        help="L, S and singular values (comparisons: scores and flagged pairs) as .png, .pdf or .svg; of a batch its "
        "first matrix, of prompts the largest",
    )
    denoise.add_argument("--tol", type=float, metavar="X", help="of rpca or bradley_terry (default: theirs)")
    denoise.add_argument("--max-iter", type=positive_integer, metavar="N", help="likewise")
    denoise.add_argument("--threads", type=positive_integer, metavar="N", help="CPU threads (default: torch's choice)")
    denoise.add_argument(
        "--max-dense",
        type=positive_number,
        metavar="GIB",
        help="refuse before holding a dense matrix of more than this: of triples, of converted numbers, or the ten "
        "copies that the convex program needs without --rank (default: half of the memory)",
    )
    matrix = denoise.add_argument_group("matrices, as the arguments of fastpref.rpca")
    matrix.add_argument("--rank", type=int, metavar="N", help="of L; without it the convex program finds it")
    matrix.add_argument("--method", choices=["auto", "annealed", "altproj", "ialm"])
    matrix.add_argument("--structure", choices=["general", "skew"], help="skew: M = -M^T")
    matrix.add_argument("--corruption", choices=["entries", "rows", "columns"], help="what is corrupted")
    matrix.add_argument("--lam", type=float, metavar="X", help="weight of |S|_1 in the convex program")
    matrix.add_argument(
        "--scale", type=positive_number, metavar="X", help="what stored numbers, such as int8, are multiplied by"
    )
    matrix.add_argument("--array", metavar="NAME", help="which array of an .npz; needed where there are several")
    matrix.add_argument(
        "--output",
        choices=["low-rank", "factors", "masked"],
        help="low-rank (default): L, dense, .npy; masked: IN with the corrupted entries missing, .npy; factors: U, S, "
        "Vh, the corruption as sparse_indices and sparse_values, and the diagnoses, .npz. Of triples: a table of all "
        "cells of L; IN's own rows, corrupted values null; .npz",
    )
    table = denoise.add_argument_group("tables")
    table.add_argument(
        "--layout", choices=["triples", "votes", "winners", "battles", "logits"], help="which of the five above"
    )
    table.add_argument(
        "--columns",
        action=ColumnsAction,
        default={},
        metavar="ROLE=NAME,...",
        help="what the file calls them, such as i=model_a,j=model_b,prompt=question_id; names may hold commas",
    )
    table.add_argument(
        "--csv-safe",
        action="store_true",
        help="in CSV, put an apostrophe before names that begin with = + - @, which spreadsheets would compute",
    )
    comparisons = denoise.add_argument_group("comparisons, as the arguments of fastpref.bradley_terry")
    comparisons.add_argument(
        "--no-robust", dest="robust", action="store_false", default=None, help="plain maximum likelihood of votes"
    )
    comparisons.add_argument("--stderr", action="store_true", default=None, help="also the scores' standard errors")
    comparisons.add_argument("--flagged", metavar="FILE", help="table of the pairs that disagree with the scores")
    denoise.set_defaults(handler=run_command, name="fastpref denoise")


def run_command(arguments) -> int:
    from fastpref._progress import StageBars
    from fastpref.cli.denoise.inputs import open_input
    from fastpref.cli.denoise.options import DenoiseOptions

    options = options_of(arguments)
    as_json = options.pop("json")
    options, began = DenoiseOptions(**options), time.perf_counter()
    with sigterm_interrupts(), StageBars() as progress:
        progress.begin_stage("reading")
        given = open_input(options)
        # torch, after all that may be refused without it
        from fastpref.cli.denoise.run import denoise_input, summary_lines

        summary = denoise_input(given, options, progress) | {"seconds": time.perf_counter() - began}
    print(json.dumps(summary, indent=2) if as_json else "\n".join(map(printable, summary_lines(summary))), flush=True)
    for kind in ("warning", "note"):
        for text in summary.get(f"{kind}s", ()):
            print(f"fastpref denoise: {kind}: {printable(text)}", file=sys.stderr)
    return 0 if summary["converged"] else 1
