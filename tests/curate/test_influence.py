"""Influence of pairs: against gradients per sample, one SGD step, and what the selection by it must keep."""

import math
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpref import losses
from fastpref._logps import causal_lm
from fastpref.curate import (
    PairLogps,
    PairScores,
    intersection,
    irm,
    keep_rate,
    loss_diff,
    pair_batches,
    pair_influence,
    pair_logps,
    truncated,
)

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything of Hugging Face is imported: no download

DPO = {"reference_free": True}  # the reference is zero: then plain logistic regression is DPO with beta = 1


class Logistic(torch.nn.Module):
    """log pi(chosen) - log pi(rejected) = <weight, x>."""

    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(weight)

    def forward(self, x):
        return x @ self.weight


def logistic_logps(model, x):
    margin = model(x)
    return 0.5 * margin, -0.5 * margin


def logistic_problem(seed=0, train=400, validation=200, flipped=0.2, dtype=torch.float64):
    """Features times the sign of the label; a fifth of the training labels is wrong."""
    g = torch.Generator().manual_seed(seed)
    truth = torch.randn(8, generator=g, dtype=torch.float64)
    x = torch.randn(train + validation, 8, generator=g, dtype=torch.float64)
    label = (torch.rand(len(x), generator=g, dtype=torch.float64) < (x @ truth).sigmoid()).double() * 2 - 1
    wrong = torch.rand(train, generator=g) < flipped
    label[:train][wrong] *= -1
    x = (x * label.unsqueeze(1)).to(dtype)
    model = Logistic((0.3 * torch.randn(8, generator=g, dtype=torch.float64)).to(dtype))
    return model, x[:train], x[train:], wrong.numpy()


def influence_of(model, train, validation, size=64, **options):
    options = {"logps_fn": logistic_logps, "beta": 1.0, "loss_options": DPO, **options}
    return pair_influence(model, train.split(size), validation.split(size), **options)


# ---- the definition


@pytest.mark.numerics
def test_one_sgd_step_takes_the_influence_off_the_validation_loss():
    model, train, validation, wrong = logistic_problem()
    scores = influence_of(model, train, validation)

    def loss(weight, x):
        return F.softplus(-(x @ weight))

    weight = model.weight.detach()
    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0))(weight, train)
    mean = torch.func.vmap(torch.func.grad(loss), (None, 0))(weight, validation).mean(0)
    np.testing.assert_allclose(scores.values, gradients @ mean, rtol=1e-5, atol=1e-9)
    eta = 1e-4
    stepped = torch.stack([loss(weight - eta * g, validation).mean() for g in gradients])
    back = torch.stack([loss(weight + eta * g, validation).mean() for g in gradients])
    np.testing.assert_allclose(scores.values, (back - stepped) / (2 * eta), rtol=1e-5, atol=1e-8)
    assert scores.check == pytest.approx(1, abs=1e-6)
    assert scores.values[wrong].mean() < 0 < scores.values[~wrong].mean()
    assert (scores.signal, scores.beta) == ("influence", 1.0)


@pytest.mark.parametrize("size", [1, 7, 400])
def test_batches_of_any_size_and_kind_give_the_same(size):
    model, train, validation, _ = logistic_problem()
    expected = influence_of(model, train, validation).values
    batches = (batch for batch in train.split(size))  # read once
    found = pair_influence(
        model, batches, iter(validation.split(size)), logps_fn=logistic_logps, beta=1.0, loss_options=DPO
    )
    np.testing.assert_allclose(found.values, expected, rtol=1e-9, atol=1e-12)


LOSS_CASES = {
    "sigmoid": {}, "ipo": {}, "hinge": {}, "robust": {"label_smoothing": 0.1}, "simpo": {}, "exo_pair": {}, "rdpo": {},
    "ml_rdpo": {"variance": 2.0}, "mixdpo": {}, "nca_pair": {}, "odpo": {}, "sft": {}, "length_dpo": {}, "ripo": {},
}  # fmt: skip


