"""Builds what the tests run on, once for each state of the sources: the simulator, and fastpref's core over it.

By hand: python tests/ptxsim/ptxsim_build.py FOLDER [--core] prints the paths of both.
"""

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[1]
# -frounding-math: instructions have rounding modes. -fwrapv: integers wrap.
FLAGS = [
    "-std=c++17",
    "-O2",
    "-march=native",
    "-frounding-math",
    "-fwrapv",
    "-fno-strict-aliasing",
    "-fPIC",
    "-Wall",
    "-Wextra",
]


class BuildError(RuntimeError):
    """What a compiler said."""


def run(*command, **options) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    if done.returncode:
        raise BuildError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


@contextlib.contextmanager
def locked(path: Path):
    """One process at a time: workers of pytest-xdist share what they build."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def digest(*parts: str | bytes | Path) -> str:
    text = hashlib.sha256()
    for part in parts:
        content = part.read_bytes() if isinstance(part, Path) else part.encode() if isinstance(part, str) else part
        text.update(len(content).to_bytes(8, "little") + content)
    return text.hexdigest()[:16]


def compiler() -> str:
    return os.environ.get("CXX", "g++")


@cache
def cuda_home() -> Path | None:
    """Where nvcc's headers are; None without an nvcc on PATH."""
    if shutil.which("nvcc") is None:
        return None
    top = re.search(r"^#\$ TOP=(.*)$", run("nvcc", "--dryrun", "-x", "cu", "/dev/null"), re.MULTILINE)
    return Path(top[1].strip())


def build_library(folder: Path) -> Path:
    """libptxsim.so: the simulator, and the CUDA runtime over it where nvcc is found."""
    cuda = cuda_home()
    sources = [f for f in sorted(HERE.glob("src/*.cpp")) if cuda or f.name != "simcudart.cpp"]
    include = [f"-isystem{cuda / where}" for where in ("include", "targets/x86_64-linux/include")] if cuda else []
    # the compiler's version and, by -march=native, this processor's instructions
    macros = run(compiler(), *FLAGS, "-E", "-dM", "-x", "c++", "/dev/null")
    library = folder / digest(macros, *FLAGS, *include, *sources, *sorted(HERE.glob("src/*.h"))) / "libptxsim.so"
    with locked(library.parent):
        if library.exists():
            return library
        library.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:

            def compiled(source):
                target = Path(scratch) / f"{source.stem}.o"
                run(compiler(), *FLAGS, *include, "-c", source, "-o", target)
                return target

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(compiled, sources))
            made = Path(scratch) / library.name
            run(compiler(), "-shared", f"-Wl,-soname,{library.name}", *objects, "-o", made)
            made.rename(library)
    return library


def build_core(library: Path) -> Path:
    """fastpref's native core of this checkout, its .cu files over the simulator; what has changed is built again."""
    import pybind11  # of the extra [test]

    defined = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_CXX_FLAGS_RELEASE": "-O0",  # of the bindings: what compiles fastest
        "CMAKE_INTERPROCEDURAL_OPTIMIZATION": "OFF",
        "CMAKE_CUDA_ARCHITECTURES": "90-virtual",
        "FASTPREF_CUDA": "ON",
        "FASTPREF_CUDA_SIM": library,
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "SKBUILD": "ON",
        "SKBUILD_PROJECT_VERSION": "0",
    }
    versions = sys.version, pybind11.__version__, run("nvcc", "--version")
    folder = library.parent / f"core-{digest(str(CHECKOUT), *map(str, defined.values()), *versions)}"
    with locked(folder):
        if not (folder / "CMakeCache.txt").exists():
            generator = ["-G", "Ninja"] if shutil.which("ninja") else []
            definitions = [f"-D{name}={value}" for name, value in defined.items()]
            run("cmake", "-S", CHECKOUT, "-B", folder, *generator, *definitions)
        run("cmake", "--build", folder, "--target", "_core", "--parallel", os.cpu_count())
    (core,) = folder.glob("_core*.so")
    return core


def load_core(path: Path) -> ModuleType:
    """The core beside the installed one, for `_native._core` to be replaced by."""
    spec = importlib.util.spec_from_file_location("simulated._core", path)
    core = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(core)
    return core


if __name__ == "__main__":
    made = build_library(Path(sys.argv[1]).resolve())
    print(f"PTXSIM_LIBRARY={made}")
    if "--core" in sys.argv:
        print(build_core(made))
