"""FastPrefDPOTrainer against TRL's DPOTrainer: the same numbers in less memory, and the losses TRL does not have."""
# ruff: noqa: E402 (TRL may be missing)

import contextlib
import math
import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything of Hugging Face is imported: no download, no telemetry
pytest.importorskip("trl", reason="TRL is not installed (the extra [trl])")
peft = pytest.importorskip("peft", reason="PEFT is not installed (the extra [trl])")

import torch
import torch.nn.functional as F
import transformers
import trl.trainer.utils
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.profiler import ProfilerActivity, profile
from trl import DPOConfig, DPOTrainer

import fastpref
import fastpref.integrations.trl as integration
from fastpref.integrations.trl import (
    TRL_LOSSES,
    DataCollatorForRatedPreference,
    FastPrefDPOConfig,
    FastPrefDPOTrainer,
)

# TRL 1.16 calls gradient checkpointing by the names it had in earlier versions of transformers.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning")

VOCAB, HIDDEN = 300, 32


@pytest.fixture(autouse=True)
def _trls_tile_fits_the_vocabulary(monkeypatch):
    """TRL's tile is 32768 columns wide whatever the vocabulary; so wide, it would flatter the comparison of memory."""
    monkeypatch.setattr(trl.trainer.utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", VOCAB)


def save_tokenizer(folder):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def tiny(config_class, **fields):
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "num_hidden_layers": 2, "vocab_size": VOCAB}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return config_class(**{**sizes, **heads, **tokens, "initializer_range": 0.2, **fields})


def save_models(folder, config):
    """A policy and a reference close to it, so that the losses are neither at their start nor at their limits."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name in ("policy", "reference"):
        model.save_pretrained(folder / name)
        save_tokenizer(folder / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("llama"), tiny(transformers.LlamaConfig))


def pairs(count=16, seed=0, longest=24, prompts=True):
    draw = random.Random(seed)

    def text(low, high):
        return "".join(draw.choice("abcdefgh ") for _ in range(draw.randint(low, high)))

    rows = [
        {
            "prompt": text(3, 9) if prompts else "",
            "chosen": text(4, longest),
            "rejected": text(4, longest),
            "score_chosen": draw.choice([None, 8.0, 6.5]),
            "score_rejected": draw.choice([2.0, 7.0]),
        }
        for _ in range(count)
    ]
    for row in rows:
        row["margin"] = None if row["score_chosen"] is None else row["score_chosen"] - row["score_rejected"]
    return Dataset.from_list(rows)


def make(
    trainer, folder, data=None, collator=None, reference="reference", peft_config=None, eval_dataset=None, **options
):
    """A trainer on the saved models. TRL's config has no loss_options."""
    config = FastPrefDPOConfig if trainer is FastPrefDPOTrainer else DPOConfig
    defaults = {
        "per_device_train_batch_size": 4, "per_device_eval_batch_size": 3, "learning_rate": 1e-3, "logging_steps": 1,
        "bf16": False, "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    args = config(str(folder / "out"), **{**defaults, **options})
    given = {"train_dataset": pairs() if data is None else data, "eval_dataset": eval_dataset}
    given |= {"data_collator": collator, "peft_config": peft_config}
    if reference is not None and peft_config is None:
        given["ref_model"] = transformers.AutoModelForCausalLM.from_pretrained(folder / reference)
    return trainer(str(folder / "policy"), args=args, **given)


def batch_of(trainer, rows=range(4)):
    return trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in rows]))


def step(trainer, batch=None):
    """Loss, gradients and metrics of one batch."""
    trainer.model.train()
    trainer.model.zero_grad()
    trainer._total_train_tokens = 0
    loss = trainer.compute_loss(trainer.model, batch_of(trainer) if batch is None else batch)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return loss.item(), gradients, metrics


def assert_same_step(ours, theirs):
    """Of losses that rounding a log-prob hardly moves."""
    loss, gradients, metrics = ours
    expected, expected_gradients, expected_metrics = theirs
    assert loss == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    largest = max(g.abs().max() for g in expected_gradients.values())
    for name, gradient in gradients.items():
        assert (gradient - expected_gradients[name]).abs().max() <= 2e-5 * largest, name
    assert metrics.keys() == expected_metrics.keys()
    assert metrics == pytest.approx(expected_metrics, rel=1e-5, abs=1e-5)


