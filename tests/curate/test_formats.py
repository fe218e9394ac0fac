"""The formats of `--format`: what each row looks like, what is refused, and Parquet that loads as JSON Lines do."""

import json

import numpy as np
import pytest
from pyarrow import parquet

from fastpref.curate import InputError, read_samples, write_pairs
from fastpref.curate.files.arrow_types import arrow_array, arrow_type, widened
from fastpref.curate.files.formats import FORMATS, shaped_rows

USER = {"role": "user", "content": "Weather in Oslo?"}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
ANSWER = {"role": "tool", "name": "get_weather", "content": "4 C"}
SAID = {"role": "assistant", "content": "It is 4 degrees."}
REFUSED = {"role": "assistant", "content": "I cannot know."}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {"city": {"type": "string"}}}}]


def row(prompt=(USER,), chosen=(SAID,), rejected=(REFUSED,), **more):
    known = {"prompt_id": "7", "prompt": list(prompt), "chosen": list(chosen), "rejected": list(rejected)}
    return known | more | {"score_chosen": 5.0, "score_rejected": 1.0, "margin": 4.0}


def write_file(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_all(folder, rows, out, format="trl", **options):
    """The published pairs of some rows, as they are."""
    samples = read_samples(write_file(folder / "in.jsonl", rows))
    assert samples.problems == []
    every = np.arange(samples.prompts)
    pairs = {"prompt": every, "chosen": np.zeros_like(every), "rejected": np.ones_like(every)}
    write_pairs(samples, pairs, folder / out, format=format, **options)
    return folder / out


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_trl_rows_stay_as_they_are():
    given = row(tools=TOOLS)
    for format in ("trl", "trl-conversational"):
        assert shaped_rows(given, format) == [given]
    assert shaped_rows(row(), "openrlhf") == [row()]


def test_axolotl():
    (found,) = shaped_rows(row(), "axolotl")
    assert (found["messages"], found["chosen"], found["rejected"]) == ([USER], SAID, REFUSED)
    assert next(iter(found)) == "prompt_id" and "prompt" not in found and found["margin"] == 4.0


def test_llamafactory():
    system = {"role": "system", "content": "Be kind."}
    given = row(prompt=[system, USER, CALLED, ANSWER], tools=TOOLS, images=[])
    (found,) = shaped_rows(given, "llamafactory")
    assert [turn["from"] for turn in found["conversations"]] == ["system", "human", "function_call", "observation"]
    assert json.loads(found["conversations"][2]["value"]) == [{"name": "get_weather", "arguments": {"city": "Oslo"}}]
    assert found["chosen"] == {"from": "gpt", "value": "It is 4 degrees."}
    assert found["rejected"] == {"from": "gpt", "value": "I cannot know."}
    assert json.loads(found["tools"]) == TOOLS
    assert shaped_rows(row(tools=None), "llamafactory")[0]["tools"] == ""


@pytest.mark.parametrize("format", ["llamafactory", "swift"])
def test_pictures_have_their_place_in_the_text(format):
    name, text = ("conversations", "value") if format == "llamafactory" else ("messages", "content")
    (found,) = shaped_rows(row(images=["a.png", "b.png"]), format)
    assert found[name][0][text] == "<image><image>Weather in Oslo?" and found["images"] == ["a.png", "b.png"]
    parts = {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "image"}]}
    (found,) = shaped_rows(row(prompt=[parts], images=["a.png"]), format)
    assert found[name][0][text] == "What is <image>"


def test_swift():
    (found,) = shaped_rows(row(tools=TOOLS), "swift")
    assert found["messages"] == [USER, SAID] and found["rejected_response"] == "I cannot know."
    assert json.loads(found["tools"]) == TOOLS
    (found,) = shaped_rows(row(chosen=[CALLED, ANSWER, SAID], rejected=[CALLED, ANSWER, REFUSED]), "swift")
    called = {"role": "tool_call", "content": json.dumps({"name": "get_weather", "arguments": {"city": "Oslo"}})}
    answered = {"role": "tool_response", "content": "4 C"}
    assert found["messages"] == [USER, called, answered, SAID]
    assert found["rejected_response"] == [called, answered, REFUSED]
    # ms-swift puts it in place of all after the last turn of the user
    (found,) = shaped_rows(row(prompt=[USER, CALLED, ANSWER]), "swift")
    assert found["rejected_response"] == [called, answered, REFUSED]


