"""curate.run: the stages in a row, what they keep, and how they are run again one by one."""

import dataclasses
import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest

from fastpref._rating_scale import of_gaps
from fastpref.curate import InputError, margins, to_logit
from fastpref.curate.pipeline.config import STAGES, CurateConfig, config_from_table, config_from_toml
from fastpref.curate.pipeline.run import run
from fastpref.curate.pipeline.state import LeftOut, PairReason

EXAMPLE = Path(__file__).parents[2] / "examples" / "curate.toml"
CHEAT = "cheat"
PROMPTS, SOURCES = 260, 12


def make_rows(prompts=PROMPTS, seed=0):
    """Pools of 12 sources whose logits have rank-2 structure, but one, which scores high and always says the same."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(prompts, 2)) @ (rng.normal(size=(2, SOURCES)) * 0.7)
    x += rng.normal(size=SOURCES) + 1.5 * rng.normal(size=(prompts, 1)) + 0.3 * rng.normal(size=(prompts, SOURCES))
    x[:, 5] = 4 + 2 * rng.normal(size=prompts)
    names = [CHEAT if s == 5 else f"model-{s}" for s in range(SOURCES)]
    rows = []
    for p in range(prompts):
        texts = ["I win." if s == 5 else f"{'word ' * rng.integers(1, 30)}{p} {s}" for s in range(SOURCES)]
        order = rng.permutation(SOURCES)
        rows.append(
            {
                "prompt": f"Question {p}?",
                "responses": [texts[s] for s in order],
                "win_prob": [float(1 / (1 + np.exp(-x[p, s]))) for s in order],
                "helpfulness": [float(x[p, s] + rng.normal()) for s in order],
                "models": [names[s] for s in order],
            }
        )
    return rows


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def samples(tmp_path):
    return write_rows(tmp_path / "samples.jsonl", make_rows())


def config_of(path, **tables):
    table = {"input": str(path), "output": str(path.with_name("pairs.jsonl"))}
    table["read"] = {"scores": ["win_prob:logit"], "sources": "models"} | tables.pop("read", {})
    return config_from_table(table | tables)


def run_quietly(config, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return run(config, **options)


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


# ---- config


def test_the_example_config_is_one(tmp_path):
    config = config_from_toml(EXAMPLE)
    assert config.construct.rejected == "quantile:0.10" and config.read.scores == ("win_prob:logit",)
    assert config.order == STAGES


def test_a_config_of_toml_is_that_of_the_dataclass(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('input = "a"\nseed = 7\n[select]\nfraction = 1\n[read]\nscore_range = [1, 10]\n')
    config = config_from_toml(file)
    assert config == CurateConfig(input="a", seed=7, select={"fraction": 1.0}, read={"score_range": (1.0, 10.0)})
    assert config.select.fraction == 1.0 and isinstance(config.select.fraction, float)
    assert config == dataclasses.replace(CurateConfig(), input="a", seed=7, select=config.select, read=config.read)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"sed": 1}, "unknown key sed, known: input, output"),
        ({"construct": {"rejectd": "min"}}, r"unknown key construct\.rejectd, known: construct\.chosen"),
        ({"seed": "1"}, "seed must be an integer, got '1'"),
        ({"seed": True}, "seed must be an integer, got True"),
        ({"hygiene": {"apply": 1}}, r"hygiene\.apply must be true or false, got 1"),
        ({"read": {"scores": "win_prob"}}, r"read\.scores must be a list, each item a string, got 'win_prob'"),
        ({"read": {"scores": ["a", 2]}}, r"read\.scores\[1\] must be a string, got 2"),
        ({"read": 3}, "read must be a table, got 3"),
        ({"construct": {"min_gap": []}}, r"construct\.min_gap must be a number or a string, got \[\]"),
        ({"audit": {"exclude": "all"}}, r"audit\.exclude must be one of both, chosen, none, got 'all'"),
        ({"select": {"fraction": 0.5, "k": 2}}, "must not both be given"),
        ({"order": ["audit"]}, "order must hold construct"),
        ({"order": ["construct", "construct"]}, "order must name a stage once"),
        ({"order": ["route", "construct"]}, "order must have construct before route"),
        ({"order": ["construct", "length"], "length": {"control": "match"}}, "order must have length before construct"),
        ({"order": ["score", "construct"]}, "order must be one of hygiene, audit"),
        ({"write": {"test_share": 0.1}}, "need each other"),
        ({"write": {"beta": 0}}, r"write\.beta must be positive and finite, got 0"),
        ({"write": {"beta": float("inf")}}, r"write\.beta must be positive and finite, got inf"),
        ({"audit": {"threshold": float("nan")}}, r"audit\.threshold must be positive and finite, got nan"),
        ({"clean": {"threshold": -1}}, r"clean\.threshold must be positive and finite, got -1"),
        ({"clean": {"rank": 0}}, r"clean\.rank must be at least 1, got 0"),
        ({"read": {"score_range": [10, 1]}}, r"read\.score_range must be two numbers, the lower first"),
        ({"read": {"workers": 0}}, r"read\.workers must be at least 1, got 0"),
        ({"read": {"score_range": [1.0]}}, r"read\.score_range must be two numbers"),
    ],
)
def test_what_is_no_config(table, message):
    with pytest.raises(InputError, match=message):
        config_from_table(table)


def test_what_is_no_toml(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("a = = 1")
    with pytest.raises(InputError, match=r"c\.toml is not TOML"):
        config_from_toml(file)
    with pytest.raises(InputError, match="cannot read"):
        config_from_toml(tmp_path / "none.toml")


# ---- what comes out


def test_every_row_says_where_it_comes_from(samples):
    result = run_quietly(config_of(samples, construct={"rejected": "quantile:0.25"}, clean={"action": "none"}))
    source = read_lines(samples)
    rows = read_lines(result.summary["output"])
    assert len(rows) == result.summary["pairs"] == PROMPTS
    for row in rows:
        pool = source[row["row"] - 1]
        trusted = [k for k, name in enumerate(pool["models"]) if name != CHEAT]
        logits = to_logit(pool["win_prob"])
        ranks = np.argsort(np.argsort(logits[trusted]))
        assert row["prompt"] == pool["prompt"]
        for side in ("chosen", "rejected"):
            k = row[f"{side}_id"]
            assert row[side] == pool["responses"][k]
            assert row[f"score_{side}"] == pytest.approx(logits[k], rel=1e-12)
            assert row[f"score_{side}_win_prob"] == pool["win_prob"][k]
            assert row[f"source_{side}"] == pool["models"][k]
            assert row[f"len_{side}"] == len(pool["responses"][k])
            z = (logits[k] - logits[trusted].mean()) / logits[trusted].std()
            assert row[f"z_{side}"] == pytest.approx(z, rel=1e-9)
        assert row["margin"] == pytest.approx(row["score_chosen"] - row["score_rejected"])
        assert row["n_pool"] == len(trusted) == SOURCES - 1
        assert row["rank_rejected"] == ranks[trusted.index(row["rejected_id"])] == round(0.25 * (SOURCES - 2))
        assert (row["rule"], row["scale"]) == ("max vs quantile:0.25", "win_prob:logit")
        assert row["reason"] == "kept" and row["route"] in ("pref", "sft")
    assert len({row["prompt_id"] for row in rows}) == PROMPTS
    order = sorted(rows, key=lambda row: row["easy_to_hard"])
    assert [row["margin"] for row in order] == sorted((row["margin"] for row in rows), reverse=True)
    gap = [row["margin"] for row in rows]
    assert result.summary["rating_scale"] == {"beta": 0.1, "pairs": PROMPTS} | of_gaps(gap, 0.1)._asdict()


def test_a_cheating_source_is_flagged_and_leaves(samples):
    with_sources = run_quietly(config_of(samples, construct={"rejected": "min"}))
    supplied = with_sources.summary["stages"]["audit"]["would_supply_chosen"]
    assert with_sources.summary["stages"]["audit"]["flagged"] == [CHEAT]
    assert not any("flagged sources are left in" in message for message in with_sources.warnings)
    chosen = [row["source_chosen"] for row in read_lines(with_sources.summary["output"])]
    assert CHEAT not in chosen
    without = run_quietly(config_of(samples, audit={"exclude": "none"}, clean={"action": "none"}))
    chosen = [row["source_chosen"] for row in read_lines(without.summary["output"])]
    assert chosen.count(CHEAT) == supplied > PROMPTS / 4
    assert any("flagged sources are left in: cheat (z" in message for message in without.warnings)
    # "chosen": may be rejected
    only = run_quietly(config_of(samples, audit={"exclude": "chosen"}, clean={"action": "none"}))
    rows = read_lines(only.summary["output"])
    assert CHEAT not in [row["source_chosen"] for row in rows]
    assert {row["n_pool"] for row in rows} == {SOURCES}


def test_hygiene_finds_the_text_that_is_everywhere(samples):
    """Without sources, too; it is reported, and left out with apply."""
    write_rows(samples, [{name: row[name] for name in row if name != "models"} for row in make_rows()])
    read = {"sources": None}
    reported = run_quietly(config_of(samples, read=read))
    found = reported.summary["stages"]["hygiene"]
    assert found["repeated_texts"] == 1 and found["most_repeated"][0]["prompts"] == PROMPTS
    count = sum(row["chosen"] == "I win." for row in read_lines(reported.summary["output"]))
    assert count > PROMPTS / 4
    assert any(f"of {count} of {PROMPTS} pairs is a text" in message for message in reported.warnings)
    applied = run_quietly(config_of(samples, read=read, hygiene={"apply": True}))
    assert applied.summary["responses_left_out"] == {"repeated_text": PROMPTS}
    assert all("I win." not in (row["chosen"], row["rejected"]) for row in read_lines(applied.summary["output"]))
    assert not any("is a text" in message for message in applied.warnings)


def test_copies_and_blanks_are_never_in_a_pool(tmp_path):
    rows = [
        {"prompt": "a", "responses": ["x", "y", "x", " ", "z"], "scores": [1.0, 2.0, 5.0, 9.0, 0.0]},
        {"prompt": "b", "responses": ["x", "x", "y", "\n", ""], "scores": [1.0, 2.0, 0.0, 7.0, 8.0]},
        {"prompt": "c", "responses": ["x", "y"], "scores": [1.0, None]},
    ]
    path = write_rows(tmp_path / "s.jsonl", rows)
    result = run_quietly(config_of(path, read={"scores": ["scores"], "sources": None}))
    written = read_lines(result.summary["output"])
    assert [(row["chosen"], row["rejected"], row["n_pool"]) for row in written] == [("x", "z", 3), ("x", "y", 2)]
    assert [row["score_chosen_used"] for row in written] == [3.0, 1.5]  # the mean of the copies
    assert [row["score_chosen"] for row in written] == [1.0, 1.0]  # what the file says of the one that stays
    assert result.summary["responses_left_out"] == {"no_score": 1, "blank": 3, "duplicate": 2}
    assert result.summary["dropped"] == {"too_few": 1}


def test_decontamination(tmp_path, samples):
    banned = write_rows(tmp_path / "bench.jsonl", [{"prompt": f"Question {p}?"} for p in range(20)])
    hygiene = {"decontaminate": [str(banned)]}
    reported = run_quietly(config_of(samples, hygiene=hygiene))
    assert reported.summary["stages"]["hygiene"]["contaminated_prompts"] == 20
    assert any(
        "of 20 of 260 pairs stands, or its prompt does, in a file not to train on" in message
        for message in reported.warnings
    )
    applied = run_quietly(config_of(samples, hygiene=hygiene | {"apply": True}))
    prompts = {row["prompt"] for row in read_lines(applied.summary["output"])}
    assert prompts == {f"Question {p}?" for p in range(20, PROMPTS)}


def test_two_runs_give_the_same_bytes(samples, tmp_path):
    config = config_of(samples, construct={"rejected": "min_of_3"}, select={"fraction": 0.5}, write={"goals": "half"})
    first = run_quietly(config)
    content = Path(first.summary["output"]).read_bytes()
    assert run_quietly(config).rows.keys() == first.rows.keys()
    assert Path(first.summary["output"]).read_bytes() == content
    other = run_quietly(dataclasses.replace(config, seed=1))
    assert Path(other.summary["output"]).read_bytes() != content


def test_the_number_of_workers_changes_nothing(samples, tmp_path):
    out = tmp_path / "pairs.parquet"
    content = set()
    for workers in (1, 2):
        run_quietly(config_of(samples, output=str(out), read={"workers": workers}))
        content.add(out.read_bytes())
    assert len(content) == 1


def test_the_order_of_the_responses_changes_nothing_but_indices(samples):
    tables = {"read": {"scores": ["win_prob:logit", "helpfulness"]}, "select": {"fraction": 0.6}}
    tables |= {"construct": {"pairs_per_prompt": 2}, "length": {"control": "within_source"}}
    rows = read_lines(samples)
    for p, row in enumerate(rows):  # one answer of two sources, which counts as that of one of them
        one, other = (row["models"].index(f"model-{s}") for s in [(0, 1), (2, 3), (6, 7), (8, 9)][p % 4])
        row["responses"][other] = row["responses"][one]
    write_rows(samples, rows)
    first = run_quietly(config_of(samples, **tables))
    rng = np.random.default_rng(1)
    for row in rows:
        order = rng.permutation(SOURCES)
        row |= {name: [row[name][k] for k in order] for name in row if name != "prompt"}
    write_rows(samples, rows)
    again = run_quietly(config_of(samples, **tables))
    assert len(again.rows["row"]) == len(first.rows["row"])
    assert (again.rows["chosen_id"] != first.rows["chosen_id"]).any()
    for name in set(first.rows) - {"chosen", "rejected", "chosen_id", "rejected_id"}:
        if isinstance(first.rows[name], np.ndarray) and first.rows[name].dtype.kind == "f":
            np.testing.assert_allclose(again.rows[name], first.rows[name], rtol=1e-9, atol=1e-9, err_msg=name)
        else:
            assert np.array_equal(again.rows[name], first.rows[name]), name


def test_the_slope_of_length_is_fitted_without_flagged_sources(samples):
    tables = {"clean": {"action": "none"}, "length": {"control": "within_source"}}
    both, chosen, none = (
        run_quietly(config_of(samples, audit={"exclude": exclude}, **tables)) for exclude in ("both", "chosen", "none")
    )
    slopes = [result.summary["stages"]["length"]["slope"] for result in (both, chosen, none)]
    assert both.summary["stages"]["audit"]["flagged"] == [CHEAT]
    assert slopes[1] == pytest.approx(slopes[0], rel=1e-9) and slopes[2] != pytest.approx(slopes[0], rel=1e-3)


def test_matched_rejected_responses_are_nearer_in_length_and_keep_the_bounds(samples):
    construct = {"rejected": "mean-1std", "min_gap": 3.0}
    rows = [
        read_lines(run_quietly(config_of(samples, construct=construct, length=length)).summary["output"])
        for length in ({}, {"control": "match", "band": 2.0})
    ]
    free, matched = rows
    assert [row["row"] for row in matched] == [row["row"] for row in free]
    assert [row["chosen"] for row in matched] == [row["chosen"] for row in free]
    assert all(row["rule"] == "max vs mean-1std, matched in length" for row in matched)
    assert min(row["score_chosen"] - row["score_rejected"] for row in matched) >= 3
    apart = [[abs(np.log(row["len_chosen"] / row["len_rejected"])) for row in rows] for rows in (free, matched)]
    assert np.mean(apart[1]) < 0.6 * np.mean(apart[0])


def test_scores_stay_as_they_are_under_length_control(samples):
    plain = run_quietly(config_of(samples))
    assert "score_chosen_used" not in plain.rows
    controlled = run_quietly(config_of(samples, length={"control": "within_source"}))
    source = read_lines(samples)
    rows = read_lines(controlled.summary["output"])
    for row in rows:
        pool = source[row["row"] - 1]
        assert row["score_chosen"] == pytest.approx(to_logit(pool["win_prob"][row["chosen_id"]]), rel=1e-12)
        assert row["score_chosen_used"] != row["score_chosen"]
    assert "slope" in controlled.summary["stages"]["length"]


# ---- selecting, routing, writing


def test_the_selected_pairs_are_those_of_bees(samples):
    read = {"scores": ["win_prob:logit", "helpfulness"]}
    everything = run_quietly(config_of(samples, read=read))
    table = everything.rows
    votes = {
        "win_prob": table["margin_win_prob"],
        "helpfulness": table["score_chosen_helpfulness"] - table["score_rejected_helpfulness"],
    }
    np.testing.assert_allclose(table["margin_helpfulness"], votes["helpfulness"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = margins.bees(votes)
        best = margins.select_top(found, fraction=0.2).indices
    np.testing.assert_allclose(table["p_joint"], found.p)
    selected = run_quietly(config_of(samples, read=read, select={"fraction": 0.2}))
    assert sorted(table["row"][best]) == selected.rows["row"].tolist()
    summary = selected.summary["stages"]["select"]
    assert (summary["pairs"], summary["selected"]) == (len(table["row"]), len(best))
    assert [row["selection"] for row in summary["beside"]] == ["mul", "win_prob", "helpfulness", "add", "random"]
    assert selected.summary["dropped"]["not_selected"] == len(table["row"]) - len(best)


def test_sources_that_are_one_vote_are_named(tmp_path):
    rows = make_rows()
    for row in rows:
        row["again"] = [2 * score for score in to_logit(row["win_prob"])]
    path = write_rows(tmp_path / "s.jsonl", rows)
    result = run_quietly(config_of(path, read={"scores": ["win_prob:logit", "again"]}))
    (notice,) = [notice for notice in result.notices if notice.id == "votes-agree"]
    assert "'win_prob' and 'again' are one vote counted twice" in notice.text and notice.severity == "finding"
    assert notice.text not in result.warnings


def test_implicit_rewards_vote(samples, tmp_path):
    file = tmp_path / "implicit.npy"
    implicit = np.random.default_rng(0).normal(size=PROMPTS * SOURCES) * 5
    np.save(file, implicit)
    result = run_quietly(config_of(samples, read={"implicit": str(file)}, select={"k": 30}))
    assert result.summary["stages"]["select"]["sources"]["implicit"]["kind"] == "implicit"
    at = (result.rows["row"] - 1) * SOURCES
    expected = implicit[at + result.rows["chosen_id"]] - implicit[at + result.rows["rejected_id"]]
    np.testing.assert_array_equal(result.rows["margin_implicit"], expected)
    column = run_quietly(config_of(samples, read={"implicit": "helpfulness"}))
    assert column.summary["stages"]["select"]["sources"]["implicit"]["kind"] == "implicit"
    np.save(file, implicit[:-1])
    with pytest.raises(InputError, match=r"must hold floating-point \[3120\], one per response of the file"):
        run(config_of(samples, read={"implicit": str(file)}))


def test_small_margins_go_to_sft(samples, tmp_path):
    asked = {"route": {"tau": "auto"}}
    whole = run_quietly(config_of(samples, **asked))
    routes = {row["row"]: row["route"] for row in read_lines(whole.summary["output"])}
    sft = {row for row, route in routes.items() if route == "sft"}
    assert len(sft) == round(0.12 * len(routes))
    split = run_quietly(config_of(samples, write={"sft": str(tmp_path / "sft.jsonl")}, **asked))
    assert {row["row"] for row in read_lines(tmp_path / "sft.jsonl")} == sft
    assert {row["row"] for row in read_lines(split.summary["output"])} == set(routes) - sft
    source = read_lines(samples)
    for row in read_lines(tmp_path / "sft.jsonl"):
        assert row["completion"] == source[row["row"] - 1]["responses"][row["chosen_id"]]
    declared = run_quietly(config_of(samples, read={"score_range": [1, 10]}, **asked))
    assert declared.summary["stages"]["route"]["tau"] == 0.5
    assert (declared.rows["route"] == "sft").tolist() == (declared.rows["margin"] < 0.5).tolist()
    off = run_quietly(config_of(samples))
    assert set(off.rows["route"]) == {"pref"}


def test_selections_beside_are_by_the_same_rules(samples):
    options = {"fraction": 0.8, "require_positive": True, "lower": -1.0}
    read = {"scores": ["win_prob:logit", "helpfulness"]}
    result = run_quietly(config_of(samples, read=read, select=options, construct={"rejected": "mean"}))
    pairs = result.state.pairs
    votes = {name: pairs[f"margin_{name}"] for name in ("win_prob", "helpfulness")}
    count = int(result.state.kept.sum())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        expected = margins.compare_selections(votes, count, lower=-1.0, require_positive=True)
        other = margins.compare_selections(votes, count, lower=-1.0)
    assert result.summary["stages"]["select"]["beside"] == expected.table() != other.table()
    assert set(np.flatnonzero(result.state.kept)) == set(expected.selected["mul"])


def test_prompts_are_held_out_whole(samples, tmp_path):
    write = {"test": str(tmp_path / "test.jsonl"), "test_share": 0.3}
    result = run_quietly(config_of(samples, construct={"pairs_per_prompt": 3}, write=write))
    train = {row["prompt"] for row in read_lines(result.summary["output"])}
    test = {row["prompt"] for row in read_lines(tmp_path / "test.jsonl")}
    assert not train & test and len(train | test) == PROMPTS
    assert 0.15 < len(test) / PROMPTS < 0.45


@pytest.mark.parametrize("kind", ["both", "half"])
def test_goals(samples, kind):
    result = run_quietly(config_of(samples, write={"goals": kind}, select={"fraction": 0.9}))
    rows = read_lines(result.summary["output"])
    pairs_made = result.summary["pairs"]
    assert len(rows) == (2 * pairs_made if kind == "both" else pairs_made)
    # "half" draws rows, not the scale: a score is the same goal in both
    plain = run_quietly(config_of(samples)).rows
    low, high = plain["score_rejected"].min(), plain["score_chosen"].max()
    source = read_lines(samples)
    for row in rows:
        pool = source[row["row"] - 1]
        assert row["chosen"] == pool["responses"][row["chosen_id"]]
        assert row["goal_swapped"] == (row["score_chosen"] < row["score_rejected"])
        assert row["prompt"].endswith("\n\n" + pool["prompt"])
        assert f"Overall score: {row['goal']:.6g}." in row["prompt"]
        assert row["goal"] == pytest.approx(1 + 9 * (row["score_chosen"] - low) / (high - low), abs=1e-6)
        assert row["margin"] == row["score_chosen"] - row["score_rejected"]  # below 0 where swapped
        assert (row["z_chosen"] < row["z_rejected"]) == row["goal_swapped"]
        assert (row["rank_rejected"] == -1) == row["goal_swapped"]
        assert row["margin_win_prob"] == pytest.approx(row["margin"])
        for side in ("chosen", "rejected"):
            assert row[f"len_{side}"] == len(row[side])
            assert row[f"source_{side}"] == pool["models"][row[f"{side}_id"]]


@pytest.mark.parametrize("kind", ["both", "half"])
def test_goals_of_a_single_pair(samples, kind):
    result = run_quietly(config_of(samples, select={"k": 1}, write={"goals": kind}))
    rows = read_lines(result.summary["output"])
    assert len(rows) == (2 if kind == "both" else 1)
    assert all(row["goal"] == (1 if row["goal_swapped"] else 10) for row in rows)


def test_goals_on_a_declared_scale(samples):
    read = {"scores": ["win_prob"], "score_range": [0, 1]}
    result = run_quietly(config_of(samples, read=read, write={"goals": "both"}))
    for row in read_lines(result.summary["output"]):
        assert row["goal"] == row["score_chosen"] and "on a scale of 0-1, where 0 is lowest" in row["prompt"]
    config = config_of(samples, read=read | {"score_range": [1, 10]}, write={"goals": "both"})
    message = r"the goals of 520 of 520 rows lie outside read\.score_range \[1, 10\], from .*: declare the range"
    with pytest.raises(InputError, match=message):
        run_quietly(config)


# ---- order and single stages


def test_selecting_before_auditing_warns(samples):
    order = ["hygiene", "construct", "select", "audit", "route"]
    result = run_quietly(config_of(samples, order=order, select={"fraction": 0.9}))
    assert any("order has select before audit" in message for message in result.warnings)
    # a pair made with a source that is flagged later is dropped, not made again
    assert result.summary["dropped"]["left_out"] > 0
    rows = read_lines(result.summary["output"])
    assert not any(CHEAT in (row["source_chosen"], row["source_rejected"]) for row in rows)
    # "chosen" drops fewer of them
    only = run_quietly(config_of(samples, order=order, select={"fraction": 0.9}, audit={"exclude": "chosen"}))
    assert CHEAT not in [row["source_chosen"] for row in read_lines(only.summary["output"])]
    assert only.summary["pairs"] >= result.summary["pairs"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run(config_of(samples, hygiene={"apply": True}, construct={"rejected": "quantile:0.1"}, order=STAGES[:-2]))


def test_length_control_before_auditing_warns(samples):
    order = ["hygiene", "length", "audit", "construct"]
    result = run_quietly(config_of(samples, order=order, length={"control": "within_source"}))
    assert any("order has length before audit" in message for message in result.warnings)
    assert not any("order has" in message for message in run_quietly(config_of(samples, order=order)).warnings)


def test_prompts_are_selected_before_there_are_pairs(samples):
    order = ["hygiene", "audit", "select", "construct"]
    result = run_quietly(config_of(samples, order=order, select={"fraction": 0.25}, construct={"rejected": "min"}))
    whole = run_quietly(config_of(samples, order=["hygiene", "audit", "construct"], construct={"rejected": "min"}))
    widest = np.argsort(-whole.rows["margin"], kind="stable")[: round(0.25 * PROMPTS)]
    assert result.rows["row"].tolist() == sorted(whole.rows["row"][widest])
    assert result.summary["dropped"] == {"not_selected": PROMPTS - len(widest)}
    by_number = config_of(samples, order=order, select={"k": len(widest)}, construct={"rejected": "min"})
    assert run_quietly(by_number).rows["row"].tolist() == result.rows["row"].tolist()
    with pytest.raises(InputError, match="select: k must be an integer from 0 to the 260 prompts, got 261"):
        run_quietly(config_of(samples, order=order, select={"k": PROMPTS + 1}))


def test_cleaning_after_construction_drops_pairs(samples):
    rows = make_rows()
    for row in rows[::10]:
        k = row["models"].index("model-3")
        row["win_prob"][k] = 1 - row["win_prob"][k]
    write_rows(samples, rows)
    late = run_quietly(config_of(samples, order=["hygiene", "audit", "construct", "clean", "route"]))
    valid = late.state.left_out != LeftOut.CORRUPTED_SCORE
    assert not valid.all()
    broken = ~(valid[late.state.place("chosen")] & valid[late.state.place("rejected")])
    assert (late.state.pairs["reason"] == np.where(broken, PairReason.LEFT_OUT, PairReason.KEPT)).all()
    assert broken.any()


@pytest.mark.parametrize("begin", [*STAGES, "write"])
def test_a_run_can_begin_at_every_stage(samples, tmp_path, begin):
    config = config_of(
        samples, work=str(tmp_path / "work"), construct={"rejected": "min_of_3"}, select={"fraction": 0.5}
    )
    first = run_quietly(config)
    content = Path(first.summary["output"]).read_bytes()
    Path(first.summary["output"]).unlink()
    again = run_quietly(config, begin=begin)
    assert Path(first.summary["output"]).read_bytes() == content
    assert set(again.warnings) == set(first.warnings)
    assert again.summary["stages"] == first.summary["stages"]


def test_one_stage_alone(samples, tmp_path):
    config = config_of(samples, work=str(tmp_path / "work"))
    run_quietly(config)
    Path(config.output).unlink()
    other = dataclasses.replace(config, construct=dataclasses.replace(config.construct, rejected="min"))
    result = run_quietly(other, begin="construct", only=True)
    assert result.summary["stages"]["construct"]["rule"] == "max vs min" and result.rows is None
    assert not Path(config.output).exists()
    with pytest.raises(InputError, match=r"route.npz is stale: construct.rejected was 'mean-2std', now 'min'"):
        run(other, begin="write")
    run_quietly(other, begin="select")
    assert {row["rule"] for row in read_lines(config.output)} == {"max vs min"}


def test_stale_files_are_refused(samples, tmp_path):
    config = config_of(samples, work=str(tmp_path / "work"), order=["hygiene", "construct"])
    with pytest.raises(
        InputError, match=r"read\.npz, which keeps what there was after the input was read, is not there"
    ):
        run(config, begin="hygiene")
    run_quietly(config)

    def message(**changes):
        with pytest.raises(InputError) as caught:
            run(dataclasses.replace(config, **changes), begin="construct")
        return str(caught.value)

    assert "hygiene.npz is stale: seed was 0, now 1" in message(seed=1)
    hygiene = dataclasses.replace(config.hygiene, repeated_least=4)
    assert "hygiene.repeated_least was 3, now 4" in message(hygiene=hygiene)
    assert "read.npz is stale: read.scores was 'win_prob:logit', now 'helpfulness'" in message(
        read=dataclasses.replace(config.read, scores=("helpfulness",))
    )
    run_quietly(
        dataclasses.replace(config, construct=dataclasses.replace(config.construct, rejected="min")), begin="construct"
    )
    os.utime(samples, ns=(1, 1))
    assert "read.npz is stale: input.changed_ns was" in message()
    (tmp_path / "work" / "read.npz").write_bytes(b"PK nothing")
    assert "read.npz is not the file of a stage" in message()


def test_work_is_needed_to_begin_later(samples):
    with pytest.raises(InputError, match="needs --work DIR"):
        run(config_of(samples), begin="select")
    with pytest.raises(InputError, match=r"a run can begin at read, hygiene, .*, got 'score'"):
        run(config_of(samples), begin="score")


def test_progress_of_both_passes(samples):
    calls = []
    run_quietly(config_of(samples, clean={"action": "none"}), progress=lambda *call: calls.append(call))
    size = os.path.getsize(samples)
    assert list(dict.fromkeys(what for what, _, _ in calls)) == ["reading", "writing"]
    for what in ("reading", "writing"):
        done = [call[1] for call in calls if call[0] == what]
        assert done == sorted(done) and done[-1] == size
    assert {total for _, _, total in calls} == {size}


# ---- errors


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (
            {"read": {"scores": ["none"]}},
            "has no scores 'none', found prompt, responses, win_prob, helpfulness, models",
        ),
        ({"read": {"scores": ["helpfulness:logit"]}}, r"helpfulness:logit: probability must lie in \[0, 1\]"),
        (
            {"read": {"scores": ["win_prob:log"]}},
            "scores must be FIELD or FIELD with :raw, :logit, .*, got 'win_prob:log'",
        ),
        ({"read": {"scores": ["win_prob:logit", "win_prob"]}}, "scores must name a field once, got 'win_prob' twice"),
        ({"select": {"how": "best"}}, r"select\.how must be one of mul, .*, win_prob, got 'best'"),
        ({"select": {"k": 1000}}, r"select\.k must be at most the 260 pairs there are, got 1000"),
        (
            {"read": {"scores": [], "implicit": "helpfulness"}},
            "read.scores must be given beside the field 'helpfulness'",
        ),
        ({"read": {"implicit": "absent.npy"}}, "cannot read absent.npy: no such file of implicit rewards"),
        ({"output": None}, r"no output was named: -o OUT"),
    ],
)
def test_what_the_user_can_mend(samples, tables, message):
    with pytest.raises(InputError, match=message):
        run_quietly(config_of(samples, **tables))


def test_outputs_never_overwrite(samples):
    with pytest.raises(InputError, match="would overwrite an input"):
        run(config_of(samples, output=str(samples)))
    with pytest.raises(InputError, match="would overwrite another output"):
        run(config_of(samples, write={"sft": str(samples.with_name("pairs.jsonl"))}))
    folder = samples.parent
    other = folder / "held-out.jsonl"
    other.write_bytes(samples.read_bytes())
    for tables in (
        {"input": str(folder / "samp*.jsonl"), "write": {"bad_rows": str(samples)}},
        {"input": str(folder), "write": {"bad_rows": str(samples)}, "output": str(folder.parent / "pairs.jsonl")},
        {"hygiene": {"decontaminate": [str(folder / "held-*.jsonl")]}, "write": {"bad_rows": str(other)}},
    ):
        with pytest.raises(InputError, match="would overwrite an input"):
            run(config_of(samples, **tables))
    with pytest.raises(InputError, match=r"pairs\.jsonl\.meta\.json would overwrite another output"):
        run(config_of(samples, write={"bad_rows": str(samples.with_name("pairs.jsonl.meta.json"))}))
    assert len(read_lines(samples)) == len(read_lines(other)) == PROMPTS


def test_unusable_sources_are_said(tmp_path):
    """Samples of one policy under column names: nothing tells them apart, so nothing is audited or cleaned."""
    rng = np.random.default_rng(0)
    rows = [
        {"prompt": str(p), "responses": [f"{p} {s}" for s in range(8)], "scores": rng.normal(size=8).tolist(),
         "sources": [f"sample-{s}" for s in range(8)]}
        for p in range(210)
    ]  # fmt: skip
    path = write_rows(tmp_path / "s.jsonl", rows)
    result = run_quietly(config_of(path, read={"scores": ["scores"], "sources": "sources"}))
    assert any("audit did nothing: scores has exchangeable sources" in text for text in result.warnings)
    assert any("clean did nothing: scores has exchangeable sources" in text for text in result.warnings)
    assert result.summary["pairs"] == 210


@pytest.mark.skipif("FASTPREF_SCORED_SAMPLES" not in os.environ, reason="FASTPREF_SCORED_SAMPLES names no file")
def test_real_samples(tmp_path):
    """On AlpacaEval's development scores a constant text is the best response of 79 of 403 prompts."""
    path = Path(os.environ["FASTPREF_SCORED_SAMPLES"]).resolve()
    table = {"input": str(path), "output": str(tmp_path / "pairs.jsonl"), "read": {"scores": ["win_prob:logit"]}}
    table["read"]["sources"] = "models"
    kept = run_quietly(config_from_table(table | {"audit": {"exclude": "none"}, "clean": {"action": "none"}}))
    assert kept.rows["source_chosen"].tolist().count("NullModel") == 79
    audited = run_quietly(config_from_table(table))
    assert audited.rows["source_chosen"].tolist().count("NullModel") == 0
    applied = run_quietly(config_from_table(table | {"audit": {"exclude": "none"}, "hygiene": {"apply": True}}))
    assert applied.rows["source_chosen"].tolist().count("NullModel") == 0
