"""Layouts of preferences: every one of the table is read from each container; what does not fit is named."""

import csv
import json
import re

import numpy as np
import pytest
from samples_cases import write_lines

from fastpref.curate import InputError, read_samples, texts
from fastpref.curate.files import containers
from fastpref.curate.files.layouts import LAYOUTS, resolve_layout

USER, SYSTEM = ({"role": role, "content": role} for role in ("user", "system"))


def reply(text):
    return [{"role": "assistant", "content": text}]


AB = {"prompt": "p", "response_a": "x", "response_b": "y"}
MODELS = {"model_a": "m", "model_b": "n"}
SCORED = {"score_chosen": 3, "score_rejected": 1}

# layout, row, arguments, then what is read: prompt, responses, the first score column
EXAMPLES = [
    ("pools", {"prompt": "p", "responses": ["x", "y"], "scores": [1, 2]}, {}, "p", ["x", "y"], [1, 2]),
    (
        "ultrafeedback",
        {"instruction": "p", "completions": [{"response": "x", "overall_score": 8, "model": "m"}]},
        {},
        "p",
        ["x"],
        [8],
    ),
    ("completions", {"prompt": "p", "completions": [{"response": "x", "score": 8}]}, {}, "p", ["x"], [8]),
    ("distilabel", {"instruction": "p", "generations": ["x", "y"], "ratings": [1, 2]}, {}, "p", ["x", "y"], [1, 2]),
    (
        "simpo",
        {"prompt": "p", "all_generated_responses": ["x", "y"], "all_rm_scores": [1, 2], "chosen": reply("y")}
        | {"rejected": reply("x")},
        {},
        "p",
        ["x", "y"],
        [1, 2],
    ),
    ("nectar", {"prompt": "p", "answers": [{"answer": "x", "rank": 1, "model": "m"}]}, {}, "p", ["x"], [1]),
    (
        "nemo-rl",
        {"context": [USER], "completions": [{"completion": reply("x"), "reward": 3, "rank": 0}]},
        {},
        [USER],
        [reply("x")],
        [3],
    ),
    ("responses", {"prompt": "p", "response": "x", "reward": 2}, {}, "p", ["x"], [2]),
    (
        "responses",
        {"prompt": "p", "response": "x", "helpfulness": 2, "verbosity": 1},
        {"score_fields": ["verbosity"]},
        "p",
        ["x"],
        [1],
    ),
    ("kto", {"prompt": "p", "completion": "x", "label": True}, {}, "p", ["x"], [1]),
    ("pairs", {"prompt": "p", "chosen": "x", "rejected": "y"} | SCORED, {}, "p", ["x", "y"], [3, 1]),
    ("pairs", {"question": "p", "chosen": "x", "rejected": "y"} | SCORED, {}, "p", ["x", "y"], [3, 1]),
    ("pairs", {"prompt": "p", "chosen": "x", "rejected": "y"}, {}, "p", ["x", "y"], [1, 0]),
    (
        "pairs",
        {"prompt": "user", "chosen": [USER, *reply("x")], "rejected": [USER, *reply("y")], "chosen-rating": 3}
        | {"rejected-rating": 1},
        {},
        [USER],
        [reply("x"), reply("y")],
        [3, 1],
    ),
    (
        "pairs",
        {"system": "system", "question": "user", "chosen": "x", "rejected": "y"},
        {},
        [SYSTEM, USER],
        [reply("x"), reply("y")],
        [1, 0],
    ),
    (
        "alpaca",
        {"instruction": "do", "input": "it", "chosen": "x", "rejected": "y", "history": [["a", "b"]]},
        {},
        [{"role": "user", "content": "a"}, *reply("b"), {"role": "user", "content": "do\nit"}],
        [reply("x"), reply("y")],
        [1, 0],
    ),
    (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "user"}], "chosen": {"from": "gpt", "value": "x"}}
        | {"rejected": {"from": "gpt", "value": "y"}},
        {},
        [USER],
        [reply("x"), reply("y")],
        [1, 0],
    ),
    (
        "swift",
        {"messages": [USER, *reply("x")], "rejected_response": "y"},
        {},
        [USER],
        [reply("x"), reply("y")],
        [1, 0],
    ),
    (
        "swift-messages",
        {"messages": [USER, *reply("x")], "rejected_messages": [USER, *reply("y")]},
        {},
        [USER],
        [reply("x"), reply("y")],
        [1, 0],
    ),
    ("ab", AB | {"label": "B"}, {}, "p", ["y", "x"], [1, 0]),
    ("arena", AB | MODELS | {"winner": "model_b"}, {}, "p", ["y", "x"], [1, 0]),
    (
        "arena-chats",
        MODELS | {"conversation_a": [USER, *reply("x")], "conversation_b": [USER, *reply("y")], "winner": "model_a"},
        {},
        [USER],
        [reply("x"), reply("y")],
        [1, 0],
    ),
    (
        "arena-wins",
        AB | MODELS | {"winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0},
        {},
        "p",
        ["y", "x"],
        [1, 0],
    ),
    (
        "helpsteer3",
        {"context": [USER], "response1": "x", "response2": "y", "overall_preference": 2},
        {},
        [USER],
        [reply("y"), reply("x")],
        [1, 0],
    ),
    (
        "helpsteer2-pairs",
        {"prompt": "p", "response_1": "x", "response_2": "y", "preference_strength": -2},
        {},
        "p",
        ["x", "y"],
        [1, 0],
    ),
    (
        "shp",
        {"history": "p", "human_ref_A": "x", "human_ref_B": "y", "labels": 0, "score_A": 5, "score_B": 9},
        {},
        "p",
        ["y", "x"],
        [9, 5],
    ),
    (
        "pku",
        {"prompt": "p", "response_0": "x", "response_1": "y", "better_response_id": 1, "safer_response_id": 0},
        {"columns": {"label": "better_response_id"}},
        "p",
        ["y", "x"],
        [1, 0],
    ),
]


