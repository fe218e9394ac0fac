"""linear_token_logps with its vocabulary, its rows or its weight on two ranks."""

from pathlib import Path

import pytest
import torch
from cases import TRANSFORMS
from linear_logps_cases import TRAINED, cast, close, exact, make, project, run

import fastpref
from fastpref._logps.token_logps import ALL_STATS

# ---- several ranks ----

VOCAB_SHARDS = """
    result = []
    for case in torch.load(f"{folder}/cases.pt"):
        bounds = [0, case["split"], case["tensors"]["weight"].shape[0]]
        mine = slice(*bounds[rank : rank + 2])
        leaves = {
            name: (t[mine] if name in ("weight", "bias", "B") else t).clone().requires_grad_(name in case["trained"])
            for name, t in case["tensors"].items()
        }
        adapter = (leaves["A"], leaves["B"]) if "A" in leaves else None
        try:
            out = fastpref.linear_token_logps(
                leaves["hidden"], leaves["weight"], case["labels"], bias=leaves.get("bias"), adapter=adapter,
                group=dist.group.WORLD, **case["options"],
            )
        except (ValueError, TypeError) as error:
            result.append(f"{type(error).__name__}: {error}")
            continue
        logps, values = out if case["options"].get("stats") else (out, None)
        if case["trained"]:
            logps.backward(case["grad"].to(logps.dtype))
        gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.requires_grad}
        result.append((logps.detach(), None if values is None else tuple(values), gradients))
"""


CASE = ("tensors", "labels", "grad", "split", "trained", "transform", "options")


def _join(parts, name):
    gradients = [part[2][name] for part in parts]
    if name in ("weight", "bias", "B"):
        return torch.cat(gradients)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0, msg=f"{name} differs between ranks")
    return gradients[0]


def test_vocabulary_shards_equal_one_process(two_ranks, tmp_path):
    cases = []

    def case(split, trained=TRAINED["all"], dtype=torch.float64, transform=None, labels=None, **options):
        tensors, made = make((3, 7), 12, 101, dtype, bias=True, rank=2)
        made[0, 0], made[0, 1] = 100, 0  # the first and the last column
        if labels is not None:
            made = labels
        transform = transform or {}
        options = {**transform, **options}
        cases.append(
            dict(zip(CASE, (tensors, made, torch.randn(3, 7), split, trained, transform, options), strict=True))
        )

    for split in (50, 70, 1, 101, 0):
        for trained in ("score", "hidden", "hidden-weight", "hidden-bias", "adapter", "all"):
            case(split, TRAINED[trained], stats=ALL_STATS)
    for transform in TRANSFORMS.values():
        case(33, transform=transform)
    for split in (70, 101):
        for trained in ("score", "hidden", "all"):
            # by bytes the ranks would cut the tokens into different tiles
            case(split, TRAINED[trained], max_tile_bytes=101 * 8 * 2)
            case(split, TRAINED[trained], dtype=torch.float32, max_tile_bytes=31 * 4 * 3, shift=True)
            case(split, TRAINED[trained], dtype=torch.bfloat16)
            case(split, TRAINED[trained], max_active_tokens=21)
            case(split, TRAINED[trained], labels=torch.full((3, 7), -100), stats=ALL_STATS)
    too_few = len(cases)
    case(70, labels=torch.zeros(3, 7, dtype=torch.long), max_active_tokens=3)
    out_of_range = len(cases)
    case(70, labels=torch.full((3, 7), 101))
    case(101, TRAINED["hidden"], labels=torch.full((3, 7), -1))

    torch.save(cases, tmp_path / "cases.pt")
    both = two_ranks(VOCAB_SHARDS)
    for number, (c, *parts) in enumerate(zip(cases, *both, strict=True)):
        where = f"case {number}: split {c['split']}, {c['trained']}, {c['options']}"
        if number >= out_of_range:
            for part in parts:
                assert isinstance(part, str), where
                assert part.startswith("ValueError: labels must lie in [0, 101)"), part
            continue
        assert not any(isinstance(part, str) for part in parts), f"{where}: {parts}"
        assert torch.equal(parts[0][0].nan_to_num(7.0), parts[1][0].nan_to_num(7.0)), where
        if number == too_few:
            assert parts[0][0].isnan().all(), where
            continue
        dtype = c["tensors"]["hidden"].dtype
        options = {**c["transform"], "shift": c["options"].get("shift", False)}
        expected = run(exact, cast(c["tensors"], torch.float64), c["labels"], c["grad"], c["trained"], **options)
        got = (parts[0][0], {name: _join(parts, name) for name in c["trained"]})
        bound = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2**-5}[dtype]
        for name, gradient in got[1].items():
            assert gradient.dtype == dtype, f"{where}: {name}"
        try:
            close(got, expected, atol=bound)
        except AssertionError as error:
            raise AssertionError(f"{where}: {error}") from None
        if c["options"].get("stats"):
            logits = project(cast(c["tensors"], torch.float64))
            _, true_values = fastpref.token_logps(logits, c["labels"], stats=ALL_STATS, **c["transform"])
            for part in parts:
                for value, true_value in zip(part[1], true_values, strict=True):
                    torch.testing.assert_close(value, true_value, rtol=1e-5, atol=1e-5, msg=where)


