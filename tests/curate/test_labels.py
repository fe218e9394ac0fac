"""Published pairs: their sides stay, their margins are signed, and what their scores say against them is said."""

import json
from pathlib import Path

import numpy as np
import pytest

from fastpref.curate import InputError
from fastpref.curate.notices import NOTICES, SEVERITIES, Notice, by_severity
from fastpref.curate.pipeline import stages
from fastpref.curate.pipeline.config import config_from_table
from fastpref.curate.pipeline.run import run

pytestmark = pytest.mark.filterwarnings("ignore::fastpref.curate.notices.DataWarning")


def published(count=40, reversed_ones=8, tied=3, seed=None):
    """Rows of pairs, of which the scores of some contradict their sides; lengths say nothing."""
    rng = np.random.default_rng(seed)
    rows = []
    for k in range(count):
        gap = -1.5 if k < reversed_ones else 0.0 if k < reversed_ones + tied else 2.0
        low = float(rng.integers(1, 6))
        texts = [f"{'a' * int(rng.integers(5, 60))} {k}", f"{'b' * int(rng.integers(5, 60))} {k}"]
        rows.append({"prompt": f"question {k}", "chosen": texts[0], "rejected": texts[1],
                     "score_chosen": low + gap, "score_rejected": low})  # fmt: skip
    order = rng.permutation(count)
    return [rows[k] for k in order]


def curate(folder, rows, **tables):
    path = folder / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run(config_from_table({"input": str(path), "output": str(folder / "out.jsonl")} | tables))
    return result, [json.loads(line) for line in Path(folder / "out.jsonl").read_text().splitlines()]


def ids(result):
    return [notice.id for notice in result.notices]


def test_published_sides_are_kept_and_margins_are_signed(tmp_path):
    given = published()
    result, rows = curate(tmp_path, given)
    assert [(row["chosen"], row["rejected"]) for row in rows] == [(row["chosen"], row["rejected"]) for row in given]
    margins = [row["score_chosen"] - row["score_rejected"] for row in given]
    assert [row["margin"] for row in rows] == pytest.approx(margins)
    made = result.summary["stages"]["construct"]
    assert (made["rule"], made["labels"]) == ("published", "published")
    assert (made["compared"], made["reversed"], made["tied"]) == (40, 8, 3)
    assert result.summary["negative_margins"] == 8
    assert ids(result) == ["negative-margins", "some-labels-reversed"]
    (warning,) = result.warnings
    assert "the margin of 8 of 40 pairs is negative" in warning and "RDPO" in warning


def test_labels_agree_drops_reversals(tmp_path):
    given = published()
    result, rows = curate(tmp_path, given, construct={"labels": "agree"})
    kept = [row for row in given if row["score_chosen"] >= row["score_rejected"]]
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in kept]
    assert result.summary["dropped"] == {"reversed": 8}
    assert result.summary["stages"]["construct"]["reversed"] == 8 and result.warnings == ()


def test_labels_scores_exchanges_sides(tmp_path):
    given = published()
    result, rows = curate(tmp_path, given, construct={"labels": "scores"})
    assert len(rows) == 37 and all(row["margin"] > 0 for row in rows)  # ties are no pairs
    known = {row["prompt"]: row for row in given}
    swapped = [row["chosen"] == known[row["prompt"]]["rejected"] for row in rows]
    assert sum(swapped) == 8
    assert "relabelled" in ids(result) and not result.warnings


def test_labels_that_are_mostly_wrong_are_serious(tmp_path):
    result, _ = curate(tmp_path, published(reversed_ones=30))
    assert result.notices[0].id == "most-labels-reversed" and result.notices[0].severity == "serious"
    assert "the scores contradict the published sides of 30 of 40 pairs" in result.notices[0].text