def test_every_layout_has_an_example():
    assert {layout for layout, *_ in EXAMPLES} == set(LAYOUTS)


def write(path, row):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import feather, parquet

    if path.suffix == ".jsonl":
        write_lines(path, [row, row])
    elif path.suffix == ".json":
        path.write_text(json.dumps([row, row], indent=2))
    elif path.suffix == ".csv":
        cells = [value if isinstance(value, str) else json.dumps(value) for value in row.values()]
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([list(row), cells, cells])
    else:
        table = pyarrow.Table.from_pylist([row, row])
        parquet.write_table(table, path) if path.suffix == ".parquet" else feather.write_feather(table, str(path))
    return path


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet", "feather"])
@pytest.mark.parametrize(("layout", "row", "options", "prompt", "responses", "scores"), EXAMPLES)
def test_every_layout_is_read_from_every_container(tmp_path, layout, row, options, prompt, responses, scores, ending):
    samples = read_samples(write(tmp_path / f"samples.{ending}", row), **options)
    assert samples.layout == layout and samples.problems == [] and samples.read_as.startswith(f"{layout}: ")
    grouped = LAYOUTS[layout].shape == "rows"  # both rows are of one prompt
    assert list(texts(samples)) == ([(prompt, responses * 2)] if grouped else [(prompt, responses)] * 2)
    assert next(iter(samples.scores.values())).tolist() == scores * 2
    assert samples.published == (LAYOUTS[layout].shape in ("pair", "sharegpt", "swift", "ab", "arena-wins"))


def test_what_is_said_of_how_it_is_read(tmp_path):
    row = {"question": "p", "chosen": "x", "rejected": "y", "tools": [], "id": 3} | SCORED
    path = write(tmp_path / "samples.csv", row | {"tools": "[]"})
    assert read_samples(path).read_as == (
        "pairs: prompt=question, chosen=chosen, rejected=rejected, scores=score, carried=tools+id; CSV with ','"
    )


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ("prompt responses chosen rejected", {}, r"could be read as pools \(prompt, responses\) and pairs"),
        ("question instruction chosen rejected", {}, "has question and instruction: say which is the prompt by"),
        (
            "prompt reponse score",
            {},
            "nearest is pools, which lacks responses: name it with --columns responses=reponse",
        ),
        ("model_a model_b winner judge", {}, "are votes without texts, which fastpref denoise ranks"),
        (
            "Prompt Responses",
            {},
            "nearest is pools, which lacks prompt, responses: name them with --columns prompt=Prompt",
        ),
        ("prompt response_0 response_1 better_response_id", {}, "needs --columns label=better_response_id$"),
        ("prompt responses", {"layout": "pool"}, "--layout must be one of pools, ultrafeedback"),
        ("prompt responses", {"columns": {"promt": "prompt"}}, "no role is called 'promt'"),
        ("prompt responses", {"columns": {"prompt": "questoin"}}, "has no column 'questoin', found prompt, responses"),
        ("prompt chosen rejected", {"columns": {"chosen": "chosen", "rejected": "chosen"}}, "got 'chosen' twice"),
        (
            "prompt response_a response_b preference",
            {},
            "nearest is ab, which lacks label: name it with .*label=preference",
        ),
        ("history response score", {}, "nearest is responses, which lacks prompt: name it with .*prompt=history"),
        ("prompt responses", {"keep": ("respones",)}, "no column 'respones', .*; nearest is 'responses'"),
    ],
)
def test_what_fits_no_layout_or_two(columns, options, message):
    with pytest.raises(InputError, match=message):
        resolve_layout("F", columns.split(), **options)


