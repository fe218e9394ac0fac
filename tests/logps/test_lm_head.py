"""FusedLMHead: a torch.nn.Linear in every respect, whose forward may also compute the loss, on one rank or several."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastpref
from fastpref._logps.token_logps import STATS

PAIRS, TOKENS, WIDTH, VOCAB = 3, 7, 16, 37


def make(dtype=torch.float32):
    """hidden, labels, reference hidden states"""
    hidden, ref_hidden = torch.randn(2, 2 * PAIRS, TOKENS, WIDTH, dtype=dtype)
    labels = torch.randint(0, VOCAB, (2 * PAIRS, TOKENS))
    labels[torch.rand(labels.shape) < 0.3] = -100
    return hidden, labels, ref_hidden


biases = pytest.mark.parametrize("bias", [False, True])


# ---- a linear layer ----


@biases
def test_state_dict_is_that_of_a_linear_layer(bias):
    linear, head = nn.Linear(WIDTH, VOCAB, bias=bias), fastpref.FusedLMHead(WIDTH, VOCAB, bias=bias)
    assert isinstance(head, nn.Linear)
    assert list(head.state_dict()) == list(linear.state_dict())
    assert [name for name, _ in head.named_parameters()] == [name for name, _ in linear.named_parameters()]
    head.load_state_dict(linear.state_dict())
    torch.testing.assert_close(head.weight, linear.weight, rtol=0, atol=0)
    linear.load_state_dict(head.state_dict())
    hidden = torch.randn(5, WIDTH)
    torch.testing.assert_close(head(hidden), linear(hidden), rtol=0, atol=0)


def test_it_starts_as_a_linear_layer_does():
    torch.manual_seed(3)
    linear = nn.Linear(WIDTH, VOCAB)
    torch.manual_seed(3)
    head = fastpref.FusedLMHead(WIDTH, VOCAB)
    torch.testing.assert_close(head.state_dict(), linear.state_dict(), rtol=0, atol=0)


def test_device_and_dtype():
    head = fastpref.FusedLMHead(WIDTH, VOCAB, bias=False, device="meta", dtype=torch.bfloat16)
    assert head.weight.device.type == "meta"
    assert head.weight.dtype == torch.bfloat16
    assert head.bias is None
    head = head.to_empty(device="cpu")
    assert head.weight.device.type == "cpu"
    assert fastpref.FusedLMHead(WIDTH, VOCAB).double().weight.dtype == torch.float64
    assert torch.nn.utils.skip_init(fastpref.FusedLMHead, WIDTH, VOCAB).weight.shape == (VOCAB, WIDTH)


def test_repr():
    assert repr(fastpref.FusedLMHead(3, 5)) == "FusedLMHead(in_features=3, out_features=5, bias=True)"


@biases
def test_copies(bias):
    head = fastpref.FusedLMHead(WIDTH, VOCAB, bias=bias).eval()
    head.weight.requires_grad_(False)
    hidden, labels, _ = make()
    expected = head(hidden, labels, loss="simpo").loss
    for twin in (copy.deepcopy(head), pickle.loads(pickle.dumps(head)), fastpref.FusedLMHead.from_linear(head)):
        assert type(twin) is fastpref.FusedLMHead
        assert not twin.training
        assert not twin.weight.requires_grad
        torch.testing.assert_close(twin(hidden, labels, loss="simpo").loss, expected, rtol=0, atol=0)
    assert copy.deepcopy(head).weight is not head.weight


# ---- made of another layer ----


@biases
def test_from_linear_shares_the_parameters(bias):
    linear = nn.Linear(WIDTH, VOCAB, bias=bias).train(False)
    linear.weight.requires_grad_(False)
    head = fastpref.FusedLMHead.from_linear(linear)
    assert head.weight is linear.weight
    assert head.bias is linear.bias
    assert not head.training
    assert list(head.state_dict()) == list(linear.state_dict())
    assert (head.in_features, head.out_features) == (WIDTH, VOCAB)
    with torch.no_grad():
        linear.weight.zero_()
    assert (head.weight == 0).all()
    for dtype in (torch.bfloat16, torch.float64):
        assert fastpref.FusedLMHead.from_linear(linear.to(dtype)).weight.dtype == dtype
    meta = fastpref.FusedLMHead.from_linear(nn.Linear(WIDTH, VOCAB, device="meta"))
    assert meta.weight.is_meta


@pytest.mark.parametrize(
    "made", [nn.Embedding, torch.randn, lambda *_: None, nn.Identity], ids=["embedding", "tensor", "none", "identity"]
)
def test_from_linear_takes_linear_layers(made):
    other = made(VOCAB, WIDTH)
    with pytest.raises(TypeError, match=f"linear must be a torch.nn.Linear, got {type(other).__name__}"):
        fastpref.FusedLMHead.from_linear(other)


class Tied(nn.Module):
    """The smallest language model: an embedding, a layer, and the embedding again."""

    def __init__(self, head):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.head = head(WIDTH, VOCAB, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens, labels, **options):
        hidden = torch.tanh(self.layer(self.embedding(tokens)))
        if isinstance(self.head, fastpref.FusedLMHead):
            return self.head(hidden, labels, **options)
        return fastpref.preference_loss(self.head(hidden), labels, **options)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_tied_head(reduction):
    fused, linear = Tied(fastpref.FusedLMHead), Tied(nn.Linear)
    linear.load_state_dict(fused.state_dict())
    assert len(list(fused.parameters())) == 3
    tokens = torch.randint(0, VOCAB, (2 * PAIRS, TOKENS))
    _, labels, _ = make()
    for model in (fused, linear):
        model(tokens, labels, loss="sigmoid", ref_logps=-torch.arange(6.0), reduction=reduction).loss.sum().backward()
    for got, expected in zip(fused.parameters(), linear.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-5, atol=1e-6)


# ---- what forward computes ----


@biases
def test_logits_without_labels(bias):
    head = fastpref.FusedLMHead(WIDTH, VOCAB, bias=bias)
    for shape in ((WIDTH,), (5, WIDTH), (2, 3, WIDTH), (0, WIDTH)):
        hidden = torch.randn(shape, requires_grad=True)
        logits = head(hidden)
        torch.testing.assert_close(logits, F.linear(hidden, head.weight, head.bias), rtol=0, atol=0)
        assert logits.requires_grad


@biases
def test_log_probs_with_labels(bias):
    head = fastpref.FusedLMHead(WIDTH, VOCAB, bias=bias)
    hidden, labels, _ = make()
    for options in ({}, {"shift": True, "temperature": 0.7}, {"max_tile_bytes": 300, "softcap": 5.0}):
        expected = fastpref.linear_token_logps(hidden, head.weight, labels, bias=head.bias, **options)
        torch.testing.assert_close(head(hidden, labels, **options), expected, rtol=0, atol=0)
        torch.testing.assert_close(head(hidden, labels=labels, **options), expected, rtol=0, atol=0)
        logits = fastpref.token_logps(head(hidden), labels, **{k: v for k, v in options.items() if "tile" not in k})
        torch.testing.assert_close(expected, logits, rtol=1e-5, atol=1e-5)
    logps, stats = head(hidden, labels, stats=STATS)
    assert logps.shape == stats.entropy.shape == labels.shape


@pytest.mark.parametrize("frozen", [False, True])
@biases
def test_a_loss_with_labels(bias, frozen):
    head = fastpref.FusedLMHead(WIDTH, VOCAB, bias=bias, dtype=torch.float64).requires_grad_(not frozen)
    hidden, labels, ref_hidden = make(torch.float64)
    options = {
        "loss": "rdpo", "rating_gap": torch.randn(PAIRS), "beta": 0.3, "stats": STATS, "shift": True,
        "reduction": "sum", "pair_weights": torch.rand(PAIRS), "loss_options": {"beta_rating": 0.5},
    }  # fmt: skip
    ref_weight = torch.randn(VOCAB, WIDTH, dtype=torch.float64)
    results = []
    for f in (
        lambda x: head(x, labels, ref_hidden=ref_hidden, ref_weight=ref_weight, **options),
        lambda x: fastpref.preference_loss(head(x), labels, ref_logits=F.linear(ref_hidden, ref_weight), **options),
    ):
        x = hidden.clone().requires_grad_()
        out = f(x)
        head.zero_grad()
        out.loss.backward()
        results.append((out.loss.detach(), out.margins, x.grad, [p.grad for p in head.parameters()]))
        if frozen:
            assert not any(p.grad is not None for p in head.parameters())
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


def test_the_reference_has_the_policys_bias_by_default():
    head = fastpref.FusedLMHead(WIDTH, VOCAB, dtype=torch.float64)
    hidden, labels, _ = make(torch.float64)
    out = head(hidden, labels, loss="sigmoid", ref_hidden=hidden)
    torch.testing.assert_close(out.loss, torch.full_like(out.loss, 2).log(), rtol=0, atol=1e-12)


def test_options_are_not_dropped():
    head = fastpref.FusedLMHead(WIDTH, VOCAB)
    hidden, labels, _ = make()
    with pytest.raises(ValueError, match="labels must be given with loss"):
        head(hidden, loss="sigmoid")
    with pytest.raises(ValueError, match="labels must be given with temperature"):
        head(hidden, temperature=0.7)
    with pytest.raises(TypeError, match="beta"):  # of a loss
        head(hidden, labels, beta=0.1)
    with pytest.raises(TypeError, match="bias"):  # the module's own
        head(hidden, labels, loss="simpo", bias=head.bias)
    with pytest.raises(TypeError, match="softmax"):
        head(hidden, labels, loss="simpo", softmax=True)
    with pytest.raises(ValueError, match=r"weight must have shape \[vocab, 15\]"):
        head(hidden[..., :15], labels, loss="simpo")


def test_hooks_fire():
    head = fastpref.FusedLMHead(WIDTH, VOCAB)
    hidden, labels, _ = make()
    seen = []
    head.register_forward_pre_hook(lambda module, args: seen.append("before"))
    head.register_forward_hook(lambda module, args, out: seen.append(type(out).__name__))
    head.weight.register_post_accumulate_grad_hook(lambda parameter: seen.append("gradient"))
    head(hidden, labels, loss="simpo").loss.backward()
    assert seen == ["before", "PreferenceOutput", "gradient"]


def test_a_parametrized_weight():
    head = fastpref.FusedLMHead(WIDTH, VOCAB, bias=False)
    torch.nn.utils.parametrizations.weight_norm(head)
    hidden, labels, _ = make()
    gradients = []
    for f in (
        lambda: head(hidden, labels, loss="simpo"),
        lambda: fastpref.preference_loss(head(hidden), labels, loss="simpo"),
    ):
        head.zero_grad()
        f().loss.backward()
        gradients.append([p.grad.clone() for p in head.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", [None, "sigmoid", "aot"])
def test_compiles_without_graph_breaks(loss):
    torch._dynamo.reset()
    head = fastpref.FusedLMHead(WIDTH, VOCAB)
    hidden, labels, ref_hidden = make()
    options = {} if loss is None else {"loss": loss, "ref_hidden": ref_hidden}

    def step(x):
        out = head(x, labels, **options)
        return out.sum() if loss is None else out.loss

    results = []
    for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        x = hidden.clone().requires_grad_()
        head.zero_grad()
        value = f(x)
        value.backward()
        results.append((value.detach(), x.grad, head.weight.grad, head.bias.grad))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("frozen", [False, True])
def test_autocast(frozen):
    head = fastpref.FusedLMHead(WIDTH, VOCAB).requires_grad_(not frozen)
    hidden, labels, ref_hidden = make()
    hidden.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head(hidden).dtype == torch.bfloat16
        out = head(hidden, labels, loss="sigmoid", ref_hidden=ref_hidden)
    assert out.loss.dtype == torch.float32
    out.loss.backward()
    assert hidden.grad.dtype == torch.float32
    assert frozen or head.weight.grad.dtype == head.bias.grad.dtype == torch.float32
    half = copy.deepcopy(head).bfloat16()
    expected = half(hidden.detach().bfloat16(), labels, loss="sigmoid", ref_hidden=ref_hidden.bfloat16())
    torch.testing.assert_close(out.loss, expected.loss, rtol=0, atol=1e-6)


# ---- on two ranks: each has pairs of its own, and all gradients are averaged ----

MODEL = """
class Model(torch.nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.embedding = torch.nn.Embedding(37, 16)
        self.layer = torch.nn.Linear(16, 16)
        self.head = fastpref.FusedLMHead(16, 37, bias=not tied)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens, labels, **options):
        return self.head(torch.tanh(self.layer(self.embedding(tokens))), labels, **options)

