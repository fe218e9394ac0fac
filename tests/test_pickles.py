"""What the public functions return, kept in a file: it names `fastpref`, wherever its class lies in the package."""

import inspect
import pickle
import subprocess
import sys

import pytest

import fastpref

CLASSES = [name for name in fastpref.__all__ if inspect.isclass(getattr(fastpref, name))]


def test_the_classes_of_the_face():
    assert {"PreferenceOutput", "TokenStats", "RPCAResult", "BradleyTerryResult", "FusedLMHead"} <= set(CLASSES)


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_of_the_face_says_so(name):
    assert getattr(fastpref, name).__module__ == "fastpref"


def test_pickles_load_in_a_fresh_process(tmp_path):
    values = []
    for name in CLASSES:
        kind = getattr(fastpref, name)
        if hasattr(kind, "_fields"):
            values.append(kind(*range(len(kind._fields))))
        elif issubclass(kind, Exception):
            values.append(kind("a message"))
        else:
            values.append(kind)
    code = (
        "import pickle, sys\n"
        "for value in pickle.loads(sys.stdin.buffer.read()):\n"
        "    print(getattr(value, '__name__', type(value).__name__), *value if isinstance(value, tuple) else [])\n"
    )
    # not in the checkout, whose fastpref is the bare source tree
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(values), capture_output=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    for name, line in zip(CLASSES, done.stdout.decode().splitlines(), strict=True):
        assert line.split()[0] == name
        fields = getattr(getattr(fastpref, name), "_fields", ())
        assert line.split()[1:] == [str(i) for i in range(len(fields))]
