"""The `fastpref` command. Exit codes: 0 done, 1 the run found something wrong, 2 the user can mend it.

Handlers import what they run, so that --help and --version answer without importing torch.
"""

import argparse
import json
import sys

from fastpref import __version__
from fastpref.curate.samples import InputError


def main(argv=None) -> int:
    """Runs one command; argv defaults to sys.argv[1:]. Returns the exit code; argparse exits by itself for --help."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.handler(arguments)
    except InputError as error:
        print(f"fastpref: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fastpref: interrupted", file=sys.stderr)
        return 130  # 128 + SIGINT, as shells have it


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fastpref", description="Fused kernels for preference optimisation, and the data for it.")
    parser.add_argument("--version", action="version", version=f"fastpref {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_info(commands)
    _add_demo(commands)
    return parser


# ---- info


def _add_info(commands) -> None:
    info = commands.add_parser(
        "info", help="what was built, which backend serves which op on which device, and why not"
    )
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(handler=_info)


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
    demo.set_defaults(handler=_demo)


def positive_integer(text) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _demo(arguments) -> int:
    from fastpref.demo.report import screen
    from fastpref.demo.run import DemoOptions, run_demo

    options = vars(arguments).copy()
    del options["handler"]
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