@pytest.mark.parametrize("loss", LOSS_CASES)
def test_any_loss_of_single_pairs(loss):
    model, train, validation, _ = logistic_problem(train=60, validation=40)
    g = torch.Generator().manual_seed(1)

    def given_of(count):
        fields = ("ref_chosen_logps", "ref_rejected_logps", "rating_gap")
        fields = {name: 0.1 * torch.randn(count, generator=g, dtype=torch.float64) for name in fields}
        lengths = ("chosen_length", "rejected_length")
        return fields | {name: torch.randint(1, 9, (count,), generator=g).double() for name in lengths}

    given_train, given_validation = given_of(60), given_of(40)

    def pair_loss(weight, x, fields):
        margin = (x @ weight).unsqueeze(0)
        pairs = losses.Pairs(0.5 * margin, -0.5 * margin, **{k: v.unsqueeze(0) for k, v in fields.items()})
        return losses.pair_loss(pairs, loss, beta=0.7, options=LOSS_CASES[loss])[0]

    gradient = torch.func.vmap(torch.func.grad(pair_loss), (None, 0, 0))
    weight = model.weight.detach()
    expected = (gradient(weight, train, given_train) @ gradient(weight, validation, given_validation).mean(0)).numpy()
    found = influence_of(
        model, train, validation, size=16, loss=loss, beta=0.7, loss_options=LOSS_CASES[loss],
        train_given=given_train, validation_given={k: v.numpy() for k, v in given_validation.items()}, step=1e-5,
    )  # fmt: skip
    np.testing.assert_allclose(found.values, expected, rtol=1e-4, atol=1e-7 * np.abs(expected).max())


def test_a_loss_and_fields_of_the_caller():
    model, train, validation, _ = logistic_problem(train=60, validation=40)

    @losses.pair_separable
    def squared(pairs, target):
        return (pairs.chosen_logps - pairs.rejected_logps - target * pairs.chosen_score).square()

    def scored_logps(model, batch):  # a whole losses.Pairs, with a field of its own
        return losses.Pairs(*logistic_logps(model, batch), chosen_score=batch[:, 0])

    found = influence_of(model, train, validation, loss=squared, logps_fn=scored_logps, loss_options={"target": 0.5})
    residual = train @ model.weight - 0.5 * train[:, 0]
    mean = (2 * (validation @ model.weight - 0.5 * validation[:, 0]).unsqueeze(1) * validation).mean(0)
    np.testing.assert_allclose(found.values, (2 * residual * (train @ mean)).detach(), rtol=1e-7, atol=1e-9)


# ---- transformers


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed (the extra [trl])")


VOCAB = 50


def tiny(transformers, seed=0, **fields):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCAB,
        max_position_embeddings=64, initializer_range=0.2, attn_implementation="eager", **fields
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config)


def random_pairs(count, seed):
    draw = np.random.default_rng(seed)
    sides = ((2, 6), (3, 9), (3, 9))
    return tuple([draw.integers(3, VOCAB, draw.integers(*size)).tolist() for _ in range(count)] for size in sides)


def per_sample(model, reference, pairs, names, beta, functional=True):
    """[pairs, parameters] float64 gradients of the DPO loss by torch.func, on plain log-softmax, pair by pair."""
    batches = pair_batches(*pairs, max_tokens=1)
    assert len(batches) == len(pairs[0])
    values = {name: p.detach() for name, p in model.named_parameters()}

    def logps(model, values, batch):
        ids, mask = batch["input_ids"], batch["attention_mask"]
        inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        logits = torch.func.functional_call(model, values, (), inputs).logits if values else model(**inputs).logits
        steps = F.log_softmax(logits[:, :-1].double(), -1).gather(2, ids[:, 1:].unsqueeze(2)).squeeze(2)
        return (steps * batch["completion_mask"][:, 1:]).sum(1)

    def loss(moved, batch, against):
        ours = logps(model, {**values, **moved}, batch) - against
        return F.softplus(-beta * (ours[0] - ours[1]))

    rows = []
    for batch in batches:
        with torch.no_grad():
            against = logps(reference, None, batch)
        found = torch.func.grad(loss)({name: values[name] for name in names}, batch, against)
        rows.append(torch.cat([found[name].flatten().double() for name in names]))
    return torch.stack(rows)


