"""Implicit rewards of responses: against plain log-softmax in float64, whole and resumed, text and conversations."""
# ruff: noqa: E402 (transformers may be missing)

import json
import os
import tracemalloc
import warnings

import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything of Hugging Face is imported: no download
transformers = pytest.importorskip("transformers", reason="transformers is not installed (the extra [trl])")

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from fastpref._logps import causal_lm
from fastpref.curate import CurateConfig, implicit_rewards, read_samples, response_logps, rewards, run

WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>", "<end>", *(f"w{i}" for i in range(57))]
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role + '> ' + m.content + ' <end> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": len(WORDS)}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def make_tokenizer(template=TEMPLATE, bos=True, **special):
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", **special}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **special)


def llama(seed=0, **fields):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        **SIZES, **ENDS, intermediate_size=64, max_position_embeddings=64, initializer_range=0.2, **fields
    )
    return transformers.AutoModelForCausalLM.from_config(config)


def gpt2(seed=0):
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=len(WORDS), n_positions=64, initializer_range=0.2, **ENDS
    )
    return transformers.AutoModelForCausalLM.from_config(config)


def gemma(seed=0):
    """With a softcap that bends its logits."""
    torch.manual_seed(seed)
    config = transformers.Gemma2Config(
        **SIZES, **ENDS, intermediate_size=64, max_position_embeddings=64, initializer_range=0.2, head_dim=8,
        num_key_value_heads=2, final_logit_softcapping=1.5, attn_implementation="eager",
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config)


def granite(seed=0):
    """With logits divided by a constant."""
    torch.manual_seed(seed)
    config = transformers.GraniteConfig(
        **SIZES, **ENDS, intermediate_size=64, max_position_embeddings=64, initializer_range=0.2, logits_scaling=3.0
    )
    return transformers.AutoModelForCausalLM.from_config(config)


# PEFT asks transformers by a name that transformers 5 has replaced
peft_asks = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*is deprecated:FutureWarning")


def make_samples(prompts=12, seed=0):
    draw = np.random.default_rng(seed)

    def text(low, high):
        return " ".join(draw.choice(WORDS[7:], draw.integers(low, high)))

    return [(text(1, 8) + " ", [text(0, 15) for _ in range(draw.integers(0, 5))]) for _ in range(prompts)]


def plain_logps(model, prompt_ids, response_ids):
    """Sum of log-softmax in float64, one sequence at a time, from the logits of the model in float64."""
    model = model.double().eval()
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt_ids, *response_ids]])).logits[0]
    steps = F.log_softmax(logits, -1)[:-1]
    first = len(prompt_ids)
    return sum(steps[first + i - 1, token].item() for i, token in enumerate(response_ids) if first + i > 0)


def ids_of(text):
    return [WORDS.index(word) for word in text.split()]


def expected_logps(model, samples):
    return np.array([plain_logps(model, [1, *ids_of(p)], [*ids_of(r), 2]) for p, pool in samples for r in pool])


@pytest.mark.parametrize("make", [llama, gpt2, gemma, granite])
def test_against_a_plain_loop(make):
    samples = make_samples()
    policy, reference = make(0), make(1)
    found = implicit_rewards(policy, reference, samples, beta=0.3, tokenizer=make_tokenizer())
    expected = [expected_logps(model, samples) for model in (policy, reference)]
    np.testing.assert_allclose(found.policy_logps, expected[0], rtol=1e-5)
    np.testing.assert_allclose(found.reference_logps, expected[1], rtol=1e-5)
    np.testing.assert_allclose(found.rewards, 0.3 * (expected[0] - expected[1]), atol=1e-4)
    assert np.array_equal(found.offsets, np.cumsum([0] + [len(pool) for _, pool in samples]))
    assert np.array_equal(found.tokens, [len(r.split()) + 1 for _, pool in samples for r in pool])
    assert found.rewards.dtype == np.float64 and not found.truncated.any() and found.beta == 0.3
    assert found.policy_id != found.reference_id


