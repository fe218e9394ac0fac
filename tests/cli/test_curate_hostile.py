"""fastpref curate under attack: full devices, names that are no text, signals at any moment of a write, two writers on
one output, and a work folder that was tampered with."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

import fastpref
from fastpref.cli.main import main
from fastpref.curate.files import writing

SOURCES = 4


@pytest.fixture
def samples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng()
    rows = [
        {"prompt": f"Question {p}?", "responses": [f"{'word ' * int(n)}{p} {n}" for n in rng.integers(1, 40, SOURCES)],
         "scores": rng.normal(size=SOURCES).tolist()}
        for p in range(60)
    ]  # fmt: skip
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def curate(*arguments):
    return main(["curate", "samples.jsonl", *arguments])


def started(*arguments, **options):
    """The command as a process, with the package that is tested."""
    environment = os.environ | {"PYTHONPATH": str(Path(fastpref.__file__).parents[1])}
    command = [sys.executable, "-m", "fastpref", "curate", "samples.jsonl", *arguments]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, **options)


# ---- what cannot be printed


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_device(samples):
    with open("/dev/full", "w") as full:
        process = started("-o", "pairs.jsonl", "--json", stdout=full)
        error = process.communicate()[1].decode()
    assert process.returncode == 2
    assert error.endswith("fastpref curate: cannot write to standard output: No space left on device\n")
    assert "Traceback" not in error and "Exception ignored" not in error
    assert len(Path("pairs.jsonl").read_text().splitlines()) == 60


@pytest.mark.skipif(sys.platform == "darwin", reason="file names are UTF-8 there")
def test_names_that_are_no_utf8(samples, capsys):
    name = os.fsdecode(b"pairs \xff\x1b[31m.jsonl")
    assert curate("-o", name) == 0
    captured = capsys.readouterr()
    assert r"pairs \udcff\x1b[31m.jsonl: 60 rows" in captured.out and "\x1b" not in captured.out + captured.err
    assert len(Path(name).read_text().splitlines()) == 60
    assert json.loads(Path(f"{name}.meta.json").read_text())["config"]["output"] == name
    assert curate("-o", os.fsdecode(b"pairs \xff.parquet"), "--json") == 0
    os.rename("samples.jsonl", os.fsdecode(b"in \xfe.jsonl"))
    assert main(["curate", os.fsdecode(b"in \xfe.jsonl"), "-o", "p.jsonl", "--scores", "\x1b]0;x\x07", "--strict"]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "\x1b" not in captured.err and r"\udcfe" in captured.err


def test_unknown_flags_with_escapes(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["curate", "in.jsonl", "--\x1b[2J"])
    assert caught.value.code == 2 and r"unrecognized arguments: --\x1b[2J" in capsys.readouterr().err


# ---- outputs are whole, or what they were


def test_folders_are_made_and_modes_kept(samples):
    assert curate("-o", "new/deep/pairs.jsonl", "--sft", "other/sft.jsonl", "--tau", "auto") == 0
    assert Path("new/deep/pairs.jsonl").exists() and Path("other/sft.jsonl").exists()
    os.chmod("new/deep/pairs.jsonl", 0o600)
    assert curate("-o", "new/deep/pairs.jsonl") == 0
    assert os.stat("new/deep/pairs.jsonl").st_mode & 0o777 == 0o600
    assert os.stat("new/deep/pairs.jsonl.meta.json").st_mode & 0o777 == 0o600


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_while_rows_are_written(samples, number):
    """At any of its steps: the old output stays, and only what was killed leaves a temporary file."""
    Path("pairs.jsonl").write_text("old\n")
    for step in np.random.default_rng().permutation(12)[:2]:
        code = _killed_at(int(step), number)
        assert code == (-signal.SIGKILL if number == signal.SIGKILL else 130)
        assert Path("pairs.jsonl").read_text() == "old\n"
        left = [name for name in os.listdir() if name.endswith(".part")]
        if number != signal.SIGKILL:
            assert left == [] and sorted(os.listdir()) == ["pairs.jsonl", "samples.jsonl"]
        for name in left:
            os.unlink(name)
    assert curate("-o", "pairs.jsonl") == 0
    assert len(Path("pairs.jsonl").read_text().splitlines()) == 60


def _killed_at(step, number) -> int:
    """The exit code of a run that gets the signal as it reaches a step among those of its writes."""
    code = (
        "import os, signal, sys\n"
        "from fastpref.cli.main import main\n"
        "from fastpref.curate.files import writing\n"
        "from fastpref import _whole_file\n"
        "steps = [0]\n"
        "def counted(function):\n"
        "    def call(*arguments, **options):\n"
        "        steps[0] += 1\n"
        f"        if steps[0] == {step} + 1:\n"
        f"            os.kill(os.getpid(), {int(number)})\n"
        "        return function(*arguments, **options)\n"
        "    return call\n"
        "for module, name in ((writing, 'pair_rows_of'), (writing, 'shaped_rows'), (writing, '_take_entries'), "
        "(writing, 'whole_file')):\n"
        "    setattr(module, name, counted(getattr(module, name)))\n"
        "sys.exit(main(['curate', 'samples.jsonl', '-o', 'pairs.jsonl', '--workers', '1', '--order', 'construct']))"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(fastpref.__file__).parents[1])}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True).returncode


def test_an_error_at_every_step_of_a_write_leaves_what_was_there(samples, monkeypatch):
    """In this process, at each of the calls that a write makes."""
    Path("pairs.jsonl").write_text("old\n")
    before = sorted(os.listdir())
    names = ("pair_rows_of", "_take_entries", "_lines", "_sink", "_in_given_order")
    for name in names:
        for error, code in ((KeyboardInterrupt(), 130), (OSError(28, "No space left on device"), 2)):
            with monkeypatch.context() as patch:
                patch.setattr(writing, name, _raising(error))
                assert curate("-o", "pairs.jsonl", "--workers", "1") == code
            assert Path("pairs.jsonl").read_text() == "old\n" and sorted(os.listdir()) == before


def _raising(error):
    def call(*_, **__):
        raise error

    return call


def test_two_writers_on_one_output(samples):
    """The file is that of one of them, whole, and nothing else is left."""
    codes = []
    options = [("--rejected", "min"), ("--chosen", "min", "--rejected", "mean")]
    wanted = []
    for k, rules in enumerate(options):
        curate("-o", f"alone{k}.jsonl", *rules)
        wanted.append(Path(f"alone{k}.jsonl").read_bytes())
    for name in ("alone0", "alone1"):
        os.unlink(f"{name}.jsonl")
        os.unlink(f"{name}.jsonl.meta.json")
    config = [["samples.jsonl", "-o", "pairs.jsonl", *rules] for rules in options]
    threads = [threading.Thread(target=lambda given=given: codes.append(_run_in_thread(given))) for given in config * 4]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if os.path.exists("pairs.jsonl"):
            assert Path("pairs.jsonl").read_bytes() in wanted
        time.sleep(0.005)
    assert codes == [True] * 8
    assert Path("pairs.jsonl").read_bytes() in wanted
    assert sorted(os.listdir()) == ["pairs.jsonl", "pairs.jsonl.meta.json", "samples.jsonl"]


def _run_in_thread(arguments) -> bool:
    """`main` sets signal handlers, which threads must not; so the run itself."""
    from fastpref.cli.arguments import options_of
    from fastpref.cli.curate import parse_options
    from fastpref.cli.main import _parse
    from fastpref.curate.pipeline.run import run

    config, options = parse_options(options_of(_parse(["curate", *arguments])))
    run(config, **options)
    return True


# ---- the work folder


def repacked(path, change, compress=zipfile.ZIP_STORED):
    """The file with its arrays and facts changed."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    facts = json.loads(str(arrays["facts"]))
    change(arrays, facts)
    arrays["facts"] = np.array(json.dumps(facts))
    with zipfile.ZipFile(path, "w", compress) as file:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, np.asarray(array), allow_pickle=False)
            file.writestr(f"{name}.npy", buffer.getvalue())


