"""CUDA C++ with its launches, over the simulated runtime."""

import subprocess

import ptxsim_build
import pytest

FEATURES = [
    "device",
    "reduce",
    "copy_async",
    "halves",
    "last_block",
    "cluster_sum",
    "grid_sum",
    "bulk_copies",
    "groups",
    "memory",
    "absent",
    "calls",
]
# in the order of features.cu; where each is found, and what has to be said
BUGS = {
    "no barrier": ("copy_async", "RACE in shared memory"),
    "no fence": ("last_block", "RACE in global memory"),
    "no cluster sync": ("cluster_sum", "RACE|UNINITIALISED"),
    "no last cluster sync": ("cluster_sum", "a block that has ended"),
    "no grid sync": ("grid_sum", "RACE in global memory"),
    "no wait": ("bulk_copies", "asynchronous copy has not been waited for"),
    "no barrier before the store": ("bulk_copies", "RACE in shared memory"),
    "memset too long": ("memory", "OUT OF BOUNDS: 4004 bytes; 0 bytes into 'cudaMalloc' of 4000"),
    "failed assertion": ("calls", "ASSERTION FAILED: n < 5"),
}


@pytest.fixture(scope="session")
def program(nvcc, library):
    source = ptxsim_build.HERE / "features.cu"
    made = library.parent / f"features-{ptxsim_build.digest(source)}"
    command = ["nvcc", "-std=c++17", "-O3", "-lineinfo", "-cudart=none", "--no-compress", "-I", source.parent / "src"]
    command += ["-gencode", "arch=compute_90,code=compute_90", source, "-o", made, library]
    with ptxsim_build.locked(made):
        if not made.exists():
            ptxsim_build.run(*command, "-Xlinker", f"-rpath={library.parent}")
    return made


def run(program, bug=0):
    return subprocess.run([program, str(bug)], capture_output=True, text=True)


def test_features(program):
    done = run(program)
    assert done.stdout.splitlines() == [f"ok {feature}" for feature in FEATURES]
    assert done.returncode == 0


@pytest.mark.parametrize("bug", BUGS)
def test_planted(program, bug):
    feature, said = BUGS[bug]
    done = run(program, 1 + list(BUGS).index(bug))
    assert done.returncode == 1
    passed = FEATURES[: FEATURES.index(feature)]
    assert done.stdout.splitlines()[: len(passed)] == [f"ok {feature}" for feature in passed]
    assert f"ok {feature}" not in done.stdout
    assert any(part in done.stdout for part in said.split("|"))
    assert "features.cu:" in done.stdout or feature == "memory"
