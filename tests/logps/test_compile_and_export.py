"""Preference losses as programs: numbers that change, graphs that are saved, and losses that cannot be in one."""

import ast
import inspect
import pickle
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch._dynamo
from linear_preference_cases import separable

import fastpref
from fastpref import operators
from fastpref._logps.pairs import EncodedLoss, Loss, decode_loss, encode_loss

VOCAB, WIDTH = 37, 8


def batch(pairs=3, tokens=9):
    labels = torch.randint(0, VOCAB, (2 * pairs, tokens))
    labels[:, :2] = -100
    return torch.randn(2 * pairs, tokens, WIDTH), torch.randn(VOCAB, WIDTH), labels, torch.randn(2 * pairs)


def linear(hidden, weight, labels, ref_logps, beta, option=0.3):
    return fastpref.linear_preference_loss(
        hidden,
        weight,
        labels,
        ref_logps=ref_logps,
        loss=["sigmoid", "sft", "discopop"],
        loss_weights=[1.0, option, 0.5],
        loss_options=[{"label_smoothing": option / 2}, None, {"tau": 0.1, "f_divergence": "forward_kl"}],
        beta=beta,
    ).loss


def fused(hidden, weight, labels, ref_logps, beta, option=0.3):
    logits = hidden @ weight.t()
    options = {"label_smoothing": option / 2}
    return fastpref.preference_loss(logits, labels, ref_logps=ref_logps, loss_options=options, beta=beta).loss


def on_vectors(hidden, weight, labels, ref_logps, beta, option=0.3):
    logits = hidden @ weight.t()
    options = {"gamma": option}
    return fastpref.preference_loss(
        logits, labels, ref_logps=ref_logps, loss="simpo", loss_options=options, beta=beta
    ).loss


STEPS = pytest.mark.parametrize("step", [linear, fused, on_vectors])


def run(step, hidden, weight, *args):
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = step(*leaves, *args)
    return loss, *torch.autograd.grad(loss, leaves)


@STEPS
def test_twenty_betas_compile_once(step):
    hidden, weight, labels, ref_logps = batch()
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for i in range(20):
        args = hidden, weight, labels, ref_logps, 0.1 + 0.013 * i, 0.2 + 0.01 * i
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            got = run(compiled, *args)
        torch.testing.assert_close(got, run(step, *args), rtol=1e-5, atol=1e-6)