OF_NO_SHARD = """
    import sys
    sys.path.insert(0, TESTS)
    from forced_cuda import devices

    def launch(kernel, grid, *args, **options):
        kernel[grid](*args, **options)

    tensors, labels, grad = torch.load(f"{folder}/inputs.pt")
    bounds = [0, 70, tensors["weight"].shape[0]]
    mine = slice(*bounds[rank : rank + 2])
    result = []
    for dtype in (torch.float32, torch.float64):
        for trained in ((), ("hidden",), ("hidden", "weight")):
            for group, part in ((dist.group.WORLD, mine), (None, slice(None))):
                hidden = tensors["hidden"].to(dtype, copy=True).requires_grad_("hidden" in trained)
                weight = tensors["weight"][part].to(dtype, copy=True).requires_grad_("weight" in trained)
                with devices(lambda place: "cuda", launch):
                    logps, stats = fastpref.linear_token_logps(
                        hidden, weight, labels, group=group, stats=STATS
                    )
                    if trained:
                        logps.backward(grad.to(dtype))
                result.append((logps.detach(), *stats, hidden.grad))
"""


def test_a_label_of_no_shard_is_nan_where_nobody_checks(two_ranks, tmp_path):
    """On a GPU, as without shards: log-prob, stats and the gradient of that row."""
    pytest.importorskip("triton")
    tensors, labels = make((2, 4), 12, 101, torch.float32)
    labels[0], labels[1, 0], labels[1, 2] = torch.tensor([101, 3, -1, 100]), -100, 1 << 40
    torch.save((tensors, labels, torch.rand(2, 4) + 0.5), tmp_path / "inputs.pt")
    invalid = ((labels < 0) | (labels >= 101)) & (labels != -100)
    assert invalid.sum() == 3
    for result in two_ranks(
        OF_NO_SHARD.replace("TESTS", repr(str(Path(__file__).parents[1]))).replace("STATS", repr(ALL_STATS))
    ):
        for sharded, whole in zip(result[::2], result[1::2], strict=True):
            for value, expected in zip(sharded[:-1], whole[:-1], strict=True):
                assert torch.equal(value.isnan(), invalid)
                torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
            if whole[-1] is not None:
                assert torch.equal(sharded[-1].isnan().all(-1), invalid)
                torch.testing.assert_close(sharded[-1], whole[-1], rtol=1e-4, atol=1e-5, equal_nan=True)


def test_ddp_and_dtensor_weights(two_ranks, tmp_path):
    tensors, labels = make((2, 9), 12, 101, torch.float64, bias=True)
    grad = torch.randn(2, 9, dtype=torch.float64)
    torch.save((tensors, labels, grad), tmp_path / "inputs.pt")
    both = two_ranks("""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        class Model(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.weight, self.bias = (torch.nn.Parameter(tensors[name]) for name in ("weight", "bias"))

            def forward(self, hidden, labels):
                return fastpref.linear_token_logps(hidden, self.weight, labels, bias=self.bias)

        mesh = init_device_mesh("cpu", (2,))
        tensors, labels, grad = torch.load(f"{folder}/inputs.pt")
        result = []
        for placement in (Shard(0), Shard(1), Replicate()):
            for frozen in (False, True):
                hidden = tensors["hidden"][rank].clone().requires_grad_()
                weight = distribute_tensor(tensors["weight"], mesh, [placement])
                weight = weight.detach().requires_grad_(not frozen)
                logps = fastpref.linear_token_logps(hidden, weight, labels[rank], bias=tensors["bias"])
                logps.backward(grad[rank])
                result.append((logps.detach(), hidden.grad, None if frozen else weight.grad.full_tensor()))
        weight = distribute_tensor(tensors["weight"], mesh, [Shard(0)])
        with torch.no_grad():
            result.append(fastpref.linear_token_logps(tensors["hidden"][rank], weight, labels[rank]))
        model = torch.nn.parallel.DistributedDataParallel(Model())
        model(tensors["hidden"][rank], labels[rank]).backward(grad[rank])
        result.append([p.grad for p in model.parameters()])
    """)
    logps, gradients = run(exact, tensors, labels, grad)
    for rank, (*gathered, scored, by_ddp) in enumerate(both):
        for got, hidden_gradient, weight_gradient in gathered:
            torch.testing.assert_close(got, logps[rank], rtol=0, atol=1e-10)
            torch.testing.assert_close(hidden_gradient, gradients["hidden"][rank], rtol=0, atol=1e-10)
            if weight_gradient is not None:  # averaged, as FSDP does
                torch.testing.assert_close(weight_gradient, gradients["weight"] / 2, rtol=0, atol=1e-10)
        without_bias = {name: tensors[name] for name in ("hidden", "weight")}
        torch.testing.assert_close(scored, exact(without_bias, labels)[rank], rtol=0, atol=1e-10)
        for name, gradient in zip(("weight", "bias"), by_ddp, strict=True):
            torch.testing.assert_close(gradient, gradients[name] / 2, rtol=0, atol=1e-10)