def batch(rank):
    generator = torch.Generator().manual_seed(rank)
    tokens, labels = torch.randint(0, 37, (2, 4, 9), generator=generator)
    labels[:, :3] = -100
    return tokens, labels, -20 * torch.rand(4, generator=generator)

# tied, what is frozen (which decides the plan), options, whether rank 1 has no token that counts: none may wait for it
CASES = {
    "pair_resident": (False, "", {"loss": "sigmoid"}, False),
    "recompute": (False, "", {"loss": "aot"}, False),
    "unit": (False, "head", {"loss": "ipo"}, False),
    "one-rank-empty": (False, "", {"loss": "sigmoid"}, True),
    "tied": (True, "", {"loss": "sigmoid"}, False),
    "tied-recompute": (True, "", {"loss": "aot"}, True),
}

def build(tied, frozen):
    torch.manual_seed(7)
    model = Model(tied)
    if frozen:
        getattr(model, frozen).requires_grad_(False)
    return model

def loss_of(model, rank, options, empty=False, rows=(0, 1, 2, 3)):
    tokens, labels, reference = batch(rank)
    if empty and rank == 1:
        labels = torch.full_like(labels, -100)
    rows = list(rows)
    return model(tokens[rows], labels[rows], ref_logps=reference[rows], **options).loss