def test_kto_is_two_rows():
    given = row(rank_rejected=3, chosen_id=4, rejected_id=2, score_chosen_b=7, score_rejected_b=8, rule="max vs min")
    first, second = shaped_rows(given, "kto")
    assert (first["completion"], first["label"]) == ([SAID], True)
    assert (second["completion"], second["label"]) == ([REFUSED], False)
    for found, score, other, response in ((first, 5.0, 7, 4), (second, 1.0, 8, 2)):
        assert (found["score"], found["score_b"], found["response_id"]) == (score, other, response)
        assert (found["prompt"], found["rule"], found["rank_rejected"], found["margin"]) == ([USER], "max vs min", 3, 4)
    assert not {"chosen", "rejected", "score_chosen", "rejected_id"} & first.keys()


@pytest.mark.parametrize(
    ("format", "given", "reason"),
    [
        ("axolotl", row(chosen=[CALLED, ANSWER, SAID]), "reads text alone, and there are tool calls"),
        ("axolotl", row(chosen=[SAID, USER, SAID]), "one message per response, got 3 as chosen"),
        ("axolotl", row(tools=TOOLS), "does not read tools"),
        ("axolotl", row(prompt=[{"role": "developer", "content": "x"}]), "knows no role 'developer'"),
        ("openrlhf", row(tools=TOOLS), "does not read tools"),
        ("openrlhf", row(images=["a.png"]), "does not read images"),
        ("llamafactory", row(chosen=[CALLED, ANSWER, SAID]), "one message per response, got 3 as chosen"),
        ("llamafactory", row(prompt=[USER, USER]), "skips turns that do not alternate, and these are human, human"),
        ("llamafactory", row(prompt=[{"role": "critic", "content": ""}]), "knows no role 'critic'"),
        ("llamafactory", row(prompt=[USER, CALLED | {"content": "Wait."}, ANSWER]), "a tool call without text"),
        ("swift", row(chosen=[SAID, USER, SAID]), "a user turn in the prompt and none in the responses"),
        (
            "swift",
            row(prompt=[{"role": "user", "content": [{"type": "smell"}]}]),
            "ms-swift knows no part of type 'smell'",
        ),
    ],
)
def test_what_a_host_would_drop_is_refused(format, given, reason):
    with pytest.raises(InputError, match=reason) as caught:
        shaped_rows(given, format)
    assert "in prompt 7: write --format trl-conversational" in str(caught.value)


def test_dataset_info(tmp_path):
    rows = [{"prompt": f"q{k}", "chosen": "good", "rejected": "bad", "images": ["a.png"]} for k in range(3)]
    (tmp_path / "dataset_info.json").write_text('{"mine": {"file_name": "mine.json"}}')
    write_all(tmp_path, rows, "pairs.jsonl", "llamafactory")
    assert json.loads((tmp_path / "dataset_info.json").read_text()) == {
        "mine": {"file_name": "mine.json"},
        "pairs": {
            "file_name": "pairs.jsonl",
            "formatting": "sharegpt",
            "ranking": True,
            "columns": {
                "messages": "conversations", "chosen": "chosen", "rejected": "rejected", "images": "images",
            },
        },
    }  # fmt: skip
    (tmp_path / "dataset_info.json").write_text("[]")
    with pytest.raises(InputError, match=r"dataset_info.json, which holds no object"):
        write_all(tmp_path, rows, "pairs.jsonl", "llamafactory")
    with pytest.raises(InputError, match=r"LLaMA-Factory does not read \.gz"):
        write_all(tmp_path, rows, "pairs.jsonl.gz", "llamafactory")


def test_columns_of_a_name_that_is_taken(tmp_path):
    rows = [{"prompt": "q", "chosen": "good", "rejected": "bad", "id": 3, "row": "mine", "score_chosen": 2,
             "score_rejected": 1}]  # fmt: skip
    samples = read_samples(write_file(tmp_path / "in.jsonl", rows), keep=("row",))
    pairs = {"prompt": [0], "chosen": [0], "rejected": [1], "row": [1]}
    write_pairs(samples, pairs, tmp_path / "out.jsonl")
    (found,) = lines(tmp_path / "out.jsonl")
    assert (found["id"], found["row"], found["input_row"]) == (3, 1, "mine")


# ---- Parquet


MIXED = [
    {"prompt": [USER], "chosen": [CALLED, ANSWER, SAID], "rejected": [REFUSED], "tools": TOOLS, "id": 1},
    {
        "prompt": [{"role": "user", "content": "Turn on the lights, softly."}],
        "chosen": [
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {"type": "function", "function": {"name": "light", "arguments": {"room": "hall", "level": 0.5}}},
                    {"type": "function", "function": {"name": "play", "arguments": {"list": ["a", 1, None]}}},
                ],
                "reasoning_content": "softly: 0.3",
            }
        ],
        "rejected": [{"role": "assistant", "content": "No."}],
        "tools": [{"type": "function", "function": {"name": "light"}}],
        "id": 2,
    },
    {"prompt": [{"role": "user", "content": "hi"}], "chosen": [{"role": "assistant", "content": "4"}],
     "rejected": [{"role": "assistant", "content": "{"}], "tools": None, "id": 3},
]  # fmt: skip
PLAIN = [{"prompt": f"q{k}", "chosen": f"good {k}", "rejected": "4", "id": k} for k in range(4)]
CHATS = [
    {"prompt": [{"role": "user", "content": f"q{k}"}], "chosen": [SAID], "rejected": [REFUSED], "images": [f"{k}.png"]}
    for k in range(4)
]


