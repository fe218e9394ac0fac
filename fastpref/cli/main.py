"""The `fastpref` command. Exit codes: 0 done, 1 the run found something wrong, 2 the user can mend it, 3 a defect.

Handlers import what they run, so that --help and --version answer without importing torch.
"""

import argparse
import json
import signal
import sys
import traceback

from fastpref import __version__
from fastpref.curate.pipeline.config import CLEAN, EXCLUDE, FORMATS, GOALS, LENGTH_CONTROL
from fastpref.errors import InputError


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
    _add_curate(commands)
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
    from fastpref.cli.demo.report import screen
    from fastpref.cli.demo.run import DemoOptions, run_demo

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
    from fastpref.cli.denoise.options import DenoiseOptions
    from fastpref.cli.denoise.run import denoise, sentence

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


# ---- curate


CURATE = """\
Makes training pairs of scored responses. It starts at scored files: it samples no responses and scores none.

IN is JSON Lines (also .gz) or Parquet, a prompt a row:
  prompt, responses[], scores[]     any name for the scores (--scores), several columns of them; also sources[] (who
                                    wrote each response: --sources), lengths[], truncated[] or finish_reason[]
  instruction, completions[]        UltraFeedback
  chosen, rejected, score_chosen, score_rejected    TRL's preference rows with scores: a pool of two
Prompts and responses are strings or messages [{"role", "content"}, ...]. What a row must hold and does not is a bad
row: left out, counted, listed in --bad-rows.

OUT is .jsonl[.gz] or .parquet, a row a pair: texts as --format has them, and beside them the scores (score_chosen,
score_rejected, margin) and where it all comes from. Scores stay as they are in every stage.

The stages, in this order unless the config says otherwise:
  hygiene    copies of a text under one prompt count once (with the mean of their scores), blank responses and missing
             scores not at all. One text under many prompts, and prompts that stand in --decontaminate files, are
             reported; --apply leaves them out.
  audit      with --sources: whose scores the other sources do not explain. From 200 prompts on, flagged sources are
             neither chosen nor rejected, nor part of a pool (--exclude).
  clean      with --sources: single scores that the others contradict count as missing (--clean).
  length     --length-control, after the audit; "longest wins" is reported in any case.
  construct  --chosen against --rejected, of every prompt.
  select     --select of the pairs, by margins; several score columns vote.
  route      pairs of small margin (--tau) go to SFT: their route says so, or they go to --sft.

IN is read twice: first the scores, then the texts of the pairs. Every output is written whole or not at all."""
CURATE_CODES = """\
Exit codes: 0 done; 1 done and written, but no pair was kept, or there were warnings and --strict; 2 the user can mend
it; 3 a defect of fastpref, with a traceback; 130 interrupted."""