def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
"""


def check(by_rank):
    """Every rank has the average of what the two would compute alone."""
    names = {"torch": torch, "fastpref": fastpref}
    exec(MODEL, names)
    for case, (tied, frozen, options, empty) in names["CASES"].items():
        model = names["build"](tied, frozen)
        sum(names["loss_of"](model, rank, options, empty) / 2 for rank in range(2)).backward()
        expected = names["gradients"](model)
        for result in by_rank:
            assert result[case].keys() == expected.keys()
            for name, gradient in expected.items():
                assert result[case][name] is not None, f"{case}: {name} has no gradient"
                torch.testing.assert_close(
                    result[case][name], gradient, rtol=1e-5, atol=1e-6, msg=lambda m, at=f"{case}: {name}: ": at + m
                )


def test_distributed_data_parallel(two_ranks):
    """No gradient escapes the all-reduce."""
    body = """
from torch.nn.parallel import DistributedDataParallel
result = {}
for case, (tied, frozen, options, empty) in CASES.items():
    model = DistributedDataParallel(build(tied, frozen))
    loss_of(model, rank, options, empty).backward()
    result[case] = gradients(model.module)

# two micro-batches, of which the first does not synchronise
model = DistributedDataParallel(build(False, ""))
options = {"loss": "sigmoid", "num_items": 2}
with model.no_sync():
    loss_of(model, rank, options, rows=(0, 2)).backward()
loss_of(model, rank, options, rows=(1, 3)).backward()
result["accumulated"] = gradients(model.module)
"""
    by_rank = two_ranks(MODEL + body)
    check(by_rank)
    for result in by_rank:
        torch.testing.assert_close(result["accumulated"], result["pair_resident"], rtol=1e-5, atol=1e-6)


def test_fully_sharded(two_ranks):
    """FSDP2: the whole weight exists between the hooks of the module alone."""
    body = """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
mesh = init_device_mesh("cpu", (2,))
result = {}
for case, (tied, frozen, options, empty) in CASES.items():
    model = build(tied, frozen)
    if not tied:
        fully_shard(model.head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for step in range(2):  # the second one with resharded weights
        model.zero_grad()
        loss_of(model, rank, options, empty).backward()
    result[case] = {name: gradient.full_tensor() for name, gradient in gradients(model).items()}
"""
    check(two_ranks(MODEL + body))
