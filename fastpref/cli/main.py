"""The `fastpref` command. Exit codes: 0 done, 1 the run found something wrong, 2 the user can mend it, 3 a defect.

Commands import what they run when they run it, so that --help and --version answer without importing torch.
"""

import argparse
import sys
import traceback

from fastpref import __version__
from fastpref.cli import curate, info
from fastpref.cli.demo import flags as demo
from fastpref.cli.denoise import flags as denoise
from fastpref.errors import InputError

COMMANDS = (info, demo, denoise, curate)  # modules with add_parser(commands), in the order of --help


def main(argv=None) -> int:
    """Runs one command; argv defaults to sys.argv[1:]. Returns the exit code; argparse exits by itself for --help."""
    arguments = _build_parser().parse_args(argv)
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


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fastpref", description="Fused kernels for preference optimisation, and the data for it.")
    parser.add_argument("--version", action="version", version=f"fastpref {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser
