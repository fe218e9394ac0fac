"""linear_preference_loss with its vocabulary, its sequences or its weight on two ranks."""

import torch
from linear_preference_cases import HEAD, assert_same, make, plain

from fastpref._logps.pairs import PreferenceOutput, PreferenceStats
from fastpref._logps.token_logps import STATS

# ---- two ranks ----

NAMES = ("hidden", "weight", *HEAD)
# columns of rank 0, what is trained, options
VOCAB_SHARDS = {
    "uneven": (23, NAMES, {}),
    "uneven-groups": (23, NAMES, {"max_tile_bytes": 900}),
    "one-column": (1, ("hidden", "weight"), {"loss": "ipo"}),
    "empty": (37, NAMES, {}),
    "empty-groups": (0, ("hidden", "weight"), {"max_tile_bytes": 900}),
    "unit": (23, ("hidden",), {}),
    "unit-tiles": (5, ("hidden",), {"max_tile_bytes": 900}),
    "unit-empty": (37, ("hidden",), {"max_tile_bytes": 900}),
    "recompute": (23, NAMES, {"loss": "aot"}),
    "recompute-empty": (0, NAMES, {"loss": "aot", "max_tile_bytes": 900}),
    "recompute-none": (23, ("hidden", "weight"), {"reduction": "none"}),
    "wpo": (23, ("hidden", "weight"), {"loss": "wpo"}),
    "head": (23, HEAD, {}),
    "softcap": (23, NAMES, {"softcap": 5.0, "temperature": 1.3}),
}


def save(batch, path):
    torch.save(batch._asdict(), path / "batch.pt")
    return batch


def unpack(result):
    """What the ranks sent, as run() returns it."""
    out, gradients = result
    fields = dict(zip(PreferenceOutput._fields, out, strict=True))
    return PreferenceOutput(**{**fields, "stats": PreferenceStats(*fields["stats"])}), dict(gradients)


SEND = """
def send(out, leaf, trained):
    plain = tuple(None if t is None else t.detach() for t in out.stats)
    return (*(t.detach() for t in out[:-1]), plain), {name: leaf[name].grad for name in trained}
"""


def test_vocabulary_shards(two_ranks, tmp_path):
    batch = save(make(pairs=4), tmp_path)
    by_rank = two_ranks(
        f"""
batch = torch.load(f"{{folder}}/batch.pt")
result = {{}}
{SEND}
for case, (first, trained, options) in {VOCAB_SHARDS!r}.items():
    mine = slice(0, first) if rank == 0 else slice(first, None)
    leaf = {{name: batch[name].clone() for name in ("hidden", "weight", "bias", "adapter_a", "adapter_b")}}
    for name in ("weight", "bias", "adapter_b"):
        leaf[name] = leaf[name][mine]
    for name in trained:
        leaf[name].requires_grad_()
    out = fastpref.linear_preference_loss(
        leaf["hidden"], leaf["weight"], batch["labels"], bias=leaf["bias"],
        adapter=(leaf["adapter_a"], leaf["adapter_b"]), ref_hidden=batch["ref_hidden"],
        ref_weight=batch["ref_weight"][mine], rating_gap=batch["gap"], group=dist.group.WORLD,
        stats=("entropy", "log_sum_p2", "mean_logit", "top1"), **{{"loss": "rdpo", **options}},
    )
    (3 * out.loss).sum().backward()
    result[case] = send(out, leaf, trained)
"""
    )
    for case, (_, trained, options) in VOCAB_SHARDS.items():
        call = {"loss": "rdpo", **options, **batch.reference, "rating_gap": batch.gap, "stats": STATS, "used": HEAD}
        out, expected = plain(batch, trained, upstream=3.0, **call)
        parts = [by_rank[rank][case][1] for rank in range(2)]
        for rank in range(2):
            got, gradients = unpack(by_rank[rank][case])
            for name in set(trained) & {"weight", "bias", "adapter_b"}:
                gradients[name] = torch.cat([part[name] for part in parts])
            try:
                assert_same((got, gradients), (out._replace(loss=out.loss.detach()), expected))
            except AssertionError as error:
                raise AssertionError(f"{case}, rank {rank}: {error}") from error


