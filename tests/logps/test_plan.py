"""plan: the kind, the passes and the bytes it predicts, and its errors."""

from functools import partial

import pytest
import torch
from linear_preference_cases import coupled, separable, uncoupled

import fastpref

# ---- plan ----


def test_plans():
    sizes = {"hidden_size": 64, "vocab_size": 1000}
    plan = partial(fastpref.plan, [100, 80, 100, 80], **sizes, loss="sigmoid")
    assert plan().kind == "pair_resident"
    assert plan().gemm_passes == 3
    assert plan().groups == 1
    grouped = plan(max_tile_bytes=200 * 1000 * 4)
    assert grouped.kind == "pair_resident"
    assert grouped.groups == 2
    assert grouped.predicted_bytes < plan().predicted_bytes
    assert plan(weight_grad=False).kind == "unit"
    assert plan(weight_grad=False, loss="aot").kind == "unit"
    assert plan(loss="aot").kind == "recompute"
    assert plan(reduction="none").kind == "recompute"
    assert plan(loss=["sigmoid", "sft"]).kind == "pair_resident"
    assert plan(loss=["sigmoid", coupled]).kind == "recompute"
    assert plan(loss=uncoupled).kind == "recompute"
    assert plan(loss=separable).kind == "pair_resident"
    assert plan(loss="kto").kind == "recompute"
    assert plan(loss="kto", loss_options={"z0": 0.0}).kind == "pair_resident"
    assert plan(hidden_grad=False, weight_grad=False).kind == "score"
    assert plan(hidden_grad=False, weight_grad=False).gemm_passes == 1
    assert plan(dtype=torch.float16).kind == "recompute"  # a loss scale arrives with the backward
    assert plan(dtype=torch.float16, weight_grad=False).gemm_passes == 3
    primitive = partial(fastpref.plan, 360, **sizes)
    assert primitive().kind == "recompute"
    assert primitive(weight_grad=False).kind == "unit"
    assert primitive(hidden_grad=False, weight_grad=False).kind == "score"
    for found in (plan(), primitive(), plan(dtype=torch.bfloat16)):
        assert isinstance(found.product, str)
        assert found.product
        assert isinstance(found.predicted_bytes, int)
        assert 1 <= found.tile_rows <= 360
    # a tile never holds more than it may, but for the one row without which nothing goes on
    for bytes_ in (1, 4000, 10_000, 400_000):
        for call in (plan, primitive):
            assert call(max_tile_bytes=bytes_).tile_rows <= max(1, bytes_ // 4000)
    for nothing in ([], [0, 0]):
        found = fastpref.plan(nothing, **sizes, loss="sigmoid")
        assert found.gemm_passes <= 3
        assert found.tile_rows == 0


def test_plan_errors():
    def message(kind, text, *args, **kwargs):
        with pytest.raises(kind) as caught:
            fastpref.plan(*args, **kwargs)
        assert text in str(caught.value), str(caught.value)

    good = ([3, 4, 5, 6], 16, 100)
    message(ValueError, "lengths", [3, 4, 5], 16, 100, loss="sigmoid")
    message(ValueError, "lengths", [3, -4], 16, 100, loss="sigmoid")
    message(ValueError, "lengths", -1, 16, 100)
    message((TypeError, ValueError), "lengths", [3.5, 4], 16, 100, loss="sigmoid")
    message((TypeError, ValueError), "hidden_size", [3, 4], 0, 100, loss="sigmoid")
    message((TypeError, ValueError), "vocab_size", [3, 4], 16, 0, loss="sigmoid")
    message((TypeError, ValueError), "dtype", *good, loss="sigmoid", dtype=torch.int64)
    message(ValueError, "got 'sigmod'; nearest names: 'sigmoid'", *good, loss="sigmod")
    message(ValueError, "reduction must be one of ('mean', 'sum', 'none'), got 'avg'", *good, loss="sigmoid",
            reduction="avg")  # fmt: skip
    message(ValueError, "max_tile_bytes", *good, loss="sigmoid", max_tile_bytes=0)
    message(TypeError, "max_tile_bytes", *good, loss="sigmoid", max_tile_bytes=1.5)
    message((TypeError, ValueError), "adapter_rank", *good, loss="sigmoid", adapter_rank=-1)
    message(ValueError, "logits_dtype", *good, loss="sigmoid", logits_dtype=torch.int8)
    message(ValueError, "total_tokens", *good, loss="sigmoid", total_tokens=3)


def test_a_device_that_is_not_there(monkeypatch):
    with pytest.raises(ValueError, match=r"device must be one of torch's, such as 'cpu' or 'cuda:0', got 'gpu'"):
        fastpref.plan([8, 8], 64, 1000, loss="sigmoid", device="gpu")

    def absent(_):
        raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr(torch.cuda, "get_device_properties", absent)
    with pytest.raises(ValueError, match=r"the memory of cuda is not known here \(Torch .*\): give max_tile_bytes="):
        fastpref.plan([8, 8], 64, 1000, loss="sigmoid", device="cuda")
    assert fastpref.plan([8, 8], 64, 1000, loss="sigmoid", device="cuda", max_tile_bytes=1 << 20).tile_rows > 0