def test_the_fused_path_scores_all_but_heads_that_cannot_be_taken_apart(monkeypatch):
    calls = []
    for name in ("linear_token_logps", "token_logps"):
        original = getattr(causal_lm, name)
        monkeypatch.setattr(
            causal_lm, name, lambda *a, name=name, original=original, **k: calls.append(name) or original(*a, **k)
        )

    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    samples, tokenizer = make_samples(3), make_tokenizer()
    for make in (llama, gpt2, gemma, granite):
        response_logps(make(), samples, tokenizer=tokenizer)
    assert set(calls) == {"linear_token_logps"}
    calls.clear()

    odd = llama()
    odd.lm_head.__class__ = Doubled
    own_formula = llama()
    forward = own_formula.forward
    own_formula.forward = lambda **inputs: transformers.utils.ModelOutput(logits=3 * forward(**inputs).logits)
    ids = torch.tensor([[1, *ids_of("w1 w2 w3 w4"), 2]])
    for model in (odd, own_formula):
        found = response_logps(model, [("w1 w2 ", ["w3 w4"])], tokenizer=tokenizer)
        assert calls and set(calls) == {"token_logps"}
        with torch.no_grad():
            steps = F.log_softmax(model(input_ids=ids).logits[0].double(), -1)
        assert found.logps[0] == pytest.approx(sum(steps[t - 1, ids[0, t]].item() for t in (3, 4, 5)), rel=1e-5)
        calls.clear()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning")
@pytest.mark.parametrize("chat", [False, True])
def test_the_same_log_probs_as_trls(tmp_path, chat):
    trl = pytest.importorskip("trl", reason="TRL is not installed (the extra [trl])")
    datasets = pytest.importorskip("datasets")
    samples = [(prompt, (pool * 2)[:2]) for prompt, pool in make_samples(10) if len(pool) > 1]
    if chat:
        turn = lambda role, text: [{"role": role, "content": text}]  # noqa: E731
        samples = [(turn("user", p), [turn("assistant", r) for r in pool]) for p, pool in samples]
    rows = [{"prompt": p, "chosen": pool[0], "rejected": pool[1]} for p, pool in samples]
    args = trl.DPOConfig(
        str(tmp_path), precompute_ref_log_probs=True, max_length=12, report_to=[], use_cpu=True, bf16=False,
        disable_tqdm=True, per_device_train_batch_size=3,
    )  # fmt: skip
    model, tokenizer = llama(), make_tokenizer()
    trainer = trl.DPOTrainer(
        llama(), args=args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
    )
    data = trainer.train_dataset
    with pytest.warns(UserWarning, match="cut at max_length=12"):
        found = response_logps(model, samples, tokenizer=tokenizer, max_length=12)
    expected = np.stack([data["ref_chosen_logps"], data["ref_rejected_logps"]], 1).reshape(-1)
    assert len(expected) == 2 * len(samples) and np.abs(expected).min() > 1
    np.testing.assert_allclose(found.logps, expected, rtol=1e-5)


@pytest.mark.parametrize("max_tokens", [1, 40, 1000])
def test_the_size_of_batches_changes_nothing(max_tokens):
    samples, tokenizer = make_samples(), make_tokenizer()
    policy, reference = llama(0), llama(1)
    one = implicit_rewards(policy, reference, samples, tokenizer=tokenizer)
    other = implicit_rewards(policy, reference, samples, tokenizer=tokenizer, max_tokens=max_tokens)
    np.testing.assert_allclose(other.policy_logps, one.policy_logps, rtol=0, atol=2e-4)
    assert one.rewards.std() > 0.1
    np.testing.assert_allclose(other.rewards, one.rewards, rtol=0, atol=5e-5)


def test_a_batch_holds_no_more_than_max_tokens(monkeypatch):
    shapes = []
    original = rewards.completion_logps

    def counting(model):
        score = original(model)
        return lambda ids, *masks: shapes.append(tuple(ids.shape)) or score(ids, *masks)

    monkeypatch.setattr(rewards, "completion_logps", counting)
    samples = make_samples(30)
    response_logps(llama(), samples, tokenizer=make_tokenizer(), max_tokens=60)
    assert all(rows * width <= 60 for rows, width in shapes)
    assert sum(rows for rows, _ in shapes) == sum(len(pool) for _, pool in samples)
    assert len(shapes) < sum(len(pool) for _, pool in samples)
    widths = [width for _, width in shapes]
    assert widths == sorted(widths, reverse=True)


# ---- text


