"""The facts a number is worth nothing without: device, versions, commit, settings. As a script: prints them as JSON.

No host name, no paths, no kernel release: results are published.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "fastpref",
    "torch",
    "triton",
    "numpy",
    "trl",
    "transformers",
    "datasets",
    "liger-kernel",
    "cut-cross-entropy",
    "pytest",
    "pytest-benchmark",
)


def facts() -> dict:
    import torch

    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "architecture": platform.machine(),
        "system": platform.system(),
        "threads": torch.get_num_threads(),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": commit(),
        "transparent_huge_pages": _huge_pages(),
        "THP_MEM_ALLOC_ENABLE": os.environ.get("THP_MEM_ALLOC_ENABLE", "not set"),
        "gpu": _gpu(torch),
    }


def context_works() -> bool:
    """Whether this process can still use its GPU, which it cannot after some errors; True before its first use."""
    import torch

    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.ones(2, device="cuda").sum().item() == 2
    except Exception:
        return False


def commit() -> str:
    """The commit of the tree the benchmarks come from, "+changes" if it differs, or why it is unknown. Without .git it
    is what FASTPREF_COMMIT says."""
    if not (ROOT / ".git").exists():  # a repository around a copy of the tree would name its own commit
        return os.environ.get("FASTPREF_COMMIT", "unknown: not a git checkout")
    try:
        head = _git("rev-parse", "HEAD")
        return head + (" +changes" if _git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("FASTPREF_COMMIT", "unknown: not a git checkout")


def _git(*arguments) -> str:
    done = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _version(name) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _huge_pages() -> str:
    try:
        modes = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return "unknown"
    return next((mode.strip("[]") for mode in modes.split() if mode.startswith("[")), modes.strip())


def _gpu(torch) -> dict | None:
    if not torch.cuda.is_available():
        return None
    device = torch.cuda.get_device_properties(0)
    return {
        "name": device.name,
        "capability": f"{device.major}.{device.minor}",
        "memory_gib": round(device.total_memory / 2**30, 1),
        "multiprocessors": device.multi_processor_count,
        "l2_mib": round(getattr(device, "L2_cache_size", 0) / 2**20, 1),
        "cuda": torch.version.cuda or f"HIP {torch.version.hip}",
        "driver": _driver(),
    }


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.split("\n")[0].strip() or "unknown"


if __name__ == "__main__":
    json.dump(facts(), sys.stdout)
