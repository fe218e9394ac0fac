"""Triton kernels compiled ahead of time, with the specialisation that the arguments of a real call have.

Tests run under Triton's interpreter, which must be chosen before Triton is imported. So another process compiles: run
as a script, this file reads requests as lines of JSON and answers each with one.
"""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import torch

TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
}


class Compiler:
    """The other process. compiler(request) is its answer, which it is asked for once.

    Args:
        triton: a folder with another Triton than the installed one.
    """

    def __init__(self, triton: str | None = None):
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [triton, *sys.path]))
        # early versions link AMD's code by ROCm's linker; what is looked at comes before that
        env.setdefault("TRITON_HIP_LLD_PATH", shutil.which("true") or "")
        self.process = subprocess.Popen(
            [sys.executable, __file__], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.answers = {}

    def __call__(self, request: dict) -> dict:
        line = json.dumps(request)
        if line not in self.answers:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
            answer = json.loads(self.process.stdout.readline() or '{"error": "the compiling process has ended"}')
            if "error" in answer:
                raise RuntimeError(answer["error"])
            self.answers[line] = answer
        return self.answers[line]

    def close(self):
        self.process.communicate()


# ---- requests ----


def bound(kernel, args: tuple, keywords: dict) -> tuple[dict, dict]:
    """Of the call kernel[grid](*args, **keywords): values by parameter, and the options of the launch."""
    names = list(inspect.signature(kernel.fn).parameters)
    values = dict(zip(names, args, strict=False)) | {n: v for n, v in keywords.items() if n in names}
    return values, {name: value for name, value in keywords.items() if name not in names}


def request(kernel, values: dict, options: dict, target: str, answer: str) -> dict:
    """target: "sm_90", "gfx942", ...; answer: "ptx", or "usage" for what the machine code takes."""
    parameters = inspect.signature(kernel.fn).parameters.values()
    return {
        "module": kernel.fn.__module__,
        "kernel": kernel.fn.__name__,
        "arguments": {p.name: kind(values[p.name], str(p.annotation)) for p in parameters},
        "options": options,
        "target": target,
        "answer": answer,
    }


def kind(value, annotation: str) -> dict:
    """What the specialisation of an argument depends on."""
    if isinstance(value, torch.Tensor):
        return {"type": f"*{TYPES[value.dtype]}", "aligned": value.data_ptr() % 16 == 0}
    if "constexpr" in annotation or value is None or isinstance(value, bool):
        return {"constant": value}
    if isinstance(value, float):
        return {"type": "fp32"}
    size = "i64" if "int64" in annotation or not -(2**31) <= value < 2**31 else "i32"
    return {"type": size, "aligned": value % 16 == 0, "one": value == 1}


# ---- the other process ----


def compiled(request: dict):
    """-> Triton's compiled kernel, and the types of what it is launched with."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if request.get("folder", sys.path[0]) != sys.path[0]:
        sys.path.insert(0, request["folder"])
    kernel = getattr(import_module(request["module"]), request["kernel"])
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        argument = request["arguments"][parameter.name]
        specialised = not parameter.do_not_specialize
        if "constant" in argument or (argument.get("one") and specialised):
            signature[parameter.name] = "constexpr"
            constants[(index,)] = argument.get("constant", 1)
            continue
        signature[parameter.name] = argument["type"]
        if argument.get("aligned") and specialised:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    name = request["target"]
    gpu = GPUTarget("hip", name, 64) if name.startswith("gfx") else GPUTarget("cuda", int(name[3:]), 32)
    parameters = {p: t for p, t in signature.items() if t != "constexpr"}
    return triton.compile(source, target=gpu, options=request["options"]), parameters


def ptx(kernel, parameters: dict) -> dict:
    entry, text = kernel.metadata.name, kernel.asm["ptx"]
    declared = re.search(rf"\.entry\s+{entry}\((.*?)\)\n", text, re.DOTALL)[1].count(".param")
    return {
        "ptx": text,
        "entry": entry,
        "threads": 32 * kernel.metadata.num_warps,
        "shared": kernel.metadata.shared,
        "parameters": parameters,
        "scratch": declared - len(parameters),
    }


def usage(kernel, parameters: dict) -> dict:
    """Registers, bytes of stack, accesses to spilled registers in all and in inner loops, accesses of 16 bytes."""
    if "amdgcn" in kernel.asm:
        return amd_usage(kernel.asm["amdgcn"])
    found, text = cubin_usage(kernel.asm["cubin"]), kernel.asm["ptx"]
    # in the PTX: ptxas may unroll a loop and so repeat its accesses; in the SASS: whether there are any
    for name, instruction in (("wide_loads", "ld"), ("wide_stores", "st")):
        found[name] = bool(found[name]) * len(re.findall(rf"{instruction}\.global\S*\.v4\.b32", text))
    return found


def amd_usage(asm: str) -> dict:
    def number(key):
        return int(re.search(rf"\.{key}:\s+(\d+)", asm)[1])

    return {
        "registers": number("vgpr_count"),
        "stack": number("private_segment_fixed_size"),
        "spills": number("vgpr_spill_count"),
        "scalar_spills": number("sgpr_spill_count"),  # into lanes of vector registers
        "wide_loads": len(re.findall(r"(?:global|buffer)_load_dwordx4", asm)),
        "wide_stores": len(re.findall(r"(?:global|buffer)_store_dwordx4", asm)),
    }


def cubin_usage(cubin: bytes) -> dict:
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        said = subprocess.check_output([cuobjdump, "--dump-resource-usage", path], text=True)
        sass = subprocess.check_output([cuobjdump, "--dump-sass", path], text=True)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", said).groups()
    return {
        "registers": int(registers),
        "stack": int(stack),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "spills_in_loops": spills_in_loops(sass),
        "wide_loads": len(re.findall(r"LDG\.E\S*\.128", sass)),
        "wide_stores": len(re.findall(r"STG\.E\S*\.128", sass)),
    }


def spills_in_loops(sass: str) -> int:
    """Accesses to local memory in inner loops: those with 16-byte loads, and with no other such loop in them."""
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)]
    branches = [(re.search(r"\bBRA\S*\s.*?0x([0-9a-f]+)", text), at) for at, text in lines if "BRA" in text]
    loads = [at for at, text in lines if re.search(r"\bLDG\.E\S*\.128", text)]
    loops = [(int(target[1], 16), at) for target, at in branches if target and int(target[1], 16) < at]
    loops = [(begin, end) for begin, end in loops if any(begin <= at <= end for at in loads)]
    inner = [loop for loop in loops if not any(o != loop and loop[0] <= o[0] and o[1] <= loop[1] for o in loops)]
    spills = [at for at, text in lines if re.search(r"\b(?:LDL|STL)\b", text)]
    return sum(any(begin <= at <= end for begin, end in inner) for at in spills)


def serve():
    answers = sys.stdout
    sys.stdout = sys.stderr  # of whatever else prints
    for line in sys.stdin:
        try:
            asked = json.loads(line)
            answer = {"ptx": ptx, "usage": usage}[asked["answer"]](*compiled(asked))
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