def test_conversations_are_scored_as_their_template_ends_them():
    model, tokenizer = llama(), make_tokenizer()
    chat = [
        ([{"role": "user", "content": "w1 w2"}], [[{"role": "assistant", "content": "w3 w4"}], "w5"]),
        ([{"role": "user", "content": "w9"}], ["w3"]),
    ]
    found = response_logps(model, chat, tokenizer=tokenizer)
    user, assistant, end = (WORDS.index(w) for w in ("<user>", "<assistant>", "<end>"))
    expected = [  # the template holds all special tokens: no <bos>, and <end> instead of <eos>
        plain_logps(model, [user, *ids_of("w1 w2"), end, assistant], [*ids_of("w3 w4"), end]),
        plain_logps(model, [user, *ids_of("w1 w2"), end, assistant], [*ids_of("w5"), end]),
        plain_logps(model, [user, *ids_of("w9"), end, assistant], [*ids_of("w3"), end]),
    ]
    np.testing.assert_allclose(found.logps, expected, rtol=1e-5)
    assert found.tokens.tolist() == [3, 2, 2]
    strings = [("w1 w2", ["w3 w4", "w5"]), ("w9", ["w3"])]
    as_chat = response_logps(model.float(), strings, tokenizer=tokenizer, as_chat=True)
    np.testing.assert_allclose(as_chat.logps, expected, rtol=1e-5)


def test_template_options_reach_the_template():
    template = TEMPLATE.replace("'<assistant> '", "'<assistant> ' + ('w7 ' if think else '')")
    model, tokenizer = llama(), make_tokenizer(template)
    with pytest.warns(UserWarning, match=r"tokens of 1 of 1 responses leave those of their prompt"):
        # the prompt alone ends in a token that the conversation does not have
        found = response_logps(
            model, [("w1", ["w3"])], tokenizer=tokenizer, as_chat=True, template_options={"think": True}
        )
    assert found.tokens.tolist() == [2]
    user, assistant, end = (WORDS.index(w) for w in ("<user>", "<assistant>", "<end>"))
    expected = plain_logps(model, [user, *ids_of("w1"), end, assistant], [*ids_of("w3"), end])
    assert found.logps[0] == pytest.approx(expected, rel=1e-5)


def test_a_token_across_the_boundary_belongs_to_the_response():
    model = llama()
    with pytest.warns(UserWarning, match="tokens of 1 of 2 responses leave those of their prompt"):
        found = response_logps(model, [("w1 w2", ["0", " w3"])], tokenizer=make_tokenizer())
    expected = [plain_logps(model, [1, *ids_of("w1")], [*ids_of("w20"), 2])]
    expected += [plain_logps(model, [1, *ids_of("w1 w2")], [*ids_of("w3"), 2])]
    np.testing.assert_allclose(found.logps, expected, rtol=1e-5)


def test_without_eos_and_without_prompt():
    model, tokenizer = llama(), make_tokenizer(bos=False)
    found = response_logps(model, [("", ["w1 w2", "", "w1 w2 <eos>"])], tokenizer=tokenizer, add_eos=False)
    expected = [plain_logps(model, [], ids_of("w1 w2")), 0, plain_logps(model, [], ids_of("w1 w2 <eos>"))]
    np.testing.assert_allclose(found.logps, expected, rtol=1e-5)
    model.float()
    closed = response_logps(model, [("", ["w1 w2", "w1 w2 <eos>"])], tokenizer=tokenizer)
    assert closed.tokens.tolist() == [3, 3]  # an EOS that is there is not doubled
    np.testing.assert_allclose(closed.logps, expected[2], rtol=1e-5)


def test_truncated_responses_are_cut_flagged_and_counted():
    model, samples = llama(), [("w1 w2 ", ["w3 w4 w5 w6", "w3"]), ("w1 w2 w3 w4 w5 w6 w7", [" w8"])]
    with pytest.warns(UserWarning, match="2 of 3 responses were cut at max_length=5 tokens, 1 of them to nothing"):
        found = response_logps(model, samples, tokenizer=make_tokenizer(), max_length=5)
    assert found.truncated.tolist() == [True, False, True]
    assert found.tokens.tolist() == [2, 2, 0]
    expected = [plain_logps(model, [1, *ids_of("w1 w2")], ids) for ids in (ids_of("w3 w4"), [*ids_of("w3"), 2])]
    np.testing.assert_allclose(found.logps, [*expected, np.nan], rtol=1e-5)
    with pytest.warns(UserWarning, match="1 of 1 responses were cut at max_length=64"):  # all that the model takes
        assert response_logps(gpt2(), [("w1 ", ["w2 " * 80])], tokenizer=make_tokenizer()).tokens.tolist() == [62]
    short, long = llama(), llama()
    short.config.max_position_embeddings = 9
    for policy, reference in ((short, long), (long, short)):  # all that both take
        with pytest.warns(UserWarning, match="1 of 1 responses were cut at max_length=9"):
            implicit_rewards(policy, reference, [("w1 ", ["w2 " * 20])], tokenizer=make_tokenizer())


