"""The `fastpref` command. Exit codes: 0 done, 1 the run found something wrong, 2 an input, option or output is wrong, 3
a defect of fastpref.

Commands import what they run when they run it, so that --help and --version answer without importing torch.
"""

import argparse
import contextlib
import difflib
import os
import shlex
import sys
import traceback

from fastpref import __version__
from fastpref.cli import curate, info
from fastpref.cli.demo import flags as demo
from fastpref.cli.denoise import flags as denoise
from fastpref.errors import InputError, printable

COMMANDS = (info, demo, denoise, curate)  # modules with add_parser(commands), in the order of --help


def main(argv=None) -> int:
    """Runs one command; argv defaults to sys.argv[1:]. Returns the exit code; argparse exits by itself for --help."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # names of files need be no UTF-8
            stream.reconfigure(errors="backslashreplace")
    arguments = _parse(argv)
    try:
        code = arguments.handler(arguments)
        if sys.stdout is not None:  # closed
            sys.stdout.flush()  # where it is full, it says so here
        return code
    except InputError as error:
        return _refuse(arguments, error)
    except OSError as error:  # of an output, for what is read raises InputError
        _give_up_stdout()
        what = "to standard output" if error.filename is None else os.fspath(error.filename)
        return _refuse(arguments, f"cannot write {what}: {error.strerror or error}")
    except KeyboardInterrupt:
        print(f"{arguments.name}: interrupted", file=sys.stderr)
        return 130  # 128 + SIGINT, as shells have it
    except Exception:  # 1, which Python would give, means done
        traceback.print_exc()
        return 3


def _refuse(arguments, reason) -> int:
    """Says in one line why there is no result."""
    with contextlib.suppress(OSError):  # there is nothing left to write to
        print(f"{arguments.name}: {printable(' '.join(str(reason).split()))}", file=sys.stderr)
    return 2


def _give_up_stdout() -> None:
    """Python writes what is left in the buffer as it ends, and would fail there once more."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {printable(message)} (see {self.prog} --help)\n")


def _parse(argv) -> argparse.Namespace:
    parser, commands = _build_parser()
    arguments, unknown = parser.parse_known_args(argv)
    arguments.command = shlex.join(["fastpref", *(sys.argv[1:] if argv is None else argv)])
    if unknown:
        command = commands.choices[arguments.name.split()[-1]]
        known = [flag for action in command._actions for flag in action.option_strings]
        flag = next((word for word in unknown if word.startswith("-")), "").partition("=")[0]
        near = difflib.get_close_matches(flag, known, 1)
        hint = f", nearest is {near[0]}" if near else ""
        command.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    return arguments


def _build_parser() -> tuple[argparse.ArgumentParser, argparse.Action]:
    parser = _Parser(prog="fastpref", description="Fused kernels for preference optimisation, and the data for it.")
    parser.add_argument("--version", action="version", version=f"fastpref {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser, commands
