"""The recipes' controlled task: reward, draws, intervals; and that every recipe runs, paired and repeatable."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

RECIPES = Path(__file__).resolve().parents[2] / "benchmarks" / "studies" / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*.py") if path.stem not in ("__init__", "run", "task", "shrinkage"))
LONG = ("whole_pipeline", "sweet_spot", "bees_selection")  # run twice with --full alone


@pytest.fixture
def task(load):
    return load("studies.recipes.task")


def world(task, vocab, generator):
    utility = torch.randn(vocab, task.FEATURES, generator=generator)
    forbidden = torch.rand(vocab, vocab, generator=generator) < 0.4
    forbidden[task.END], forbidden[:, task.END] = False, False
    return task.World(utility, forbidden, torch.randn(task.FEATURES, generator=generator), 1.7)


# ---- the task ----


def test_reward_by_hand(task):
    utility = torch.zeros(4, task.FEATURES)
    utility[:, 0] = torch.tensor([9.0, 1.0, 2.0, -4.0])  # the end has no worth, whatever its row says
    forbidden = torch.zeros(4, 4, dtype=torch.bool)
    forbidden[1, 2] = True
    prompt = torch.zeros(1, task.FEATURES)
    prompt[0, 0] = 0.5
    made = task.World(utility, forbidden, torch.full((task.FEATURES,), -2.2), 2.0)  # wants 4 - 1.1, that is 3, tokens

    def reward(*tokens):
        padded = [*tokens, *[task.NOTHING] * (task.LENGTH - len(tokens))]
        return float(task.true_reward(made, prompt, torch.tensor([padded])))

    penalty = task.PENALTY
    assert reward(0) == pytest.approx(-3 * penalty / 2)
    assert reward(2, 1, 0) == pytest.approx((1 + 0.5 - penalty) / 2)
    assert reward(1, 2, 1, 0) == pytest.approx((0.5 + 1 + 0.5 - penalty) / 2)  # a transition that is forbidden
    assert reward(*[3] * task.LENGTH) == pytest.approx((-2 * task.LENGTH - 5 * penalty) / 2)


def test_best_reward_is_that_of_the_best_of_all_responses(task, monkeypatch):
    monkeypatch.setattr(task, "LENGTH", 4)
    generator = torch.Generator().manual_seed(0)
    made = world(task, 4, generator)
    prompts = torch.randn(25, task.FEATURES, generator=generator)
    every = []
    for length in range(5):
        for tokens in itertools.product(range(1, 4), repeat=length):
            ended = [*tokens, task.END][:4]
            every.append(ended + [task.NOTHING] * (4 - len(ended)))
    every = torch.tensor(every)
    brute = torch.stack([task.true_reward(made, prompt.expand(len(every), -1), every).max() for prompt in prompts])
    torch.testing.assert_close(task.best_reward(made, prompts), brute)
    assert len(brute.unique()) == 25


def test_draws_follow_the_policy(task):
    setting = task.made_setting(0, task.TINY)
    prompts = task.draw_prompts(0, "draws", 200)
    noise = task.gumbel(np.random.default_rng(0), 200, task.LENGTH, task.VOCAB)
    goal = torch.linspace(-1, 1, 200)
    policy = task.Policy(8, np.random.default_rng(1))
    policy[0].weight.data[:, task.FEATURES] = 1.0
    responses = task.sample(policy, prompts, noise, goal)
    logits = policy(task.inputs(prompts, responses, goal)).detach()  # of all positions at once
    greedy = (logits + noise).argmax(2)
    there = responses != task.NOTHING
    assert torch.equal(responses[there], greedy[there])
    ended = (responses == task.END).cumsum(1)
    assert torch.equal(there, ended - (responses == task.END).long() == 0)  # nothing follows the end
    assert not there.all()
    logps = torch.log_softmax(logits, 2).gather(2, responses.clamp(min=0)[:, :, None])[:, :, 0]
    torch.testing.assert_close(task.logps(policy, prompts, responses, goal), (logps * there).sum(1))
    assert setting.reference[0].weight[:, task.FEATURES].abs().max() == 0  # which knows no goal


def test_teacher_is_a_distribution(task):
    made = task.made_setting(0, task.TINY).world
    state = task.inputs(task.draw_prompts(0, "teacher", 5), torch.tensor([[1, 2, 0] + [task.NOTHING] * 5] * 5))
    logits = task.teacher(made)(state)
    torch.testing.assert_close(logits.exp().sum(2), torch.ones(5, task.LENGTH))
    torch.testing.assert_close(logits[:, :, 0].exp(), torch.full((5, task.LENGTH), task.TEACHER_END))


def test_judges(task):
    reward = np.zeros((200, 100))
    draw = np.random.default_rng(0)
    assert task.gaussian_judge(reward, 0.5, draw).std() == pytest.approx(0.5, rel=0.02)
    heavy = np.abs(task.heavy_tailed_judge(reward, 0.5, draw))
    assert (heavy > 0.5 * 5.841).mean() == pytest.approx(0.01, abs=0.003)  # Student's t with 3 degrees of freedom
    label = np.arange(20_000) % 3 == 0
    assert (task.flipped(label, 0.2, draw) != label).mean() == pytest.approx(0.2, abs=0.01)
    assert (task.flipped(label, 0.0, draw) == label).all()


def test_equal_policies_are_drawn_alike(task):
    setting = task.made_setting(1, task.TINY)
    before = task.evaluate(setting, setting.reference)
    assert before.kl == 0
    assert before.reward.shape == (task.TINY.held_out,)
    nudged = task.Policy(task.TINY.width, np.random.default_rng(0))
    nudged.load_state_dict({k: v + 1e-7 for k, v in setting.reference.state_dict().items()})
    assert (task.evaluate(setting, nudged).reward == before.reward).all()


def test_rewards_are_in_standard_deviations(task):
    size = task.Size(clone_steps=60, held_out=100, samples=16, prompts=64)
    setting = task.made_setting(0, size)
    pool = task.draw_pool(setting, 300, 32)
    assert np.sqrt(pool.reward.var(1, ddof=1).mean()) == pytest.approx(1, abs=0.1)


def test_training_learns_and_leaves_the_reference(task):
    size = task.Size(clone_steps=60, steps=60, batch=32, prompts=256, held_out=60, samples=8)
    setting = task.made_setting(2, size)
    weights = {k: v.clone() for k, v in setting.reference.state_dict().items()}
    pool = task.draw_pool(setting, 256, 8)
    at = np.arange(256)
    pairs = pool.pairs(pool.reward.argmax(1), pool.reward.argmin(1), pool.reward)
    assert np.allclose(pairs.gap, pool.reward.max(1) - pool.reward.min(1))
    better = task.evaluate(setting, task.train(setting, pairs))
    again = task.evaluate(setting, task.train(setting, pairs))
    worse = task.evaluate(setting, task.train(setting, pairs._replace(chosen=pairs.rejected, rejected=pairs.chosen)))
    middle = task.evaluate(setting, setting.reference)
    assert (better.reward == again.reward).all()
    assert better.mean > middle.mean + 0.5
    assert worse.mean < middle.mean - 0.5
    assert better.kl > 0.1
    assert better.mean < float(task.best_reward(setting.world, setting.prompts).mean())
    assert all(torch.equal(v, weights[k]) for k, v in setting.reference.state_dict().items())
    kept = pool.pairs(pool.reward.argmax(1), pool.reward.argmin(1), keep=at % 2 == 0)
    assert torch.equal(kept.chosen, pairs.take(at[::2]).chosen)


def test_training_starts_at_the_reference(task, monkeypatch):
    found, loss = [], task.preference_loss

    def recording(*args, **options):
        found.append((loss(*args, **options), options))
        return found[-1][0]

    monkeypatch.setattr(task, "preference_loss", recording)
    setting = task.made_setting(5, task.TINY)
    pool = task.draw_pool(setting, 40, 2)
    pairs = pool.pairs(np.zeros(40, int), np.ones(40, int), pool.reward)._replace(goal=torch.linspace(-1, 1, 40))
    order = torch.arange(32).view(2, 16)
    task.train(setting, pairs, order=order)
    assert len(found) == 2
    first, options = found[0]
    assert first.loss.item() == pytest.approx(math.log(2), abs=1e-6)
    assert first.margins.abs().max() < 1e-5
    torch.testing.assert_close(
        options["rating_gap"], torch.from_numpy(pool.reward[:16, 0] - pool.reward[:16, 1]).float()
    )


def test_batches_are_whole_epochs(task):
    rows = task.batches(10, 3, 8, np.random.default_rng(0))
    assert rows.shape == (3, 8)
    flat = rows.flatten().tolist()
    assert sorted(flat[:10]) == sorted(flat[10:20]) == list(range(10))
    assert len(set(flat[20:])) == 4


# ---- claims ----


@pytest.mark.parametrize(("freedom", "quantile"), [(1, 12.7062), (4, 2.77645), (7, 2.36462), (30, 2.04227)])
def test_student_t(task, freedom, quantile):
    assert task.student_t(freedom) == pytest.approx(quantile, rel=1e-5)


def test_intervals_cover(task):
    draws = np.random.default_rng(0).normal(3, 2, (1000, 6))
    inside = [low <= 3 <= high for _, low, high in map(task.interval, draws)]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.025)
    mean, low, high = task.interval([1.0, 2.0, 3.0])
    assert mean == 2
    assert high - mean == pytest.approx(mean - low) == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5)
    with pytest.raises(ValueError, match="at least two"):
        task.interval([1.0])


def test_verdicts(task):
    def verdict(values, **more):
        return task.judge_claim(task.Claim("", "", lambda arms: arms["x"], **more), [{"x": v} for v in values]).verdict

    assert verdict([0.4, 0.5, 0.6]) == "reproduces"
    assert verdict([-0.4, -0.5, -0.6]) == "does not"
    assert verdict([0.01, 0.0, -0.01]) == "does not"  # no effect worth speaking of
    assert verdict([-1.0, 0.0, 2.0]) == "inconclusive"
    assert verdict([0.01, 0.0, -0.01], above=-0.1) == "reproduces"
    assert verdict([0.4, 0.5, 0.6], above=1.0) == "does not"


def test_gain_is_paired_by_prompt(task):
    arms = {"a": task.Outcome(np.array([1.0, 5.0]), 0.0), "b": task.Outcome(np.array([0.0, 3.0]), 0.0)}
    assert task.gain("a", "b")(arms) == 1.5


# ---- the recipes ----


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore")  # methods out of their range warn: few pairs, small matrices
def test_recipe(load, task, monkeypatch, name, full):
    recipe = load(f"studies.recipes.{name}")
    descend, evaluate = task._descend, task.evaluate

    def counting(policy, loss, rows, rate):
        policy.budget = tuple(rows.shape)
        descend(policy, loss, rows, rate)

    def checking(setting, policy, *args, **more):
        assert policy.budget == (task.TINY.steps, task.TINY.batch)  # the same in every arm
        return evaluate(setting, policy, *args, **more)

    setting = task.made_setting(3, task.TINY)
    monkeypatch.setattr(task, "_descend", counting)
    monkeypatch.setattr(recipe, "evaluate", checking, raising=False)
    arms = recipe.arms(setting)
    again = recipe.arms(setting) if full or name not in LONG else arms
    assert arms.keys() == again.keys()
    for arm, found in arms.items():
        if isinstance(found, task.Outcome):
            assert found.reward.shape == (task.TINY.held_out,)  # the held-out prompts of every other arm
            assert np.isfinite(found.reward).all(), arm
            assert (found.reward == again[arm].reward).all(), arm
        else:
            assert found == again[arm], arm
    assert recipe.CLAIMS
    for claim in recipe.CLAIMS:
        assert math.isfinite(claim.measure(arms)), claim.text


def test_every_response_of_two_tokens(load, task):
    every = load("studies.recipes.online_gradient").every_response()
    prompts = task.draw_prompts(0, "every", 3)
    policy = task.Policy(8, np.random.default_rng(0))
    for prompt in prompts:
        share = task.logps(policy, prompt.expand(len(every), -1), every).exp()
        assert float(share.sum()) == pytest.approx(1, abs=1e-5)


def test_cosines_reach_one(load, task):
    found = load("studies.recipes.online_gradient").arms(task.made_setting(4, task.TINY))
    assert found["online β=0.001"] == pytest.approx(1, abs=1e-5)
    # 1 - cosine falls with the square of beta
    assert 1 - found["online β=0.001"] == pytest.approx((1 - found["online β=0.01"]) / 100, rel=0.1)
    assert found["offline β=0.001"] < 0.99


@pytest.mark.filterwarnings("ignore")
def test_run_writes_a_table(load, tmp_path, capsys, monkeypatch):
    run = load("studies.recipes.run")
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)  # which would outlive the test
    assert set(run.RECIPES) == set(NAMES)
    assert run.main(["--tiny", "--seeds", "5", "--only", "ratings", "noisy_labels", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    (path,) = tmp_path.glob("*-recipes.json")
    assert path.with_suffix(".md").read_text() == text
    results = json.loads(path.read_text())
    assert results["seeds"] == [0, 1, 2, 3, 4]
    assert results["size"]["steps"] == 6
    claims = [claim for recipe in results["recipes"].values() for claim in recipe["claims"]]
    assert all(len(claim["per_seed"]) == 5 for claim in claims)
    assert text.count("\n| ") == 1 + len(claims)
    assert all(claim["low"] <= claim["mean"] <= claim["high"] for claim in claims)
    with pytest.raises(SystemExit):
        run.main(["--seeds", "4"])