def assert_close_to_exact(found, expected, tolerance):
    """Differences in units of the spread of the exact values."""
    error = np.abs(found - expected.numpy()).max() / expected.std().item()
    assert error < tolerance, error
    assert np.corrcoef(found, expected)[0, 1] > 1 - tolerance**2


@pytest.mark.numerics
def test_a_transformer_in_float32_against_torch_func(transformers):
    model, reference = tiny(transformers, 0), tiny(transformers, 1)
    model.train()
    train, validation = random_pairs(40, 0), random_pairs(16, 1)
    names = [name for name, _ in model.named_parameters()]
    exact = per_sample(model, reference, train, names, 0.1)
    mean = per_sample(model, reference, validation, names, 0.1).mean(0)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    scores = pair_influence(
        model,
        pair_batches(*train, max_tokens=300),
        pair_batches(*validation, max_tokens=300),
        reference=reference,
    )
    # The error is of second order in the step: 0.016 of the spread was measured here at 1e-3, 0.0014 at 3e-4.
    assert_close_to_exact(scores.values, exact @ mean, 0.02)
    assert scores.check == pytest.approx(1, abs=0.02)
    assert scores.model_id == causal_lm.model_id(model)
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    assert model.training and all(p.grad is None and p.requires_grad for p in model.parameters())


def test_parameters_by_name(transformers):
    model, reference = tiny(transformers, 0), tiny(transformers, 1)
    model.requires_grad_(False)
    names = ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"]
    train, validation = random_pairs(20, 0), random_pairs(10, 1)
    exact = per_sample(model, reference, train, names, 0.5)
    mean = per_sample(model, reference, validation, names, 0.5).mean(0)
    scores = pair_influence(
        model, pair_batches(*train), pair_batches(*validation), reference=reference, beta=0.5, parameters=names
    )
    assert_close_to_exact(scores.values, exact @ mean, 0.02)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.numerics
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*is deprecated:FutureWarning")
def test_adapters_of_peft(transformers):
    peft = pytest.importorskip("peft", reason="PEFT is not installed (the extra [trl])")
    reference = tiny(transformers, 0)
    torch.manual_seed(3)
    options = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False}
    model = peft.get_peft_model(tiny(transformers, 0), peft.LoraConfig(**options, task_type="CAUSAL_LM"))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names and all("lora_" in name for name in names)
    train, validation = random_pairs(20, 0), random_pairs(10, 1)
    exact = per_sample(model, reference, train, names, 0.1)
    mean = per_sample(model, reference, validation, names, 0.1).mean(0)
    scores = pair_influence(model, pair_batches(*train), pair_batches(*validation), reference=reference)
    assert_close_to_exact(scores.values, exact @ mean, 0.02)
    given = []
    with model.disable_adapter():
        for pairs in (train, validation):
            logps = pair_logps(model, pair_batches(*pairs))
            given.append({"ref_chosen_logps": logps.chosen, "ref_rejected_logps": logps.rejected})
    same = pair_influence(
        model, pair_batches(*train), pair_batches(*validation), train_given=given[0], validation_given=given[1]
    )
    np.testing.assert_allclose(same.values, scores.values, rtol=1e-3, atol=1e-3 * scores.values.std())


def test_log_probs_of_pairs_and_lengths(transformers):
    model = tiny(transformers)
    pairs = random_pairs(13, 2)
    pairs[0][4] = []  # nothing predicts the first token of its responses
    found = pair_logps(model, pair_batches(*pairs, max_tokens=200), template="t")
    for i, (prompt, *sides) in enumerate(zip(*pairs, strict=True)):
        for side, logps in zip(sides, (found.chosen[i], found.rejected[i]), strict=True):
            ids = torch.tensor([[*prompt, *side]])
            with torch.no_grad():
                steps = F.log_softmax(model(input_ids=ids).logits[0].double(), -1)
            first = len(prompt)
            expected = sum(steps[first + t - 1, token].item() for t, token in enumerate(side) if first + t > 0)
            assert logps == pytest.approx(expected, rel=1e-5)
    assert (found.model_id, found.template) == (causal_lm.model_id(model), "t")
    # a loss per token takes the lengths from the masks
    reference = PairLogps(found.chosen, found.rejected, "reference", "t")
    train, validation = pair_batches(*pairs), pair_batches(*random_pairs(6, 3))
    scores = pair_influence(model, train, validation, loss="simpo", loss_options={"gamma": 0.5})
    lengths = {"chosen_length": [len(c) for c in pairs[1]], "rejected_length": [len(r) for r in pairs[2]]}
    for counts in lengths.values():
        counts[4] -= 1
    given = pair_influence(model, train, validation, loss="simpo", loss_options={"gamma": 0.5}, train_given=lengths)
    np.testing.assert_allclose(scores.values, given.values, rtol=1e-9)
    assert irm(found, reference).values == pytest.approx(np.zeros(13))