def test_samples_of_a_file(tmp_path):
    samples = make_samples()
    rows = [{"prompt": p, "responses": pool, "scores": [1.0] * len(pool)} for p, pool in samples]
    rows[2]["prompt"] = None  # a row that is left out
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read, model, tokenizer = read_samples(path), llama(), make_tokenizer()
    found = response_logps(model, read, tokenizer=tokenizer)
    assert np.array_equal(found.offsets, read.offsets)
    again = response_logps(model, [*samples[:2], *samples[3:]], tokenizer=tokenizer)
    np.testing.assert_array_equal(found.logps, again.logps)


def test_implicit_rewards_of_a_file_select_its_pairs(tmp_path):
    draw, path, column = np.random.default_rng(0), tmp_path / "samples.jsonl", tmp_path / "implicit.npy"
    rows = [{"prompt": p, "responses": [*pool, "w1 w2", "w3"]} for p, pool in make_samples(40)]
    rows = [row | {"scores": draw.normal(size=len(row["responses"])).tolist()} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = implicit_rewards(llama(0), llama(1), read_samples(path), beta=1, tokenizer=make_tokenizer())
    np.save(column, found.rewards)
    fields = {
        "input": str(path),
        "output": str(tmp_path / "pairs.jsonl"),
        "read": {"implicit": str(column)},
        "construct": {"rejected": "min"},
    }
    config = CurateConfig(**fields, select={"k": 10, "how": "implicit"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        result = run(config)
    first = found.offsets[result.rows["row"] - 1]
    margin = found.rewards[first + result.rows["chosen_id"]] - found.rewards[first + result.rows["rejected_id"]]
    np.testing.assert_array_equal(result.rows["margin_implicit"], margin)
    best = [np.argmax(row["scores"]) for row in rows], [np.argmin(row["scores"]) for row in rows]
    every = found.rewards[found.offsets[:-1] + best[0]] - found.rewards[found.offsets[:-1] + best[1]]
    np.testing.assert_allclose(np.sort(margin), np.sort(every)[-10:])
    for wrong in (found.rewards[:-1], found.rewards[None]):
        np.save(column, wrong)
        with pytest.raises(ValueError, match=rf"implicit.npy must hold floating-point \[{len(found.rewards)}\]"):
            run(config)


def test_the_tokens_of_a_prompt_are_held_once():
    prompt, tokenizer = "w1 " * 500, make_tokenizer()
    tracemalloc.start()
    try:
        found = rewards._encode(((prompt, ["w2"] * 40) for _ in range(50)), tokenizer, None, False, None, False)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.count == 2000 and len(found.prompt_tokens) == 50 * 501 and len(found.own_tokens) == 2000
    assert peak < 1_500_000  # with those of every response 4 MB


def test_nothing_to_score():
    model, tokenizer = llama(), make_tokenizer()
    for samples in ([], [("w1", [])]):
        found = implicit_rewards(model, model, samples, tokenizer=tokenizer, progress=False)
        assert found.rewards.shape == (0,) and found.offsets.tolist() == [0] * (len(samples) + 1)


# ---- models


def test_the_model_is_left_as_it_was():
    model = llama(attention_dropout=0.5)
    model.train()
    model.lm_head.eval()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    samples, tokenizer = make_samples(3), make_tokenizer()
    one, other = (response_logps(model, samples, tokenizer=tokenizer).logps for _ in range(2))
    assert np.array_equal(one, other)  # no dropout
    assert model.training and model.model.training and not model.lm_head.training
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@peft_asks
def test_a_peft_policy_is_its_own_reference():
    peft = pytest.importorskip("peft", reason="PEFT is not installed (the extra [trl])")
    samples, tokenizer = make_samples(), make_tokenizer()
    base = llama()
    expected = response_logps(base, samples, tokenizer=tokenizer)
    torch.manual_seed(3)
    options = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    policy = peft.get_peft_model(base, peft.LoraConfig(**options))
    found = implicit_rewards(policy, None, samples, tokenizer=tokenizer)
    np.testing.assert_allclose(found.reference_logps, expected.logps, atol=1e-5)
    assert found.policy_id != found.reference_id and np.abs(found.rewards).max() > 0.01
    policy.peft_config["default"].lora_alpha *= 2
    assert causal_lm.model_id(policy) != found.policy_id
    with pytest.raises(ValueError, match="reference may be None for a PEFT policy only, got LlamaForCausalLM"):
        implicit_rewards(llama(), None, samples, tokenizer=tokenizer)


@peft_asks
def test_soft_prompts_and_adapters_on_the_head_are_scored_from_logits():
    peft = pytest.importorskip("peft", reason="PEFT is not installed (the extra [trl])")
    samples = [("w1 w2 ", ["w3 w4", "w5"])]
    soft = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    head = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["lm_head"], init_lora_weights=False)
    for config in (soft, head):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            policy = peft.get_peft_model(llama(), config)
        found = response_logps(policy, samples, tokenizer=make_tokenizer())
        with policy.disable_adapter():
            assert causal_lm.model_id(policy) != found.model_id
        assert causal_lm.model_id(policy) == found.model_id
        for logps, response in zip(found.logps, ["w3 w4", "w5"], strict=True):
            ids = torch.tensor([[1, *ids_of("w1 w2 " + response), 2]])
            with torch.no_grad():
                steps = F.log_softmax(policy(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].double(), -1)
            steps = steps[-ids.shape[1] :]
            expected = sum(steps[t - 1, ids[0, t]].item() for t in range(3, ids.shape[1]))
            assert logps == pytest.approx(expected, rel=1e-5)


def test_low_precision_has_float32_exact_log_probs():
    samples, tokenizer = make_samples(), make_tokenizer()
    model = llama().bfloat16()
    found = response_logps(model, samples, tokenizer=tokenizer, max_tokens=1)
    expected, rounded = [], []
    for prompt, pool in samples:
        for response in pool:
            ids = torch.tensor([[1, *ids_of(prompt + response), 2]])
            with torch.no_grad():
                hidden, head = model.model(ids).last_hidden_state[0], model.lm_head.weight
                pair = hidden.double() @ head.double().T, F.linear(hidden, head).double()
            steps = [F.log_softmax(logits, -1)[:-1].gather(1, ids[0, 1:, None])[:, 0] for logits in pair]
            for sums, step in zip((expected, rounded), steps, strict=True):
                sums.append(step[len(ids_of(prompt)) :].sum().item())
    np.testing.assert_allclose(found.logps, expected, rtol=1e-5)
    assert np.abs(np.subtract(rounded, expected)).max() > 1e-2  # what rounded logits would cost
    assert found.model_id != causal_lm.model_id(model.float())


def test_the_id_of_a_model_is_what_it_computes_with(tmp_path):
    model = llama()
    name = causal_lm.model_id(model)
    assert name == causal_lm.model_id(llama()) != causal_lm.model_id(llama(1))
    model.save_pretrained(tmp_path)
    assert causal_lm.model_id(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)) == name
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-6
    assert causal_lm.model_id(model) != name
    softer = granite()
    before = causal_lm.model_id(softer)
    softer.config.logits_scaling = 4.0
    assert causal_lm.model_id(softer) != before
    with pytest.raises(ValueError, match=r"no data for weight \(device meta\)"):
        causal_lm.model_id(torch.nn.Linear(2, 2, device="meta"))


# ---- the cache


class Counted(RuntimeError):
    pass


@pytest.fixture
def counting(monkeypatch):
    """Counts the responses that a model scores, and raises after `most` batches."""
    state = {"responses": 0, "batches": 0, "most": None}
    original = rewards.completion_logps

    def count(model):
        score = original(model)

        def counted(ids, *masks):
            if state["most"] == state["batches"]:
                raise Counted
            state["batches"] += 1
            state["responses"] += len(ids)
            return score(ids, *masks)

        return counted

    monkeypatch.setattr(rewards, "completion_logps", count)
    monkeypatch.setattr(rewards, "_BLOCK_TOKENS", 100)
    return state


def test_an_interrupted_run_goes_on_where_it_was(tmp_path, counting):
    samples, tokenizer = make_samples(30), make_tokenizer()
    policy, reference = llama(0), llama(1)
    run = lambda **options: implicit_rewards(  # noqa: E731
        policy, reference, samples, tokenizer=tokenizer, max_tokens=50, cache=tmp_path / "cache", **options
    )
    plain = implicit_rewards(policy, reference, samples, tokenizer=tokenizer)
    total = counting["responses"]
    assert total == 2 * len(plain.rewards)

    counting.update(responses=0, batches=0, most=17)
    with pytest.raises(Counted):
        run()
    interrupted = counting["responses"]
    assert 0 < interrupted < total // 2
    kept = sum(len(np.load(path)) for path in (tmp_path / "cache").glob("*/block-*.npy"))
    assert 0 < kept <= interrupted

    steps = []
    counting.update(responses=0, batches=0, most=None)
    resumed = run(progress=lambda done, of: steps.append((done, of)))
    assert counting["responses"] == total - kept
    np.testing.assert_allclose(resumed.rewards, plain.rewards, rtol=0, atol=5e-5)
    assert steps[-1] == (total, total) and [s for s, _ in steps] == sorted(s for s, _ in steps)

    counting["responses"] = 0
    again = run(max_length=None)
    assert counting["responses"] == 0  # all of it was there
    assert np.array_equal(again.rewards, resumed.rewards)
    assert not list((tmp_path / "cache").glob("*/.*"))  # no half-written file


def test_another_beta_and_batch_size_use_the_same_cache(tmp_path, counting):
    samples, tokenizer, policy, reference = make_samples(), make_tokenizer(), llama(0), llama(1)
    one = implicit_rewards(policy, reference, samples, 0.1, tokenizer=tokenizer, cache=tmp_path)
    counting["responses"] = 0
    other = implicit_rewards(policy, reference, samples, 0.5, tokenizer=tokenizer, cache=tmp_path, max_tokens=30)
    assert counting["responses"] == 0
    np.testing.assert_allclose(other.rewards, 5 * one.rewards)


def test_a_stale_cache_is_refused_with_what_differs(tmp_path):
    samples, tokenizer, policy, reference = make_samples(), make_tokenizer(), llama(0), llama(1)
    implicit_rewards(policy, reference, samples, tokenizer=tokenizer, cache=tmp_path)
    before = sorted((p, p.read_bytes()) for p in tmp_path.rglob("*") if p.is_file())

    def refused(policy=policy, reference=reference, samples=samples, tokenizer=tokenizer, **options):
        with pytest.raises(ValueError, match="holds scores of another run") as error:
            implicit_rewards(policy, reference, samples, tokenizer=tokenizer, cache=tmp_path, **options)
        return str(error.value)

    message = refused(policy=llama(2))
    assert f"model {causal_lm.model_id(llama(0))} there, {causal_lm.model_id(llama(2))} now" in message
    assert str(tmp_path / "policy") in message
    for name in ("data", "tokenizer", "chat template", "truncation", "tokens"):
        assert name not in message
    assert f"{causal_lm.model_id(llama(1))} there" in refused(reference=llama(2))
    message = refused(samples=[*samples[:-1], (samples[-1][0], [*samples[-1][1], "w1"])])
    assert "data sha256:" in message and "tokens sha256:" in message and "chat template" not in message
    assert "truncation max_length=64 there, max_length=63 now" in refused(max_length=63)
    assert "chat template sha256:" in refused(tokenizer=make_tokenizer(TEMPLATE + " "))
    assert "tokenizer sha256:" in refused(tokenizer=make_tokenizer(eos_token="<end>"))
    assert "model sha256:" in refused(policy_id="mine@v2")
    assert before == sorted((p, p.read_bytes()) for p in tmp_path.rglob("*") if p.is_file())


def test_blocks_of_another_key_are_never_read(tmp_path):
    samples, tokenizer = make_samples(), make_tokenizer()
    first = response_logps(llama(0), samples, tokenizer=tokenizer, cache=tmp_path)
    (tmp_path / "key.json").unlink()  # or: two runs began before either had written its key
    second = response_logps(llama(1), samples, tokenizer=tokenizer, cache=tmp_path)
    np.testing.assert_array_equal(second.logps, response_logps(llama(1), samples, tokenizer=tokenizer).logps)
    assert not np.array_equal(second.logps, first.logps)


def test_a_model_by_name_is_not_read(tmp_path, monkeypatch):
    def refuse(model):
        raise AssertionError

    monkeypatch.setattr(rewards, "model_id", refuse)
    found = implicit_rewards(
        llama(0),
        llama(1),
        make_samples(),
        tokenizer=make_tokenizer(),
        cache=tmp_path,
        policy_id="a@1",
        reference_id="b@2",
    )
    assert (found.policy_id, found.reference_id) == ("a@1", "b@2")
    assert json.loads((tmp_path / "policy" / "key.json").read_text())["model"] == "a@1"


@pytest.mark.parametrize("damage", ["cut", "other shape", "key"])
def test_a_damaged_cache_is_named(tmp_path, damage):
    samples, tokenizer, model = make_samples(), make_tokenizer(), llama()
    response_logps(model, samples, tokenizer=tokenizer, cache=tmp_path)
    path = tmp_path / "key.json" if damage == "key" else next(tmp_path.glob("block-*-000000.npy"))
    if damage == "other shape":
        np.save(path, np.zeros(2))
    else:
        path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=path.name):
        response_logps(model, samples, tokenizer=tokenizer, cache=tmp_path)


