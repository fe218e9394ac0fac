"""A child of gpu.py: works through named items, one after the other, and says what became of each.

    worker.py contact | measure | low_rank   [--few] [--share I N] [--without NAME...]

Lines of JSON on stdout: {"names": [...]} of what it will do, then {"begin": NAME, "cap_s": seconds it may take} and
{"end": NAME, "result": {...}} of each. Where an error has left the GPU's context unusable the process ends after that
item, so that another can go on with the rest.
"""

import argparse
import importlib
import json
import os
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic products

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness import machine
from harness.place import is_dry_run, working_place

KINDS = {"contact": "harness.contact", "measure": "harness.gpu_measure", "low_rank": "harness.gpu_low_rank"}
BROKEN_CONTEXT = 3  # the exit code


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--few", action="store_true")
    parser.add_argument("--share", type=int, nargs=2, default=(0, 1))
    parser.add_argument("--without", nargs="*", default=())
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # the peers' are theirs
    module = importlib.import_module(KINDS[arguments.kind])
    first, step = arguments.share
    names = module.names(is_dry_run(), arguments.few)[first::step]
    names = [name for name in names if name not in arguments.without]
    emit({"names": names})
    with working_place() as device:
        for name in names:
            emit({"begin": name, "cap_s": module.cap_s(name)})
            emit({"end": name, "result": _worked(module.ITEMS[name], device)})
            if device.type == "cuda" and not machine.context_works():
                return BROKEN_CONTEXT
    return 0


def _worked(item, device) -> dict:
    start = time.perf_counter()
    try:
        result = item(device)
        if device.type == "cuda":
            torch.cuda.synchronize()
    except Exception as error:
        result = {"failed": f"{type(error).__name__}: {str(error)[:500]}"}
    return result | {"item_seconds": round(time.perf_counter() - start, 2)}


def emit(line: dict) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # a broken context may hang the interpreter's exit