@contextlib.contextmanager
def float32_is_float64():
    """What TRL and transformers compute in float32 whatever the model's dtype, they compute in float64 here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        torch.set_default_dtype(torch.float64)
        patch.setattr(torch, "float32", torch.float64)
        try:
            yield
        finally:
            patch.undo()
            torch.set_default_dtype(torch.float32)


def exact_steps(folder, **options):
    """TRL's step in float64; and again with each log-prob off by two float32 roundings, those of a pair apart."""
    trainer = make(DPOTrainer, folder, **options)
    signs = {trainer.model: 1.0}
    if isinstance(trainer.ref_model, torch.nn.Module):
        signs[trainer.ref_model] = -1.0
    rounding = 0.0

    def moved(model, inputs, output):
        if getattr(output, "log_probs", None) is not None:
            sides = torch.tensor([1.0, -1.0]).repeat_interleave(len(output.log_probs) // 2)
            output.log_probs = output.log_probs * (1 + signs[model] * rounding * sides[:, None])
        return output

    for model in signs:
        model.double().register_forward_hook(moved)
    with float32_is_float64():
        truth = step(trainer)
        rounding = 2.0**-23
        return truth, step(trainer)


def distance(one, other):
    """Of two steps: how far apart the losses are, and the gradients."""
    gradients = (one[1][name].double() - gradient.double() for name, gradient in other[1].items())
    return abs(one[0] - other[0]), max(difference.abs().max().item() for difference in gradients)


def assert_as_exact(ours, theirs, truth, moved):
    """No further from TRL in float64 than four times TRL in float32, and what rounding the log-probs alone may cost."""
    (_, gradients, metrics), (_, expected_gradients, expected_metrics) = ours, theirs
    assert gradients.keys() == expected_gradients.keys() == truth[1].keys()
    unit = torch.finfo(torch.float32).eps / 2
    sizes = abs(truth[0]), max(gradient.abs().max().item() for gradient in truth[1].values())
    distances = [distance(step, truth) for step in (ours, theirs, moved)]
    for what, error, same, rounding, size in zip(("loss", "gradients"), *distances, sizes, strict=True):
        allowed = 4 * same + rounding + 4 * unit * size
        assert error <= allowed, f"{what} off by {error:.2e}, allowed {allowed:.2e}: TRL {same:.2e}, size {size:.2e}"
    assert metrics.keys() == expected_metrics.keys()
    assert metrics == pytest.approx(expected_metrics, rel=1e-5, abs=1e-5)


def same_step(folder, **options):
    """Both trainers, one step each; returns ours."""
    trainers = [make(trainer, folder, **options) for trainer in (FastPrefDPOTrainer, DPOTrainer)]
    assert_as_exact(*map(step, trainers), *exact_steps(folder, **options))
    return trainers[0]


def logged(trainer, *names):
    return [[entry[name] for name in names] for entry in trainer.state.log_history if names[0] in entry]


# ---- whole runs ----


def peak_bytes(function) -> int:
    """Most bytes of CPU tensors alive at once, beyond those alive before: allocations as torch's profiler sees them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        function()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return most


def test_twenty_steps_follow_trls_curve_in_less_memory(llama):
    trainers = [
        make(trainer, llama, pairs(40, longest=100), reference=None, max_steps=20)
        for trainer in (FastPrefDPOTrainer, DPOTrainer)
    ]
    ours, theirs = ((trainer.train(), trainer.state.log_history[:-1]) for trainer in trainers)
    for mine, other in zip(ours[1], theirs[1], strict=True):
        assert mine.keys() == other.keys()
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-4)
    losses = [entry["loss"] for entry in ours[1]]
    assert len(losses) == 20
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert min(losses) < 0.6

    fused, trls = (peak_bytes(lambda trainer=trainer: step(trainer)) for trainer in trainers)
    assert fused < 0.8 * trls


@pytest.mark.parametrize("options", [{"gradient_accumulation_steps": 3}, {"sync_ref_model": True}], ids=str)
def test_runs_that_change_the_loop(llama, options):
    options = {"max_steps": 4, "per_device_train_batch_size": 2, **options}
    if "sync_ref_model" in options:
        options |= {"ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5}
    ours, theirs = (make(trainer, llama, **options) for trainer in (FastPrefDPOTrainer, DPOTrainer))
    ours.train(), theirs.train()
    for mine, other in zip(ours.state.log_history[:-1], theirs.state.log_history[:-1], strict=True):
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-4)


def test_evaluation_with_a_smaller_last_batch(llama):
    data = pairs(7, seed=1)
    trainers = [make(trainer, llama, eval_dataset=data) for trainer in (FastPrefDPOTrainer, DPOTrainer)]
    ours, theirs = (trainer.evaluate() for trainer in trainers)
    timed = ("runtime", "second", "time")
    ours, theirs = ({k: v for k, v in m.items() if not any(t in k for t in timed)} for m in (ours, theirs))
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    assert trainers[0].state.log_history[-1].keys() == trainers[1].state.log_history[-1].keys()
    named = (
        "loss",
        "entropy",
        "num_tokens",
        "mean_token_accuracy",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
    )
    assert {f"eval_{name}" for name in named} <= trainers[0].state.log_history[-1].keys()


@pytest.mark.filterwarnings("ignore:.*return_outputs:FutureWarning")  # TRL's
def test_predict_has_logits(llama):
    trainer = make(FastPrefDPOTrainer, llama)
    prediction = trainer.predict(trainer.train_dataset.select(range(3)))
    assert prediction.predictions.shape[-1] == VOCAB


@pytest.fixture
def kinds(monkeypatch):
    """The plans that were chosen."""
    chosen = []
    module = sys.modules["fastpref._logps.linear_preference"]
    choose = module.choose_kind
    monkeypatch.setattr(module, "choose_kind", lambda *args: chosen.append(choose(*args)) or chosen[-1])
    return chosen


# ---- one step, option by option ----

SMOOTHED = {"exo_pair": 0.1, "robust": 0.1, "aot": 0.2, "aot_unpaired": 0.2, "sigmoid": 0.1}


@pytest.mark.parametrize("loss", TRL_LOSSES)
def test_every_trl_loss(llama, loss):
    same_step(llama, loss_type=[loss], label_smoothing=SMOOTHED.get(loss, 0.0))


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        {"loss_type": ["hinge"], "loss_weights": [0.5]},
        {"loss_type": ["sigmoid"], "use_weighting": True},
        {"loss_type": ["ipo", "apo_zero"], "use_weighting": True},
        {"loss_type": ["discopop"], "discopop_tau": 0.5, "beta": 0.3},
        {"loss_type": ["sigmoid", "sft"], "f_divergence_type": "forward_kl"},
        {"loss_type": ["hinge", "discopop"], "f_divergence_type": "js_divergence"},
        {"loss_type": ["robust"], "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3,
         "label_smoothing": 0.1},
        {"loss_type": ["exo_pair"], "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0,
         "label_smoothing": 0.1},
        # TRL's own epilogue on our log-probs
        {"loss_type": ["ipo"], "f_divergence_type": "forward_kl"},
        {"loss_type": ["sigmoid_norm", "sigmoid"], "f_divergence_type": "js_divergence"},
        {"loss_type": ["sigmoid", "aot"], "ld_alpha": 0.3},
        {"loss_type": ["sigmoid"], "ld_alpha": 0.5, "use_weighting": True, "precompute_ref_log_probs": True},
    ],
    ids=str,
)  # fmt: skip
def test_options_of_the_losses(llama, options):
    same_step(llama, **options)


@pytest.mark.parametrize("loss", ["ipo", "sigmoid_norm"])
@pytest.mark.filterwarnings("ignore:.*'keep_end'.*:FutureWarning")
def test_a_first_token_that_nothing_predicts_counts_in_trls_lengths(llama, loss):
    same_step(llama, loss_type=[loss], data=pairs(prompts=False))
    same_step(llama, loss_type=[loss], truncation_mode="keep_end", max_length=8)


def test_a_completion_that_was_cut_off(llama):
    ours = same_step(llama, loss_type=["ipo"], max_length=8)
    assert not batch_of(ours)["completion_mask"].all(1).any()


@pytest.mark.parametrize(
    "config",
    [
        tiny(transformers.Gemma2Config, final_logit_softcapping=5.0, head_dim=8),
        tiny(transformers.CohereConfig, logit_scale=0.25),
        tiny(transformers.GraniteConfig, logits_scaling=3.0),
        tiny(transformers.PhiConfig, num_key_value_heads=4),  # a bias
        tiny(transformers.LlamaConfig, tie_word_embeddings=True),
    ],
    ids=lambda config: config.model_type,
)
def test_what_lies_between_the_head_and_the_logits(tmp_path, config):
    save_models(tmp_path, config)
    trainer = same_step(tmp_path)
    same_step(tmp_path, ld_alpha=0.5)
    batch = batch_of(trainer)
    with torch.no_grad():
        logits = trainer.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        found = trainer.model(batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels,
                              fused_lm_head=True).log_probs  # fmt: skip
    expected = fastpref.token_logps(logits, labels, shift=True)[:, :-1]
    assert (found - expected).abs().max() < 1e-4


def test_fp16_gradients_see_the_loss_scale(llama, kinds):
    trainer = make(FastPrefDPOTrainer, llama)
    expected = step(trainer)
    trainer.args.fp16 = True  # accelerate refuses it on a CPU
    assert_same_step(step(trainer), expected)
    assert kinds == ["pair_resident", "recompute"]


def test_equal_policy_and_reference_are_even_under_autocast(llama):
    trainer = make(FastPrefDPOTrainer, llama, reference="policy", bf16=True, max_steps=1, learning_rate=0.0)
    trainer.train()
    assert logged(trainer, "loss")[0][0] == pytest.approx(math.log(2), abs=1e-6)
    assert logged(trainer, "rewards/margins")[0][0] == 0


# ---- the reference ----


def test_precomputed_reference(llama):
    precomputed = same_step(llama, precompute_ref_log_probs=True)
    live = make(FastPrefDPOTrainer, llama)
    assert_same_step(step(precomputed), step(live))
    rated = {"loss_type": ["rdpo"], "precompute_ref_log_probs": True, "eval_dataset": pairs(5, seed=2)}
    trainer = make(FastPrefDPOTrainer, llama, **rated)
    assert_same_step(step(trainer), step(make(FastPrefDPOTrainer, llama, loss_type=["rdpo"])))
    assert trainer.evaluate()["eval_loss"] > 0
    assert trainer.evaluate(pairs(3, seed=3))["eval_loss"] > 0  # tokenised and precomputed on the way in


def test_precomputed_numbers_are_not_shared_between_settings(llama):
    data = pairs()
    one = make(FastPrefDPOTrainer, llama, data, precompute_ref_log_probs=True)
    short = make(FastPrefDPOTrainer, llama, data, precompute_ref_log_probs=True, max_length=8)
    assert one.train_dataset["ref_chosen_logps"] != short.train_dataset["ref_chosen_logps"]


def test_a_loss_without_a_reference_keeps_none(llama):
    trainer = make(FastPrefDPOTrainer, llama, loss_type=["simpo"], beta=2.0)
    assert trainer.ref_model is None
    loss, _, metrics = step(trainer)
    batch = batch_of(trainer)
    chosen, rejected = policy_logps(trainer, batch)
    lengths = batch["completion_mask"].sum(1).chunk(2)
    expected = -F.logsigmoid(2.0 * (chosen / lengths[0] - rejected / lengths[1]) - 0.5).mean()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["rewards/chosen"] == pytest.approx(2.0 * chosen.mean().item(), rel=1e-5)


# ---- ratings ----


def policy_logps(trainer, batch, model=None):
    """Plain log-softmax of plain logits."""
    model = trainer.model if model is None else model
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
    tokens = torch.log_softmax(logits[:, :-1], -1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    return (tokens * batch["completion_mask"][:, 1:]).sum(1).chunk(2)


def delta(trainer, batch):
    chosen, rejected = policy_logps(trainer, batch)
    ref_chosen, ref_rejected = policy_logps(trainer, batch, trainer.ref_model)
    return chosen - ref_chosen - (rejected - ref_rejected)


@pytest.mark.parametrize("columns", [["margin"], ["score_chosen", "score_rejected"], ["margin", "score_rejected"]])
def test_rdpo_and_ml_rdpo(llama, columns):
    data = pairs()
    data = data.remove_columns([name for name in ("margin", "score_chosen", "score_rejected") if name not in columns])
    trainer = make(FastPrefDPOTrainer, llama, data, loss_type=["rdpo"], loss_options={"beta_rating": 0.7})
    batch = batch_of(trainer, range(16))
    gap = torch.tensor([math.nan if m is None else m for m in pairs()["margin"]])
    assert gap.isnan().any()
    assert torch.equal(batch["margin"].nan_to_num(99.0), gap.nan_to_num(99.0))
    margin = 0.1 * delta(trainer, batch)
    expected = -F.logsigmoid(margin - 0.1 / 0.7 * gap.nan_to_num(0.0)).mean().item()
    assert step(trainer, batch)[0] == pytest.approx(expected, rel=1e-5)

    trainer = make(FastPrefDPOTrainer, llama, data, loss_type=["ml_rdpo"], loss_options={"variance": 4.0})
    square = torch.where(gap.isnan(), 0.0, (gap - margin).square() / 8)
    assert step(trainer, batch)[0] == pytest.approx((square - F.logsigmoid(margin)).mean().item(), rel=1e-5)


def test_ratings_reach_the_loss_through_the_whole_loop(llama):
    options = {"max_steps": 3, "gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 3}
    data = {"eval_dataset": pairs(5, seed=1)}
    trainer = make(FastPrefDPOTrainer, llama, loss_type=["rdpo", "sft"], loss_weights=[1.0, 0.1],
                   loss_options=[{"beta_rating": 0.5}, None], **data, **options)  # fmt: skip
    trainer.train()
    rated = logged(trainer, "loss")
    plain = make(FastPrefDPOTrainer, llama, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.1], **data, **options)
    plain.train()
    assert len(rated) == 3
    assert rated != logged(plain, "loss")
    assert logged(trainer, "eval_loss")


def test_ratings_beside_a_loss_that_has_no_use_for_them(llama):
    trainer = make(FastPrefDPOTrainer, llama)
    assert "margin" not in batch_of(trainer)
    assert type(trainer.data_collator) is trl.trainer.dpo_trainer.DataCollatorForPreference
    collator = DataCollatorForRatedPreference(pad_token_id=0)
    for options in ({}, {"ld_alpha": 0.5}, {"precompute_ref_log_probs": True}):
        assert_same_step(
            step(make(FastPrefDPOTrainer, llama, collator=collator, **options)),
            step(make(DPOTrainer, llama, **options)),
        )


def test_absolute_scores(llama):
    data = pairs().map(lambda row: {"score_chosen": 0.9, "score_rejected": 0.25})
    trainer = make(FastPrefDPOTrainer, llama, data, loss_type=["sppo"], beta=0.5)
    batch = batch_of(trainer)
    chosen, rejected = policy_logps(trainer, batch)
    ref_chosen, ref_rejected = policy_logps(trainer, batch, trainer.ref_model)
    expected = 0.5 * ((chosen - ref_chosen - 0.8).square() + (rejected - ref_rejected + 0.5).square()).mean()
    assert step(trainer, batch)[0] == pytest.approx(expected.item(), rel=1e-5)


def test_ratings_that_are_not_there(llama):
    bare = pairs().remove_columns(["margin", "score_chosen"])
    with pytest.raises(
        ValueError, match=r"needs ratings \(rating_gap\), but train_dataset has only .*'score_rejected'"
    ):
        make(FastPrefDPOTrainer, llama, bare, loss_type=["rdpo"])
    with pytest.raises(ValueError, match=r"needs ratings \(score\), but train_dataset has only"):
        make(FastPrefDPOTrainer, llama, pairs().remove_columns(["score_chosen"]), loss_type=["sppo"])
    collator = trl.trainer.dpo_trainer.DataCollatorForPreference(pad_token_id=0)
    trainer = make(FastPrefDPOTrainer, llama, collator=collator, loss_type=["rdpo"])
    with pytest.raises(ValueError, match=r"needs ratings \(rating_gap\), but the batch has no 'margin', only"):
        trainer.train()


def test_ratings_are_not_rounded_under_deepspeed(llama, monkeypatch):
    trainer = make(FastPrefDPOTrainer, llama, loss_type=["rdpo"])
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    assert trainer._prepare_inputs({"margin": torch.tensor([0.1])})["margin"].dtype == torch.float32


# ---- PEFT ----

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def with_adapter(folder, trainer, config, **options):
    """An adapter that has moved: a fresh one adds nothing."""
    trainer = make(trainer, folder, peft_config=config, **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return trainer


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(**LORA),
        peft.LoraConfig(**LORA, modules_to_save=["lm_head"]),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ],
    ids=["lora", "trained head", "virtual tokens"],
)
def test_peft(llama, config, kinds):
    ours, theirs = (with_adapter(llama, trainer, config) for trainer in (FastPrefDPOTrainer, DPOTrainer))
    assert ours.ref_model is None
    found = step(ours)
    assert_same_step(found, step(theirs))
    trained_head = any("lm_head" in name for name in found[1])
    assert trained_head == (getattr(config, "modules_to_save", None) is not None)
    assert kinds == ["pair_resident" if trained_head else "unit"]


def test_an_adapter_trained_further_is_its_own_reference(llama):
    trainers = []
    for trainer in (FastPrefDPOTrainer, DPOTrainer):
        model = transformers.AutoModelForCausalLM.from_pretrained(llama / "policy")
        torch.manual_seed(1)
        model = peft.get_peft_model(model, peft.LoraConfig(**LORA, init_lora_weights=False))
        args = make(trainer, llama).args
        given = {"args": args, "train_dataset": pairs(), "processing_class": make(trainer, llama).processing_class}
        trainers.append(trainer(model, **given))
    found = step(trainers[0])
    assert found[0] == pytest.approx(math.log(2), abs=1e-6)
    assert_same_step(found, step(trainers[1]))
    for built in trainers:
        with torch.no_grad():
            for name, parameter in built.model.named_parameters():
                if ".default." in name:
                    parameter.mul_(1.5)
    assert_same_step(*map(step, trainers))


# ---- several processes ----

RANK = """
import os, sys, json
sys.path.insert(0, os.environ["TESTS"])
import test_trl as t, torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
folder = t.Path(os.environ["FOLDER"])
common = {"per_device_train_batch_size": 2, "max_steps": 3, "loss_type": ["rdpo"], "ddp_backend": "gloo"}
trainer = t.make(t.FastPrefDPOTrainer, folder, eval_dataset=t.pairs(5, seed=1), **common)
trainer.train()
history, metrics = trainer.state.log_history[:3], trainer.evaluate()
assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"

low = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32, "output_dtype": torch.bfloat16}  # as accelerate's
sharded = []
for precision in ({}, low):
    trainer = t.make(t.FastPrefDPOTrainer, folder, gradient_checkpointing=False, **common)
    policy = MixedPrecisionPolicy(**precision)
    for model in (trainer.model, trainer.ref_model):
        for module in (*model.model.layers, model):
            fully_shard(module, mesh=torch.distributed.init_device_mesh("cpu", (2,)), mp_policy=policy)
    first = 2 * trainer.accelerator.process_index
    loss, gradients, logged = t.step(trainer, t.batch_of(trainer, range(first, first + 2)))
    sharded.append([{name: g.full_tensor() for name, g in gradients.items()}, logged, loss])
