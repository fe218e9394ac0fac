"""Triton kernels run by ptxsim, with the specialisation that their arguments have on a GPU (ahead_of_time.py)."""

import ctypes
from functools import cache
from importlib import import_module
from pathlib import Path

import ptxsim
from ahead_of_time import Compiler, bound, request

SCALARS = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}


@cache
def loaded(ptx: str) -> ptxsim.Module:
    return ptxsim.Module(ptx)


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

    def __call__(self, asked: dict) -> dict:
        name = asked["module"].rpartition(".")[2]
        if name in self.changed:
            asked = asked | {"module": name + self.mark, "folder": str(self.folder)}
        return self.compiler(asked)


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
        self.compiler, self.kernel, self.target = compiler, kernel, f"sm_{arch}"
        self.readonly, self.by_row, self.registered = readonly, by_row, registered

    def __getitem__(self, grid):
        return lambda *args, **keywords: self.launch(grid, args, keywords)

    def launch(self, grid, args, keywords):
        values, options = bound(self.kernel, args, keywords)
        compiled = self.compiler(request(self.kernel, values, options, self.target, "ptx"))
        module = loaded(compiled["ptx"])
        arguments, tensors = [], {}
        for name, type_ in compiled["parameters"].items():
            if type_.startswith("*"):
                tensor, readonly = values[name], name in self.readonly
                arguments.append(ptxsim.pointer(tensor))
                tensors |= ptxsim.by_row(name, tensor, readonly) if name in self.by_row else {name: (tensor, readonly)}
            else:
                arguments.append(SCALARS[type_](values[name]))
        arguments += [ctypes.c_void_p(0)] * compiled["scratch"]
        # lanes of one store may write values that differ in the last place to one address, as reductions do
        with ptxsim.options(collide=0):
            module.launch(
                compiled["entry"],
                grid,
                compiled["threads"],
                arguments,
                None if self.registered else tensors,
                shared=compiled["shared"],
            )
