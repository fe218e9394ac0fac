"""The house: who may import whom, no circles, and functions that are read without scrolling.

Read off the sources by `ast`, so that an import inside a function counts as one at the top of a file does.
"""

import ast
from collections import defaultdict
from functools import cache
from pathlib import Path

import fastpref

PACKAGE = Path(__file__).parents[1] / "fastpref"
GROUND = (
    "errors",
    "operators",
    "_native",
    "_library",
    "_checks",
    "_autograd",
    "_progress",
    "_whole_file",
    "_rating_scale",
    "_warnings",
)
# From the ground up: a room imports its own floor and those below. The two halves share a floor and no import.
FLOORS = [
    {*GROUND, "_build", "_core"},
    {"losses", "_logps", "_lowrank"},
    {"preference_matrix", "_build_info"},
    {""},  # the face, fastpref/__init__.py
    {"curate"},
    {"integrations"},
    {"cli", "__main__"},
]
FACES = ("", "curate")
APART = [({"losses", "_logps"}, {"_lowrank"})]
MOST_LINES = 80
MOST_PARAMETERS = 12


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def sources() -> dict[str, ast.Module]:
    return {module_of(path): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def nodes(tree: ast.AST, face: bool):
    """All of it; of a face without what only type checkers read, for it hands names of all floors on."""
    for child in ast.iter_child_nodes(tree):
        if not (face and is_type_checking(child)):
            yield child
            yield from nodes(child, face)


def imports(module: str) -> set[str]:
    """Modules of the package that this one imports, by their names within it; "" is the face."""
    known = {*sources(), "_build", "_core"}
    found = set()

    def add(name: str, attribute: str | None = None) -> None:
        if name != "fastpref" and not name.startswith("fastpref."):
            return
        name = name.removeprefix("fastpref").removeprefix(".")
        inner = ".".join(filter(None, (name, attribute)))
        found.add(inner if attribute and inner in known else name)

    for node in nodes(sources()[module], face=module in FACES):
        if isinstance(node, ast.Import):
            for alias in node.names:
                add(alias.name)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            for alias in node.names:
                add(node.module, alias.name)
    found.discard(module)
    assert found <= known, f"{module} imports what is not there: {sorted(found - known)}"
    return found


def room(module: str) -> str:
    return module.partition(".")[0]


def floor(module: str) -> int:
    (level,) = [i for i, rooms in enumerate(FLOORS) if room(module) in rooms]
    return level


def test_every_module_has_a_floor():
    for module in sources():
        floor(module)


def test_nothing_imports_upwards():
    upwards = [f"{m} -> {other}" for m in sources() for other in imports(m) if floor(other) > floor(m)]
    assert not upwards


def test_neither_half_imports_the_other():
    for one, other in APART:
        across = [
            f"{m} -> {n}"
            for m in sources()
            for n in imports(m)
            if (room(m) in one and room(n) in other) or (room(m) in other and room(n) in one)
        ]
        assert not across


def test_no_circles():
    """Tarjan's strongly connected components, of more than one module."""
    index, low, stack, on_stack, circles = {}, {}, [], set(), []

    def visit(module):
        index[module] = low[module] = len(index)
        stack.append(module)
        on_stack.add(module)
        for other in imports(module) & set(sources()):
            if other not in index:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in on_stack:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            circle = []
            while not circle or circle[-1] != module:
                circle.append(stack.pop())
                on_stack.discard(circle[-1])
            if len(circle) > 1:
                circles.append(sorted(circle))

    for module in sources():
        if module not in index:
            visit(module)
    assert not circles


# ---- functions ----


def functions(module: str):
    for node in ast.walk(sources()[module]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def is_kernel(function: ast.FunctionDef) -> bool:
    return any("triton.jit" in ast.unparse(d) for d in function.decorator_list)


def code_lines(function: ast.FunctionDef, text: list[str]) -> int:
    """Lines of its body with code on them: no docstring, no comment, no blank one, not those of the signature."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    if not body:
        return 0
    lines = text[body[0].lineno - 1 : function.end_lineno]
    return sum(1 for line in lines if line.strip() and not line.strip().startswith("#"))


def test_functions_are_short():
    long = []
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text().splitlines()
        for function in functions(module_of(path)):
            if not is_kernel(function) and (lines := code_lines(function, text)) > MOST_LINES:
                long.append(f"{path.relative_to(PACKAGE)}:{function.lineno} {function.name}: {lines} lines of code")
    assert not long, "\n".join(long)


def public_names() -> set[str]:
    from fastpref import curate, integrations, losses, preference_matrix

    faces = fastpref, curate, preference_matrix, losses, integrations
    return {name for face in faces for name in getattr(face, "__all__", ())}


def operator_functions(module: str) -> set[str]:
    """What is registered as an operator's implementation or fake: their lists are the schema's."""
    named = set()
    for node in ast.walk(sources()["operators"]):  # "fastpref._logps.token_logps:_fwd", and _fwd_fake beside it
        if isinstance(node, ast.Constant) and str(node.value).startswith(f"fastpref.{module}:"):
            name = node.value.partition(":")[2]
            named |= {name, f"{name}_fake"}
    return named


def test_parameter_lists_are_short():
    long, public = [], public_names()
    for module in sources():
        exempt = public | operator_functions(module)
        for function in functions(module):
            a = function.args
            count = len(a.posonlyargs) + len(a.args) + len(a.kwonlyargs)
            if count > MOST_PARAMETERS and function.name not in exempt and not is_kernel(function):
                long.append(f"{module}:{function.lineno} {function.name}: {count} parameters")
    assert not long, "\n".join(long)


def test_no_two_names_differ_by_a_capital():
    """Among what one module defines at its top: `_Data` beside `_data` is read wrongly. What users know stays."""
    twins, public = [], public_names() | {"hygiene"}  # curate.hygiene.hygiene: the module has the name of the face
    for module, tree in sources().items():
        seen = defaultdict(set)
        for node in tree.body:
            names = []
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names = [node.name]
            elif isinstance(node, ast.Assign):
                names = [t.id for t in node.targets if isinstance(t, ast.Name)]
            for name in names:
                seen[name.lower()].add(name)
        twins += [f"{module}: {sorted(names)}" for names in seen.values() if len(names) > 1 and not names <= public]
    assert not twins


def test_no_test_file_imports_another():
    """What they share stands in conftest.py, cases.py, the files *_cases.py and tolerance.py."""
    for path in sorted(Path(__file__).parent.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.rpartition(".")[2].startswith("test_")], path


# ---- devices ----

SEAM = "_native"  # what tests replace to run CUDA's paths without a GPU
ONLY_THERE = ("is_cuda", "is_cpu", "get_device", "device_of", "current_stream", "current_device")


def test_one_module_looks_at_devices():
    """No other asks for a device's type, a stream or a guard; build_info alone names the GPU."""
    looks = []
    for module, tree in sources().items():
        if module == SEAM:
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute):
                continue
            text = ast.unparse(node)
            of_a_device = node.attr == "type" and text.removesuffix(".type").endswith(("device", "place"))
            of_cuda = text.startswith("torch.cuda.") and module != "_build_info"
            if of_a_device or of_cuda or node.attr in ONLY_THERE:
                looks.append(f"{module}:{node.lineno} {text}")
    assert not looks


def test_one_function_launches_triton():
    launches = []
    for module, tree in sources().items():
        kernels = {f.name for f in functions(module) if is_kernel(f)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                name = ast.unparse(node.func.value)
                if name in kernels or name.rpartition(".")[2].endswith("kernel"):
                    launches.append(f"{module}: {name}")
    assert launches == [f"{SEAM}: kernel"]