# positions of rank 0 in each padded sequence, what is trained, options
SEQUENCE_SLICES = {
    "uneven": (3, NAMES, {}),
    "uneven-groups": (3, NAMES, {"max_tile_bytes": 900}),
    "all-on-one": (9, ("hidden", "weight"), {}),
    "unit": (5, ("hidden",), {"max_tile_bytes": 900}),
    "coupled": (5, ("hidden", "weight"), {"loss": "aot"}),
    "none": (5, ("hidden", "weight"), {"reduction": "none"}),
    "lengths": (4, ("hidden", "weight"), {"loss": "ipo"}),
    "wpo": (4, ("hidden", "weight"), {"loss": "wpo"}),
}


def test_sequence_slices(two_ranks, tmp_path):
    batch = save(make(pairs=4), tmp_path)
    by_rank = two_ranks(
        f"""
batch = torch.load(f"{{folder}}/batch.pt")
result = {{}}
{SEND}
for case, (first, trained, options) in {SEQUENCE_SLICES!r}.items():
    mine = slice(0, first) if rank == 0 else slice(first, None)
    leaf = {{name: batch[name].clone() for name in ("hidden", "weight", "bias", "adapter_a", "adapter_b")}}
    leaf["hidden"] = leaf["hidden"][:, mine].clone()
    for name in trained:
        leaf[name].requires_grad_()
    out = fastpref.linear_preference_loss(
        leaf["hidden"], leaf["weight"], batch["labels"][:, mine], bias=leaf["bias"],
        adapter=(leaf["adapter_a"], leaf["adapter_b"]), ref_hidden=batch["ref_hidden"][:, mine],
        ref_weight=batch["ref_weight"], rating_gap=batch["gap"], sequence_group=dist.group.WORLD,
        stats=("entropy", "log_sum_p2", "mean_logit", "top1"), **{{"loss": "rdpo", **options}},
    )
    (3 * out.loss).sum().backward()
    result[case] = send(out, leaf, trained)
"""
    )
    for case, (_, trained, options) in SEQUENCE_SLICES.items():
        call = {"loss": "rdpo", **options, **batch.reference, "rating_gap": batch.gap, "stats": STATS, "used": HEAD}
        out, expected = plain(batch, trained, upstream=3.0, **call)
        parts = [by_rank[rank][case][1] for rank in range(2)]
        for rank in range(2):
            got, gradients = unpack(by_rank[rank][case])
            for name in trained:
                if name == "hidden":
                    gradients[name] = torch.cat([part[name] for part in parts], 1)
                else:
                    gradients[name] = parts[0][name] + parts[1][name]
            try:
                assert_same((got, gradients), (out._replace(loss=out.loss.detach()), expected))
            except AssertionError as error:
                raise AssertionError(f"{case}, rank {rank}: {error}") from error


def test_a_sharded_weight_is_gathered(two_ranks, tmp_path):
    """A DTensor weight, as FSDP2 keeps it: each rank has pairs of its own, and the gradient is averaged."""
    batch = save(make(pairs=4, dtype=torch.float32), tmp_path)
    by_rank = two_ranks(
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor
        batch = torch.load(f"{folder}/batch.pt")
        mesh = init_device_mesh("cpu", (2,))
        rows = [2 * rank, 2 * rank + 1, 4 + 2 * rank, 5 + 2 * rank]
        result = []
        for loss in ("sigmoid", "aot"):
            weight = torch.nn.Parameter(distribute_tensor(batch["weight"], mesh, [Shard(0)]))
            out = fastpref.linear_preference_loss(
                batch["hidden"][rows], weight, batch["labels"][rows], ref_hidden=batch["ref_hidden"][rows],
                ref_weight=batch["ref_weight"], loss=loss,
            )
            out.loss.backward()
            result.append((type(weight.grad).__name__, weight.grad.full_tensor()))
        """
    )
    for i, loss in enumerate(("sigmoid", "aot")):
        gradients = []
        for rank in range(2):
            rows = [2 * rank, 2 * rank + 1, 4 + 2 * rank, 5 + 2 * rank]
            part = batch._replace(**{k: getattr(batch, k)[rows] for k in ("hidden", "ref_hidden", "labels")})
            gradients.append(plain(part, ("weight",), loss=loss, **batch.reference | part.reference)[1]["weight"])
        for result in by_rank:
            assert result[i][0] == "DTensor"
            torch.testing.assert_close(result[i][1], sum(gradients) / 2, rtol=1e-5, atol=1e-6)