def test_batches_of_pairs():
    pairs = random_pairs(50, 0)
    batches = pair_batches(*pairs, max_tokens=120)
    rows = []
    for batch in batches:
        ids, attention, completion = batch["input_ids"], batch["attention_mask"], batch["completion_mask"]
        assert ids.numel() <= 120 or len(ids) == 2
        assert attention.sum(1).max() == ids.shape[1] and (ids[attention == 0] == 0).all()
        half = len(ids) // 2
        for i in range(half):
            chosen, rejected = (ids[row][attention[row] == 1].tolist() for row in (i, i + half))
            first = int(completion[i].argmax())
            assert completion[i].sum() == len(chosen) - first
            rows.append((chosen[:first], chosen[first:], rejected[first:]))
    assert rows == list(zip(*pairs, strict=True))
    assert len(batches) < 50 and pair_batches([], [], []) == []
    with pytest.raises(ValueError, match="must be of the same pairs, got 1, 1 and 0"):
        pair_batches([[1]], [[2]], [])


def test_batches_that_are_no_pairs_or_padded_on_the_left_are_refused(transformers):
    model = tiny(transformers)
    (batch,) = pair_batches([[3, 4]] * 2, [[5]] * 2, [[6, 7]] * 2)
    with pytest.raises(ValueError, match="as many rejected as chosen sequences, got 3 in all"):
        pair_logps(model, [{name: part[:3] for name, part in batch.items()}])
    with pytest.raises(ValueError, match="attention_mask of a batch must be padded on the right"):
        pair_logps(model, [{name: part.flip(1) for name, part in batch.items()}])


# ---- the parameters


def test_parameters_are_restored_bit_for_bit_after_an_error():
    model, train, validation, _ = logistic_problem(dtype=torch.float32)
    before = model.weight.detach().clone()
    calls = []

    def failing(model, x):
        assert not model.training
        calls.append(model.weight.detach().clone())
        if len(calls) == 12:
            raise RuntimeError("lost")
        return logistic_logps(model, x)

    with pytest.raises(RuntimeError, match="lost"):
        influence_of(model, train, validation, logps_fn=failing)
    assert not torch.equal(calls[-1], before)  # it was moved
    assert torch.equal(model.weight, before)
    assert model.training and model.weight.grad is None


def test_a_step_that_is_too_long_or_too_short_is_told():
    model, train, validation, _ = logistic_problem(dtype=torch.float32)
    with pytest.warns(UserWarning, match=r"over its exact value, is 0\.\d+ at step=30: no such step"):
        assert influence_of(model, train, validation, step=30.0).check < 0.95
    with pytest.warns(UserWarning, match=r"over its exact value, is .* at step=1e-08: no such step"):
        influence_of(model, train, validation, step=1e-8)


