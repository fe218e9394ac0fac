"""`fastpref demo`: one tiny run end to end as a user starts it, then its parts."""

import contextlib
import json
import math
import os
import re
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fastpref
from fastpref.cli.demo.samples import embedded_samples
from fastpref.cli.main import main
from fastpref.curate import InputError, read_scored_samples, select_pairs

pytest.importorskip("tokenizers", reason="fastpref[demo] is not installed")
pytest.importorskip("tqdm", reason="fastpref[demo] is not installed")

from fastpref.cli.demo import cost as demo_cost
from fastpref.cli.demo import report as demo_report
from fastpref.cli.demo import run as demo

REAL_DATA = Path(
    os.environ.get("FASTPREF_REAL_DATA") or Path(__file__).parents[3] / "shared" / "data" / "alpaca_eval_dev.jsonl.gz"
)


def write_samples(path, samples, extra_lines=()):
    rows = zip(samples.prompts, samples.responses, samples.scores, strict=True)
    lines = [json.dumps({"prompt": p, "responses": r, "scores": s.tolist()}) for p, r, s in rows]
    path.write_text("\n".join([*extra_lines, *lines]))
    return path


# ---- the whole run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The console script on 24 short prompts and 12 malformed lines: (finished process, numbers, data file)."""
    folder = tmp_path_factory.mktemp("demo")
    samples = embedded_samples(24, 6)
    short = replace(samples, responses=[[text[:40] for text in pool] for pool in samples.responses])
    data = write_samples(folder / "samples.jsonl", short, ["{"] * 12)
    script = Path(sysconfig.get_path("scripts")) / "fastpref"
    flags = ["--data", data, "--steps", "2", "--seeds", "2", "--threads", "1", "--json", folder / "numbers.json"]
    done = subprocess.run([script, "demo", *flags], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done, json.loads((folder / "numbers.json").read_text()), data


def test_it_ends_on_one_screen_with_two_blocks(run):
    lines = run[0].stdout.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 100
    for start in (
        "Training: RDPO, 2 steps of 4 pairs",
        "held-out accuracy ",
        "  longest wins ",
        "  untouched model",
        "length-matched accuracy ",
        "Spearman(margin, rating gap) ",
        "Cost: 5 identical steps, logits [8, up to ",
        "step time, ms ",
        "peak memory, MB ",
        "largest margin error ",
        "losses equal to 1e-05 ",
    ):
        assert any(line.startswith(start) for line in lines), start
    columns = [re.split("  +", line.strip()) for line in lines]
    assert ["plain PyTorch", "fastpref, logits", "fastpref, hidden"] in columns


def test_malformed_lines_are_reported_and_counted(run):
    done, numbers, data = run
    reported = [line for line in done.stderr.splitlines() if line.startswith(str(data))]
    assert [line.removeprefix(f"{data}:").split(":")[0] for line in reported[:10]] == [str(n) for n in range(1, 11)]
    assert reported[10:] == [f"{data}: 2 more malformed rows"]
    assert numbers["data"]["malformed_rows"] == 12 and "12 malformed rows" in done.stdout


def test_the_numbers_are_whole(run):
    numbers = run[1]
    pairs, training, cost = numbers["pairs"], numbers["training"], numbers["cost"]
    assert pairs["train"] + pairs["held_out"] + sum(pairs["dropped"].values()) == 24
    assert 0 <= pairs["target_below_min"] <= 1
    for name, seeds in {"held_out_accuracy": 2, "untouched_model": 2, "longest_wins": 1}.items():
        row = training[name]
        low, high = row["interval"]
        assert 0 <= low <= row["value"] <= high <= 1 and (row["n"], row["seeds"]) == (pairs["held_out"], seeds), name
    assert -1 <= training["spearman_margin_gap"]["value"] <= 1
    assert training["beta_rating"] > 0
    assert cost["losses_equal"]
    for prefix in ("", "linear_"):
        assert cost[f"{prefix}loss_difference"] <= 1e-5 and cost[f"{prefix}gradient_difference"] < 1e-4
        low, high = cost[f"{prefix}step_time_ratio_range"]
        assert 0 < low <= cost[f"{prefix}step_time_ratio"] <= high
    assert (cost["vocabulary"], cost["width"], cost["steps"]) == (32_768, 128, 5)
    assert max(cost[name]["margin_error"] for name in ("plain", "fastpref", "linear")) < 1e-4
    if sys.platform == "linux" and cost["plain"]["peak_mb"] is not None:
        logits_mb = cost["sequences"] * cost["tokens"] * cost["vocabulary"] * 4 / 1e6
        assert cost["plain"]["peak_mb"] > 1.5 * logits_mb  # logits and their log-softmax, at the least
        assert cost["linear"]["peak_mb"] < cost["fastpref"]["peak_mb"] < cost["plain"]["peak_mb"]


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(monkeypatch, capsys):
    if not hasattr(os, "openpty"):
        pytest.skip("no pseudo-terminals here")
    reader, writer = os.openpty()
    with open(writer, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        with demo.Progress(2) as progress:
            progress.describe("warm-up")
            progress.advance()
    shown = b""
    with contextlib.suppress(OSError):  # EIO: the other end is closed
        while part := os.read(reader, 10_000):
            shown += part
    os.close(reader)
    assert b"warm-up" in shown

    with demo.Progress(2) as progress:
        progress.advance()
        progress.last_line -= 60
        progress.describe("cost")
        progress.advance()
    assert capsys.readouterr().err == "2 of 2 steps (cost)\n"


# ---- what the user can mend


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        ("", [], "holds no usable row (0 malformed)"),
        ('{"prompt": 1, "responses": ["a", "b"], "scores": [1, 2]}\n' * 2, [], "holds no usable row (2 malformed)"),
        ("[]\n{}\n", [], "samples.jsonl:2: not a JSON array"),
        ('{"prompt": "p", "responses": ["a", "b"], "scores": [1, 2]}', [], "gives 1 training and 0 held-out pairs"),
        ('{"prompt": "p", "responses": ["a", "b"], "scores": [1, 2]}', ["--score-scale", "logit"], "in [0, 1], 1 in"),
        ('{"prompt": "p", "responses": ["a", "b"], "scores": [1, 2]}', ["--score-field", "x"], "has no scores 'x'"),
        ('{"prompt": "p", "responses": ["a", "b"], "scores": [1, 2]}', ["--json", "no/such/folder"], "cannot write"),
    ],
)
def test_unusable_input_is_one_message_and_exit_code_2(tmp_path, monkeypatch, capsys, content, flags, message):
    monkeypatch.chdir(tmp_path)
    Path("samples.jsonl").write_text(content)
    assert main(["demo", "--data", "samples.jsonl", *flags]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    last = captured.err.splitlines()[-1]
    assert last.startswith("fastpref: ") and message in last


@pytest.mark.parametrize("module", ["tokenizers", "tqdm"])
def test_a_missing_extra_says_what_to_install(python, module):
    code = f"import sys; sys.modules[{module!r}] = None; from fastpref.cli.main import main; sys.exit(main(['demo']))"
    done = python(code)
    assert done.returncode == 2
    assert done.stderr == f'fastpref: fastpref demo needs {module}: pip install "fastpref[demo]"\n'


def test_losses_that_differ_fail_the_demo(run, monkeypatch, capsys):
    numbers = run[1]
    wrong = numbers | {"cost": numbers["cost"] | {"losses_equal": False, "loss_difference": 0.1}}
    monkeypatch.setattr(demo, "run_demo", lambda options: wrong)
    assert main(["demo"]) == 1
    assert "losses NOT EQUAL to 1e-05" in capsys.readouterr().out


# ---- pairs


def test_equal_prompts_stay_on_one_side():
    prompts = [f"prompt {i % 50}" for i in range(200)]
    held_out = demo.held_out_prompts(prompts).reshape(4, 50)
    assert (held_out == held_out[0]).all()
    assert held_out[0].sum() == int(demo.HELD_OUT_SHARE * 50)


def test_embedded_samples_hide_nothing_in_the_length():
    samples = embedded_samples()
    assert samples.prompts == embedded_samples().prompts and len(set(samples.prompts)) == 480
    lengths = [len(response) for pool in samples.responses for response in pool]
    assert abs(np.corrcoef(lengths, np.concatenate(samples.scores))[0, 1]) < 0.05


def test_scores_in_the_unit_interval_become_logits():
    unit = embedded_samples(4, 3)
    for scores in unit.scores:
        scores[:] = [0.0, 0.5, 0.75]
    rewards, scale, clamped = demo.scale_scores(unit, "auto")
    assert (scale, clamped) == ("logit", 4)
    np.testing.assert_allclose(rewards[0, 1:], [0, np.log(3)], atol=1e-12)
    assert demo.scale_scores(unit, "raw")[1:] == ("raw", 0)
    unit.scores[0][0] = 1.5
    assert demo.scale_scores(unit, "auto")[1:] == ("raw", 0)
    with pytest.raises(InputError, match=r"needs scores in \[0, 1\], 1 in embedded samples are outside"):
        demo.scale_scores(unit, "logit")


def test_labels_cover_the_response_and_its_end_only():
    long, short = demo.join_tokens([5, 6], [7, 8, 9]), demo.join_tokens([5], [])
    ids, labels = demo.pad_sequences([long, short])
    assert ids.tolist() == [[5, 6, demo.ANSWER, 7, 8, 9, demo.END], [5, demo.ANSWER, demo.END, *[demo.PADDING] * 4]]
    assert labels.tolist() == [[-100] * 3 + [7, 8, 9, demo.END], [-100, -100, demo.END, *[-100] * 4]]
    cut = demo.join_tokens([5], range(3, 3 + demo.MAX_TOKENS))
    assert cut.cut and len(cut.ids) == demo.MAX_TOKENS and cut.ids[-1] != demo.END


@pytest.mark.skipif(not REAL_DATA.exists(), reason="no real data: set FASTPREF_REAL_DATA to alpaca_eval_dev.jsonl.gz")
def test_real_data_shows_what_methods_md_says():
    # spec section 11: the target is mostly below the minimum, and one adversarial text is chosen 79 times.
    samples = read_scored_samples(REAL_DATA)
    assert len(samples.prompts) == 403 and samples.problems == [] and samples.score_field == "win_prob"
    rewards, scale, clamped = demo.scale_scores(samples, "auto")
    assert (scale, clamped) == ("logit", 6)
    with pytest.warns(UserWarning, match="below every reward"):
        logit, raw = select_pairs(rewards), select_pairs(samples.score_matrix())
    assert raw.share_below_min == pytest.approx(0.99, abs=0.01)
    assert logit.share_below_min > 0.9 and logit.share_rejected_min > 0.95
    chosen = [pool[index] for pool, index in zip(samples.responses, logit.chosen, strict=True)]
    assert max(map(chosen.count, chosen)) == 79


# ---- training


def test_training_and_evaluation_form_no_logits(monkeypatch):
    """They call neither the model's forward nor what takes logits."""

    def refuse(*arguments, **keywords):
        raise AssertionError("logits [sequences, tokens, vocabulary] were formed")

    monkeypatch.setattr(demo.TinyTransformer, "forward", refuse)
    monkeypatch.setattr(fastpref, "token_logps", refuse)
    monkeypatch.setattr(fastpref, "preference_loss", refuse)
    task, _ = demo.make_task(embedded_samples(24, 6), "raw")
    with demo.Progress(100) as progress:
        training, model, batches = demo.train_and_evaluate(task, demo.DemoOptions(steps=2, seeds=1), progress)
    assert training["held_out_accuracy"]["n"] == len(task.held_out) and len(batches) == demo.COST_STEPS
    with pytest.raises(AssertionError, match="were formed"):
        model(batches[0].ids)


def test_log_probs_are_those_of_the_logits():
    torch.manual_seed(0)
    model = demo.TinyTransformer()
    ids, labels = demo.pad_sequences([demo.join_tokens([5, 6], [7, 8, 9]), demo.join_tokens([5], [])])
    with torch.no_grad():
        expected = torch.zeros(ids.shape)
        logps = model(ids)[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
        expected[:, :-1] = torch.where(labels[:, 1:] == demo.IGNORE, 0, logps)
        assert model.hidden_states(ids).shape == (2, ids.shape[1], demo.WIDTH)
        torch.testing.assert_close(demo.label_logps(model, ids, labels), expected, atol=1e-5, rtol=0)


# ---- estimates


def test_rank_correlation_averages_ties():
    assert demo_report.rank_correlation(np.array([1.0, 2, 3]), np.array([10.0, 20, 30])) == pytest.approx(1)
    assert demo_report.rank_correlation(np.array([1.0, 2, 3]), np.array([3.0, 2, 1])) == pytest.approx(-1)
    # ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4
    assert demo_report.rank_correlation(np.array([0.0, 5, 5, 9]), np.arange(4.0)) == pytest.approx(4.5 / 22.5**0.5)
    assert math.isnan(demo_report.rank_correlation(np.ones(3), np.arange(3.0)))


def test_accuracy_counts_ties_half_and_is_not_certain_of_few_pairs():
    generator = np.random.default_rng(0)
    row = demo_report.accuracy(np.array([[1.0, -1.0, 0.0, 2.0]]), generator)
    assert row["value"] == 0.625 and row["ties"] == 1 and (row["n"], row["seeds"]) == (4, 1)
    sure = demo_report.accuracy(np.ones((3, 10)), generator)
    # Wilson for 10 of 10; a bootstrap alone would say [1, 1].
    assert sure["interval"] == pytest.approx([0.7225, 1.0], abs=1e-4)
    nothing = demo_report.accuracy(np.empty((2, 0)), generator)
    assert nothing["value"] is None and nothing["n"] == 0
    assert demo_report.verdict(sure, nothing) == "no data"
    assert demo_report.row("name", nothing).split() == ["name", "-", "-", "0", "2"]


def test_seeds_that_disagree_widen_the_interval():
    disagree = np.concatenate([np.ones((2, 400)), -np.ones((2, 400))])
    low, high = demo_report.accuracy(disagree, np.random.default_rng(0))["interval"]
    assert low < 0.1 and high > 0.9


@pytest.mark.parametrize(
    ("other", "verdict"),
    [([0.1, 0.59], "trained is better"), ([0.1, 0.6], "no difference"), ([0.81, 0.9], "trained is worse")],
)
def test_overlapping_intervals_say_no_difference(other, verdict):
    trained = {"value": 0.7, "interval": [0.6, 0.8]}
    assert demo_report.verdict(trained, {"value": sum(other) / 2, "interval": other}) == verdict


# ---- cost


class TinyModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 8)

    def hidden_states(self, ids):
        return self.embedding(ids)

    def forward(self, ids):
        return self.hidden_states(ids) @ self.embedding.weight.T


@pytest.fixture
def batch():
    torch.manual_seed(0)
    ids = torch.randint(50, (4, 9))
    labels = ids.clone()
    labels[:, :3] = -100
    labels[1, 7:] = -100
    scored = torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1))
    return demo_cost.Batch(ids, labels, torch.randn(4, 9) * scored, torch.tensor([1.0, 2.0]))