@pytest.mark.parametrize(
    ("columns", "options", "layout", "roles"),
    [
        ("prompt responses chosen rejected", {"layout": "pairs"}, "pairs", {"prompt": "prompt"}),
        ("q outs", {"columns": {"prompt": "q", "responses": "outs"}}, "pools", {"prompt": "q", "responses": "outs"}),
        ("query out", {"columns": {"prompt": "query", "response": "out"}}, "responses", {"response": "out"}),
        ("q chosen rejected", {"columns": {"prompt": "q"}}, "pairs", {"prompt": "q"}),
        ("best worst prompt", {"columns": {"chosen": "best", "rejected": "worst"}}, "pairs", {"chosen": "best"}),
        (
            "prompt x y pref",
            {"columns": {"response_a": "x", "response_b": "y", "label": "pref"}},
            "ab",
            {"label": "pref"},
        ),
        ("prompt answers", {}, "nectar", {"completions": "answers"}),
        ("prompt responses rules", {"columns": {"system": "rules"}}, "pools", {"system": "rules"}),
    ],
)
def test_columns_are_named(columns, options, layout, roles):
    found = resolve_layout("F", columns.split(), **options)
    assert found.layout == layout and roles.items() <= found.roles.items()


def test_two_answers_that_begin_alike_have_no_prompt(tmp_path):
    row = {"chosen": "The tallest tree is a redwood.", "rejected": "The tallest one is an oak."} | SCORED
    samples = read_samples(write_lines(tmp_path / "pairs.jsonl", [row]))
    assert samples.prompts == 0 and "no turn of an assistant in common" in samples.problems[0].reason


def test_a_null_prompt_is_not_filled_from_another_column(tmp_path):
    row = {"prompt": None, "question": "q", "chosen": "x", "rejected": "y"}
    samples = read_samples(write_lines(tmp_path / "pairs.jsonl", [row, row | {"prompt": "p"}]))
    assert [str(problem) for problem in samples.problems] == [f"{samples.path}:1: prompt is null"]
    assert list(texts(samples)) == [("p", ["x", "y"])]


def test_ties_are_counted_and_strengths_are_no_scores(tmp_path):
    row = {"context": [USER], "response1": "x", "response2": "y"}
    values = [-3, 0, 1, 0, None, "high"]
    path = write_lines(tmp_path / "h.jsonl", [row | {"overall_preference": value} for value in values])
    samples = read_samples(path)
    assert samples.strength.tolist() == [3, 1] and samples.scored is False
    assert samples.counts == {"ties": 2} and [p.row for p in samples.problems] == [5, 6]
    labels = ["a", "Model_B", "tie", "tie (bothbad)", "both_bad", "neither", 1]
    path = write_lines(tmp_path / "ab.jsonl", [AB | {"label": label} for label in labels])
    samples = read_samples(path)
    assert [responses for _, responses in texts(samples)] == [["x", "y"], ["y", "x"]]
    assert samples.counts == {"ties": 3} and [p.row for p in samples.problems] == [6, 7]