@pytest.mark.numerics
def test_the_step_is_the_first_that_the_validation_pairs_confirm():
    model, train, validation, _ = logistic_problem()
    scores = influence_of(model, train, validation)
    assert scores.step == 1e-3 and scores.check == pytest.approx(1, abs=0.01)

    def bent(model, x):  # a step of a thousandth is wrong by 20 %, one of 3e-4 by 1.8 %, one of 1e-4 by 0.2 %
        moved = model.weight - start
        margin = x @ (model.weight + 0.2 * moved * moved.square().sum() / (1e-6 * start.square().sum()))
        return 0.5 * margin, -0.5 * margin

    start = model.weight.detach().clone()
    scores = influence_of(model, train, validation, logps_fn=bent)
    with pytest.warns(UserWarning, match=r"at step=0\.001: no such step"):
        long = influence_of(model, train, validation, logps_fn=bent, step=1e-3)
    expected = influence_of(model, train, validation).values
    assert scores.step == 1e-4 and scores.check == pytest.approx(1.002, abs=5e-4)
    assert long.check == pytest.approx(1.2, abs=0.01)
    np.testing.assert_allclose(scores.values, 1.002 * expected, rtol=1e-3)
    np.testing.assert_allclose(long.values, 1.2 * expected, rtol=1e-2)


def test_a_step_without_a_finite_loss_is_not_taken():
    model, train, validation, _ = logistic_problem()
    start, furthest = model.weight.detach().clone(), 5e-4

    def bounded(model, x):
        far = (model.weight - start).norm() > furthest * start.norm()
        return tuple(logps + torch.where(far, torch.nan, 0.0) for logps in logistic_logps(model, x))

    scores = influence_of(model, train, validation, logps_fn=bounded)
    assert scores.step == 3e-4 and scores.check == pytest.approx(1, abs=0.01)
    np.testing.assert_allclose(scores.values, influence_of(model, train, validation).values, rtol=1e-4, atol=1e-7)
    furthest = 1e-9
    with pytest.warns(UserWarning) as caught:
        influence_of(model, train, validation, logps_fn=bounded)
    assert "nan at step=1e-05: no such step" in str(caught[0].message) and len(caught) == 2


def test_parameters_at_zero_and_a_gradient_of_zero():
    model, train, validation, _ = logistic_problem()
    with torch.no_grad():
        model.weight.zero_()
    scores = influence_of(model, train, validation)
    np.testing.assert_allclose(scores.values, 0.25 * train @ validation.mean(0), rtol=1e-5)
    with pytest.warns(UserWarning, match="has no gradient: every influence is 0"):
        scores = influence_of(model, train, 0 * validation)
    assert (scores.values == 0).all()


def test_what_influence_refuses():
    model, train, validation, _ = logistic_problem()

    def refused(match, model=model, train=train, validation=validation, **options):
        with pytest.raises(ValueError, match=match):
            influence_of(model, train, validation, **options)

    refused("loss must be one of single pairs, got 'aot'", loss="aot")
    refused("step must be a positive number or None, got 0", step=0)
    refused(r"parameters must be names of the model's parameters, got \['bias'\]", parameters=["bias"])
    refused("parameters must not be empty", parameters=[])
    refused("parameters must be float32 or float64.* weight is torch.bfloat16", Logistic(torch.zeros(8).bfloat16()))
    refused(r"train_given\['rating_gap'\] must have one entry per pair, got 100 for 128 pairs",
            train_given={"rating_gap": np.zeros(100)})  # fmt: skip
    refused(r"train_given\['rating_gap'\] must have one entry per pair, got 401 for 400 pairs",
            train_given={"rating_gap": np.zeros(401)})  # fmt: skip
    refused(r"validation_given\['rating_gap'\] must have one entry per pair, got 201 for 200 pairs",
            validation_given={"rating_gap": np.zeros(201)})  # fmt: skip
    refused(r"fields of losses.Pairs besides the log-probs, got \['gap'\]", train_given={"gap": np.zeros(400)})
    refused("sigmoid needs ref_chosen_logps", loss_options=None)
    refused("reference must not share the parameters that are moved", reference=model, loss_options=None)
    references = {"ref_chosen_logps": np.zeros(400), "ref_rejected_logps": np.zeros(400)}
    refused(r"train_given must not hold what the reference gives, got \['ref_chosen_logps', 'ref_rejected_logps'\]",
            reference=Logistic(torch.ones(8).double()), train_given=references)  # fmt: skip
    refused("validation must hold at least one pair, got none", validation=validation[:0])
    refused("validation must give a finite gradient", validation=validation / 0)
    broken = train.clone()
    broken[3] = torch.nan
    with pytest.warns(UserWarning, match="1 of 400 training pairs have no finite loss"):
        assert np.isnan(influence_of(model, broken, validation).values).sum() == 1


