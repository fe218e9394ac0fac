"""`fastpref curate`: its flags, which override the config file, and the summary that it prints."""

import argparse
import json
import re
import sys
import warnings
from typing import TYPE_CHECKING

from fastpref._progress import StageBars
from fastpref.cli.arguments import ColumnsAction, options_of, positive_integer, positive_number
from fastpref.cli.signals import sigterm_interrupts
from fastpref.curate.pipeline.config import (
    CLEAN,
    EXCLUDE,
    FORMATS,
    GOALS,
    LABELS,
    LENGTH_CONTROL,
    CurateConfig,
    config_from_table,
    toml_table,
)
from fastpref.errors import InputError, printable

if TYPE_CHECKING:
    from fastpref.curate.pipeline.run import CurateResult

DESCRIPTION = """\
Makes training pairs of scored responses. It starts at scored files: it samples no responses and scores none.

IN is JSON Lines, a JSON array, CSV (its delimiter is found), Parquet or Arrow, also .gz or .zst: a file, several, a
glob in quotes, a folder, "-" for stdin, or an address that fsspec opens. A row holds a prompt and its responses with
their scores, a published pair with scores or without, two responses and a label, or one response; --help-layouts lists
the layouts, which are told apart by their columns. Columns called otherwise are named with --columns.
Prompts and responses are strings or messages [{"role", "content", ...}, ...]. A row that lacks what it must hold is a
bad row: left out, counted, listed in --bad-rows.

OUT is .jsonl[.gz] or .parquet, a row a pair: texts as --format has them, and beside them the scores (score_chosen,
score_rejected, margin) and where it all comes from. Scores stay as they are in every stage. Pairs whose sides were
published keep them; the margin of one that its scores contradict is negative (--labels).

The stages, in this order unless the config says otherwise:
  hygiene    copies of a text under one prompt count once (with the mean of their scores), blank responses and missing
             scores not at all. One text under many prompts, prompts that stand in --decontaminate files, and responses
             whose scores contradict each other are reported; --apply leaves them out.
  audit      with --sources: whose scores the other sources do not explain. From 200 prompts on, flagged sources are
             neither chosen nor rejected, nor part of a pool (--exclude).
  clean      with --sources: single scores that the others contradict count as missing (--clean).
  length     --length-control, after the audit; "longest wins" is reported in any case.
  construct  --chosen against --rejected, of every prompt.
  select     --select of the pairs, by margins; several score columns vote.
  route      with --tau: pairs of small margin go to SFT: their route says so, or they go to --sft.

IN is read twice: first the scores, then the texts of the pairs. Every output is written whole or not at all."""
EXIT_CODES = """\
Exit codes: 0 done; 1 done and written, but no pair was kept, or there were warnings and --strict; 2 an input, an option
or an output is wrong, and the message says which; 3 a defect of fastpref, with a traceback; 130 interrupted."""