def test_pairs_without_scores_are_written_on(tmp_path):
    given = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in published()]
    given[3]["rejected"] = given[3]["chosen"]  # no pair
    given[4]["chosen"] = " "
    result, rows = curate(tmp_path, given)
    assert len(rows) == 38 and result.summary["dropped"] == {"too_few": 2}
    assert result.summary["responses_left_out"] == {"blank": 1, "duplicate": 1}
    assert result.notices == () and "score_chosen" not in rows[0]
    for tables, reason in (
        ({"construct": {"labels": "scores"}}, "goes by scores, and .* has none"),
        ({"select": {"fraction": 0.5}}, "the file has no scores"),
        ({"route": {"tau": "auto"}}, "neither scores nor a published strength"),
        ({"write": {"goals": "both"}}, "write.goals states scores, and .* has none"),
        ({"length": {"control": "match"}}, "published pairs have no other"),
    ):
        with pytest.raises(InputError, match=reason):
            curate(tmp_path, given, **tables)


def test_some_scores_are_missing(tmp_path):
    given = published()
    given[0]["score_chosen"] = None
    result, rows = curate(tmp_path, given)
    assert len(rows) == 40 and rows[0]["margin"] is None and rows[0]["chosen"] == given[0]["chosen"]
    assert result.summary["stages"]["construct"]["compared"] == 39


def test_bounds_apply_to_published_pairs(tmp_path):
    result, rows = curate(tmp_path, published(), construct={"min_gap": 0.5})
    assert len(rows) == 29 and result.summary["dropped"] == {"small_gap": 11}
    result, rows = curate(tmp_path, published(), construct={"max_gap": 0, "labels": "agree"})
    assert len(rows) == 3 and result.summary["dropped"] == {"reversed": 8, "large_gap": 29}


# ---- notices


def test_pools_of_five_or_fewer_have_the_rule_min_and_no_warning(tmp_path):
    rng = np.random.default_rng()
    given = [
        {"prompt": f"q{k}", "responses": [f"{'x' * int(n)} {k}" for n in rng.integers(3, 90, 5)],
         "scores": rng.normal(size=5).tolist()}
        for k in range(60)
    ]  # fmt: skip
    result, rows = curate(tmp_path, given)
    assert result.warnings == () and ids(result) == ["small-pools"]
    assert all(row["rank_rejected"] == 0 for row in rows)
    assert result.notices[0].text == (
        "60 of 60 pairs come from pools of 5 responses or fewer, where the rule mean-2std is min: none of so few can "
        "lie that far below their mean"
    )
    asked, _ = curate(tmp_path, given, construct={"on_degenerate": "warn"})
    assert asked.warnings == ()  # there is nothing to mend
    assert ids(curate(tmp_path, given, construct={"rejected": "min"})[0]) == []


def test_defaults_do_not_warn(tmp_path):
    """Two reward models that agree, scores in [0, 1] and normal pools of eight: nothing here is the user's mistake."""
    rng = np.random.default_rng()
    given = []
    for k in range(80):
        scores = rng.uniform(size=8)
        given.append({"prompt": f"q{k}", "responses": [f"{'x' * int(n)} {k} {n}" for n in rng.integers(3, 900, 8)],
                      "rm1": scores.tolist(), "rm2": (scores + 0.01 * rng.normal(size=8)).tolist()})  # fmt: skip
    result, _ = curate(tmp_path, given, read={"scores": ["rm1", "rm2"]})
    assert result.warnings == () and "votes-agree" in ids(result)
    selected, _ = curate(tmp_path, given, read={"scores": ["rm1", "rm2"]}, select={"fraction": 0.5})
    assert selected.warnings == () and {"votes-agree", "default-bounds"} <= set(ids(selected))
    bounds = {"fraction": 0.5, "lower": -2.0}
    own, _ = curate(tmp_path, given, read={"scores": ["rm1", "rm2"]}, select=bounds)
    assert "clip-bounds" in ids(own) and len(own.warnings) >= 1  # these are the user's
    warned, _ = curate(tmp_path, given, read={"scores": ["rm1"]}, construct={"on_degenerate": "warn"})
    assert ids(warned) == ["rule-below-pool"]