# ---- what is refused


def test_what_is_refused():
    model, tokenizer, samples = llama(), make_tokenizer(), make_samples()
    chat = [([{"role": "user", "content": "w1"}], ["w2"])]

    def refused(error, match, samples=samples, model=model, tokenizer=tokenizer, **options):
        with pytest.raises(error, match=match):
            implicit_rewards(model, llama(1), samples, tokenizer=tokenizer, **options)

    refused(ValueError, r"samples\[0\] is a conversation, and the tokenizer has no chat_template",
            chat, tokenizer=make_tokenizer(None))  # fmt: skip
    refused(ValueError, "as_chat|no chat_template", tokenizer=make_tokenizer(None), as_chat=True)
    refused(TypeError, r"samples\[1\] must be \(prompt, list of responses\)", [("w1", ["w2"]), "w3"])
    refused(TypeError, r"samples\[0\] must be \(prompt, list of responses\)", [("w1", "w2")])
    refused(TypeError, r"samples\[0\]: a response to a string must be a string, got list", [("w1", [["w2"]])])
    refused(TypeError, r"samples\[0\]: the prompt must be a string or a list of messages, got 3", [(3, ["w2"])])
    refused(TypeError, r"samples\[0\]: a response must be", [(chat[0][0], [["w2"]])])
    refused(TypeError, r"samples must be Samples or \(prompt, responses\) pairs, got dict", {"w1": ["w2"]})
    refused(TypeError, "model must be a causal LM of transformers, got Linear", model=torch.nn.Linear(2, 2))
    refused(ValueError, "beta must be a positive number, got 0", beta=0)
    refused(ValueError, "max_length must be a positive integer, got 0", max_length=0)
    refused(ValueError, "max_tokens must be a positive integer, got 1.5", max_tokens=1.5)
    refused(TypeError, "progress must be a bool or a function", progress="bar")
    refused(ValueError, "add_eos=True needs a tokenizer with an EOS token", tokenizer=make_tokenizer(eos_token=None))
    small = transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(**{**SIZES, "vocab_size": 20}, **ENDS)
    )
    refused(ValueError, r"tokenizer must fit the model, which embeds 20 tokens, got token \d+", model=small)
    t5 = transformers.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    t5 = transformers.T5ForConditionalGeneration(t5)
    refused(TypeError, "decoder-only, got the encoder-decoder T5ForConditionalGeneration", model=t5)


def test_a_model_that_gives_nan_is_counted():
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.warns(UserWarning, match="gives 2 of 2 responses no finite log-prob"):
        found = response_logps(model, [("w1 ", ["w2", "w3"])], tokenizer=make_tokenizer())
    assert np.isnan(found.logps).all()
