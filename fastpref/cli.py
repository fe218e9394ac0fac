"""The `fastpref` command. Exit codes: 0 done, 1 the run found something wrong, 2 the user can mend it, 3 a defect.

Handlers import what they run, so that --help and --version answer without importing torch.
"""

import argparse
import json
import signal
import sys
import traceback

from fastpref import __version__
from fastpref.curate.samples import InputError


def main(argv=None) -> int:
    """Runs one command; argv defaults to sys.argv[1:]. Returns the exit code; argparse exits by itself for --help."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.handler(arguments)
    except InputError as error:
        print(f"{arguments.name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{arguments.name}: interrupted", file=sys.stderr)
        return 130  # 128 + SIGINT, as shells have it
    except Exception:  # 1, which Python would give, means done
        traceback.print_exc()
        return 3


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fastpref", description="Fused kernels for preference optimisation, and the data for it.")
    parser.add_argument("--version", action="version", version=f"fastpref {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_info(commands)
    _add_demo(commands)
    _add_denoise(commands)
    return parser


# ---- info


def _add_info(commands) -> None:
    info = commands.add_parser(
        "info", help="what was built, which backend serves which op on which device, and why not"
    )
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(handler=_info, name="fastpref")


def _info(arguments) -> int:
    import fastpref

    info = fastpref.build_info()
    print(json.dumps(info, indent=2, default=str) if arguments.json else "\n".join(_indented(info)))
    return 0


def _indented(info, depth=0) -> list[str]:
    """A nested dict as lines, one level of indent per level of nesting."""
    width = max(map(len, info), default=0)
    lines = []
    for name, value in info.items():
        if isinstance(value, dict):
            lines += ["  " * depth + name, *_indented(value, depth + 1)]
        else:
            lines.append(f"{'  ' * depth}{name:<{width}}  {value}")
    return lines


# ---- demo


def _add_demo(commands) -> None:
    demo = commands.add_parser(
        "demo",
        help="scored samples -> pairs -> RDPO on a small transformer: what it learnt, what it cost",
        description="Builds pairs from scored samples, trains a small transformer with RDPO through the fused loss and "
        "prints what it learnt on held-out prompts and what the loss cost against plain PyTorch. Under three minutes "
        "on two CPU cores. Without --data it uses samples the project makes itself.",
    )
    demo.add_argument("--data", metavar="FILE", help="JSON Lines (also .gz) or Parquet: prompt, responses[], scores[]")
    demo.add_argument("--score-field", metavar="NAME", help="field with the scores (default: scores, else win_prob)")
    demo.add_argument(
        "--score-scale",
        choices=["auto", "raw", "logit"],
        default="auto",
        help="logit turns probabilities into a linear scale; auto does so when all scores lie in [0, 1]",
    )
    demo.add_argument(
        "--max-prompts", type=positive_integer, default=1000, metavar="N", help="first N prompts (%(default)s)"
    )
    demo.add_argument(
        "--steps", type=positive_integer, default=40, metavar="N", help="of warm-up and of RDPO (%(default)s)"
    )
    demo.add_argument("--seeds", type=positive_integer, default=3, metavar="N", help="trained models (%(default)s)")
    demo.add_argument("--seed", type=int, default=0, metavar="N", help="the first seed (%(default)s)")
    demo.add_argument("--threads", type=positive_integer, metavar="N", help="CPU threads (default: torch's own choice)")
    demo.add_argument("--json", metavar="FILE", help="also write the numbers to FILE")
    demo.set_defaults(handler=_demo, name="fastpref")


def _options(arguments) -> dict:
    return {name: value for name, value in vars(arguments).items() if name not in ("handler", "name")}


def positive_number(text) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be positive and finite, got {text}")
    return number


def positive_integer(text) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _demo(arguments) -> int:
    from fastpref.demo.report import screen
    from fastpref.demo.run import DemoOptions, run_demo

    options = _options(arguments)
    json_path = options.pop("json")
    if json_path is not None:
        _check_writable(json_path)
    results = run_demo(DemoOptions(**options))
    print(screen(results))
    if json_path is not None:
        with open(json_path, "w") as file:
            json.dump(results, file, indent=2)
    return 0 if results["cost"]["losses_equal"] else 1


def _check_writable(path) -> None:
    """Before the run rather than after it."""
    try:
        with open(path, "a"):
            pass
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error


# ---- denoise


DENOISE = """\
Splits what IN holds into structure and corruption, and writes the structure to OUT.

