"""curate.report: what the page says, that nothing in the data can break it, and that it needs nothing beside it."""

import base64
import html
import html.parser
import os
import re
import sys
from dataclasses import replace

import matplotlib
import numpy as np
import pytest

from fastpref.curate import InputError, length_report, read_scored_samples, select_pairs, to_logit
from fastpref.curate.pipeline import report_plots
from fastpref.curate.pipeline.report import (
    GLOSSARY,
    Action,
    Example,
    MarginPairs,
    PairLengths,
    PickedScores,
    ReportData,
    SourceTable,
    write_report,
)

NAN = np.nan
PNG = b"\x89PNG\r\n\x1a\n"


def some_scores(prompts=50, responses=12):
    rewards = np.random.default_rng(0).normal(size=(prompts, responses))
    return PickedScores(rewards, select_pairs(rewards, rejected="min"), unit="points")


def some_data(**changes):
    generator = np.random.default_rng(1)
    margins = generator.normal(size=(2, 60))
    everything = ReportData(
        title="Curation of samples.jsonl",
        summary={"prompts": 12345, "share kept": 0.25, "applied": True, "rule": "max vs min"},
        verdict="12,345 pairs, with one thing to look at before you train on them.",
        severity="warning",
        actions=[Action("The longer response wins", "it does in 94 % of the pairs", "Try another rule.")],
        findings=[Action("Few responses", "7 prompts have one", "Sample more.")],
        before_after=[["pairs", 50, 40], ["mean margin", 3.25, 1.5]],
        provenance={"input": "samples.jsonl", "command": "fastpref curate samples.jsonl", "version": "fastpref 9"},
        scores=some_scores(),
        sources=SourceTable(
            names=["plain", "gamer", "baseline"],
            unexplained=np.array([0.2, 0.9, NAN]),
            low=np.array([0.15, 0.85, NAN]),
            high=np.array([0.25, 0.95, NAN]),
            flagged=np.array([False, True, False]),
            chosen=np.array([10, 1379, 0]),
        ),
        margins=MarginPairs(*margins, kept=margins.sum(0) > 0),
        counts={"prompts": {"kept": 40, "NO_SPREAD": 10}, "responses": {"kept": 599, "duplicate": 1}},
        lengths=PairLengths(np.array([10, 10, 10, 40]), np.array([5, 10, 20, 0]), unit="tokens"),
        rating_scale={"beta": 0.1, "median": 19.92, "initial_offset": 6.64},
        examples=[Example("What is 1 < 2?", "True & right.", "No", 2.0, -1.5, note="gamer against plain")],
    )
    return replace(everything, **changes)


class Page(html.parser.HTMLParser):
    """Text, tags and attributes of a page whose tags must all be closed."""

    VOID = frozenset(("meta", "img", "br"))

    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(path.read_text())
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if not self.open or self.open[-1] != "style":
            self.texts.append(text)

    @property
    def text(self):
        return " ".join(self.texts)