def test_contradicting_scores(tmp_path, monkeypatch):
    rng = np.random.default_rng()
    given, wrong = [], {}
    for k in range(120):
        worth = rng.normal(size=4)
        overall = np.clip(np.round(2 * (5.5 + 2 * worth + 0.5 * rng.normal(size=4))) / 2, 1, 10)
        fine = np.clip(np.round(4 * (3 + worth + 0.2 * rng.normal(size=4))) / 4, 1, 5)
        if k % 12 == 0:
            at = int(rng.integers(4))
            overall[at], fine[at] = 10.0, 1.0
            wrong[k] = at
        given.append({"instruction": f"q{k}", "completions": [
            {"response": f"{'w' * int(rng.integers(5, 60))} {k} {s}", "model": f"m{s}",
             "overall_score": float(overall[s]), "fine-grained_score": float(fine[s])} for s in range(4)]})  # fmt: skip
    options = {"read": {"scores": ["overall_score"]}, "clean": {"action": "none"}}
    result, rows = curate(tmp_path, given, **options)
    assert result.notices[0].id == "contradicting-scores"
    listed = result.summary["contradicting"]
    assert {(row["row"] - 1, row["response"]) for row in listed} >= set(wrong.items())
    assert len(listed) <= len(wrong) + 3
    chosen = [row["chosen"] for row in listed]
    assert chosen == sorted(chosen, reverse=True) and any(chosen)  # those that win come first
    assert all({"overall_score", "fine-grained_score", "source"} <= row.keys() for row in listed)
    won = {(row["row"] - 1, row["chosen_id"]) for row in rows}
    assert sum(chosen) == len(won & {(row["row"] - 1, row["response"]) for row in listed})
    applied, rows = curate(tmp_path, given, **options, hygiene={"apply": True})
    assert "contradicting-scores" not in ids(applied)
    assert not {(row["row"] - 1, row[f"{side}_id"]) for row in rows for side in ("chosen", "rejected")} & set(
        wrong.items()
    )
    assert applied.summary["responses_left_out"]["contradicted_score"] == len(listed)
    monkeypatch.setattr(stages.hygiene, "MOST_LISTED", 3)  # the list is bounded, the count and what is left out are not
    bounded, _ = curate(tmp_path, given, **options)
    assert (bounded.summary["contradicted"], len(bounded.summary["contradicting"])) == (len(listed), 3)
    said = f"{len(listed)} responses have two scores that contradict each other, {sum(chosen)} of them are the chosen"
    assert bounded.notices[0].text.startswith(said)
    bounded, _ = curate(tmp_path, given, **options, hygiene={"apply": True})
    assert bounded.summary["responses_left_out"] == applied.summary["responses_left_out"]


def test_marks_are_reported_and_prompts_with_one_response_counted(tmp_path):
    rng = np.random.default_rng()
    given = [{"prompt": f"q{k}", "responses": [f"{'x' * int(n)} {k} {n}" for n in rng.integers(3, 90, 4)],
              "scores": rng.integers(1, 11, 4).tolist()} for k in range(100)]  # fmt: skip
    for k in range(0, 100, 20):
        given[k]["scores"][2] = -1
    given[50] = {"prompt": "alone", "responses": ["x"], "scores": [3]}
    result, _ = curate(tmp_path, given)
    (text,) = [notice.text for notice in result.notices if notice.id == "sentinel-scores"]
    assert text.startswith("-1 stands as scores of 5 responses under 5 prompts") and text.endswith("--missing -1")
    assert result.summary["stages"]["hygiene"]["one_response"] == 1 and "one-response" in ids(result)
    missing, rows = curate(tmp_path, given, read={"missing": [-1]})
    assert "sentinel-scores" not in ids(missing) and all(row["score_rejected"] > 0 for row in rows)


