"""fastpref curate: flags and config, what it prints and writes, its exit codes."""

import dataclasses
import io
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from fastpref.cli.arguments import options_of
from fastpref.cli.curate import parse_options
from fastpref.cli.main import _build_parser, _parse, main
from fastpref.curate import read_metadata
from fastpref.curate.files import writing
from fastpref.curate.pipeline.config import STAGES, CurateConfig

EXAMPLE = Path(__file__).parents[2] / "examples" / "curate.toml"
SOURCES = 10


def make_rows(prompts, seed=0):
    """Pools of 10 responses with scores of their own; the longer, the better."""
    rng = np.random.default_rng(seed)
    rows = []
    for p in range(prompts):
        logits = rng.normal(size=SOURCES) * 3
        rows.append(
            {
                "prompt": f"Question {p}?",
                "responses": ["word " * (1 + rank) + f"{p} {s}" for s, rank in enumerate(logits.argsort().argsort())],
                "win_prob": (1 / (1 + np.exp(-logits))).tolist(),
                "who": [f"model-{s}" for s in range(SOURCES)],
            }
        )
    return rows


@pytest.fixture
def samples(tmp_path, monkeypatch):
    """samples.jsonl in the working directory, which is new."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in make_rows(50)))
    return path


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def curate(*arguments, scores="win_prob:logit"):
    return main(["curate", "samples.jsonl", "--scores", scores, *arguments])


def test_a_run_says_what_it_did(samples, capsys):
    options = ("--rejected", "quantile:0.10", "--sft", "sft.jsonl", "--tau", "auto")
    assert curate("-o", "pairs.jsonl", *options) == 0
    captured = capsys.readouterr()
    said = dict(line.split(maxsplit=1) for line in captured.out.splitlines() if line[0] != " ")
    assert captured.out.startswith("read as pools: prompt=prompt, responses=responses, scores=win_prob\n")
    assert "read       50 prompts, 500 responses\n" in captured.out
    assert said["audit"] == "skipped: no sources"
    assert said["construct"].startswith("50 pairs, max vs quantile:0.10; rejected is its pool's minimum in 0.0%")
    assert said["route"].startswith("6 pairs to SFT (12.0%)")
    assert "wrote      pairs.jsonl: 44 rows\nwrote      sft.jsonl: 6 rows\n" in captured.out
    warned = captured.err.splitlines()
    assert all(line.startswith("fastpref curate: warning: ") for line in warned)
    (line,) = [line for line in warned if line.endswith(" [length-decides]")]
    assert "the longer response is the chosen one in 100.0% of the pairs" in line
    assert sorted(os.listdir()) == [
        "pairs.jsonl", "pairs.jsonl.meta.json", "samples.jsonl", "sft.jsonl", "sft.jsonl.meta.json"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ('tau = "quantile:1"', "50 pairs to SFT (100.0%)"),
        ('tau = "quantile:0"\ninclusive = true', "0 pairs to SFT (0.0%)"),
        ("tau = 1000\ninclusive = true", "50 pairs to SFT (100.0%), margin at most 1000"),
        ("tau = 1000", "50 pairs to SFT (100.0%), margin below 1000"),
    ],
)
def test_what_is_said_of_routes(samples, capsys, table, said):
    Path("route.toml").write_text(f"[route]\n{table}\n")
    assert curate("-o", "pairs.jsonl", "--config", "route.toml") == 0
    assert f"route      {said}\n" in capsys.readouterr().out


def test_the_summary_as_json(samples, capsys):
    assert curate("-o", "pairs.jsonl", "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["prompts"], summary["responses"], summary["pairs"]) == (50, 500, 50)
    assert list(summary["stages"]) == ["hygiene", "audit", "clean", "length", "construct", "select", "route"]
    assert summary["written"] == {"pairs.jsonl": 50}
    assert [notice["id"] for notice in summary["notices"]] == ["length-decides"]
    assert summary["notices"][0]["severity"] == "warning"


def test_what_more_responses_would_bring(samples, capsys):
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    for name in ("responses", "win_prob", "who"):
        rows[0][name] = rows[0][name][:4]
    rows[1]["responses"][1] = rows[1]["responses"][0]  # a copy, whose two scores differ by 0.2 in logits
    rows[1]["win_prob"][:2] = (1 / (1 + np.exp(-np.array([-5.1, -4.9])))).tolist()
    rows[2]["win_prob"] = [0.9, 0.901, *[0.1] * 8]
    samples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert curate("-o", "pairs.jsonl", "--json") == 0
    found = json.loads(capsys.readouterr().out)["resample"]
    noise = 0.2 / np.sqrt(2)
    best = [np.sort(np.log(p) - np.log1p(-p))[-2:] for p in (np.array(row["win_prob"]) for row in rows)]
    close = sum(top - second < noise for second, top in best)
    assert (found["too_few"], found["unresolved"]) == (1, close) and close > 0
    assert found["judge_noise"] == pytest.approx(noise)
    assert 0 < found["median_gain"] < 3  # rewards have std 3
    assert curate("-o", "pairs.jsonl") == 0
    assert f"1 prompts have fewer than five; in {close} the best two are closer" in capsys.readouterr().out
    assert curate("-o", "pairs.jsonl", "--order", "construct") == 0
    assert "the judge's noise" not in capsys.readouterr().out


def test_the_scale_of_the_ratings_is_in_the_output(samples):
    assert curate("-o", "pairs.parquet") == 0
    known = read_metadata("pairs.parquet")
    assert known["rating_scale"]["beta"] == 0.1 and known["rating_scale"]["median"] > 0
    assert known["config"]["read"]["scores"] == ["win_prob:logit"]
    assert curate("-o", "pairs.jsonl") == 0
    assert read_metadata("pairs.jsonl")["rating_scale"] == known["rating_scale"]


def test_flags_win_over_the_config(samples, capsys):
    arguments = ["curate", "samples.jsonl", "-o", "pairs.jsonl", "--config", str(EXAMPLE), "--json", "--sources", "who"]
    assert main([*arguments, "--rejected", "min", "--select", "7", "--tau", "none"]) == 0
    captured = capsys.readouterr()
    stages_said = json.loads(captured.out)["stages"]
    assert stages_said["construct"]["rule"] == "max vs min"
    assert stages_said["select"]["selected"] == 7 == len(read_lines("pairs.jsonl"))
    assert stages_said["route"] == {"skipped": "not asked for"}
    # the rest is the file's: sources are audited, though on 50 prompts none is flagged
    assert "audit did nothing: scores has exchangeable sources" in captured.err


@pytest.mark.parametrize(
    ("file_format", "out", "fields"),
    [
        ("trl", "pairs.jsonl", {"prompt": str, "chosen": str, "rejected": str}),
        ("trl-conversational", "pairs.jsonl", {"prompt": list, "chosen": list, "rejected": list}),
        ("axolotl", "pairs.jsonl", {"messages": list, "chosen": dict, "rejected": dict}),
    ],
)
def test_formats(samples, file_format, out, fields):
    assert curate("-o", out, "--format", file_format) == 0
    for row in read_lines(out):
        assert {name: type(row[name]) for name in fields} == fields


def test_bad_rows_have_a_file_of_their_own(samples, capsys):
    with open(samples, "a") as file:
        file.write("{\n")
        file.write(json.dumps({"prompt": "x", "responses": ["a"], "win_prob": [0.1, 0.2]}) + "\n")
    assert curate("-o", "pairs.jsonl", "--bad-rows", "bad.jsonl") == 0
    captured = capsys.readouterr()
    bad = read_lines("bad.jsonl")
    assert [row["row"] for row in bad] == [51, 52]
    assert "one entry per response, got 2 for 1" in bad[1]["reason"]
    assert "2 bad rows" in captured.out
    assert "warning: 2 of 52 rows are left out, the first samples.jsonl:51: not JSON" in captured.err
    assert curate("-o", "pairs.jsonl", "--bad-rows", "bad.jsonl", "--strict") == 1
    samples.write_text("{\n\nnull\n")
    assert curate("-o", "none.jsonl", "--bad-rows", "bad.jsonl") == 2
    assert [row["row"] for row in read_lines("bad.jsonl")] == [1, 3]


def test_strict_writes_and_exits_with_1(samples, capsys):
    assert curate("-o", "pairs.jsonl", "--strict", "--on-degenerate", "warn") == 1
    assert "warning: mean-2std lies below every reward" in capsys.readouterr().err
    assert len(read_lines("pairs.jsonl")) == 50
    texts = ["a b", "c d e", "f"]
    rows = [{"prompt": f"{p}", "responses": [f"{t} {p}" for t in texts], "s": [1, 3 + p, 2]} for p in range(20)]
    samples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert curate("-o", "pairs.jsonl", "--strict", "--rejected", "min", scores="s") == 1  # the longest one wins
    rows = [row | {"s": [3 + p, 1, 2]} for p, row in enumerate(rows)]
    samples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert curate("-o", "pairs.jsonl", "--strict", "--rejected", "min", scores="s") == 0


def test_what_hygiene_reports_and_leaves_out(samples, capsys):
    rows = read_lines(samples)
    for row in rows[:10]:
        row["responses"][0] = "I cannot help with that."
    samples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert curate("-o", "pairs.jsonl") == 0
    assert "1 repeated texts, one under 10 prompts, reported (--apply leaves them out)\n" in capsys.readouterr().out
    assert curate("-o", "pairs.jsonl", "--apply") == 0
    captured = capsys.readouterr()
    assert "1 repeated texts, one under 10 prompts, left out\n" in captured.out
    assert "left out   10 responses: repeated_text 10\n" in captured.out


def test_no_pair_at_all_exits_with_1(samples, capsys):
    options = ("--min-gap", "1000", "--select", "0.5", "--tau", "1", "--sft", "s.jsonl", "--report", "page")
    assert curate("-o", "pairs.jsonl", *options) == 1
    assert Path("pairs.jsonl").read_text() == ""
    assert "dropped    50 pairs: small_gap 50" in capsys.readouterr().out


def test_a_report(samples):
    assert curate("-o", "pairs.jsonl", "--sources", "who", "--exclude", "none", "--report", "page") == 0
    assert {"report.md", "report.html"} <= set(os.listdir("page"))
    page = Path("page/report.html").read_text()
    assert "Pairs of samples.jsonl" in page and "Question 0?" in page


def test_stages_one_by_one(samples, capsys):
    assert curate("-o", "whole.jsonl", "--work", "work", "--rejected", "min_of_3") == 0
    assert sorted(os.listdir("work")) == sorted(f"{name}.npz" for name in ("read", *STAGES))
    again = ("--work", "work", "--rejected", "min_of_3")
    assert curate("-o", "again.jsonl", *again, "--from", "select") == 0
    assert Path("again.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    assert curate(*again, "--stage", "construct") == 0
    capsys.readouterr()
    assert curate("-o", "again.jsonl", *again, "--seed", "3", "--from", "write") == 2
    error = capsys.readouterr().err
    assert error == "fastpref curate: work/route.npz is stale: seed was 0, now 3; run from an earlier stage\n"


def test_without_sources_torch_is_not_imported(samples, python, tmp_path):
    code = (
        "import sys; from fastpref.cli.main import main\n"
        "arguments = ['samples.jsonl', '-o', 'pairs.jsonl', '--scores', 'win_prob:logit', '--select', '0.5']\n"
        "code = main(['curate', *arguments])\n"
        "sys.exit(10 if 'torch' in sys.modules else code)"
    )
    done = python(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_bar_on_a_terminal_alone(samples, capsys, monkeypatch):
    assert curate("-o", "pairs.jsonl", "--rejected", "quantile:0.10") == 0
    assert "reading" not in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert curate("-o", "pairs.jsonl", "--rejected", "quantile:0.10") == 0
    captured = capsys.readouterr()
    assert "reading" in captured.err and "writing" in captured.err and "reading" not in captured.out


def test_help_says_where_it_starts(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["curate", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    assert "It starts at scored files: it samples no responses and scores none." in said
    assert set(re.findall(r"(?<= )--[a-z-]+", said)) >= {"--scores", "--sources", "--apply", "--strict", "--report"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no output was named: -o OUT (output), a file that ends in .jsonl, .jsonl.gz or .parquet"),
        (["-o", "pairs.txt"], "the output must end in .jsonl, .jsonl.gz, .parquet, got pairs.txt"),
        (["-o", "samples.jsonl"], "samples.jsonl would overwrite an input"),
        (["-o", "p.jsonl", "--bad-rows", os.devnull], f"cannot write {os.devnull}: it is not a regular file"),
        (["-o", "samples.jsonl/pairs.jsonl"], "samples.jsonl is not a folder"),
        (["-o", "p.jsonl", "--config", "c.toml"], "unknown key construct.rejectd, known: construct.chosen"),
        (["-o", "p.jsonl", "--config", "none.toml"], "cannot read none.toml: No such file or directory"),
        (["-o", "p.jsonl", "--rejected", "worst"], "rejected must be"),
        (["-o", "p.jsonl", "--on-degenerate", "error"], "mean-2std lies below every reward"),
        (["-o", "p.jsonl", "--select", "51"], "select.k must be at most the 50 pairs there are, got 51"),
        (["-o", "p.jsonl", "--tau", "high"], 'tau must be a number or "quantile:'),
        (["-o", "p.jsonl", "--order", "audit"], "order must hold construct"),
        (["-o", "p.jsonl", "--sources", "whom"], "whom"),
        (["-o", "p.jsonl", "--stage", "construct"], "needs --work DIR"),
        (["-o", "p.jsonl", "--from", "construct", "--stage", "construct", "--work", "w"], "must not both be given"),
        (["-o", "p.jsonl", "--test-share", "0.1"], "write.test and write.test_share need each other"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_code_2(samples, capsys, arguments, message):
    Path("c.toml").write_text('[construct]\nrejectd = "min"\n')
    content = samples.read_bytes()
    assert curate(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("fastpref curate: ") and message in captured.err
    assert captured.err.count("\n") == 1 and captured.out == ""
    assert sorted(os.listdir()) == ["c.toml", "samples.jsonl"]
    assert samples.read_bytes() == content


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (["--select", "0"], "must be positive and finite, got 0"),
        (["--select", "1.5"], "must be below 1 or a whole number, got 1.5"),
        (["--exclude", "all"], "invalid choice: 'all'"),
        (["--missing", "abc"], "--missing: must be numbers, separated by commas, got 'abc'"),
        (["--workers", "0"], "must be at least 1, got 0"),
        (["--unknown"], "unrecognized arguments: --unknown (see fastpref curate --help)"),
        (["--rejectd", "min"], "unrecognized arguments: --rejectd min, nearest is --rejected (see fastpref curate --"),
    ],
)
def test_wrong_flags(capsys, flag, message):
    with pytest.raises(SystemExit) as caught:
        main(["curate", "in.jsonl", "-o", "out.jsonl", *flag])
    assert caught.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt, 130), (OSError(28, "No space left on device"), 2)])
def test_an_interrupted_run_leaves_nothing(samples, monkeypatch, capsys, error, code):
    def failing(*_, **__):
        raise error

    monkeypatch.setattr(writing, "pair_rows_of", failing)
    assert curate("-o", "pairs.jsonl", "--workers", "1") == code
    assert os.listdir() == ["samples.jsonl"]


def test_every_option_of_the_config_has_a_flag():
    given = {}
    for action in _flags():
        if action.dest not in ("help", "select"):
            assert action.help or action.metavar, action.option_strings
            given[action.dest] = action
    named = {"input", "output", "report", "work", "seed", "order"}
    for table in dataclasses.fields(CurateConfig):
        options = table.default_factory if dataclasses.is_dataclass(table.default_factory) else None
        if options is None:
            assert table.name in named and table.name in given
            continue
        for option in dataclasses.fields(options):
            if (table.name, option.name) not in (("select", "fraction"), ("select", "k")):  # --select
                assert f"{table.name}.{option.name}" in given, f"{table.name}.{option.name} has no flag"
    assert not [dest for dest in given if "." in dest and not _is_option(dest)]


def _flags():
    _, commands = _build_parser()
    return commands.choices["curate"]._actions


def _is_option(dest) -> bool:
    table, _, name = dest.partition(".")
    return name in {option.name for option in dataclasses.fields(getattr(CurateConfig(), table))}


@pytest.mark.parametrize(
    ("flags", "stage", "expected"),
    [
        (["--repeated-share", "0.5", "--repeated-least", "9"], "hygiene", {"repeated_share": 0.5, "repeated_least": 9}),
        (["--audit-threshold", "2.5", "--audit-rank", "2"], "audit", {"threshold": 2.5, "rank": 2}),
        (["--clean-threshold", "4", "--clean-rank", "1"], "clean", {"threshold": 4.0, "rank": 1}),
        (["--length-band", "0.2"], "length", {"band": 0.2}),
        (["--ddof", "1", "--labels", "agree"], "construct", {"ddof": 1, "labels": "agree"}),
        (
            ["--select-lower", "-1", "--select-upper", "3", "--require-positive"],
            "select",
            {"lower": -1.0, "upper": 3.0, "require_positive": True},
        ),
        (["--tau", "0.5", "--tau-inclusive"], "route", {"tau": 0.5, "inclusive": True}),
        (["--no-system-role", "--beta", "0.5"], "write", {"system_role": False, "beta": 0.5}),
    ],
)
def test_flags_of_options(flags, stage, expected):
    config, _ = parse_options(options_of(_parse(["curate", "in.jsonl", "-o", "out.jsonl", *flags])))
    assert vars(getattr(config, stage)).items() >= expected.items()


def test_results_come_before_warnings(samples, capfd):
    assert curate("-o", "pairs.jsonl") == 0
    both = capfd.readouterr()
    assert "wrote" in both.out and "warning:" not in both.out and "[length-decides]" in both.err
    order = []

    class Stream(io.StringIO):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def write(self, text):
            order.append(self.name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", Stream("results"))
        patch.setattr(sys, "stderr", Stream("warnings"))
        assert curate("-o", "pairs.jsonl") == 0
    assert order[0] == "results" and order.index("warnings") > order.count("results") - 1


def test_findings_are_notes_and_do_not_count_as_warnings(samples, capsys):
    rows = [
        {"prompt": f"{p}", "responses": [f"{t} {p}" for t in ("a b", "c d e", "f")], "s": [3 + p, 1, 2]}
        for p in range(20)
    ]
    samples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert curate("-o", "pairs.jsonl", "--strict", scores="s") == 0
    captured = capsys.readouterr()
    assert captured.err == "" and captured.out.count("[small-pools]\n") == 1
    assert (
        "note       20 of 20 pairs come from pools of 5 responses or fewer, where the rule mean-2std is min"
        in captured.out
    )