def test_what_changes_the_meaning_of_a_pair_is_carried_or_refused(tmp_path):
    row = {"prompt": "p", "chosen": "x", "rejected": "y", "images": ["a.png"], "documents": [{"t": 1}], "note": 3}
    samples = read_samples(write_lines(tmp_path / "pairs.jsonl", [row]), keep=["note"])
    assert samples.fields.carried == ("images", "documents", "note")
    for further, reason in [
        ({"history": "a turn"}, "history must be a list of turns, got str"),
        ({"history": [["a"]]}, r"history\[0\] must be \[prompt, response\], or history be messages"),
        ({"system": 3}, "system must be a string, got int"),
        ({"system": "s", "prompt": [{"role": "system", "content": "t"}]}, "system differs from the system message"),
    ]:
        samples = read_samples(write_lines(tmp_path / "pairs.jsonl", [row | further]))
        assert samples.prompts == 0
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError(samples.problems[0].reason)
    # a system prompt in some rows makes messages of all
    path = write_lines(tmp_path / "pairs.jsonl", [row | {"system": text} for text in ("s", "", None)])
    assert [len(prompt) for prompt, _ in texts(read_samples(path))] == [2, 1, 1]


def test_numbers_that_stand_for_none(tmp_path):
    rows = [
        {"prompt": f"{k}", "responses": ["x", "y"], "scores": [score, 1]} for k, score in enumerate([-3.4e38, -1, 2])
    ]
    path = write_lines(tmp_path / "samples.jsonl", rows)
    samples = read_samples(path)
    np.testing.assert_array_equal(samples.scores["scores"], [np.nan, 1, -1, 1, 2, 1])
    assert samples.counts == {"scores of a size of 1e+30 or more": 1}
    samples = read_samples(path, missing=[-1])
    np.testing.assert_array_equal(samples.scores["scores"], [np.nan, 1, np.nan, 1, 2, 1])
    assert samples.counts["scores declared as missing"] == 1


def test_the_scores_of_both_sides_have_one_name(tmp_path):
    path = write_lines(tmp_path / "s.jsonl", [{"prompt": "p", "chosen": "x", "rejected": "y"} | SCORED])
    with pytest.raises(InputError, match="score_chosen is the score of one side; --scores score reads those of both"):
        read_samples(path, score_fields=["score_chosen"])


def test_scores_that_are_not_there(tmp_path):
    path = write_lines(tmp_path / "s.jsonl", [{"prompt": "p", "responses": ["x"], "quality": [1.5], "n": 3}])
    with pytest.raises(
        InputError, match=r"has no scores \(scores, win_prob\); numbers are in quality, n: name them by --scores"
    ):
        read_samples(path)
    with pytest.raises(InputError, match=r"has no scores 'qualty', .*; nearest is 'quality'; name them by --scores"):
        read_samples(path, score_fields=["qualty"])
    rows = [{"prompt": "p", "responses": ["x"], "scores": None}, {"prompt": "p", "responses": ["x"], "scores": [1]}]
    samples = read_samples(write_lines(tmp_path / "s.jsonl", rows))
    assert [problem.reason for problem in samples.problems] == ["scores is null"] and samples.prompts == 1


@pytest.mark.parametrize("name", ["system_message", "System", "systemPrompt", "sys_prompt", "System Instruction"])
def test_a_system_prompt_by_any_name(tmp_path, name):
    row = {"prompt": "user", "chosen": "x", "rejected": "y", name: "system"}
    assert next(texts(read_samples(write_lines(tmp_path / "s.jsonl", [row]))))[0] == [SYSTEM, USER]
    with pytest.raises(
        InputError, match=f"has system_prompt and {name}: say which is the system prompt by --columns system="
    ):
        read_samples(write_lines(tmp_path / "s.jsonl", [{"system_prompt": "t"} | row]))


def test_what_a_prompt_is_about_by_any_name(tmp_path):
    further = {"image_path": "a.png", "Images": [], "videoUrl": "v", "tool_choice": "auto", "system_fingerprint": "f"}
    further |= {"input": "beside a prompt", "retrieved": 1}
    row = {"prompt": "p", "chosen": "x", "rejected": "y"} | further
    samples = read_samples(write_lines(tmp_path / "s.jsonl", [row]))
    assert set(samples.fields.carried) == set(further) - {"retrieved"}
    row = {"instruction": "Sum it", "input": "1 + 2", "responses": ["x"], "scores": [1]}
    samples = read_samples(write_lines(tmp_path / "s.jsonl", [row]), columns={"prompt": "instruction"})
    assert list(texts(samples)) == [("Sum it\n1 + 2", ["x"])]
    row = {"instruction": "Sum it", "input": "1 + 2", "chosen": "x", "rejected": "y"}
    samples = read_samples(write_lines(tmp_path / "s.jsonl", [row]), layout="pairs")
    assert list(texts(samples)) == [("Sum it\n1 + 2", ["x", "y"])]