def _facts(key, value):
    return lambda arrays, facts: facts.update({key: value})


def _array(name, change):
    return lambda arrays, facts: arrays.update({name: change(arrays[name])})


TAMPERED = {
    "offsets beyond the texts": ("read", _array("offsets", lambda a: a * 1000)),
    "offsets that descend": ("read", _array("offsets", lambda a: a[::-1].copy())),
    "a column too short": ("read", _array("lengths", lambda a: a[:-1])),
    "a column of another type": ("read", _array("scores.0", lambda a: a.astype(np.float32))),
    "no offsets": ("read", lambda arrays, facts: arrays.pop("offsets")),
    "an unknown column": ("read", lambda arrays, facts: arrays.update(other=np.zeros(3))),
    "facts that are a list": ("read", _facts("problems", [{"a": 1}])),
    "another path": ("read", _facts("fields", 3)),
    "a reason that is none": ("construct", _array("left_out", lambda a: a + 100)),
    "a prompt that is not there": ("construct", _array("pairs.0", lambda a: a + 10**6)),
    "a response that is not there": ("construct", _array("pairs.1", lambda a: a + 100)),
    "a negative response": ("construct", _array("pairs.2", lambda a: a - 100)),
    "pairs of another length": ("construct", _array("pairs.1", lambda a: a[:-1])),
    "summaries that are none": ("construct", _facts("summaries", [1])),
    "notices that are none": ("construct", _facts("notices", [["no-such-id", "x"]])),
    "notices that are numbers": ("construct", _facts("notices", 7)),
    "an array too many": ("construct", lambda arrays, facts: arrays.update(more=np.zeros(3))),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_a_tampered_work_folder_is_refused(samples, capsys, what):
    stage, change = TAMPERED[what]
    options = ("-o", "pairs.jsonl", "--work", "w", "--order", "hygiene,construct")
    assert curate(*options) == 0
    path = Path(f"w/{stage}.npz")
    content = path.read_bytes()
    repacked(path, lambda arrays, facts: None)
    assert curate(*options, "--from", "write") == 0  # the repacking itself changes nothing
    written = Path("pairs.jsonl").read_bytes()
    repacked(path, change)
    capsys.readouterr()
    assert curate(*options, "--from", "write") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"w/{stage}.npz" in error
    assert Path("pairs.jsonl").read_bytes() == written
    path.write_bytes(content)
    assert curate(*options, "--from", "write") == 0


def test_damaged_files_of_stages(samples, capsys):
    options = ("-o", "pairs.jsonl", "--work", "w", "--order", "construct")
    assert curate(*options) == 0
    path = Path("w/construct.npz")
    content = path.read_bytes()
    rng = np.random.default_rng()
    for k in range(40):
        damaged = bytearray(content)
        if k % 2:
            damaged = damaged[: int(rng.integers(len(content)))]
        else:
            for at in rng.integers(0, len(content), 8):
                damaged[at] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        assert curate(*options, "--from", "write") in (0, 2), k
        assert "Traceback" not in capsys.readouterr().err
    path.write_bytes(content)
    repacked(path, lambda arrays, facts: None, compress=zipfile.ZIP_DEFLATED)  # may unpack to anything
    assert curate(*options, "--from", "write") == 2
    assert "is not the file of a stage" in capsys.readouterr().err
    path.unlink()
    assert curate(*options, "--from", "write") == 2
    assert capsys.readouterr().err == (
        "fastpref curate: w/construct.npz, which keeps what there was after stage construct was done, is not there: "
        "run once with --work w and without --from and --stage, or begin at an earlier stage\n"
    )


def test_a_closed_stdout_and_a_closed_pipe(samples, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", None)  # as Python has it where descriptor 1 is closed
    assert curate("-o", "pairs.jsonl") == 0
    reading, writing_end = os.pipe()
    os.close(reading)
    with os.fdopen(writing_end, "w") as broken:
        monkeypatch.setattr(sys, "stdout", broken)
        assert curate("-o", "again.jsonl") == 2
    assert "cannot write to standard output: Broken pipe\n" in capsys.readouterr().err
    assert Path("pairs.jsonl").read_bytes() == Path("again.jsonl").read_bytes()
