"""The simulator and what runs on it, built once and shared by the workers; default options for each test."""

import importlib.metadata
import importlib.util
import os
import shutil
from pathlib import Path

import ptxsim
import ptxsim_build
import pytest
from ahead_of_time import Compiler

from fastpref import _native


def absent(reason: str):
    """Skips; fails where everything is expected to be there."""
    if os.environ.get("FASTPREF_EXPECT_NATIVE") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def build_folder(request, tmp_path_factory) -> Path:
    """In pytest's cache, so that the next run finds what is there; without a cache, shared by this run's workers."""
    if hasattr(request.config, "cache"):
        return request.config.cache.mkdir("ptxsim")
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "ptxsim"


@pytest.fixture(scope="session", autouse=True)
def library(build_folder):
    """libptxsim.so: of these sources, or the one that PTXSIM_LIBRARY names."""
    if "PTXSIM_LIBRARY" in os.environ:
        return Path(os.environ["PTXSIM_LIBRARY"])
    if shutil.which(ptxsim_build.compiler()) is None:
        absent(f"there is no {ptxsim_build.compiler()}: the simulator is built with it")
    os.environ["PTXSIM_LIBRARY"] = str(ptxsim_build.build_library(build_folder))
    return Path(os.environ["PTXSIM_LIBRARY"])


@pytest.fixture(autouse=True)
def default_options(library):
    ptxsim.option(**ptxsim.DEFAULTS)
    yield
    ptxsim.option(**ptxsim.DEFAULTS)


@pytest.fixture(scope="session")
def nvcc():
    if shutil.which("nvcc") is None:
        absent("nvcc is not on PATH")


@pytest.fixture(scope="session")
def simulated_core(nvcc, library):
    """fastpref's native core of this checkout, its CUDA kernels run by ptxsim."""
    if shutil.which("cmake") is None:
        absent("cmake is not on PATH")
    return ptxsim_build.load_core(ptxsim_build.build_core(library))


@pytest.fixture
def core(simulated_core, monkeypatch):
    """fastpref calls the simulated core in this test."""
    monkeypatch.setattr(_native, "_core", simulated_core)
    return simulated_core


@pytest.fixture(scope="session")
def triton_compiler(library):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    version = importlib.metadata.version("triton")
    if tuple(map(int, version.split(".")[:2])) < (3, 3):
        pytest.skip(f"Triton {version} compiles ahead of time by another interface; 3.3 and later are checked")
    compiler = Compiler()
    yield compiler
    compiler.close()


@pytest.fixture
def planted(tmp_path, nvcc):
    """The kernels of an op's .cu file after one change of it or of a header of csrc/cuda."""

    def compiled(op: str, old: str, new: str) -> ptxsim.Module:
        folder = ptxsim_build.CHECKOUT / "csrc"
        changed = []
        for source in (folder / "cuda").iterdir():
            text = source.read_text()
            if old in text:
                changed.append(source.name)
            (tmp_path / source.name).write_text(text.replace(old, new))
        assert len(changed) == 1, f"in {changed}: the kernels have changed, plant this bug anew"
        return ptxsim.Module(ptxsim.nvcc_ptx(tmp_path / op, tmp_path / "changed.ptx", f"-I{folder}"))

    return compiled