def test_without_dynamic_the_second_beta_compiles_once_more():
    hidden, weight, labels, ref_logps = batch()
    torch._dynamo.reset()
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    for i in range(12):
        args = hidden, weight, labels, ref_logps, 0.1 + 0.013 * i
        with torch._dynamo.config.patch(error_on_recompile=i > 1):
            got = run(compiled, *args)
        torch.testing.assert_close(got, run(linear, *args), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("step", [linear, fused])
def test_inductor(step, thin):
    thin(unless=step is linear)
    args = batch()
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for beta in (0.1, 0.7):
        torch.testing.assert_close(run(compiled, *args, beta), run(step, *args, beta), rtol=1e-5, atol=1e-6)


# ---- exported programs, run in another process ----


class Model(torch.nn.Module):
    def __init__(self, weight, call):
        super().__init__()
        self.head, self.call = fastpref.FusedLMHead(WIDTH, VOCAB, bias=False), call
        self.head.weight = torch.nn.Parameter(weight)

    def forward(self, hidden, labels, ref_logps):
        return self.call(self.head, hidden, labels, ref_logps)


CALLS = {
    "tokens": lambda head, hidden, labels, ref: head(hidden, labels),
    "pair-resident": lambda head, hidden, labels, ref: head(hidden, labels, loss="sigmoid", ref_logps=ref).loss,
    "coupled": lambda head, hidden, labels, ref: head(hidden, labels, loss="aot", ref_logps=ref).loss,
    "callable": lambda head, hidden, labels, ref: head(hidden, labels, loss=separable, ref_logps=ref).loss,
    "logits": lambda head, hidden, labels, ref: fastpref.token_logps(head(hidden), labels),
    "fused": lambda head, hidden, labels, ref: fastpref.preference_loss(head(hidden), labels, ref_logps=ref).loss,
}
OTHER_PROCESS = """
import pickle, sys, torch, fastpref
inputs = pickle.loads(sys.stdin.buffer.read())
found = [torch.export.load(path).module()(*inputs).detach() for path in sys.argv[1:]]
assert not any(name.startswith("fastpref._lowrank") for name in sys.modules)
sys.stdout.buffer.write(pickle.dumps([value.tolist() for value in found]))
"""


@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs_run_in_another_process(tmp_path, strict, thin):
    thin(unless=not strict)
    hidden, weight, labels, ref_logps = batch()
    inputs = hidden, labels, ref_logps
    paths, expected = [], []
    for name, call in CALLS.items():
        for grad in (True, False):
            model = Model(weight, call)
            with torch.set_grad_enabled(grad):
                program = torch.export.export(model, inputs, strict=strict)
                expected.append(model(*inputs).detach())
            paths.append(tmp_path / f"{name}-{grad}.pt2")
            torch.export.save(program, paths[-1])
    command = [sys.executable, "-W", "ignore", "-c", OTHER_PROCESS, *paths]
    done = subprocess.run(command, input=pickle.dumps(inputs), capture_output=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    for path, found, value in zip(paths, pickle.loads(done.stdout), expected, strict=True):
        torch.testing.assert_close(torch.tensor(found), value, rtol=1e-6, atol=1e-6, msg=lambda m, p=path: f"{p}: {m}")


def python(code, cwd):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd)


@pytest.mark.parametrize(
    "imports",
    ["torch, fastpref", "fastpref.operators", "fastpref, torch; fastpref.set_simd_level", "fastpref; fastpref.svt"],
)
def test_operators_are_there_without_their_modules(tmp_path, imports):
    code = (
        f"import {imports}\n"
        "import sys, torch\n"
        "for name in ('token_logps_bwd_', 'preference_fwd', 'linear_preference_fwd', 'svt', 'bradley_terry_edges'):\n"
        "    getattr(torch.ops.fastpref, name).default\n"
        "assert 'triton' not in sys.modules and 'fastpref._logps.linear_logps' not in sys.modules\n"
    )
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_operators_need_no_native_core(tmp_path):
    code = (
        "import sys; sys.modules['fastpref._core'] = None\n"
        "import fastpref.operators\n"
        "assert not {'fastpref._native', 'fastpref._library', 'triton'} & set(sys.modules)\n"
    )
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_every_operator_has_its_functions():
    """Which load at the first call, and take the schema's arguments by position: an error would be found then."""
    tree = ast.parse(Path(operators.__file__).read_text())
    defined = [
        (node.targets[0].id, node.value.args[1].value)
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(getattr(node.value, "func", None), "id", "") == "_define"
    ]
    assert len(defined) >= 13
    for operator, path in defined:
        schema = getattr(operators, operator)._schema
        arguments = [argument.name for argument in schema.arguments]
        module, _, name = path.partition(":")
        functions = vars(import_module(module))
        for function in (name, f"{name}_fake") if schema.returns else (name,):
            assert list(inspect.signature(functions[function]).parameters) == arguments, f"{module}:{function}"


# ---- a loss in an operator's schema ----


@pytest.mark.parametrize(
    "loss",
    [
        Loss("sigmoid", None, None, 0.1),
        Loss("sigmoid", None, {"label_smoothing": 0.25, "reference_free": True}, 0.3),
        Loss("wpo", None, {"base": "ipo", "max_weight": None}, 0.3),
        Loss(["sigmoid", "sft"], None, None, 1.5),
        Loss(
            ("discopop", "rpo"), (0.1, 2), [{"f_divergence": "=.'\"\n", "tau": 3}, {"mode": "fwd", "beta": 1e-7}], 0.2
        ),
    ],
)
def test_a_loss_comes_back_from_the_schema(loss):
    encoded = encode_loss(loss)
    assert encoded.numbers.dtype == torch.float64
    assert all(isinstance(word, str) for word in encoded.losses + encoded.loss_options)
    if loss.is_list():
        many = len(loss.loss)
        weights, options = list(loss.weights or [1.0] * many), list(loss.options or [{}] * many)
        expected = Loss(list(loss.loss), weights, options, loss.beta)
    else:
        expected = loss._replace(options=loss.options or {})
    assert decode_loss(EncodedLoss(*encoded)) == expected


@pytest.mark.parametrize(
    "loss",
    [
        Loss(separable, None, None, 0.1),
        Loss(["sigmoid", separable], None, None, 0.1),
        Loss("kto", None, {"z0": torch.zeros(())}, 0.1),
        Loss("wpo", None, {"options": {"label_smoothing": 0.1}}, 0.1),
    ],
)
def test_what_is_no_name_or_number_stays_out_of_it(loss):
    assert encode_loss(loss) is None


def test_a_callable_is_called_directly():
    """It is handed to no operator, and no table keeps it."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = set()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names.add(function.name())
            return function(*args, **(kwargs or {}))

    hidden, weight, labels, ref_logps = batch()
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    with Seen() as by_callable:
        out = fastpref.linear_preference_loss(*leaves, labels, ref_logps=ref_logps, loss=separable)
    with Seen() as by_name:
        fastpref.linear_preference_loss(*leaves, labels, loss="simpo")
    assert "fastpref::linear_preference_fwd" in by_name.names - by_callable.names
    assert "fastpref::linear_logps_fwd" not in by_callable.names
    expected = fastpref.preference_loss(hidden @ weight.t(), labels, ref_logps=ref_logps, loss=separable).loss
    torch.testing.assert_close(out.loss, expected)
    gradients = torch.autograd.grad(out.loss, leaves), torch.autograd.grad(expected, leaves)
    torch.testing.assert_close(*gradients)


def test_an_option_out_of_range_is_named():
    hidden, weight, labels, ref_logps = batch()
    options = {"label_smoothing": 0.75}
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 0.5\), got 0.75"):
        fastpref.linear_preference_loss(
            hidden, weight.requires_grad_(), labels, ref_logps=ref_logps, loss_options=options
        )