# ---- proxies and selection


def logps_of(seed, model="m", count=200, template="t"):
    draw = np.random.default_rng(seed)
    return PairLogps(draw.normal(-50, 5, count), draw.normal(-55, 5, count), model, template)


def test_loss_diff_and_irm():
    policy, validated, reference = (logps_of(seed, f"m{seed}") for seed in range(3))
    margin = policy.chosen - reference.chosen - policy.rejected + reference.rejected
    after = validated.chosen - reference.chosen - validated.rejected + reference.rejected
    found = irm(policy, reference, beta=0.3)
    np.testing.assert_allclose(found.values, 0.3 * margin)
    assert (found.signal, found.model_id, found.beta, found.template) == ("irm", "m0", 0.3, "t")
    found = loss_diff(policy, validated, reference, beta=0.3)
    np.testing.assert_allclose(found.values, np.logaddexp(0, -0.3 * margin) - np.logaddexp(0, -0.3 * after))
    assert (found.signal, found.model_id, found.beta, found.template) == ("loss_diff", "m0", 0.3, "t")
    hinge = loss_diff(policy, validated, reference, loss="hinge", beta=0.3)  # SLiC
    np.testing.assert_allclose(hinge.values, np.maximum(0, 1 - 0.3 * margin) - np.maximum(0, 1 - 0.3 * after))
    gaps = {"rating_gap": np.arange(200.0)}
    rated = loss_diff(policy, validated, reference, loss="rdpo", given=gaps)
    assert not np.allclose(rated.values, loss_diff(policy, validated, reference).values)
    for other, match in ((logps_of(1, template="u"), "policy's template 't', got 'u'"),
                         (logps_of(1, count=3), "policy's 200 pairs, got 3")):  # fmt: skip
        with pytest.raises(ValueError, match=f"reference must .*{match}"):
            irm(policy, other)
        with pytest.raises(ValueError, match=f"validated must .*{match}"):
            loss_diff(policy, other, reference)
    with pytest.raises(ValueError, match="got 'aot', which couples"):
        loss_diff(policy, validated, reference, loss="aot")
    for count in (199, 201):
        gaps = {"rating_gap": np.zeros(count)}
        with pytest.raises(ValueError, match=rf"given\['rating_gap'\] must have .* got {count} for 200 pairs"):
            loss_diff(policy, validated, reference, loss="rdpo", given=gaps)
    with pytest.raises(ValueError, match=r"given must not hold what the reference gives, got \['ref_chosen_logps'\]"):
        loss_diff(policy, validated, reference, given={"ref_chosen_logps": policy.chosen})


def scores_of(values, **fields):
    return PairScores(np.asarray(values, dtype=float), **{"signal": "irm", "model_id": "m", "beta": 0.1, **fields})


def test_the_band_is_inclusive_below_and_exclusive_above():
    kept = truncated(scores_of(np.arange(11)), "m", lo=20, hi=80)
    assert kept.keep.tolist() == [2 <= i < 8 for i in range(11)]
    assert kept.bounds == [(2, 8)] and kept.rate == 6 / 11 and kept.model_id == "m"
    assert truncated(scores_of(np.arange(10)), "m", lo=20, hi=75).bounds == [(pytest.approx(1.8), pytest.approx(6.75))]
    assert truncated(scores_of(np.arange(11)), "m", lo=0, hi=100).keep.all()
    tied = truncated(scores_of([0, 1, 1, 1, 1, 1, 1, 1, 2]), "m")
    assert not tied.keep.any() and tied.bounds == [(1, 1)]  # nothing lies between two equal percentiles
    missing = truncated(scores_of([np.nan, 0, 1, 2, 3, 4, np.inf]), "m", lo=0, hi=100)
    assert missing.keep.tolist() == [False, True, True, True, True, True, False]
    assert not truncated(scores_of([np.nan]), "m").keep.any()
    assert math.isnan(truncated(scores_of([]), "m").rate)
    with pytest.raises(ValueError, match="lo and hi must be percentiles"):
        truncated(scores_of([1, 2]), "m", lo=80, hi=20)