def add_parser(commands) -> None:
    curate = commands.add_parser(
        "curate",
        help="scored samples -> training pairs: cleaned, selected, routed, with their scores and where they come from",
        description=DESCRIPTION,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    curate.set_defaults(handler=run_command, name="fastpref curate")
    # argparse takes what begins with a minus for a flag, but for one number: "-1,-100" is a value, too
    curate._negative_number_matcher = re.compile(r"-\.?\d")
    _add_run_flags(curate)
    _add_reading_flags(curate.add_argument_group("reading"))
    _add_cleaning_flags(curate.add_argument_group("cleaning"))
    _add_pair_flags(curate.add_argument_group("pairs"))
    _add_writing_flags(curate.add_argument_group("writing"))


# A destination "stage.field" is a field of the config.


def _add_run_flags(curate) -> None:
    add = curate.add_argument
    add("input", metavar="IN", nargs="+", help="scored samples, or published pairs")
    add("--help-layouts", action=_HelpLayouts, nargs=0, help="the layouts of IN, a row each")
    add("-o", dest="output", metavar="OUT", help="the pairs; replaced if it is there")
    add("--config", metavar="FILE", help="TOML, a table per stage; flags win over it")
    add("--report", metavar="DIR", help="a page of what was done, report.md and report.html")
    add("--json", action="store_true", help="print the summary as JSON")
    add("--strict", action="store_true", help="exit with 1 after warnings; findings are none")
    add("--seed", type=int, metavar="N", help="of everything random (0)")
    add("--order", type=_comma_separated, metavar="STAGE,...", help="of the stages; those not named are left out")
    add("--work", metavar="DIR", help="keep what every stage makes, one .npz each")
    add("--from", dest="begin", metavar="STAGE", help='begin there, with what --work kept; also "write"')
    add("--stage", metavar="STAGE", help="run this one alone on what --work kept, and keep its result; no OUT")


def _add_reading_flags(group) -> None:
    add = group.add_argument
    add(
        "--scores",
        dest="read.scores",
        type=_comma_separated,
        metavar="FIELD[:SCALE],...",
        help=":logit for probabilities, :best-low or :best-high for ranks; the first constructs the pairs (default: "
        "the usual ones of the layout)",
    )
    add("--sources", dest="read.sources", metavar="FIELD", help="who wrote each response, such as models")
    add("--lengths", dest="read.lengths", metavar="FIELD", help="of the responses (default: characters)")
    add("--layout", dest="read.layout", metavar="NAME", help="of IN, where its columns fit several (--help-layouts)")
    add(
        "--columns",
        dest="read.columns",
        action=ColumnsAction,
        metavar="ROLE=NAME,...",
        help="what IN calls them, such as prompt=question,responses=generations or response=output,system=instructions",
    )
    add(
        "--keep",
        dest="read.keep",
        type=_comma_separated,
        metavar="FIELD,...",
        help="columns that reach OUT as they are",
    )
    add(
        "--missing",
        dest="read.missing",
        type=_numbers,
        metavar="X,...",
        help="scores that stand for none, such as -1; numbers of size 1e30 or more always do",
    )
    add(
        "--implicit",
        dest="read.implicit",
        metavar="FIELD|NPY",
        help="implicit rewards of beta 1, one per response of the file; they vote when pairs are selected",
    )
    add(
        "--score-range",
        dest="read.score_range",
        type=_numbers,
        metavar="LOW,HIGH",
        help="what the first scores can be, such as 1,10",
    )
    add("--workers", dest="read.workers", type=positive_integer, metavar="N", help="processes that read")


def _add_cleaning_flags(group) -> None:
    add = group.add_argument
    add(
        "--apply",
        dest="hygiene.apply",
        action="store_true",
        default=None,
        help="also leave out repeated texts, contaminated prompts and contradicted scores",
    )
    add(
        "--decontaminate",
        dest="hygiene.decontaminate",
        type=_comma_separated,
        metavar="FILE,...",
        help="not to train on",
    )
    add("--exclude", dest="audit.exclude", choices=EXCLUDE, help="flagged sources: from what (both)")
    add("--clean", dest="clean.action", choices=CLEAN, help="single corrupted scores (mask)")
    add(
        "--repeated-share",
        dest="hygiene.repeated_share",
        type=float,
        metavar="X",
        help="of the prompts, beyond which a text under so many of them is reported (0.01)",
    )
    add("--repeated-least", dest="hygiene.repeated_least", type=positive_integer, metavar="N", help="and as many (3)")
    add(
        "--audit-threshold", dest="audit.threshold", type=positive_number, metavar="X", help="z of a flagged source (3)"
    )
    add("--audit-rank", dest="audit.rank", type=positive_integer, metavar="N", help="of what sources share (at most 3)")
    add(
        "--clean-threshold",
        dest="clean.threshold",
        type=positive_number,
        metavar="X",
        help="deviations of a wrong score (5)",
    )
    add("--clean-rank", dest="clean.rank", type=positive_integer, metavar="N", help="of what sources share (at most 3)")
    add(
        "--length-control",
        dest="length.control",
        choices=LENGTH_CONTROL,
        help="within_source: scores minus their slope over length within prompt and source; match: of the responses "
        "near the rejected's target the one nearest in length to the chosen (none)",
    )
    add("--length-band", dest="length.band", type=positive_number, metavar="X", help="how near, in deviations (0.5)")


def _add_pair_flags(group) -> None:
    add = group.add_argument
    add(
        "--labels",
        dest="construct.labels",
        choices=LABELS,
        help="pairs whose sides were published: as published (default); scores: the higher score is chosen; agree: "
        "without those that their scores contradict",
    )
    add(
        "--chosen",
        dest="construct.chosen",
        metavar="RULE",
        help="max (default), min, mean+1std, quantile:0.9, ...: the response nearest to that",
    )
    add(
        "--rejected",
        dest="construct.rejected",
        metavar="RULE",
        help="mean-2std (default), quantile:0.10, min_of_5 (the lowest of five drawn), min, ...",
    )
    add("--scale", dest="construct.scale", metavar="SCALE", help="of the moments: raw (default), logit, mad, ...")
    add(
        "--on-degenerate",
        dest="construct.on_degenerate",
        metavar="WHAT",
        help="where more than a fifth of the rejected's targets lie below pools of more than five: ignore (default), "
        "warn, min_of_5, quantile:0.10, drop, error",
    )
    add("--ddof", dest="construct.ddof", type=int, choices=(0, 1), help="1: the sample's standard deviation (0)")
    add(
        "--min-chosen", dest="construct.min_chosen", type=_number_or_text, metavar="X", help="least score of the chosen"
    )
    add("--min-gap", dest="construct.min_gap", type=_number_or_text, metavar="X", help="least gap, or quantile:0.1")
    add("--max-gap", dest="construct.max_gap", type=_number_or_text, metavar="X", help="largest gap, likewise")
    add("--pairs-per-prompt", dest="construct.pairs_per_prompt", type=positive_integer, metavar="N")
    add("--select", dest="select", type=_count_or_share, metavar="N", help="pairs to keep, or their share below 1")
    add("--how", dest="select.how", metavar="HOW", help="margins combine: mul (BeeS, default), add, max, ... ")
    add("--select-lower", dest="select.lower", type=float, metavar="X", help="margin that counts as none (-2)")
    add("--select-upper", dest="select.upper", type=float, metavar="X", help="margin that counts as certain (sought)")
    add(
        "--require-positive",
        dest="select.require_positive",
        action="store_true",
        default=None,
        help="select no pair that one of the scores contradicts",
    )
    add(
        "--tau",
        dest="route.tau",
        type=_number_or_text,
        metavar="X",
        help="margin below which a pair goes to SFT: a number, quantile:0.12, auto (that, or 0.5 for --score-range "
        "1,10), none (default)",
    )
    add(
        "--tau-inclusive",
        dest="route.inclusive",
        action="store_true",
        default=None,
        help="a margin of exactly that goes to SFT, too",
    )


def _add_writing_flags(group) -> None:
    add = group.add_argument
    add("--format", dest="write.format", choices=FORMATS, help="of the texts (trl)")
    add("--sft", dest="write.sft", metavar="FILE", help="pairs routed to SFT, as prompt and completion")
    add("--test", dest="write.test", metavar="FILE", help="pairs of the prompts held out")
    add("--test-share", dest="write.test_share", type=float, metavar="X", help="of the prompts, by their hash")
    add(
        "--easy-to-hard",
        dest="write.easy_to_hard",
        action="store_true",
        default=None,
        help="the largest margin first, for training without shuffling; otherwise in the order of IN",
    )
    add(
        "--goals",
        dest="write.goals",
        choices=GOALS,
        help="goal-conditioned rows: both, the pair and its swap; half, as many rows as pairs (none)",
    )
    add(
        "--no-system-role",
        dest="write.system_role",
        action="store_false",
        default=None,
        help="goals go before the first user turn, for chat templates without a system role",
    )
    add(
        "--beta",
        dest="write.beta",
        type=positive_number,
        metavar="X",
        help="of the loss, for the scale of ratings (0.1)",
    )
    add("--bad-rows", dest="write.bad_rows", metavar="FILE", help="rows that could not be read, and why, as .jsonl")


class _HelpLayouts(argparse.Action):
    """Prints the table of layouts."""

    def __call__(self, parser, namespace, values, option_string=None):
        from fastpref.curate.files import layouts

        print(layouts.__doc__.strip())
        parser.exit()


def _comma_separated(text) -> list[str]:
    return text.split(",")


def _numbers(text) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers, separated by commas, got {text!r}") from None


def _number_or_text(text) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _count_or_share(text) -> dict[str, float]:
    number = positive_number(text)
    if number < 1:
        return {"fraction": number}
    if number != int(number):
        raise argparse.ArgumentTypeError(f"must be below 1 or a whole number, got {text}")
    return {"k": int(number)}


# ---- the run


def run_command(arguments) -> int:
    options = options_of(arguments)
    with sigterm_interrupts():
        config, run_options = parse_options(options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # they are in the result
            with StageBars(unit_scale=True) as bars:
                run_options["command"] = arguments.command
                result = _run_pipeline(config, run_options, bars.report)
        lines = [json.dumps(result.summary, indent=2)] if options["json"] else map(printable, summary_lines(result))
        print("\n".join(lines), flush=True)
        for notice in result.notices:
            if notice.severity != "finding":
                print(f"fastpref curate: {notice.severity}: {printable(notice.text)} [{notice.id}]", file=sys.stderr)
    failed = (options["strict"] and result.warnings) or result.summary.get("pairs") == 0
    return 1 if failed else 0


def parse_options(options: dict) -> tuple[CurateConfig, dict]:
    """Returns the config that file and flags give together, and the arguments of `run` beside it."""
    table = {} if options["config"] is None else toml_table(options["config"])
    given = {name: value for name, value in options.items() if value is not None}
    for name in ("input", "output", "report", "work", "seed", "order"):
        if name in given:
            table[name] = given[name]
    if isinstance(table.get("input"), list) and len(table["input"]) == 1:
        (table["input"],) = table["input"]
    for name, value in given.items():
        part, dot, key = name.partition(".")
        if dot:
            table[part] = {**_table_of(table, part), key: value}
    if "select" in given:  # one flag for two fields
        table["select"] = {**_table_of(table, "select"), "fraction": None, "k": None, **given["select"]}
    begin, only = options["begin"], options["stage"]
    if begin is not None and only is not None:
        raise InputError("--from and --stage must not both be given")
    return config_from_table(table), {"begin": only or begin or "read", "only": only is not None}


def _table_of(table, name) -> dict:
    part = table.get(name, {})
    if not isinstance(part, dict):
        raise InputError(f"{name} must be a table, got {part!r}")
    return part


def _run_pipeline(config, options, progress) -> "CurateResult":
    """Runs the pipeline; raises InputError where an output cannot be written."""
    from fastpref.curate.pipeline.run import run

    try:
        return run(config, **options, progress=progress)
    except OSError as error:
        raise InputError(f"cannot write {error.filename or 'an output'}: {error.strerror or error}") from error


# ---- the summary in words


def summary_lines(result: "CurateResult") -> list[str]:
    """Returns the summary of a run, a line for each thing that happened."""
    summary = result.summary
    stages = summary["stages"]
    of = "" if summary["sources"] is None else f" of {summary['sources']} sources"
    found = [("read", f"{summary['prompts']} prompts, {summary['responses']} responses{of}")]
    if summary["bad_rows"]:
        found.append(("", _number_of(summary["bad_rows"], "bad row")))
    if summary["bad_responses"]:
        found.append(("", f"{_number_of(summary['bad_responses'], 'bad response')}, left out of their pools"))
    for reason, count in summary["not_read"].items():
        found.append(("", f"{count} {reason[:-1] if (reason, count) == ('ties', 1) else reason}, left out"))
    found += [(name, _SAID[name](stages[name])) for name in stages]
    if "pairs" in summary:
        found.append(("left out", _counted(summary["responses_left_out"], "responses")))
        found.append(("dropped", _counted(summary["dropped"], "pairs")))
        found.append(("length", _length(summary["length"])))
        found.append(("resample", _resample(summary["resample"] or {"median_gain": None})))
    if summary.get("rating_scale"):
        found.append(("ratings", _ratings(summary["rating_scale"])))
    for path, rows in summary.get("written", {}).items():
        found.append(("wrote", f"{path}: {rows} rows"))
    found += [("note", f"{notice.text} [{notice.id}]") for notice in result.notices if notice.severity == "finding"]
    found.append(("", f"{summary['seconds']:.1f} s"))
    return [f"read as {summary['read_as']}", *(f"{name:<10} {said}" for name, said in found if said)]


def _number_of(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _hygiene(stage) -> str:
    parts = [
        f"{stage[key]} {what}"
        for key, what in (
            ("duplicate", "duplicates"),
            ("blank", "blank"),
            ("clamped", "scores of exactly 0 or 1"),
            ("no_score", "without a score"),
            ("duplicate_prompts", "duplicate prompts"),
            ("contaminated_prompts", "contaminated prompts"),
        )
        if stage[key]
    ]
    if stage["contradicted"]:
        done = "left out" if stage["applied"] else "reported"
        parts.append(f"{stage['contradicted']} responses with contradicting scores, {done}")
    if stage["repeated_texts"]:
        most = stage["most_repeated"][0]
        source = f" ({most['source']})" if most["source"] is not None else ""
        parts.append(f"{stage['repeated_texts']} repeated texts, one under {most['prompts']} prompts{source}")
    if stage["repeated_texts"] or stage["contaminated_prompts"]:
        parts.append("left out" if stage["applied"] else "reported (--apply leaves them out)")
    return ", ".join(parts) or "nothing found"


def _audit(stage) -> str:
    if "skipped" in stage:
        return _skipped(stage)
    flagged = [f"{row['source']} (z {row['z']:.1f})" for row in stage["sources"] if row["flagged"]]
    if not flagged:
        first = stage["sources"][0]
        return f"no source flagged, the least explained is {first['source']} (z {first['z'] or 0:.1f})"
    return (
        f"flagged {', '.join(flagged)}; without the audit {stage['would_supply_chosen']} chosen and "
        f"{stage['would_supply_rejected']} rejected responses; excluded: {stage['exclude']}"
    )


def _clean(stage) -> str:
    if "skipped" in stage:
        return _skipped(stage)
    return (
        f"{stage['flagged']} of {stage['scores']} scores contradict the others ({stage['action']}); the best response "
        f"of {stage['best_changed']} of {stage['prompts']} prompts is another one now"
    )


def _control(stage) -> str:
    slope = f", slope {stage['slope']:.3g}" if "slope" in stage else ""
    return "" if stage["control"] == "none" else f"{stage['control']}{slope}"


def _construct(stage) -> str:
    if stage["rule"] == "published":
        text = f"{stage['pairs']} pairs, sides as they were published"
        agree = ", without those that their scores contradict" if stage["labels"] == "agree" else ""
        if not stage["compared"]:
            return f"{text}, without scores"
        return (
            f"{text}{agree}; of {stage['compared']} with scores, {stage['reversed']} reversed and {stage['tied']} tied"
        )
    text = f"{stage['pairs']} pairs, {stage['rule']}"
    if not stage["pairs"]:
        return text
    text += f"; rejected is its pool's minimum in {stage['share_rejected_min']:.1%}"
    if "mean" in stage["rule"] and stage["share_below_min"] is not None:
        text += f" (its target below that in {stage['share_below_min']:.1%})"
    return f"{text}, its median percentile {stage['median_percentile']:.1f}"


def _select(stage) -> str:
    if "selected" not in stage:
        return _skipped(stage) if "skipped" in stage else f"margins of {', '.join(stage['sources'])} by {stage['how']}"
    if "pairs" not in stage:
        return f"{stage['selected']} of {stage['prompts']} prompts, by the span of their scores"
    text = f"{stage['selected']} of {stage['pairs']} pairs by {stage['how']}"
    if not stage["selected"]:
        return text
    own, *others = stage["beside"]
    beside = [f"{row['selection']} {own[row['selection']]:.0%}" for row in others]
    return f"{text}; {stage['tied_at_cut']:.1%} tied at the cut; in common with {', '.join(beside)}"


def _route(stage) -> str:
    if "skipped" in stage:
        return _skipped(stage)
    if stage["share_sft"] is None:
        return "no pairs"
    text = f"{stage['sft']} pairs to SFT ({stage['share_sft']:.1%})"
    if stage["tau"] is None:  # infinite: all of them or none
        return text
    return f"{text}, margin {'at most' if stage['inclusive'] else 'below'} {stage['tau']:.4g}"


def _skipped(stage) -> str:
    return f"skipped: {stage['skipped']}"


_SAID = {
    "hygiene": _hygiene,
    "audit": _audit,
    "clean": _clean,
    "length": _control,
    "construct": _construct,
    "select": _select,
    "route": _route,
}


def _counted(counts, what) -> str:
    return f"{sum(counts.values())} {what}: {', '.join(f'{name} {n}' for name, n in counts.items())}" if counts else ""


def _length(length) -> str:
    if length["longest_wins"] is None:
        return ""
    text = f"the longer response is the chosen one in {length['longest_wins']:.1%}"
    text += f", {length['median_ratio']:.1f} times as long in the median"
    if length["chosen_in_top_decile"] is not None:
        text += f", in the top decile of its pool in {length['chosen_in_top_decile']:.1%}"
    if length["truncated_share"] is not None:
        text += f", {length['truncated_share']:.1%} truncated"
    return text


def _resample(found) -> str:
    if found["median_gain"] is None:
        return ""
    parts = [f"twice as many responses would raise the best score by {found['median_gain']:.2g} in the median"]
    if found["too_few"]:
        parts.append(f"{found['too_few']} prompts have fewer than five")
    if found["unresolved"] is not None:
        parts.append(
            f"in {found['unresolved']} the best two are closer than the judge's noise between copies, "
            f"{found['judge_noise']:.2g}"
        )
    return "; ".join(parts)


def _ratings(scale) -> str:
    return (
        f"median gap {scale['median']:.3g}: at beta {scale['beta']:g} RDPO wants beta_rating "
        f"{scale['suggested_beta_rating']:.2g}, ML-RDPO variance {scale['suggested_variance']:.3g}"
    )
