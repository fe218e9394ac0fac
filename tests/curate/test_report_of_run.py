"""The page of a run: its verdict, what is to be done first, and that nothing in the data gets at the reader."""

import html.parser
import json
from pathlib import Path

import numpy as np
import pytest

from fastpref.cli.main import main
from fastpref.curate.pipeline.config import config_from_table
from fastpref.curate.pipeline.report_of_run import report_of_run
from fastpref.curate.pipeline.run import run

pytestmark = pytest.mark.filterwarnings("ignore::fastpref.curate.notices.DataWarning")
EVIL = '</pre></td></title><script src="//x.example/s.js">alert(1)</script><img src=x onerror=alert(1)>\x1b[31m\u202e'


def rows(count=60, responses=4, long_wins=False):
    rng = np.random.default_rng()
    found = []
    for k in range(count):
        scores, lengths = rng.normal(size=responses), rng.integers(5, 90, responses)
        if long_wins:
            lengths = np.sort(lengths)[np.argsort(np.argsort(scores))]
        texts = [f"{'x' * int(n)} {k} {s}" for s, n in enumerate(lengths)]
        found.append({"prompt": f"question {k}", "responses": texts, "scores": scores.tolist()})
    return found


def page_of(folder, given, **tables):
    path = folder / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    config = config_from_table({"input": str(path), "output": str(folder / "out.jsonl")} | tables)
    result = run(config)
    return report_of_run(result.state, config, result.summary, result.notices, "fastpref curate in.jsonl")


def test_nothing_speaks_against_good_pairs(tmp_path):
    page = page_of(tmp_path, rows())
    assert page.verdict == "60 pairs, and nothing was found that speaks against training on them."
    assert page.severity == "finding" and len(page.actions) == 3
    assert page.actions[0].title == "Read the examples below"
    assert "Few responses per prompt" in [found.title for found in page.findings]
    assert page.provenance["command"] == "fastpref curate in.jsonl" and page.provenance["seed"] == 0
    assert set(page.provenance) == {"input", "command", "version", "seed", "date", "stages"}
    before_after = {what: (before, after) for what, before, after in page.before_after}
    assert before_after["pairs"] == (60, 60)
    assert before_after["mean margin"][0] == pytest.approx(before_after["mean margin"][1])


def test_a_warning_and_something_serious(tmp_path):
    page = page_of(tmp_path, rows(long_wins=True))
    assert page.verdict == "60 pairs, with one thing to look at before you train on them."
    assert (page.severity, page.actions[0].title) == ("warning", "The longer response nearly always wins")
    given = rows()
    for row in given[:20]:
        row["responses"][int(np.argmax(row["scores"]))] = "I win."
    page = page_of(tmp_path, given)
    assert page.verdict.startswith("60 pairs, but do not train on them yet") and page.severity == "serious"
    assert page.actions[0].title == "One text wins under many prompts" and len(page.actions) == 3


def test_no_pair_at_all(tmp_path):
    page = page_of(tmp_path, rows(), construct={"min_gap": 1e9})
    assert page.verdict == "No pair was kept: there is nothing to train on yet."
    assert dict(page.summary)["pairs"] == 0 and not page.examples


def test_technical_notices_are_not_on_the_page(tmp_path):
    given = [row | {"again": [2 * score for score in row["scores"]]} for row in rows()]
    page = page_of(tmp_path, given, read={"scores": ["scores", "again"]}, select={"fraction": 0.5})
    said = " ".join(f"{action.title} {action.text}" for action in [*page.actions, *page.findings])
    assert "one vote" not in said and "lower=" not in said


def test_published_pairs_without_scores_have_a_page(tmp_path):
    given = [
        {"prompt": row["prompt"], "chosen": row["responses"][0], "rejected": row["responses"][1]} for row in rows()
    ]
    page = page_of(tmp_path, given)
    assert page.scores is None and dict(page.summary)["chosen against rejected"] == "sides as published"
    assert len(page.examples) == 3


class Tags(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes = set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}
        assert not any(value and value.startswith(("http", "//")) for _, value in attributes)


def test_hostile_text_is_inert(tmp_path, monkeypatch, capsys):
    """In prompts, responses, names of sources and of scores, and in the command line."""
    monkeypatch.chdir(tmp_path)
    given = rows(250, responses=4)
    for k, row in enumerate(given):
        row["prompt"] = EVIL + str(k)
        row["responses"] = [text + EVIL for text in row["responses"]]
        row[EVIL] = [EVIL + "1", EVIL + "2", "c", "d"]
        row["<b>score"] = row.pop("scores")
    Path("<i>in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    options = ["--scores", "<b>score", "--sources", EVIL, "--report", "page"]
    assert main(["curate", "<i>in.jsonl", "-o", "out.jsonl", *options]) == 0
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err
    text = Path("page/report.html").read_text()
    page = Tags(text)
    assert not page.tags & {"script", "b", "i", "link", "iframe", "object", "a", "base", "form"}
    assert not any(name.startswith("on") for name in page.attributes)
    assert "\x1b" not in text and "\u202e" not in text and "&lt;script" in text
    assert "default-src &#39;none&#39;" in text or "default-src 'none'" in text
    assert "\x1b" not in Path("page/report.md").read_text()