SECTIONS = {
    "sources": "Who wrote the responses",
    "before_after": "Before and after",
    "scores": "Where the pairs were picked",
    "lengths": "Length",
    "margins": "Scores against the model's own preference",
    "counts": "Kept and dropped",
    "rating_scale": "For losses that use the margin",
    "examples": "Examples",
    "provenance": "How these pairs were made",
}
FIGURES = ("sources", "scores", "lengths", "margins", "counts")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With the report of `some_data`."""
    folder = tmp_path_factory.mktemp("report") / "new" / "folder"
    assert write_report(folder, some_data()) == folder / "report.html"
    return folder


def test_the_whole_page(folder):
    assert {path.name for path in folder.iterdir()} == {
        *(f"{name}.png" for name in FIGURES),
        "report.html",
        "report.md",
    }
    page, markdown = Page(folder / "report.html"), (folder / "report.md").read_text()
    for title in SECTIONS.values():
        assert title in page.text and f"\n## {title}\n" in markdown
    assert all(term in page.text and meaning in markdown for term, meaning in GLOSSARY)
    for numbers in (
        ["12,345", "0.25", "yes", "max vs min"],
        ["one thing to look at", "The longer response wins", "it does in 94 % of the pairs", "Try another rule."],
        ["Few responses", "7 prompts have one", "Sample more."],
        ["mean margin", "3.25", "1.5"],
        ["fastpref curate samples.jsonl", "fastpref 9"],
        ["50 pairs of 50 prompts"],
        [
            "1 of 3 sources do not fit (gamer), with 1,379 chosen responses",
            "0.850 to 0.950",
            "not compared",
            "90 % interval",
        ],
        ["60 pairs kept"],
        ["no spread", "20.0 %", "99.8 %"],
        ["right on 62.5 % of the pairs", "1.414 times as long"],
        ["19.92", "6.64", "median offset in nats"],
        ["gamer against plain", "Chosen (2)", "Rejected (-1.5)"],
    ):
        for number in numbers:
            assert number in page.text, number
            assert number in markdown, number
    assert "What is 1 < 2?" in page.text and "True & right." in page.text
    names = [name for name in page.texts if name in ("plain", "gamer", "baseline")]
    assert names == ["gamer", "plain", "baseline"]  # by what is unexplained
    # the verdict, then what to do, then everything else
    places = [page.text.index(text) for text in ("one thing to look at", "it does in 94 %", "share kept", "gamer")]
    assert places == sorted(places)


def test_the_numbers_of_the_scores(tmp_path):
    scores = some_scores()
    text = Page(write_report(tmp_path, ReportData("t", {}, scores=scores))).text
    assert f"is {scores.rewards.max(1).mean():.4g}, and they lie" in text
    assert f"lie {np.ptp(scores.rewards, axis=1).mean():.4g} above the rejected ones" in text
    assert f"50 %: {np.median(np.ptp(scores.rewards, axis=1)):.4g}" in text
    assert "in units of points" in text


@pytest.mark.parametrize(
    "left_out",
    [
        {"scores", "margins", "lengths", "examples"},
        {"sources", "counts", "rating_scale", "before_after", "provenance"},
    ],
)
def test_a_section_without_data_is_left_out(tmp_path, left_out):
    path = write_report(
        tmp_path, some_data(**{part: () if part in ("examples", "before_after") else None for part in left_out})
    )
    headings = re.findall(r"^## (.*)$", (tmp_path / "report.md").read_text(), re.MULTILINE)
    assert headings == [*(title for part, title in SECTIONS.items() if part not in left_out), "Words"]
    shown = [html.unescape(title) for title in re.findall(r"<h2>(.*?)</h2>", path.read_text())]
    assert shown == ["To do first", *headings]
    assert {png.stem for png in tmp_path.glob("*.png")} == set(FIGURES) - left_out


def test_nothing_but_a_title(tmp_path):
    path = write_report(tmp_path, ReportData("Nothing", {}))
    assert re.findall(r"<h2>(.*?)</h2>", path.read_text()) == ["Words"]
    assert "To do first" not in path.read_text() and "verdict" not in path.read_text().partition("<body>")[2]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.md"]


def test_the_html_needs_nothing_beside_it(folder):
    path = folder / "report.html"
    page = Page(path)
    assert not {"script", "link", "iframe", "a", "object"} & set(page.tags)
    assert page.tags.count("img") == len(FIGURES)
    sources = [value for name, value in page.attributes if name in ("src", "href", "srcset")]
    images = [base64.b64decode(source.removeprefix("data:image/png;base64,"), validate=True) for source in sources]
    assert images == [(folder / f"{name}.png").read_bytes() for name in FIGURES]
    assert all(image.startswith(PNG) for image in images)
    assert "url(" not in path.read_text() and "@import" not in path.read_text()
    assert "prefers-color-scheme: dark" in path.read_text()


def test_the_markdown_names_its_figures(folder):
    assert re.findall(r"\]\((.*?)\)", (folder / "report.md").read_text()) == [f"{name}.png" for name in FIGURES]


EVIL = '<script>alert("x")</script> & <b>|$\\frac$|`*_x_*`'


def test_texts_are_shown_as_they_are(tmp_path):
    sources = SourceTable([EVIL, "$a$b$"], *np.full((3, 2), 0.5), np.array([True, False]), np.array([1, 2]))
    data = some_data(
        title=EVIL,
        summary={EVIL: EVIL},
        verdict=EVIL,
        actions=[Action(EVIL, EVIL, EVIL)],
        findings=[Action(EVIL, EVIL, EVIL)],
        before_after=[[EVIL, EVIL, EVIL]],
        provenance={EVIL: EVIL},
        sources=sources,
        counts={EVIL: {EVIL: 3}},
        scores=replace(some_scores(), unit=EVIL),
        lengths=PairLengths(np.array([1]), np.array([2]), unit=EVIL),
        rating_scale={EVIL: 1.0},
        examples=[Example(EVIL, EVIL, EVIL, 1.0, 0.0, note=EVIL)],
    )
    page = Page(write_report(tmp_path, data))
    assert "script" not in page.tags and "b" not in page.tags
    # title twice, verdict, actions, findings, summary, sources, counts, scores, scale, example: everywhere unharmed
    assert sum(EVIL.lower() in text.lower() for text in page.texts) >= 24
    markdown = (tmp_path / "report.md").read_text()
    prose = re.sub(r"^(`{3,})text\n.*?\n\1$", "", markdown, flags=re.MULTILINE | re.DOTALL)
    assert not re.search(r"(?<!\\)<(script|b)>", prose)
    assert not re.search(r"(?<!\\)[*`$]", re.sub(r"^\*\*|\*\*$", "", prose, flags=re.MULTILINE))
    tables = re.findall(r"(?:^\|.*\n)+", prose, re.MULTILINE)
    assert len(tables) == 7
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("# no heading", r"\# no heading"),
        ("C #", r"C \#"),
        ("- no list", r"\- no list"),
        ("+ no list", r"\+ no list"),
        ("1. no list", r"1\. no list"),
        ("2) no list", r"2\) no list"),
        ("---", r"\---"),
        ("-1.5 nats", "-1.5 nats"),
        ("94 % of 3.5", "94 % of 3.5"),
        ("a\n\n# b\r\n- c", r"a \# b - c"),
        ("<script>alert(1)</script>", r"\<script\>alert(1)\</script\>"),
        ("| a | b |", r"\| a \| b \|"),
    ],
)
def test_a_line_of_text_is_no_markup(tmp_path, text, expected):
    write_report(tmp_path, ReportData(text, {"what": text}, examples=[Example("p", "c", "r", 1.0, 0.0, text)]))
    lines = (tmp_path / "report.md").read_text().splitlines()
    assert f"# {expected}" in lines and f"| what | {expected} |" in lines
    # inside of a line only what is markup everywhere
    assert any(line.startswith("### Pair 1: ") and ("#" not in line[4:] or r"\#" in line) for line in lines)


def test_a_fence_is_longer_than_what_it_holds(tmp_path):
    write_report(tmp_path, ReportData("t", {}, examples=[Example("p", "```python\nx\n```", "````", 1.0, 0.0)]))
    markdown = (tmp_path / "report.md").read_text()
    assert "\n````text\n```python\nx\n```\n````\n" in markdown
    assert "\n`````text\n````\n`````\n" in markdown


def test_long_texts_are_cut_and_say_so(tmp_path):
    page = Page(
        write_report(tmp_path, ReportData("t", {}, examples=[Example("p" * 701, "c" * 12_700, "r" * 700, 1.0, 0.0)]))
    )
    assert "p" * 700 in page.texts and "c" * 700 in page.texts and "r" * 700 in page.texts
    assert "Prompt, without its last 1 characters" in page.texts
    assert "Chosen (1), without its last 12,000 characters" in page.texts
    assert "Rejected (0)" in page.texts


def test_any_unicode_can_be_written(tmp_path):
    names = ["模型", "m\ud800", "a\u202eb"]  # half a surrogate pair, and a mark that turns the direction of writing
    sources = SourceTable(names, *np.full((3, 3), 0.5), np.zeros(3, bool), np.ones(3, int))
    data = ReportData("\udfff", {"模型": "\ud800"}, "模型 \x1b[31m", sources=sources)
    page = Page(write_report(tmp_path, data))
    assert "模型" in page.text and r"m\ud800" in page.text and r"a\u202eb" in page.text and r"\x1b[31m" in page.text
    assert not {"\u202e", "\x1b"} & set(page.text + (tmp_path / "report.md").read_text())


# ---- odd numbers


@pytest.mark.parametrize(
    "rewards",
    [
        np.ones((3, 4)),
        np.full((3, 4), NAN),
        np.empty((0, 4)),
        np.array([[1.0, 2.0, NAN]]),
        np.array([[1.0, 1e12, 3.0]] * 20),
        np.random.default_rng(2).integers(1, 11, (30, 8)),
        np.random.default_rng(3).standard_cauchy((200, 8)),
    ],
    ids=["equal", "none", "no prompts", "one pair", "outlier", "integers", "heavy tails"],
)
def test_scores_of_every_kind(tmp_path, rewards):
    scores = PickedScores(rewards, select_pairs(rewards, rejected="min"))
    text = Page(write_report(tmp_path, ReportData("t", {}, scores=scores))).text
    assert "pairs of" in text and "nan" not in text
    assert (tmp_path / "scores.png").read_bytes().startswith(PNG)


def test_flat_scores_and_a_table_of_pairs_make_the_same_page(tmp_path):
    scores = some_scores()
    flat = PickedScores(scores.rewards.ravel(), scores.pairs.table(), np.arange(51) * 12, "points")
    pages = [
        write_report(tmp_path / name, ReportData("t", {}, scores=s)).read_bytes()
        for name, s in (("a", scores), ("b", flat))
    ]
    assert pages[0] == pages[1]


@pytest.mark.parametrize("pairs", [0, 1, 50, 5000])
def test_margins_and_lengths_of_any_number_of_pairs(tmp_path, pairs):
    generator = np.random.default_rng(4)
    margins = generator.normal(size=(2, pairs))
    margins[0, ::10] = NAN
    lengths = generator.integers(0, 3000, (2, pairs))
    data = ReportData("t", {}, margins=MarginPairs(*margins, margins[1] > 0), lengths=PairLengths(*lengths))
    text = Page(write_report(tmp_path, data)).text
    assert f"{(margins[1] > 0).sum():,} of {pairs:,} pairs kept" in text and "nan" not in text
    assert (f"{-(-pairs // 10):,} pairs lack one of the two" in text) == (pairs > 0)
    if pairs == 5000:
        seen = ~np.isnan(margins[0])
        agree = ((margins[0] > 0) == (margins[1] > 0))[seen].mean()
        assert f"agree on {100 * agree:.1f} % of the pairs" in text
        right = (lengths[0] > lengths[1]).mean() + (lengths[0] == lengths[1]).mean() / 2
        assert f"right on {100 * right:.1f} % of the pairs" in text


def test_what_length_report_knows_is_said(tmp_path):
    lengths = np.array([[30, 10, 20], [5, 50, 1]])
    pairs = {"prompt": [0, 1], "chosen": [0, 0], "rejected": [1, 2]}
    known = length_report(lengths, pairs, truncated=lengths > 40)
    data = ReportData("t", {}, lengths=PairLengths(lengths[:, 0], lengths[[0, 1], [1, 2]], found=known))
    text = Page(write_report(tmp_path, data)).text
    assert "right on 100.0 % of the pairs" in text and "50.0 % of the chosen ones are in the longest tenth" in text
    assert "Truncated: 16.7 % of all responses, 0.0 % of the chosen and 0.0 % of the rejected ones." in text
    alone = Page(write_report(tmp_path, ReportData("t", {}, lengths=replace(data.lengths, found=None)))).text
    assert "tenth" not in alone and "Truncated" not in alone and "right on 100.0 %" in alone


def test_equal_margins_and_equal_lengths(tmp_path):
    same = np.ones(10)
    data = ReportData("t", {}, margins=MarginPairs(same, same, same > 0), lengths=PairLengths(same, same))
    text = Page(write_report(tmp_path, data)).text
    assert "their correlation is –" in text and "right on 50.0 % of the pairs" in text


def test_a_margin_of_zero_has_no_sign_to_agree_with(tmp_path):
    margins = MarginPairs(np.array([0.0, 0.0, 2.0, -3.0]), np.array([-1.0, 0.0, 1.0, -4.0]), np.ones(4, bool))
    text = Page(write_report(tmp_path, ReportData("t", {}, margins=margins))).text
    assert "signs agree on 75.0 % of the pairs" in text


def test_nothing_to_count(tmp_path):
    nobody = SourceTable([], *np.zeros((3, 0)), np.zeros(0, bool), np.zeros(0, int))
    data = ReportData("t", {}, counts={}, rating_scale={}, sources=nobody)
    page = Page(write_report(tmp_path, data))
    assert "0 of 0 sources do not fit" in page.text and page.tags.count("h2") == 2
    counts = ReportData("t", {}, counts={"pairs": {}, "prompts": {"kept": 0}})
    assert "0.0 %" in Page(write_report(tmp_path, counts)).text


def test_many_sources(tmp_path):
    share = np.linspace(0, 1, 200)
    names = [f"source {at}" for at in range(200)]
    sources = SourceTable(names, share, share, share, share > 2, np.zeros(200, int), confidence=0.95)
    text = Page(write_report(tmp_path, ReportData("t", {}, sources=sources))).text
    assert "0 of 200 sources do not fit." in text and "The plot shows the first 30." in text and "95 % interval" in text
    assert all(name in text for name in names)
    assert text.index("source 199") < text.index("source 0 ")


@pytest.mark.parametrize(
    "data",
    [
        {"margins": MarginPairs(np.zeros(2), np.zeros(3), np.zeros(2, bool))},
        {"lengths": PairLengths(np.zeros(2), np.zeros(3))},
        {"sources": SourceTable(["a"], *np.zeros((3, 2)), np.zeros(2, bool), np.zeros(2, int))},
        {"margins": MarginPairs(*np.zeros((2, 2, 2)), np.zeros((2, 2), bool))},
    ],
)
def test_arrays_that_do_not_belong_together(tmp_path, data):
    with pytest.raises(ValueError, match=r"must be vectors of one length, got \{"):
        write_report(tmp_path, ReportData("t", {}, **data))
    assert not list(tmp_path.iterdir())


# ---- bins


def test_few_values_have_a_bin_each():
    assert report_plots._edges(np.array([3.0, 1.0, 2.0, 2.0, NAN])).tolist() == [0.5, 1.5, 2.5, 3.5]
    assert report_plots._edges(np.full(9, 4.0)).tolist() == [3.5, 4.5]


def test_a_long_tail_does_not_squeeze_the_rest():
    values = np.concatenate([np.random.default_rng(5).normal(size=10_000), [1e6, -1e300]])
    edges = report_plots._edges(values)
    assert -5 < edges[0] < -2 < 2 < edges[-1] < 5
    shares = report_plots._shares(values, edges)
    assert shares.sum() == pytest.approx(100)  # the tail is in the outermost bins
    plain = report_plots._edges(values[:-2])
    assert (plain[0], plain[-1]) == (values[:-2].min(), values[:-2].max())


# ---- files and settings


def test_writing_again_gives_the_same_bytes(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    write_report(folder, some_data())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before  # and no temporary file is left


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"cannot write .*file"):
        write_report(tmp_path / "file", ReportData("t", {}))
    with pytest.raises(InputError, match=r"cannot write .*file"):
        write_report(tmp_path / "file" / "below", ReportData("t", {}))


def test_settings_and_style_are_left_alone(tmp_path, folder):
    with matplotlib.rc_context({"font.size": 31, "axes.facecolor": "black", "savefig.dpi": 7}):
        before = dict(matplotlib.rcParams)
        styled = write_report(tmp_path, some_data())
        assert dict(matplotlib.rcParams) == before
    assert styled.read_bytes() == (folder / "report.html").read_bytes()


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r'the report needs matplotlib: pip install "fastpref\[cli\]"'):
        write_report(tmp_path, some_data())
    assert not list(tmp_path.iterdir())


def test_imports(python, tmp_path):
    code = """