def test_the_table_of_notices():
    for id, kind in NOTICES.items():
        assert id == id.lower() and " " not in id
        assert kind.severity in SEVERITIES and kind.title and kind.advice.endswith(".")
    mixed = [Notice("small-pools", "a"), Notice("length-decides", "b"), Notice("contradicting-scores", "c")]
    assert [notice.severity for notice in by_severity(mixed)] == list(SEVERITIES)
    assert mixed[0].as_dict() == {"id": "small-pools", "severity": "finding", "text": "a"}


def test_the_readme_has_every_notice():
    readme = Path(__file__).parents[2] / "README.md"
    for id, kind in NOTICES.items():
        assert f"| `{id}` | {kind.severity} | {kind.title}. {kind.advice} |\n" in readme.read_text(), id


def test_every_id_that_is_issued_is_in_the_table():
    import re

    import fastpref.curate

    folder = Path(fastpref.curate.__file__).parent
    issued = {
        id
        for path in folder.rglob("*.py")
        for id in re.findall(r'(?:DataWarning|_warn)\(\s*"([a-z-]+)"', path.read_text())
    }
    assert issued <= NOTICES.keys() and len(issued) >= 15


def test_a_config_is_no_file_name():
    with pytest.raises(TypeError, match=r"config must be a CurateConfig, got 'all.jsonl': .*CurateConfig\(input="):
        run("all.jsonl")


def test_labels_are_for_published_pairs(tmp_path):
    pool = [{"prompt": "q", "responses": ["a", "b"], "scores": [1, 2]}]
    with pytest.raises(InputError, match=r"--labels agree is for pairs whose sides are published, and .* holds pools"):
        curate(tmp_path, pool, construct={"labels": "agree"})


@pytest.mark.parametrize("layout", ["pools", "responses"])
def test_a_column_beside_the_score_that_was_asked_for_contradicts_it(tmp_path, layout):
    """And one that measures something else does not, nor the numbers of tokens."""
    rng = np.random.default_rng()
    given, wrong = [], 0
    for k in range(150):
        worth = rng.normal(size=4)
        helpful, fine = 5 + 2 * worth + 0.4 * rng.normal(size=4), 3 + worth + 0.2 * rng.normal(size=4)
        if k % 30 == 0:
            at = int(np.argmin(fine))
            helpful[at], fine[at], wrong = 12.0, -1.0, wrong + 1
        texts = [f"{'w' * int(rng.integers(5, 60))} {k} {s}" for s in range(4)]
        columns = {"helpful": helpful, "fine": fine, "verbose": rng.normal(size=4), "tokens": rng.permutation(helpful)}
        columns = {name: column.round(2).tolist() for name, column in columns.items()}
        if layout == "pools":
            given.append({"prompt": f"q{k}", "responses": texts, **columns})
        else:
            for s in range(4):
                given.append(
                    {"prompt": f"q{k}", "response": texts[s], **{n: column[s] for n, column in columns.items()}}
                )
    result, _ = curate(tmp_path, given, read={"scores": ["helpful"]})
    listed = result.summary["contradicting"]
    assert wrong <= len(listed) <= wrong + 2 and sum(row["helpful"] == 12 for row in listed) == wrong
    assert all({"helpful", "fine"} <= row.keys() for row in listed)


def test_columns_that_come_along_under_another_name_are_said(tmp_path):
    given = [row | {"route": f"A{k}", "rule": "mine", "kind": "x"} for k, row in enumerate(published(reversed_ones=0))]
    result, rows = curate(tmp_path, given, read={"keep": ["route", "rule", "kind"]})
    assert [row["input_route"] for row in rows] == [row["route"] for row in given]
    assert rows[0]["kind"] == "x" and rows[0]["rule"] == "published"
    (text,) = [notice.text for notice in result.notices if notice.id == "renamed-columns"]
    assert text.endswith("route is input_route, rule is input_rule") and not result.warnings