def test_plain_fused_linear_and_float64_are_one_computation(batch):
    torch.manual_seed(1)
    cost = demo_cost.measure_cost(TinyModel(), [batch] * 3, 0.1, 0.4, lambda: None)
    assert cost["losses_equal"]
    assert 0 < max(cost[name]["margin_error"] for name in ("plain", "fastpref", "linear")) < 1e-5
    for prefix in ("", "linear_"):
        assert cost[f"{prefix}gradient_difference"] < 1e-5
        low, high = cost[f"{prefix}step_time_ratio_range"]
        assert 0 < low <= cost[f"{prefix}step_time_ratio"] <= high


@pytest.mark.parametrize("which", ["plain", "fused", "linear"])
def test_a_loss_that_differs_is_noticed(batch, monkeypatch, which):
    original = getattr(demo_cost, f"{which}_loss")

    def wrong(*arguments):
        output = original(*arguments)
        loss = output[0] * (1 + 5e-5)
        return (loss, output[1]) if which == "plain" else output._replace(loss=loss)

    monkeypatch.setattr(demo_cost, f"{which}_loss", wrong)
    cost = demo_cost.measure_cost(TinyModel(), [batch], 0.1, 0.4, lambda: None)
    assert not cost["losses_equal"]
    for prefix, differs in {"": which != "linear", "linear_": which != "fused"}.items():
        assert (cost[f"{prefix}loss_difference"] > 1e-5) == differs
        if differs:
            assert cost[f"{prefix}loss_difference"] == pytest.approx(5e-5, rel=0.1)


def test_a_system_that_hides_its_memory_keeps_the_screen_whole(run):
    numbers = run[1]
    untold = {name: numbers["cost"][name] | {"peak_mb": None} for name in ("plain", "fastpref", "linear")}
    lines = demo_report.screen(numbers | {"cost": numbers["cost"] | untold}).splitlines()
    assert len(lines) == 24 and any(re.fullmatch("peak memory, MB +this system does not tell", line) for line in lines)
