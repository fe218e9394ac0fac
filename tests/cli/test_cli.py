"""The command line: what it prints, where, its exit codes, and what it does not import."""

import json
import subprocess
import sys

import pytest

import fastpref
from fastpref.cli.main import main


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["demo", "--help"], ["denoise", "--help"], ["curate", "--help"], ["info", "--help"]],
)
def test_help_and_version_do_not_import_torch(python, arguments):
    code = (
        "import sys; from fastpref.cli.main import main\n"
        f"try: main({arguments!r})\n"
        "finally: print('torch' in sys.modules, file=sys.stderr)"
    )
    done = python(code)
    assert done.returncode == 0 and done.stderr == "False\n"
    assert "fastpref" in done.stdout


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0 and capsys.readouterr().out == f"fastpref {fastpref.__version__}\n"


def test_module_and_function_are_one_command(tmp_path):
    # Not from the root of the repository: there Python would meet the bare source tree.
    command = [sys.executable, "-m", "fastpref", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout == f"fastpref {fastpref.__version__}\n"


def test_info_prints_every_entry_of_the_build_info(capsys):
    assert main(["info"]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]

    def expected(info):
        for name, value in info.items():
            if isinstance(value, dict):
                yield from ([name], *expected(value))
            else:
                yield f"{name} {value}".split(maxsplit=1)  # a value may be empty, such as a product that the CPU lacks

    assert lines == list(expected(fastpref.build_info()))


def test_info_json_is_the_build_info(capsys):
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(fastpref.build_info(), default=str))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["nothing"], "invalid choice: 'nothing'"),
        (["demo", "--steps", "0"], "argument --steps: must be at least 1, got 0"),
        (["demo", "--steps", "many"], "argument --steps: invalid"),
        (["demo", "--score-scale", "log"], "argument --score-scale: invalid choice"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    captured = capsys.readouterr()
    assert caught.value.code == 2 and captured.out == ""
    assert message in captured.err and captured.err.count("\n") == 1