def test_numbers_in_texts(tmp_path):
    row = {"prompt": "p", "chosen": "x", "rejected": "y", "score_chosen": "9", "score_rejected": "10"}
    path = write_lines(tmp_path / "s.jsonl", [row, row | {"score_rejected": "1,234"}, row | {"score_rejected": "N/A"}])
    samples = read_samples(path)
    np.testing.assert_array_equal(samples.scores["score"], [9, 10, 9, np.nan])
    assert [problem.reason for problem in samples.problems] == ["score_rejected must be a number, got '1,234'"]
    (tmp_path / "s.csv").write_text('prompt;chosen;rejected;score_chosen;score_rejected\np;x;y;"2,5";1,0\n')
    assert read_samples(tmp_path / "s.csv").scores["score"].tolist() == [2.5, 1.0]


def test_a_margin_that_is_no_number_is_a_column_like_others(tmp_path):
    row = {"prompt": "p", "chosen": "x", "rejected": "y", "margin": "theirs"}
    samples = read_samples(write_lines(tmp_path / "s.jsonl", [row]), keep=["margin"])
    assert samples.strength is None and samples.problems == [] and samples.fields.carried == ("margin",)
    samples = read_samples(write_lines(tmp_path / "s.jsonl", [row | {"margin": 2}]))
    assert samples.strength.tolist() == [2]


def test_a_column_that_nobody_asks_for_may_be_there_twice(tmp_path):
    (tmp_path / "s.csv").write_text("note,prompt,chosen,rejected,note\n1,p,x,y,2\n")
    assert list(texts(read_samples(tmp_path / "s.csv"))) == [("p", ["x", "y"])]
    with pytest.raises(InputError, match="more than one column note"):
        read_samples(tmp_path / "s.csv", keep=["note"])


def test_an_object_around_the_rows_is_named(tmp_path):
    row = {"prompt": "p", "chosen": "x", "rejected": "y"}
    (tmp_path / "s.json").write_text(json.dumps({"data": [row, row]}, indent=1))
    with pytest.raises(InputError, match=r"it is one JSON object that holds the array 'data'; .* as jq .data does"):
        read_samples(tmp_path / "s.json")


def test_what_comes_first_behind_the_first_rows_is_not_left_out(tmp_path, monkeypatch):
    row = {"prompt": "user", "chosen": "x", "rejected": "y"}
    monkeypatch.setattr(containers, "MOST_HEAD_ROWS", 3)
    late = [{"system": "s"}, {"tools": [1]}, {"image_url": "u"}, {"chat_history": ["t"]}]
    late += [{"score_chosen": 2, "score_rejected": 1}, {"system": None, "note": 1}]
    samples = read_samples(write_lines(tmp_path / "s.jsonl", [row] * 4 + [row | further for further in late]))
    assert [problem.row for problem in samples.problems] == [5, 6, 7, 8, 9] and samples.row.tolist() == [1, 2, 3, 4, 10]
    assert all("of none of the first" in p.reason or "in none of the first" in p.reason for p in samples.problems)


BOB = {"role": "user", "content": "user", "name": "bob"}


@pytest.mark.parametrize(
    ("prompt", "before", "read"),
    [
        ([USER], [USER], [USER]),
        ([USER], [SYSTEM, USER], [SYSTEM, USER]),
        ([USER], [BOB], [BOB]),
        ([USER | {"tool_calls": None}], [USER], [USER]),
        ([USER], [USER, *reply("a"), USER], [USER, *reply("a"), USER]),
        ([USER], [], [USER]),
        ("user", [SYSTEM, USER], [SYSTEM, USER]),
        ("user", [], [USER]),
        ([{"role": "user", "content": "another"}], [USER], None),
        ("another", [USER], None),
    ],
)
def test_a_prompt_beside_whole_conversations(tmp_path, prompt, before, read):
    row = {"prompt": prompt, "chosen": [*before, *reply("x")], "rejected": [*before, *reply("y")]}
    samples = read_samples(write_lines(tmp_path / "s.jsonl", [row]))
    assert list(texts(samples)) == ([] if read is None else [(read, [reply("x"), reply("y")])])


