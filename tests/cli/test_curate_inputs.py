"""fastpref curate on the layouts that people publish and export: what reaches OUT, what is said, what is refused."""

import csv
import gzip
import io
import json
import os
import sys

import pytest

from fastpref.cli.main import main

pyarrow = pytest.importorskip("pyarrow")

SCORED = {"score_chosen": 5, "score_rejected": 1}
REPLIES = {"chosen": "It is Haus.", "rejected": "It is Hose."}


@pytest.fixture
def curate(tmp_path, monkeypatch, capsys):
    """function(rows or names, *flags) -> exit code, rows of OUT, stdout, stderr; in a new folder."""
    monkeypatch.chdir(tmp_path)

    def run(data, *flags):
        names = data if isinstance(data, tuple) else (written(data),)
        code = main(["curate", *names, "-o", "out.jsonl", *flags])
        captured = capsys.readouterr()
        rows = []
        if os.path.exists("out.jsonl"):
            with open("out.jsonl") as file:
                rows = [json.loads(line) for line in file]
            os.unlink("out.jsonl")
        return code, rows, captured.out, captured.err

    return run


def written(rows, name="samples.jsonl"):
    with open(name, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return name


def message(role, content, **further):
    return {"role": role, "content": content, **further}


def test_the_prompt_is_the_one_of_the_layout(curate):
    code, rows, out, _ = curate([{"question": "What is tall?", **REPLIES, **SCORED}])
    assert code == 0 and rows[0]["prompt"] == "What is tall?" and rows[0]["chosen"] == "It is Haus."
    assert out.startswith("read as pairs: prompt=question, chosen=chosen, rejected=rejected, scores=score\nread ")
    code, rows, out, _ = curate([{"instruction": "Translate", "input": "house", **REPLIES, **SCORED}])
    assert rows[0]["prompt"] == "Translate\nhouse" and out.startswith("read as alpaca: prompt=instruction,")
    code, rows, _, err = curate([{"prompt": None, "question": "q", **REPLIES, **SCORED}])
    assert (code, rows) == (2, []) and "samples.jsonl:1: prompt is null" in err
    code, rows, _, err = curate([{**REPLIES, **SCORED}])
    assert code == 2 and "chosen and rejected have no turn of an assistant in common" in err
    said = [{side: f"\n\nHuman: Tea?\n\nAssistant: A h{side}." for side in ("chosen", "rejected")} | SCORED]
    _, rows, _, _ = curate(said)
    assert rows[0]["prompt"] == "\n\nHuman: Tea?\n\nAssistant:" and rows[0]["rejected"] == " A hrejected."


def test_system_tools_and_images_reach_the_output(curate):
    row = {"prompt": "What is rain?", **REPLIES, **SCORED}
    tools = [{"type": "function", "function": {"name": "f"}}]
    _, rows, _, _ = curate([row | {"system": "You rhyme."}])
    assert rows[0]["prompt"] == [message("system", "You rhyme."), message("user", "What is rain?")]
    _, rows, out, _ = curate(
        [row | {"tools": tools, "images": ["a.png"], "id": 7, "language": "en"}], "--keep", "language"
    )
    assert (rows[0]["tools"], rows[0]["images"], rows[0]["id"], rows[0]["language"]) == (tools, ["a.png"], 7, "en")
    assert "carried=tools+images+id+language" in out
    completions = [{"response": text, "overall_score": score} for text, score in (("An owl.", 8), ("A wren.", 5))]
    _, rows, _, _ = curate([{"system": "Be kind.", "instruction": "A bird?", "completions": completions}])
    assert rows[0]["prompt"][0] == message("system", "Be kind.") and rows[0]["chosen"] == [
        message("assistant", "An owl.")
    ]


def test_messages_are_kept_as_they_are(curate):
    call = {"type": "function", "function": {"name": "f", "arguments": {"city": "Oslo"}}}
    prompt = [message("user", [{"type": "text", "text": "Hi", "image": None}], language="English")]
    chosen = [
        message("assistant", None, tool_calls=[call]),
        message("tool", "4 C", name="f"),
        message("assistant", "4"),
    ]
    rejected = [message("assistant", "5", reasoning_content="hm")]
    code, rows, _, _ = curate([{"prompt": prompt, "chosen": chosen, "rejected": rejected, **SCORED}])
    assert code == 0 and (rows[0]["prompt"], rows[0]["chosen"], rows[0]["rejected"]) == (prompt, chosen, rejected)
    image = [message("user", [{"type": "image"}, {"type": "text", "text": "What?"}])]
    pair = {"prompt": image, "chosen": rejected, "rejected": chosen, **SCORED}
    assert curate([pair])[0] == 2
    assert curate([pair | {"images": ["x.png"]}])[1][0]["prompt"] == image


def test_a_column_that_is_there_twice_is_refused(curate):
    from pyarrow import parquet

    columns = [["p"], [["aa", "bb"]], [[1.0, 2.0]], [[2.0, 1.0]]]
    parquet.write_table(pyarrow.table(columns, names=["prompt", "responses", "scores", "scores"]), "dup.parquet")
    code, rows, _, err = curate(("dup.parquet",))
    assert (code, rows, err) == (2, [], "fastpref curate: dup.parquet has more than one column scores\n")
    with open("dup.csv", "w") as file:
        file.write("prompt,chosen,rejected,chosen\np,a,b,c\n")
    assert curate(("dup.csv",))[3] == "fastpref curate: dup.csv has more than one column chosen\n"


def test_numbers_beyond_all_measure(curate):
    with open("samples.jsonl", "w") as file:
        for scores in ("[1e400, 2]", "[123456789012345678901234567890, 2]", "[1e308, -1e308]", "[1, 2]"):
            file.write(f'{{"prompt": "p{scores}", "responses": ["a1", "b2"], "scores": {scores}}}\n')
    code, rows, out, err = curate(("samples.jsonl",), "--rejected", "min")
    assert code == 0 and len(rows) == 2 and "1 bad row" in out and "samples.jsonl:1: scores[0] must be finite" in err
    assert "2 scores of a size of 1e+30 or more, left out" in out
    pool = {"prompt": "p", "responses": ["a1", "b2", "c3"]}
    _, rows, _, _ = curate([pool | {"scores": [-1, 0.5, 0.7]}], "--missing", "-1,-100", "--rejected", "min")
    assert rows[0]["score_rejected"] == 0.5


@pytest.mark.parametrize(
    ("rows", "flags", "chosen", "rejected"),
    [
        (
            [{"prompt": "p", "all_generated_responses": ["a", "b"], "all_rm_scores": [1, 2], **REPLIES}],
            ["--scores", "all_rm_scores"],
            "b",
            "a",
        ),
        ([{"instruction": "p", "generations": ["a", "b"], "ratings": [4, 1]}], ["--scores", "ratings"], "a", "b"),
        (
            [
                {"prompt": "p", "response": "a", "helpfulness": 4, "verbosity": 1},
                {"prompt": "p", "response": "b", "helpfulness": 1, "verbosity": 4},
            ],
            ["--scores", "helpfulness"],
            "a",
            "b",
        ),
        (
            [{"prompt": "p", "answers": [{"answer": "a", "rank": 7.0}, {"answer": "b", "rank": 1.0}]}],
            ["--scores", "rank:best-low"],
            "b",
            "a",
        ),
        (
            [{"q": "p", "outs": ["a", "b"], "quality": [1, 2]}],
            ["--columns", "prompt=q,responses=outs", "--scores", "quality"],
            "b",
            "a",
        ),
        (
            [{"q": "p", "out": text, "quality": score} for text, score in (("a", 1), ("b", 2))],
            ["--columns", "prompt=q,response=out", "--scores", "quality"],
            "b",
            "a",
        ),
        (
            [{"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": 1, "safer_response_id": 0}],
            ["--columns", "label=safer_response_id"],
            "a",
            "b",
        ),
        (
            [{"history": "p", "human_ref_A": "a", "human_ref_B": "b", "labels": 0, "score_A": 5, "score_B": 52}],
            [],
            "b",
            "a",
        ),
    ],
)
def test_layouts_and_named_columns(curate, rows, flags, chosen, rejected):
    code, found, _, err = curate(rows, "--rejected", "min", *flags)
    assert code == 0, err
    assert [(row["prompt"], row["chosen"], row["rejected"]) for row in found] == [("p", chosen, rejected)]


def test_a_rank_must_say_which_end_is_best(curate):
    rows = [{"prompt": "p", "answers": [{"answer": "a", "rank": 7.0}, {"answer": "b", "rank": 1.0}]}]
    for flags in ([], ["--scores", "rank"]):
        code, _, _, err = curate(rows, *flags)
        assert code == 2 and "--scores rank:best-low or rank:best-high" in err and err.count("\n") == 1
    _, found, _, _ = curate(rows, "--scores", "rank:best-high", "--rejected", "min")
    assert found[0]["chosen"] == "a"


def test_a_strength_becomes_the_margin_and_no_two_scores(curate):
    rows = [
        {"context": [message("user", "hi")], "response1": "hello", "response2": "no", "overall_preference": strength}
        for strength in (-2, 0, 3)
    ]
    code, found, out, _ = curate(rows)
    assert code == 0 and [row["margin"] for row in found] == [2, 3] and "1 tie, left out" in out
    assert not any(name.startswith("score") for row in found for name in row)
    assert [row["chosen"][0]["content"] for row in found] == ["hello", "no"]


def test_published_preferences_without_scores_are_written_on(curate):
    rows = [{"prompt": f"q{k}", "chosen": f"a{k}", "rejected": f"b{k}"} for k in range(3)]
    code, found, out, _ = curate([*rows, {"prompt": "q", "chosen": " ", "rejected": "b"}])
    assert code == 0 and [{name: row[name] for name in rows[0]} for row in found] == rows
    assert "no scores" in out.splitlines()[0]


def test_one_bad_response_leaves_its_pool(curate):
    rows = [{"prompt": "p", "responses": ["ok", text, "plain"], "scores": [3, 9, 1]} for text in (None, "half \ud83d")]
    code, found, out, err = curate(rows, "--rejected", "min", "--bad-rows", "bad.jsonl")
    assert code == 0 and [(row["chosen"], row["rejected"]) for row in found] == [("ok", "plain")] * 2
    assert (
        "2 bad responses, left out of their pools" in out and "the first samples.jsonl:1: responses[1] is null" in err
    )
    with open("bad.jsonl") as file:
        assert [json.loads(line)["row"] for line in file] == [1, 2]


def test_what_is_there_is_said_with_the_flag(curate):
    code, _, _, err = curate([{"prompt": "p", "answer_list": ["a", "b"], "ratings": [1, 2]}])
    assert code == 2 and "its columns prompt, answer_list, ratings fit no layout" in err and "--columns" in err
    code, _, _, err = curate([{"prompt": "p", "responses": ["a", "b"], "ratings": [1, 2]}])
    assert "has no scores (scores, win_prob); numbers are in ratings: name them by --scores ratings" in err
    code, _, _, err = curate([{"prompt": "p", "responses": ["a", "b"], "ratings": [1, 2]}], "--scores", "rating")
    assert "has no scores 'rating', found prompt, responses, ratings; nearest is 'ratings'" in err
    code, _, _, err = curate([{"prompt": "p", "responses": ["a", "b"], "scores": [1, 2], **REPLIES}])
    assert "could be read as pools (prompt, responses) and pairs (chosen, rejected): say which by --layout" in err


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "utf-16"])
def test_every_container_packed_or_not(curate, kind, packing):
    rows = [
        {"prompt": f'p{k}, \n"q"', "chosen": "x" * (1_200_000 if k == 7 else k) + "a", "rejected": "b;\t", **SCORED}
        for k in range(9)
    ]
    if kind in ("csv", "tsv"):
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(rows[0]), delimiter="," if kind == "csv" else "\t")
        writer.writeheader()
        writer.writerows(rows)
        content = text.getvalue().encode()
    elif kind == "json":
        content = json.dumps(rows, indent=2).encode()
    else:
        content = "".join(json.dumps(row) + "\n" for row in rows).encode("utf-16" if kind == "utf-16" else "utf-8")
    name = f"samples.{'jsonl' if kind == 'utf-16' else kind}{packing}"
    with open(name, "wb") as file:
        pack = {
            "": bytes,
            ".gz": gzip.compress,
            ".zst": lambda data: pyarrow.Codec("zstd").compress(data, asbytes=True),
        }
        file.write(pack[packing](content))
    code, found, out, _ = curate((name,), "--order", "construct")
    assert code == 0 and [{key: row[key] for key in rows[0]} for row in found] == rows
    assert kind not in ("csv", "tsv") or f"; CSV with {repr(',') if kind == 'csv' else 'tabs'}" in out.splitlines()[0]


def test_several_files_a_folder_and_stdin(curate, monkeypatch):
    os.mkdir("data")
    rows = [{"prompt": f"q{k}", **REPLIES} for k in range(4)]
    written(rows[:2], "data/a.jsonl"), written(rows[2:], "data/b.jsonl")
    for names in (("data/a.jsonl", "data/b.jsonl"), ("data",), ("data/*.jsonl",)):
        assert [row["prompt"] for row in curate(names)[1]] == ["q0", "q1", "q2", "q3"]
    with open("data/a.jsonl", "rb") as file:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(file.read())))
    assert len(curate(("-",))[1]) == 2
    code, _, _, err = curate(("-",), "--work", "work")
    assert code == 2 and "cannot read - once more: copy it to a file first" in err


def test_the_layouts_are_listed(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["curate", "--help-layouts"])
    said = capsys.readouterr().out
    from fastpref.curate.files.layouts import LAYOUTS

    assert caught.value.code == 0 and all(name in said for name in LAYOUTS)
