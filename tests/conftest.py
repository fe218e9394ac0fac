"""Seeds, poisoned memory, and the backends every kernel test runs on.

Several files run on one worker per core, where pytest-xdist is there; -n0 runs them here, and --full every case of the
grids that are thinned otherwise. Tests get one thread unless FASTPREF_TEST_THREADS says how many; those of threads set
their own.
"""

import contextlib
import os
import subprocess
import sys
import textwrap
import zlib

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start, too

import numpy as np
import pytest
import torch

# Without a GPU the Triton kernels run under the interpreter, which must be chosen before Triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products on a GPU need it

from cases import BACKENDS, SEED, Backend

import fastpref

THREADS = int(os.environ.get("FASTPREF_TEST_THREADS", "1"))


def pytest_addoption(parser):
    with contextlib.suppress(ValueError):  # benchmarks/ has it too, in a run of both
        parser.addoption("--full", action="store_true", help="every case of the grids that are thinned otherwise")
        parser.addoption("--fuzz", type=int, default=5000, help="damaged files that the readers are given in all")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """One file, or one test, is not worth the seconds that workers take to start. hypothesis draws by the seed, too."""
    if config.getoption("hypothesis_seed", None) is None:
        config.option.hypothesis_seed = str(SEED)
    here = "PYTEST_XDIST_WORKER" in os.environ or not config.pluginmanager.hasplugin("xdist")
    one = len(config.args) == 1 and os.path.isfile(config.args[0].partition("::")[0])
    if not here and not one and config.option.numprocesses is None and config.option.dist == "no":
        config.option.numprocesses, config.option.dist = "auto", "worksteal"


def pytest_report_header(config):
    native = fastpref.build_info()["native"]
    return [f"fastpref: {fastpref.__file__}, native: {native}", f"fresh inputs: FASTPREF_TEST_SEED={SEED} repeats them"]


def pytest_collection_modifyitems(config, items):
    no_gpu = pytest.mark.skip(reason="no GPU is visible to torch")
    thinned = pytest.mark.skip(reason="with --full alone")
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if item.get_closest_marker("full") and not config.getoption("full", False):
            item.add_marker(thinned)


@pytest.fixture(autouse=True)
def _fresh_inputs(request):
    torch.manual_seed(SEED ^ zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def _threads():
    """Thousands of tiny products: two threads that get one core between them would wait for each other at each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """torch.empty is full of NaN (integers: the largest value), and operators that are not deterministic raise."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _quiet_interpreter():
    """Triton's interpreter computes log(0) and inf - inf in numpy, which warns where a GPU does not."""
    with np.errstate(all="ignore"):
        yield


def _param(backend):
    marks = [pytest.mark.cuda] if backend.device.type == "cuda" else []
    if backend.name in ("triton", "reference"):
        marks.append(getattr(pytest.mark, backend.name))
    return pytest.param(backend, id=repr(backend), marks=marks)


@pytest.fixture(params=[_param(b) for b in BACKENDS])
def backend(request):
    chosen = request.param
    if reason := chosen.missing():
        pytest.skip(f"{chosen}: {reason}")
    if chosen.simd:
        fastpref.set_simd_level(chosen.simd)
    yield chosen
    if chosen.simd:
        fastpref.set_simd_level("auto")


@pytest.fixture
def thin(request):
    """thin(unless) leaves the test to --full, unless it is one of the few cases that run always."""

    def skip(unless: bool = False):
        if not (unless or request.config.getoption("full", False)):
            pytest.skip("with --full alone")

    return skip


@pytest.fixture(
    params=[
        _param(Backend(*b)) for b in (("reference", "cpu"), ("native", "cpu"), ("native", "cuda"), ("triton", "cuda"))
    ]
)
def place(request):
    """Each backend once on each device, for ops whose kernels are tested at every SIMD level by themselves."""
    if reason := request.param.missing():
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture(params=[_param(b) for b in BACKENDS if b.device.type == "cpu" and b.name != "triton"])
def cpu_backend(request):
    """The name of the backend, for ops that have only reference and native CPU kernels."""
    if reason := request.param.missing():
        pytest.skip(reason)
    fastpref.set_simd_level(request.param.simd or "auto")
    yield request.param.name
    fastpref.set_simd_level("auto")


SIMD = ["baseline", "avx2", "avx512"]


@pytest.fixture(params=SIMD)
def simd(request):
    try:
        fastpref.set_simd_level(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    fastpref.set_simd_level("auto")


@pytest.fixture
def python(tmp_path):
    """Runs code in a fresh interpreter, away from the checkout: there Python would meet the bare source tree."""

    def run(code, cwd=tmp_path, **environment):
        return subprocess.run(
            [sys.executable, "-c", code], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
        )

    return run


RANK = """
import os
import sys
import torch
import torch.distributed as dist
import fastpref
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
torch.manual_seed(0)
BODY
torch.save(result, f"{folder}/{rank}.pt")
dist.barrier()
sys.stderr.flush()
os._exit(0)  # torch's gloo threads may abort the interpreter's exit once a DeviceMesh exists, without fastpref too
"""


@pytest.fixture
def two_ranks(tmp_path):
    """Runs a piece of code on two gloo ranks; it sets `result`, and both results come back."""

    def run(body):
        code = RANK.replace("BODY", textwrap.dedent(body))
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", code, str(rank), str(tmp_path)],
                cwd=tmp_path,  # not the checkout, whose fastpref is the bare source tree
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        try:
            errors = [process.communicate(timeout=300)[1] for process in ranks]
        finally:
            for process in ranks:
                process.kill()
        assert not any(process.returncode for process in ranks), "\n".join(errors)
        return [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]

    return run
