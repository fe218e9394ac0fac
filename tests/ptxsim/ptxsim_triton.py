"""Triton kernels run by ptxsim, with the specialisation that their arguments have on a GPU.

Tests run under Triton's interpreter, which must be chosen before Triton is imported. So another process compiles:
run as a script, this file reads kernels and the kinds of their arguments as lines of JSON, and prints their PTX.
"""

import ctypes
import inspect
import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import ptxsim
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
SCALARS = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}


class Compiled(NamedTuple):
    module: ptxsim.Module
    entry: str
    threads: int
    shared: int  # bytes
    parameters: dict[str, str]  # name -> type of what the kernel is launched with; the rest are constants
    scratch: int  # pointers behind them, to memory that no kernel here asks for


class Compiler:
    """The other process, and the kernels it has compiled."""

    def __init__(self):
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        self.process = subprocess.Popen(
            [sys.executable, __file__], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.compiled = {}

    def __call__(self, request: dict) -> Compiled:
        line = json.dumps(request)
        if line not in self.compiled:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
            answer = json.loads(self.process.stdout.readline() or '{"error": "the compiling process has ended"}')
            if "error" in answer:
                raise RuntimeError(answer["error"])
            module = ptxsim.Module(answer.pop("ptx"))
            self.compiled[line] = Compiled(module, **answer)
        return self.compiled[line]

    def close(self):
        self.process.communicate()


class Planted:
    """A compiler of the kernels of fastpref/_logps after one change of their text.

    Args:
        folder: empty, for the changed files.
        old, new: `old` stands in exactly one of the files.
    """

    FILES = ("columns", "token_logps", "preference_triton")  # the first is what the others import

    def __init__(self, compiler: Compiler, folder: Path, old: str, new: str):
        self.compiler, self.folder, self.mark = compiler, folder, f"_{folder.name}"
        texts = {name: Path(import_module(f"fastpref._logps.{name}").__file__).read_text() for name in self.FILES}
        changed = [name for name, text in texts.items() if old in text]
        assert len(changed) == 1, f"in {changed}: the kernels have changed, plant this bug anew"
        self.changed = self.FILES if changed == ["columns"] else changed
        for name in self.changed:
            text = texts[name].replace(old, new)
            if changed == ["columns"]:
                text = text.replace("from fastpref._logps import columns", f"import columns{self.mark} as columns")
            (folder / f"{name}{self.mark}.py").write_text(text)

    def __call__(self, request: dict) -> Compiled:
        name = request["module"].rpartition(".")[2]
        if name in self.changed:
            request = request | {"module": name + self.mark, "folder": str(self.folder)}
        return self.compiler(request)


class Kernel:
    """Stands for a @triton.jit function: kernel[grid](...) compiles and runs it, with its tensors registered.

    Args:
        kernel: the function, compiled or interpreted.
        readonly: names of the parameters that it must not write through.
        by_row: names of those whose tensors are bounded row by row.
        registered: what the kernel may touch is registered already (simulated.py).
        arch: compute capability to compile for.
    """

    def __init__(self, compiler: Compiler, kernel, readonly=(), by_row=(), registered: bool = False, arch: int = 90):
        self.compiler, self.function, self.arch = compiler, kernel.fn, arch
        self.readonly, self.by_row, self.registered = readonly, by_row, registered
        self.annotations = {p.name: str(p.annotation) for p in inspect.signature(kernel.fn).parameters.values()}

    def __getitem__(self, grid):
        return lambda *args, **keywords: self.launch(grid, args, keywords)

    def launch(self, grid, args, keywords):
        values = dict(zip(self.annotations, args, strict=False))
        values |= {name: keywords.pop(name) for name in self.annotations if name in keywords}
        compiled = self.compiler(
            {
                "module": self.function.__module__,
                "kernel": self.function.__name__,
                "arguments": {name: kind(values[name], annotation) for name, annotation in self.annotations.items()},
                "options": keywords,
                "arch": self.arch,
            }
        )
        arguments, tensors = [], {}
        for name, type_ in compiled.parameters.items():
            if type_.startswith("*"):
                tensor, readonly = values[name], name in self.readonly
                arguments.append(ptxsim.pointer(tensor))
                tensors |= ptxsim.by_row(name, tensor, readonly) if name in self.by_row else {name: (tensor, readonly)}
            else:
                arguments.append(SCALARS[type_](values[name]))
        arguments += [ctypes.c_void_p(0)] * compiled.scratch
        # lanes of one store may write values that differ in the last place to one address, as reductions do
        with ptxsim.options(collide=0):
            compiled.module.launch(
                compiled.entry,
                grid,
                compiled.threads,
                arguments,
                None if self.registered else tensors,
                shared=compiled.shared,
            )


# ---- arguments, as JSON ----


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


def compile_kernel(request: dict) -> dict:
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
    target = GPUTarget("cuda", request["arch"], 32)
    compiled = triton.compile(source, target=target, options=request["options"])
    entry, ptx = compiled.metadata.name, compiled.asm["ptx"]
    parameters = {name: type_ for name, type_ in signature.items() if type_ != "constexpr"}
    declared = re.search(rf"\.entry\s+{entry}\((.*?)\)\n", ptx, re.DOTALL)[1].count(".param")
    return {
        "ptx": ptx,
        "entry": entry,
        "threads": 32 * compiled.metadata.num_warps,
        "shared": compiled.metadata.shared,
        "parameters": parameters,
        "scratch": declared - len(parameters),
    }


def serve():
    answers = sys.stdout
    sys.stdout = sys.stderr  # of whatever else prints
    for line in sys.stdin:
        try:
            answer = compile_kernel(json.loads(line))
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