IN is a matrix or comparisons:
  .npy, .npz           a matrix [m, n] or a batch [batch, m, n], NaN (int8: -128) missing: robust PCA, M = L + S. One
                       float16, float32, float64 or int8 matrix in a .npy is memory-mapped and never copied; other
                       integers become float32 or float64 first.
  .parquet, .csv[.gz], .jsonl[.gz]
    row, column, value          triples of a matrix, cells without one missing: robust PCA
    i, j, wins_i, wins_j        how often item i beat item j, and j beat i: robust Bradley-Terry scores
    winner, loser               one vote a row: the same
    i, j, value                 the logit of i beating j, log(p / (1 - p)): the same
  With a column prompt, every prompt has scores of its own. Names are strings (in CSV always) or integers. Columns
  called otherwise are named with --columns, and where several layouts fit, --layout chooses.

OUT of a matrix is what --output says; of comparisons a .parquet, .csv or .jsonl with, for every item, its score (mean 0
in each component), component (compared among each other, directly or not) and rejected (share of its pairs flagged)."""
EXIT_CODES = """\
Exit codes: 0 done; 1 done and written, but something did not converge, which stderr says; 2 the user can mend it; 3 a
defect of fastpref, with a traceback; 130 interrupted. Every output is written whole or not at all.

With --rank, converged means that the iteration came to rest. Whether a low rank explains the matrix, the share of
corrupted entries, the noise scale and the plot show."""


def _add_denoise(commands) -> None:
    denoise = commands.add_parser(
        "denoise",
        help="a matrix or comparisons, some of them corrupted -> low rank or scores, and what is corrupted",
        description=DENOISE,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    denoise.add_argument("input", metavar="IN", help="told apart by its ending")
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
    table.add_argument("--layout", choices=["triples", "votes", "winners", "logits"], help="which of the four above")
    table.add_argument(
        "--columns",
        type=_columns,
        default={},
        metavar="ROLE=NAME,...",
        help="what the file calls them, such as i=model_a,j=model_b,prompt=question_id",
    )
    comparisons = denoise.add_argument_group("comparisons, as the arguments of fastpref.bradley_terry")
    comparisons.add_argument(
        "--no-robust", dest="robust", action="store_false", default=None, help="plain maximum likelihood of votes"
    )
    comparisons.add_argument("--stderr", action="store_true", default=None, help="also the scores' standard errors")
    comparisons.add_argument("--flagged", metavar="FILE", help="table of the pairs that disagree with the scores")
    denoise.set_defaults(handler=_denoise, name="fastpref denoise")


def _columns(text) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in text.split(",")]
    if wrong := [role for role, equals, name in pairs if not (role and equals and name)]:
        raise argparse.ArgumentTypeError(f"must be ROLE=NAME,..., got {wrong[0]!r} in {text!r}")
    return {role: name for role, _, name in pairs}


def _denoise(arguments) -> int:
    from fastpref.denoise.options import DenoiseOptions
    from fastpref.denoise.run import denoise, sentence

    options = _options(arguments)
    as_json = options.pop("json")
    # kill, too, leaves no temporary file behind
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        summary = denoise(DenoiseOptions(**options))
    finally:
        signal.signal(signal.SIGTERM, previous)
    for warning in summary["warnings"]:
        print(f"fastpref denoise: warning: {warning}", file=sys.stderr)
    print(json.dumps(summary, indent=2) if as_json else sentence(summary))
    return 0 if summary["converged"] else 1