def _add_curate(commands) -> None:
    curate = commands.add_parser(
        "curate",
        help="scored samples -> training pairs: cleaned, selected, routed, with their scores and where they come from",
        description=CURATE,
        epilog=CURATE_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = curate.add_argument
    add("input", metavar="IN", help="scored samples")
    add("-o", dest="output", metavar="OUT", help="the pairs; replaced if it is there")
    add("--config", metavar="FILE", help="TOML, a table per stage; flags win over it")
    add("--report", metavar="DIR", help="a page of what was done, report.md and report.html")
    add("--json", action="store_true", help="print the summary as JSON")
    add("--strict", action="store_true", help="exit with 1 after warnings: degenerate rules, correlated scores, ...")
    add("--seed", type=int, metavar="N", help="of everything random (0)")
    add("--order", type=_listed, metavar="STAGE,...", help="of the stages; those not named are left out")
    add("--work", metavar="DIR", help="keep what every stage makes, one .npz each")
    add("--from", dest="begin", metavar="STAGE", help='begin there, with what --work kept; also "write"')
    add("--stage", metavar="STAGE", help="run this one alone on what --work kept, and keep its result; no OUT")

    add = curate.add_argument_group("reading").add_argument
    add(
        "--scores",
        dest="read.scores",
        type=_listed,
        metavar="FIELD[:logit],...",
        help=":logit for probabilities; the first constructs the pairs (default: scores, else win_prob)",
    )
    add("--sources", dest="read.sources", metavar="FIELD", help="who wrote each response, such as models")
    add("--lengths", dest="read.lengths", metavar="FIELD", help="of the responses (default: characters)")
    add(
        "--implicit",
        dest="read.implicit",
        metavar="FIELD|NPY",
        help="implicit rewards of beta 1, one per response of the file; they vote when pairs are selected",
    )
    add(
        "--score-range",
        dest="read.score_range",
        type=_numbers,
        metavar="LOW,HIGH",
        help="what the first scores can be, such as 1,10",
    )
    add("--workers", dest="read.workers", type=positive_integer, metavar="N", help="processes that read")

    add = curate.add_argument_group("cleaning").add_argument
    add(
        "--apply",
        dest="hygiene.apply",
        action="store_true",
        default=None,
        help="also leave out repeated texts and contaminated prompts",
    )
    add("--decontaminate", dest="hygiene.decontaminate", type=_listed, metavar="FILE,...", help="not to train on")
    add("--exclude", dest="audit.exclude", choices=EXCLUDE, help="flagged sources: from what (both)")
    add("--clean", dest="clean.action", choices=CLEAN, help="single corrupted scores (mask)")
    add(
        "--length-control",
        dest="length.control",
        choices=LENGTH_CONTROL,
        help="within_source: scores minus their slope over length within prompt and source; match: of the responses "
        "near the rejected's target the one nearest in length to the chosen (none)",
    )

    add = curate.add_argument_group("pairs").add_argument
    add(
        "--chosen",
        dest="construct.chosen",
        metavar="RULE",
        help="max (default), min, mean+1std, quantile:0.9, ...: the response nearest to that",
    )
    add(
        "--rejected",
        dest="construct.rejected",
        metavar="RULE",
        help="mean-2std (default), quantile:0.10, min_of_5 (the lowest of five drawn), min, ...",
    )
    add("--scale", dest="construct.scale", metavar="SCALE", help="of the moments: raw (default), logit, mad, ...")
    add(
        "--on-degenerate",
        dest="construct.on_degenerate",
        metavar="WHAT",
        help="where more than a fifth of the rejected's targets lie below the pool: warn (default), min_of_5, "
        "quantile:0.10, drop, error",
    )
    add(
        "--min-chosen", dest="construct.min_chosen", type=_number_or_text, metavar="X", help="least score of the chosen"
    )
    add("--min-gap", dest="construct.min_gap", type=_number_or_text, metavar="X", help="least gap, or quantile:0.1")
    add("--max-gap", dest="construct.max_gap", type=_number_or_text, metavar="X", help="largest gap, likewise")
    add("--pairs-per-prompt", dest="construct.pairs_per_prompt", type=positive_integer, metavar="N")
    add("--select", dest="select", type=_count_or_share, metavar="N", help="pairs to keep, or their share below 1")
    add("--how", dest="select.how", metavar="HOW", help="margins combine: mul (BeeS, default), add, max, ... ")
    add(
        "--tau",
        dest="route.tau",
        type=_number_or_text,
        metavar="X",
        help="margin below which a pair goes to SFT; quantile:0.12 (default), or 0.5 for --score-range 1,10; none",
    )

    add = curate.add_argument_group("writing").add_argument
    add("--format", dest="write.format", choices=FORMATS, help="of the texts (trl)")
    add("--sft", dest="write.sft", metavar="FILE", help="pairs routed to SFT, as prompt and completion")
    add("--test", dest="write.test", metavar="FILE", help="pairs of the prompts held out")
    add("--test-share", dest="write.test_share", type=float, metavar="X", help="of the prompts, by their hash")
    add(
        "--easy-to-hard",
        dest="write.easy_to_hard",
        action="store_true",
        default=None,
        help="the largest margin first, for training without shuffling; otherwise in the order of IN",
    )
    add(
        "--goals",
        dest="write.goals",
        choices=GOALS,
        help="goal-conditioned rows: both, the pair and its swap; half, as many rows as pairs (none)",
    )
    add("--bad-rows", dest="write.bad_rows", metavar="FILE", help="rows that could not be read, and why, as .jsonl")
    curate.set_defaults(handler=_curate, name="fastpref curate")


def _listed(text) -> list[str]:
    return text.split(",")


def _numbers(text) -> list[float]:
    return [float(part) for part in text.split(",")]


def _number_or_text(text) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _count_or_share(text) -> dict[str, float]:
    number = positive_number(text)
    if number < 1:
        return {"fraction": number}
    if number != int(number):
        raise argparse.ArgumentTypeError(f"must be below 1 or a whole number, got {text}")
    return {"k": int(number)}


def _curate(arguments) -> int:
    from fastpref.cli.curate import run_command

    # kill, too, leaves no temporary file behind
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return run_command(_options(arguments))
    finally:
        signal.signal(signal.SIGTERM, previous)