@pytest.mark.parametrize(
    ("rows", "format"),
    [
        (MIXED, "trl"),
        (MIXED, "swift"),
        (MIXED, "kto"),
        *((PLAIN, format) for format in FORMATS),
        *((CHATS, format) for format in FORMATS if format not in ("axolotl", "openrlhf")),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)} rows",
)
def test_parquet_loads_as_json_lines_do(tmp_path, rows, format):
    """With the same features, values and nulls, by `datasets`, as TRL loads them."""
    datasets = pytest.importorskip("datasets")
    found = []
    for ending, kind in (("jsonl", "json"), ("parquet", "parquet")):
        path = write_all(tmp_path, rows, f"pairs.{ending}", format)
        found.append(
            datasets.load_dataset(kind, data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
        )
    one, other = found
    assert list(one) == list(other)
    features = [{name: known for name, known in data.features.items() if not name.startswith("len")} for data in found]
    assert features[0] == features[1]  # lengths are int32 in one and int64 in the other
    if rows is MIXED and format == "trl":
        calls = other[1]["chosen"][0]["tool_calls"]
        assert [call["function"]["arguments"] for call in calls] == [
            {"room": "hall", "level": 0.5},
            {"list": ["a", 1, None]},
        ]
        assert [row["tools"] for row in other] == [TOOLS, MIXED[1]["tools"], None]


def test_without_datasets_a_mixed_column_is_a_string_of_json(tmp_path):
    path = write_all(tmp_path, MIXED, "pairs.parquet")
    column = parquet.read_table(path)["chosen"].combine_chunks()
    assert json.loads(column.flatten().cast("string")[0].as_py()) == CALLED


def test_random_values_keep_their_shape():
    """Whatever JSON holds comes back from Arrow, nulls and all."""
    rng = np.random.default_rng()

    def value(depth):
        kind = rng.integers(0, 8 if depth else 5)
        if kind == 5:
            return [value(depth - 1) for _ in range(rng.integers(0, 4))]
        if kind >= 6:
            return {str(name): value(depth - 1) for name in rng.choice(list("abc"), rng.integers(0, 4), replace=False)}
        return [None, bool(rng.integers(2)), int(rng.integers(-9, 9)), float(rng.normal()), "x" * rng.integers(3)][kind]

    def decoded(known, shape):
        if known is None or not (isinstance(shape, list | dict) or shape == "json"):
            return known
        if shape == "json":
            return json.loads(known)
        if isinstance(shape, list):
            return [decoded(item, shape[0]) for item in known]
        return {name: decoded(known[name], shape[name]) for name in shape}

    for _ in range(300):
        values = [value(3) for _ in range(rng.integers(0, 6))]
        shape = None
        for each in values:
            shape = widened(shape, each)
        array = arrow_array(values, shape)
        assert array.type == arrow_type(shape) and len(array) == len(values)
        assert [decoded(known, shape) for known in array.to_pylist()] == values


def test_what_json_has_no_word_for_is_refused_by_its_column(tmp_path):
    import datetime
    from decimal import Decimal

    import pyarrow

    columns = {"prompt": ["q"], "chosen": ["good"], "rejected": ["bad"], "price": [Decimal("2.50")]}
    for name, value, kind in (("b", b"\x89PNG", "bytes"), ("d", datetime.timedelta(1), "timedelta")):
        parquet.write_table(pyarrow.table(columns | {name: [value]}), tmp_path / "in.parquet")
        samples = read_samples(tmp_path / "in.parquet", keep=(name,))
        pairs = {"prompt": [0], "chosen": [0], "rejected": [1]}
        for out in ("out.jsonl", "out.parquet"):
            with pytest.raises(InputError, match=rf"the column {name} cannot be written \(.*{kind}\), in prompt"):
                write_pairs(samples, pairs, tmp_path / out)
            assert not (tmp_path / out).exists()
    write_pairs(read_samples(tmp_path / "in.parquet", keep=("price",)), pairs, tmp_path / "out.jsonl")
    assert lines(tmp_path / "out.jsonl")[0]["price"] == 2.5