import sys
from fastpref.curate import diagnostics
from fastpref.curate.pipeline import report
print(sorted({"torch", "matplotlib", "pyarrow"} & set(sys.modules)))
report.write_report(sys.argv[0] + "out", report.ReportData("t", {}, counts={"pairs": {"kept": 1}}))
print("matplotlib.pyplot" in sys.modules, "torch" in sys.modules)
"""
    assert python(code).stdout.split("\n")[:2] == ["[]", "False False"]


# ---- the real samples


@pytest.mark.skipif("FASTPREF_SCORED_SAMPLES" not in os.environ, reason="FASTPREF_SCORED_SAMPLES names no file")
def test_real_samples(tmp_path):
    """methods.md section 11: length decides max against min, and the median gap of logits is 19.9."""
    samples = read_scored_samples(os.environ["FASTPREF_SCORED_SAMPLES"])
    rewards = to_logit(samples.score_matrix())
    pairs = select_pairs(rewards, rejected="min").table()
    texts = [
        [samples.responses[p][at] for p, at in zip(pairs["prompt"], pairs[s], strict=True)]
        for s in ("chosen", "rejected")
    ]
    data = ReportData(
        title="real samples",
        summary={"pairs": len(pairs["prompt"])},
        scores=PickedScores(rewards, pairs, unit="logit of win_prob"),
        lengths=PairLengths(*(np.array([len(text) for text in side]) for side in texts)),
        examples=[Example(samples.prompts[0], texts[0][0], texts[1][0], 1.0, 0.0)],
    )
    text = Page(write_report(tmp_path, data)).text
    assert "403 pairs of 403 prompts" in text and "50 %: 19.9" in text
    assert float(re.search(r"right on ([\d.]+) % of the pairs", text)[1]) == pytest.approx(94.8, abs=0.5)
    assert float(re.search(r"is ([\d.]+) times as long", text)[1]) == pytest.approx(9.7, abs=0.2)