def test_a_system_message_stays_first(tmp_path):
    row = {"prompt": [SYSTEM, USER], "chosen": "x", "rejected": "y", "history": [["a", "b"]]}
    ((prompt, _),) = texts(read_samples(write_lines(tmp_path / "s.jsonl", [row])))
    assert [message["role"] for message in prompt] == ["system", "user", "assistant", "user"]


def test_a_header_that_comes_again_is_no_row(tmp_path):
    (tmp_path / "s.csv").write_text("prompt,chosen,rejected\np,x,y\nprompt,chosen,rejected\nq,x,y\n")
    samples = read_samples(tmp_path / "s.csv")
    assert samples.prompts == 2 and [str(p) for p in samples.problems] == [
        f"{samples.path}:3: this row repeats the header"
    ]


@pytest.mark.parametrize(
    ("row", "late"),
    [
        ({"chosen": [USER, *reply("x")], "rejected": [USER, *reply("y")], **SCORED}, {"prompt": "user"}),
        ({"prompt": "p", "chosen": "x", "rejected": "y", **SCORED}, {"margin": 2}),
        ({"prompt": "p", "chosen": "x", "rejected": "y", **SCORED}, {"prompt_id": "a"}),
        ({"instruction": "p", "chosen": "x", "rejected": "y", **SCORED}, {"input": "i"}),
        ({"prompt": "p", "responses": ["x", "y"], "scores": [1, 2]}, {"sources": ["m", "n"]}),
        ({"prompt": "p", "responses": ["x", "y"], "scores": [1, 2]}, {"lengths": [3, 4]}),
        ({"prompt": "p", "response": "x", "score": 1}, {"model": "m"}),
    ],
    ids=lambda value: "+".join(value),
)
def test_a_late_column_that_would_have_a_role_is_no_small_thing(tmp_path, monkeypatch, row, late):
    monkeypatch.setattr(containers, "MOST_HEAD_ROWS", 2)
    (name,) = late
    read = read_samples(write_lines(tmp_path / "s.jsonl", [row | late] * 3))
    assert (read.problems == [] and name in read.fields.roles.values()) or read.sources is not None
    samples = read_samples(write_lines(tmp_path / "s.jsonl", [row, row, row | late, row | {name: None, "other": 1}]))
    assert [(p.row, p.reason.partition(" is ")[0]) for p in samples.problems] == [(3, name)]
    table = tmp_path / "t.csv"  # a file of another container beside it changes nothing
    if all(isinstance(value, str | int) for value in row.values()):
        with open(table, "w", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            writer.writeheader()
            writer.writerow(row)
        samples = read_samples([tmp_path / "s.jsonl", table])
        assert [(p.row, p.reason.partition(" is ")[0]) for p in samples.problems] == [(3, name)]


def test_a_late_margin_that_is_no_number_is_not_missed(tmp_path, monkeypatch):
    monkeypatch.setattr(containers, "MOST_HEAD_ROWS", 2)
    row = {"prompt": "p", "chosen": "x", "rejected": "y"}
    assert read_samples(write_lines(tmp_path / "s.jsonl", [row] * 2 + [row | {"margin": "theirs"}])).problems == []


@pytest.mark.parametrize(("first", "strength"), [(None, [np.nan, 2]), ("N/A", [np.nan, 2]), ("theirs", None)])
def test_margins_that_the_first_rows_lack(tmp_path, monkeypatch, first, strength):
    monkeypatch.setattr(containers, "MOST_HEAD_ROWS", 1)
    row = {"prompt": "p", "chosen": "x", "rejected": "y"}
    path = write_lines(tmp_path / "s.jsonl", [row | {"margin": first}, row | {"margin": 2 if strength else "mine"}])
    samples = read_samples(path)
    assert samples.problems == []
    if strength is None:
        assert samples.strength is None
    else:
        np.testing.assert_array_equal(samples.strength, strength)


@pytest.mark.parametrize("layout", ["pairs", "swift", "ab"])
def test_a_history_that_the_prompt_holds_is_not_there_twice(tmp_path, layout):
    before = [USER, *reply("a")]
    asked = {"role": "user", "content": "and?"}
    sides = {
        "pairs": {"chosen": [*before, asked, *reply("x")], "rejected": [*before, asked, *reply("y")]},
        "swift": {"messages": [*before, asked, *reply("x")], "rejected_response": "y"},
        "ab": {"prompt": [*before, asked], "response_a": "x", "response_b": "y", "label": "a"},
    }[layout]
    for system in ([], [SYSTEM]):
        row = {name: [*system, *side] if isinstance(side, list) else side for name, side in sides.items()}
        want = [*system, *before, asked]
        for history in ([["user", "a"]], before, [*system, *before]):
            path = write_lines(tmp_path / "s.jsonl", [row | {"history": history}])
            assert list(texts(read_samples(path))) == [(want, [reply("x"), reply("y")])]
    other = [{"role": "user", "content": "earlier"}, *reply("b")]
    path = write_lines(tmp_path / "s.jsonl", [sides | {"history": other}])
    assert list(texts(read_samples(path))) == [([*other, *before, asked], [reply("x"), reply("y")])]


@pytest.mark.parametrize(("no", "yes"), [("0", "1"), ("False", "True"), ("false", " true"), ("0.0", "1.0"), (0, 1)])
def test_votes_of_an_arena_are_numbers_however_they_are_written(tmp_path, no, yes):
    names = ("winner_model_a", "winner_model_b", "winner_tie")
    rows = [{**MODELS, **AB, **{name: yes if k == vote else no for k, name in enumerate(names)}} for vote in range(3)]
    broken = [rows[0] | {"winner_tie": yes}, rows[0] | {"winner_model_a": no}, rows[0] | {"winner_model_a": "x"}]
    broken.append(rows[0] | {"winner_tie": None})
    samples = read_samples(write_lines(tmp_path / "s.jsonl", rows + broken))
    assert samples.counts == {"ties": 1} and [problem.row for problem in samples.problems] == [4, 5, 6, 7]
    assert [responses for _, responses in texts(samples)] == [["x", "y"], ["y", "x"]]


def test_sources_that_look_like_numbers_stay_names_in_csv(tmp_path):
    (tmp_path / "s.csv").write_text("prompt,response,score,who\np,x,1,7\np,y,2,08\np,z,3,true\n")
    samples = read_samples(tmp_path / "s.csv", source_field="who")
    assert samples.problems == [] and samples.source_names == ["08", "7", "true"]
    (tmp_path / "s.csv").write_text("prompt,chosen,rejected,who_chosen,who_rejected\np,x,y,7,8.0\n")
    samples = read_samples(tmp_path / "s.csv", source_field="who")
    assert samples.problems == [] and samples.source_names == ["7", "8.0"]
    (tmp_path / "s.csv").write_text('prompt,responses,scores,who\np,"[""x"", ""y""]","[1, 2]","[""7"", ""8""]"\n')
    assert read_samples(tmp_path / "s.csv", source_field="who").source_names == ["7", "8"]


def test_numbers_of_csv_are_known_before_they_are_asked_for(tmp_path):
    (tmp_path / "s.csv").write_text("prompt;response;good;nice\np;x;1,5;2\np;y;2,5;3\n")
    with pytest.raises(InputError, match="numbers are in good, nice: name them by --scores good"):
        read_samples(tmp_path / "s.csv")
    samples = read_samples(tmp_path / "s.csv", score_fields=["good"])
    assert samples.scores["good"].tolist() == [1.5, 2.5] and samples.beside["nice"].tolist() == [2, 3]
    (tmp_path / "s.csv").write_text("prompt;chosen;rejected;margin\np;x;y;0,5\n")
    assert read_samples(tmp_path / "s.csv").strength.tolist() == [0.5]


@pytest.mark.parametrize(
    ("chosen", "rejected", "read"),
    [
        ("6.000", "2,5", "s.csv:3: score_chosen may be 6.000 or 6000, got '6.000'"),
        ("6,000", "2.5", "s.csv:3: score_chosen may be 6.000 or 6000, got '6,000'"),
        ("2", "-1,250", "s.csv:3: score_rejected may be -1.250 or -1250, got '-1,250'"),
        ("6,000", "2,5", [6, 2.5]),
        ("6.000", "2.5", [6, 2.5]),
        ("0.500", "2,5", [0.5, 2.5]),
    ],
)
def test_a_mark_of_thousands_is_not_taken_for_a_decimal_one(tmp_path, chosen, rejected, read):
    row = f"7.000 or 2,5;7.000;7,25;{chosen};{rejected}"  # texts may be numbers
    (tmp_path / "s.csv").write_text(f"prompt;chosen;rejected;score_chosen;score_rejected\np;x;y;1;1\n{row}\n")
    if isinstance(read, list):
        assert read_samples(tmp_path / "s.csv").scores["score"][2:].tolist() == read
    else:
        with pytest.raises(InputError, match=re.escape(read)):
            read_samples(tmp_path / "s.csv")


@pytest.mark.parametrize("separator", [", ", "\n "])  # of a list, and of an array of NumPy
def test_messages_as_python_prints_them_are_no_text(tmp_path, separator):
    said = f"[{separator.join(map(repr, [USER, *reply('x')]))}]"
    with open(tmp_path / "s.csv", "w", newline="") as file:
        csv.writer(file).writerows([["prompt", "chosen", "rejected"], ["p", said, "y"], ["p", "[{'x': 1}]", "y"]])
    samples = read_samples(tmp_path / "s.csv")
    assert list(texts(samples)) == [("p", ["[{'x': 1}]", "y"])]
    assert [problem.reason for problem in samples.problems] == [
        "chosen holds messages as Python prints them: write them as JSON, by json.dumps"
    ]


@pytest.mark.parametrize("prompt", ["\n\nHuman: hi\n\nAssistant:", "Why?"])
def test_a_prompt_that_both_sides_repeat_is_cut(tmp_path, prompt):
    whole = {"prompt": prompt, "chosen": f"{prompt} yes", "rejected": f"{prompt} no"}
    plain = {"prompt": prompt, "chosen": " yes", "rejected": " no"}
    word = {"prompt": "H", "chosen": "Hi", "rejected": "Hm"}
    cut = "the prompt cut from both sides, which begin with it"
    samples = read_samples(write_lines(tmp_path / "s.jsonl", [whole, plain, whole, word, whole]))
    expected = [(prompt, [" yes", " no"])] * 3 + [("H", ["Hi", "Hm"]), (prompt, [" yes", " no"])]
    assert list(texts(samples)) == expected and samples.read_as.endswith(cut)
    # a few replies may begin as their prompt does, but for a turn of the assistant
    samples = read_samples(write_lines(tmp_path / "s.jsonl", [plain, plain, whole]))
    assert cut not in samples.read_as and samples.row.tolist() == ([1, 2] if "Assistant" in prompt else [1, 2, 3])
    reasons = [problem.reason for problem in samples.problems]
    assert reasons == ["both sides begin with the prompt, up to the assistant's turn, which most rows do not"] * (
        "Assistant" in prompt
    )
    ab = {"prompt": prompt, "response_a": f"{prompt} no", "response_b": f"{prompt} yes", "label": "b"}
    assert list(texts(read_samples(write_lines(tmp_path / "s.jsonl", [ab])))) == expected[:1]


@pytest.mark.parametrize("name", ["context", "Passage", "background"])
def test_a_passage_beside_a_prompt_is_asked_for(tmp_path, name):
    row = {"prompt": "p", "response": "x", "score": 1}
    rows = [row | {name: "one"}, row | {name: "other"}, row | {name: "one", "response": "y"}]
    path = write_lines(tmp_path / "s.jsonl", rows)
    with pytest.raises(
        InputError, match=rf"--columns input={name} reads it behind the prompt, --keep {name} writes it"
    ):
        read_samples(path)
    samples = read_samples(path, keep=[name])
    assert samples.fields.carried == (name,)
    assert list(texts(samples)) == [("p", ["x", "y"]), ("p", ["x"])]  # prompts about two passages are two
    samples = read_samples(path, columns={"input": name})
    assert list(texts(samples)) == [("p\none", ["x", "y"]), ("p\nother", ["x"])]
    assert read_samples(write_lines(tmp_path / "s.jsonl", [row | {name: None}])).prompts == 1


def test_a_model_that_is_no_text_is_no_source(tmp_path):
    rows = [{"prompt": "p", "response": f"{k}", "score": k, "model": {"name": "m"}} for k in range(2)]
    samples = read_samples(write_lines(tmp_path / "s.jsonl", rows))
    assert samples.problems == [] and samples.sources is None and "source" not in samples.read_as
    rows = [row | {"model": "m"} for row in rows]
    assert read_samples(write_lines(tmp_path / "s.jsonl", rows)).source_names == ["m"]