@pytest.mark.parametrize("count", [101, 201, 1001])
def test_a_percentile_that_is_a_value_is_that_value(count):
    scores = scores_of(np.random.default_rng(0).permutation(count) / 7)
    for lo, hi in zip(range(50), range(51, 101), strict=True):
        first, last = (at * (count - 1) / 100 for at in (lo, hi))
        if first == int(first) and last == int(last):
            kept = truncated(scores, "m", lo=lo, hi=hi)
            place = np.rint(scores.values * 7)
            assert np.array_equal(kept.keep, (place >= first) & ((place < last) | (hi == 100)))


def test_the_intersection_is_that_of_the_bands():
    draw = np.random.default_rng(0)
    one, other = scores_of(draw.normal(size=1000)), scores_of(draw.normal(size=1000), signal="loss_diff")
    both = intersection([one, other], "m", lo=10, hi=70)
    assert np.array_equal(both.keep, truncated(one, "m", lo=10, hi=70).keep & truncated(other, "m", lo=10, hi=70).keep)
    assert len(both.bounds) == 2 and both.rate == pytest.approx(0.36, abs=0.05)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.tuples(*[st.integers(0, 12) | st.just(math.nan)] * 2), min_size=1, max_size=60),
    rate=st.floats(0.01, 1.0),
)
def test_the_interval_of_a_keep_rate_is_the_narrowest(values, rate):
    scores = [scores_of(column) for column in zip(*values, strict=True)]
    most = truncated(scores[0], "m", lo=0, hi=100).keep & truncated(scores[1], "m", lo=0, hi=100).keep
    if rate > most.mean():
        with pytest.raises(ValueError, match="rate must lie in"):
            keep_rate(scores, rate, "m")
        return
    kept = keep_rate(scores, rate, "m")
    assert kept.lo + kept.hi == pytest.approx(100) and kept.rate >= rate
    assert np.array_equal(kept.keep, intersection(scores, "m", lo=kept.lo, hi=kept.hi).keep)
    if kept.hi > 50.001:
        assert intersection(scores, "m", lo=kept.lo + 1e-6, hi=kept.hi - 1e-6).rate < rate


def test_the_keep_rate_of_distinct_scores_is_met():
    draw = np.random.default_rng(0)
    one, other = scores_of(draw.normal(size=5000)), scores_of(draw.normal(size=5000))
    for scores in (one, [one, other]):
        for rate in (0.05, 0.64, 1.0):
            assert keep_rate(scores, rate, "m").rate == pytest.approx(rate, abs=2 / 5000)
    assert keep_rate(one, 0.6, "m").hi == pytest.approx(80, abs=0.1)


def test_scores_of_another_model_are_refused():
    model, train, validation, _ = logistic_problem()
    scores = influence_of(model, train, validation)
    assert truncated(scores, model).rate == pytest.approx(0.6, abs=0.01)
    name = scores.model_id
    other = Logistic(torch.ones(8))
    for select in (truncated, lambda s, m: keep_rate(s, 0.5, m), lambda s, m: intersection([s, s], m)):
        with pytest.raises(ValueError, match=f"belong to the model {name}, .* for {causal_lm.model_id(other)}"):
            select(scores, other)
        with pytest.raises(ValueError, match=f"belong to the model {name}, .* for llama@2"):
            select(scores, "llama@2")
    named = influence_of(model, train, validation, model_id="llama@2", template="chatml")
    truncated(named, "llama@2")
    mixed = ("model_id", "'m'", "'n'"), ("beta", "0.1", "0.2"), ("template", "None", "'t'")
    for field, first, second in mixed:
        different = scores_of([1, 2], **{field: second.strip("'") if "'" in second else float(second)})
        with pytest.raises(ValueError, match=f"one {field}, got {first} .* and {second}"):
            intersection([scores_of([1, 2]), different], "m")
    with pytest.raises(ValueError, match=r"of the same pairs, got 2 .* and 3"):
        intersection([scores_of([1, 2]), scores_of([1, 2, 3])], "m")
    with pytest.raises(TypeError, match="scores must be PairScores"):
        intersection([np.zeros(3)], "m")