if trainer.accelerator.is_main_process:
    torch.save([trainer.accelerator.num_processes, history, metrics, sharded], "result.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks_are_one_process_with_their_batches(llama, tmp_path):
    """Under DDP in a whole run, under FSDP2 in a step."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
              "ACCELERATE_USE_CPU": "true", "TESTS": str(Path(__file__).parent), "FOLDER": str(llama)}  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK],
            cwd=tmp_path,  # not the checkout, whose fastpref is the bare source tree
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        ends = [process.communicate(timeout=300)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    for process, errors in zip(ranks, ends, strict=True):
        assert process.returncode == 0, errors
    processes, history, evaluation, (plain, low) = torch.load(tmp_path / "result.pt")
    assert processes == 2
    alone = make(FastPrefDPOTrainer, llama, loss_type=["rdpo"])
    _, gradients, logged = step(alone)
    largest = max(g.abs().max() for g in gradients.values())
    for name, gradient in plain[0].items():
        assert (gradient - gradients[name]).abs().max() <= 2e-5 * largest, name
    assert plain[1] == pytest.approx(logged, rel=1e-4, abs=1e-4)
    assert low[1] == pytest.approx(logged, rel=0.05, abs=0.05)  # the backbone's rounding, but not that of the results:
    for exact in (low[2], low[1]["logps/chosen"], low[1]["rewards/margins"]):
        assert torch.tensor(exact, dtype=torch.bfloat16).item() != exact

    alone = make(FastPrefDPOTrainer, llama, max_steps=3, loss_type=["rdpo"])
    alone.train()
    for ours, expected in zip(history, alone.state.log_history[:3], strict=True):
        assert ours == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert evaluation["eval_loss"] > 0


# ---- configuration ----


def test_command_line():
    parse = transformers.HfArgumentParser(FastPrefDPOConfig).parse_args_into_dataclasses
    common = ["--output_dir", "out", "--use_cpu", "--bf16", "False"]
    (args,) = parse([*common, "--loss_type", "rdpo", "--loss_options", '{"beta_rating": 0.5}'])
    assert args.loss_options == {"beta_rating": 0.5}
    (args,) = parse([*common, "--loss_type", "rdpo", "sft", "--loss_options", '[{"beta_rating": 0.5}, null]'])
    assert args.loss_options == [{"beta_rating": 0.5}, None]


def test_options_override_trls_fields(llama):
    field, option = (
        make(FastPrefDPOTrainer, llama, **given) for given in ({"beta": 0.3}, {"loss_options": {"beta": 0.3}})
    )
    assert_same_step(step(option), step(field))
    smoothed = make(FastPrefDPOTrainer, llama, loss_options={"label_smoothing": 0.2})
    margin = 0.1 * delta(smoothed, batch_of(smoothed))
    expected = -(0.8 * F.logsigmoid(margin) + 0.2 * F.logsigmoid(-margin)).mean().item()
    assert step(smoothed)[0] == pytest.approx(expected, rel=1e-5)


def test_trls_trainer_keeps_its_own_head(llama):
    make(FastPrefDPOTrainer, llama)
    assert trl.trainer.dpo_trainer.add_fused_lm_head is trl.trainer.utils.add_fused_lm_head
    with pytest.raises(ValueError, match="train_dataset"):
        FastPrefDPOTrainer(str(llama / "policy"), args=DPOConfig("out", use_cpu=True))
    assert trl.trainer.dpo_trainer.add_fused_lm_head is trl.trainer.utils.add_fused_lm_head


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding_free": True}, "padding_free"),
        ({"use_liger_kernel": True}, "use_liger_kernel"),
        ({"activation_offloading": True}, "activation_offloading"),
        ({"torch_compile": True}, "torch_compile"),
        ({"loss_type": ["rpdo"]}, "loss_type.*nearest names: .*'rdpo'"),
        ({"loss_type": ["rdpo"], "loss_options": {"beta_ratings": 1.0}}, "loss_type.*beta_ratings"),
        ({"loss_type": ["rdpo"], "loss_options": {"beta_rating": -1.0}}, "beta_rating must be a positive number"),
        ({"loss_type": ["rdpo", "sft"], "loss_options": {"beta_rating": 1.0}}, "loss_options must be a list"),
        ({"loss_type": ["rdpo", "sft"], "loss_options": [{}]}, "loss_options must have one entry per loss"),
        ({"loss_options": 3}, "loss_options must be a mapping"),
        ({"loss_type": ["robust"], "label_smoothing": 0.5}, "label_smoothing"),
        ({"loss_type": ["discopop"], "discopop_tau": 2.0}, "tau must be in"),
        ({"beta": 0.0}, "beta must be a positive number"),
        ({"f_divergence_type": "total_variation"}, "f_divergence must be"),
        ({"loss_type": ["rdpo"], "f_divergence_type": "forward_kl"}, "f_divergence"),
        ({"loss_type": ["rdpo"], "ld_alpha": 0.5}, "ld_alpha=0.5 takes TRL's losses"),
        ({"loss_options": {"label_smoothing": 0.1}, "ld_alpha": 0.5}, "ld_alpha=0.5 takes TRL's losses"),
        ({"loss_type": ["sigmoid", "sft"], "use_weighting": True}, "use_weighting"),
        ({"loss_type": ["ipo", "sppo"]}, "loss_type must not mix"),
        ({"loss_type": ["ld_dpo"], "precompute_ref_log_probs": True}, "precompute_ref_log_probs"),
        ({"loss_type": ["simpo"], "precompute_ref_log_probs": True}, "precompute_ref_log_probs needs a loss"),
        ({"loss_type": ["simpo"], "sync_ref_model": True}, "sync_ref_model needs a loss"),
    ],
    ids=str,
)
def test_what_is_refused_at_construction(llama, options, message):
    with pytest.raises(ValueError, match=message):
        make(FastPrefDPOTrainer, llama, reference=None, **options)


def test_other_versions_of_trl(python):
    code = """
import sys, types
for trl, message in ((None, "fastpref[trl]"), (types.SimpleNamespace(__version__="1.17.0"), "1.16, got TRL 1.17.0")):
    sys.modules["trl"] = trl
    try:
        import fastpref.integrations.trl
    except ImportError as error:
        assert message in str(error), error
    else:
        sys.exit("imported")
"""
    result = python(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("deepspeed_plugin", SimpleNamespace(zero_stage=3), "deepspeed is not supported.*ZeRO-3"),
        ("parallelism_config", SimpleNamespace(tp_size=2, cp_size=1, sp_size=1), "parallelism_config is not supported"),
        ("parallelism_config", SimpleNamespace(tp_size=1, cp_size=2, sp_size=1), "parallelism_config is not supported"),
    ],
)
def test_launchers_that_are_refused(llama, field, value, message):
    args = make(FastPrefDPOTrainer, llama).args
    object.__setattr__(args, field, value)
    with pytest.raises(ValueError, match=message):
        FastPrefDPOTrainer(str(llama / "policy"), args=args, train_dataset=pairs())


def test_models_that_are_refused(llama, tmp_path):
    mixture = tiny(transformers.MixtralConfig, num_local_experts=2, num_experts_per_tok=1)
    save_models(tmp_path, mixture)
    with pytest.raises(ValueError, match="router_aux_loss_coef must be 0 for MixtralForCausalLM"):
        make(FastPrefDPOTrainer, tmp_path, reference=None)
    # torch multiplies groups of experts in 32 and 16 bits alone: there is no step in float64 to compare with
    trainers = (make(trainer, tmp_path, router_aux_loss_coef=0.0) for trainer in (FastPrefDPOTrainer, DPOTrainer))
    assert_same_step(*map(step, trainers))

    text = tiny(transformers.LlamaConfig)
    vision = transformers.CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                           num_attention_heads=2, image_size=8, patch_size=4)  # fmt: skip
    llava = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=5)
    t5 = transformers.T5Config(vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    llama_model = transformers.LlamaForCausalLM(text)
    quantised = transformers.LlamaForCausalLM(text)
    quantised.lm_head.weight = torch.nn.Parameter(torch.zeros(VOCAB, HIDDEN, dtype=torch.uint8), requires_grad=False)
    spread = transformers.LlamaForCausalLM(text)
    spread.hf_device_map = {"model": 0, "lm_head": 1}
    other = transformers.LlamaForCausalLM(text)
    other.lm_head = torch.nn.Sequential(torch.nn.Linear(HIDDEN, VOCAB))
    for model, message in (
        (transformers.LlavaForConditionalGeneration(llava), "vision-language models are not supported"),
        (transformers.T5ForConditionalGeneration(t5), "encoder-decoder models are not supported"),
        (quantised, "plain nn.Linear.*quantised weights"),
        (other, "plain nn.Linear.*got Sequential"),
        (spread, "on one device"),
    ):
        with pytest.raises(ValueError, match=message):
            integration.add_preference_head(model)
    integration.add_preference_head(llama_model)


@pytest.mark.parametrize(
    "options", [{"target_modules": ["lm_head"]}, {"trainable_token_indices": {"lm_head": [5]}}], ids=str
)
def test_adapters_on_the_head_are_refused(llama, options):
    with pytest.raises(ValueError, match=r"lm_head|the LM head must be"):
        make(FastPrefDPOTrainer, llama, peft_config=peft.LoraConfig(**{**LORA, **options}))
