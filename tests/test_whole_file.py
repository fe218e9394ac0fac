"""Outputs are whole or not there, whatever ends the writer and whoever else writes; they keep the mode of old ones."""

import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time

import pytest

from fastpref._whole_file import whole_file
from fastpref.errors import InputError

SIZE = 200_000  # times a number is written: some megabytes, so that a write has a middle

# Writes the same number over and over, another one each time, until it is ended.
WRITER = """
import sys
from pathlib import Path
from fastpref._whole_file import whole_file
begin, step = int(sys.argv[1]), int(sys.argv[2])
for number in range(begin, 10**8, step):
    with whole_file("new/folder/out.txt") as temporary, open(temporary, "wb") as file:
        for _ in range(20):
            file.write(b"%08d" % number * (SIZE // 20))
"""


@pytest.fixture
def writer(tmp_path):
    def start(begin=0, step=1):
        def heed_interrupts():  # which a shell has its background jobs ignore, and their children with them
            signal.signal(signal.SIGINT, signal.default_int_handler)

        code = WRITER.replace("SIZE", str(SIZE))
        command = [sys.executable, "-c", code, str(begin), str(step)]
        return subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL, preexec_fn=heed_interrupts)

    return start


def assert_whole(path):
    content = path.read_bytes()
    assert len(content) == 8 * SIZE and content == content[:8] * SIZE


def wait_for(path):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_an_end_at_any_point_of_a_write_leaves_a_whole_output(tmp_path, writer, sign):
    out = tmp_path / "new" / "folder" / "out.txt"
    for _ in range(12):
        for old in tmp_path.rglob("*.*"):
            old.unlink()
        with writer() as process:
            wait_for(out)
            time.sleep(random.uniform(0, 0.03))
            process.send_signal(sign)
        assert process.returncode
        assert_whole(out)
        left = [name for name in os.listdir(out.parent) if name != "out.txt"]
        # a killed process cannot tidy up; its file has the name of no output
        assert all(name.startswith(".out.txt.") and name.endswith(".part") for name in left)
        assert len(left) <= (sign == signal.SIGKILL)


def test_two_writers_of_one_output(tmp_path, writer):
    out = tmp_path / "new" / "folder" / "out.txt"
    with writer(0, 2) as one, writer(1, 2) as two:
        wait_for(out)
        seen = set()
        deadline = time.monotonic() + 60
        while len(seen) < 2 or time.monotonic() < deadline - 58:
            assert time.monotonic() < deadline
            assert_whole(out)
            seen.add(int(out.read_bytes()[:8]) % 2)
        for process in (one, two):
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
    assert os.listdir(out.parent) == ["out.txt"]


def test_threads_write_one_output(tmp_path):
    def write(text):
        for _ in range(50):
            with whole_file(tmp_path / "a" / "b" / "out") as temporary:
                temporary.write_text(text * 1000)

    threads = [threading.Thread(target=write, args=(text,)) for text in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "a" / "b" / "out").read_text() in ("a" * 1000, "b" * 1000)
    assert os.listdir(tmp_path / "a" / "b") == ["out"]


# ---- modes and owners


def mode_of(path):
    return stat.S_IMODE(os.stat(path).st_mode)


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o660, 0o444, 0o755, 0o400])
def test_a_replaced_file_hands_on_its_mode(tmp_path, umask, mode):
    out = tmp_path / "out"
    out.write_text("old")
    out.chmod(mode)
    for _ in range(2):
        with whole_file(out) as temporary:
            assert mode_of(temporary) & ~(mode | 0o600) == 0  # no more may read it while it is written
            temporary.write_text("new")
        assert out.read_text() == "new" and mode_of(out) == mode


def test_a_new_file_has_the_mode_of_the_umask(tmp_path, umask):
    for mask in (0o022, 0o077, 0o002):
        umask(mask)
        with whole_file(tmp_path / f"{mask}") as temporary:
            temporary.write_text("new")
        assert mode_of(tmp_path / f"{mask}") == 0o666 & ~mask


def test_a_link_hands_on_the_mode_of_its_file(tmp_path, umask):
    (tmp_path / "there").write_text("old")
    (tmp_path / "there").chmod(0o600)
    (tmp_path / "link").symlink_to(tmp_path / "there")
    with whole_file(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link").is_symlink() and mode_of(tmp_path / "there") == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_replaced_file_hands_on_its_owner(tmp_path, umask, monkeypatch):
    out = tmp_path / "out"
    out.write_text("old")
    os.chown(out, 12345, 23456)
    out.chmod(0o2640)
    with whole_file(out) as temporary:
        temporary.write_text("new")
    found = os.stat(out)
    assert (found.st_uid, found.st_gid, mode_of(out)) == (12345, 23456, 0o2640)

    def refuse(*arguments):
        raise PermissionError

    monkeypatch.setattr(os, "fchown", refuse)  # as for all others
    with whole_file(out) as temporary:
        temporary.write_text("newer")
    # what was meant for another group is not shown to this one
    assert out.read_text() == "newer" and mode_of(out) & 0o077 == 0


# ---- folders


def test_folders_are_made_and_taken_away_after_an_error(tmp_path):
    path = tmp_path / "a" / "b" / "c" / "out"
    with pytest.raises(ZeroDivisionError), whole_file(path):
        assert path.parent.is_dir()
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []
    (tmp_path / "a").mkdir()
    with pytest.raises(ZeroDivisionError), whole_file(path):
        (tmp_path / "a" / "b" / "other").touch()  # another's
        raise ZeroDivisionError
    assert os.listdir(tmp_path / "a" / "b") == ["other"]
    with whole_file(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127])
def test_a_name_may_have_all_its_bytes(tmp_path, name):
    with whole_file(tmp_path / name) as temporary:
        temporary.write_text("new")
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("name", ["file/out", "file/more/out", "x" * 300])
def test_what_cannot_be_written_is_one_error(tmp_path, name):
    (tmp_path / "file").touch()
    reasons = r"^cannot write .*(Not a directory|File name too long)$"
    with pytest.raises(InputError, match=reasons), whole_file(tmp_path / name):
        raise AssertionError
    assert os.listdir(tmp_path) == ["file"]
