"""`fastpref curate`: flags over the config file, and what the user reads at the end."""

import contextlib
import json
import shutil
import sys
import warnings

from fastpref.curate.pipeline.config import CurateConfig, config_from_table, toml_table
from fastpref.curate.pipeline.run import CurateResult, run
from fastpref.errors import InputError


def run_command(options: dict) -> int:
    """options: of the parser; those with a dot in their name are fields of the config. Returns the exit code."""
    config, run_options = parse(options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # they are in the result
        with _bar() as progress:
            result = _run(config, run_options, progress)
    for warning in result.warnings:
        print(f"fastpref curate: warning: {warning}", file=sys.stderr)
    print(json.dumps(result.summary, indent=2) if options["json"] else "\n".join(lines(result)))
    failed = (options["strict"] and result.warnings) or result.summary.get("pairs") == 0
    return 1 if failed else 0


def parse(options: dict) -> tuple[CurateConfig, dict]:
    """The config that file and flags give together, and the arguments of `run` beside it."""
    table = {} if options["config"] is None else toml_table(options["config"])
    given = {name: value for name, value in options.items() if value is not None}
    for name in ("input", "output", "report", "work", "seed", "order"):
        if name in given:
            table[name] = given[name]
    for name, value in given.items():
        part, dot, key = name.partition(".")
        if dot:
            table[part] = {**_part(table, part), key: value}
    if "select" in given:  # one flag for two fields
        table["select"] = {**_part(table, "select"), "fraction": None, "k": None, **given["select"]}
    begin, only = options["begin"], options["stage"]
    if begin is not None and only is not None:
        raise InputError("--from and --stage must not both be given")
    return config_from_table(table), {"begin": only or begin or "read", "only": only is not None}


def _part(table, name) -> dict:
    part = table.get(name, {})
    if not isinstance(part, dict):
        raise InputError(f"{name} must be a table, got {part!r}")
    return part


def _run(config, options, progress) -> CurateResult:
    """A disk that is full as an InputError."""
    try:
        return run(config, **options, progress=progress)
    except OSError as error:
        raise InputError(f"cannot write: {error.strerror or error}") from error


@contextlib.contextmanager
def _bar():
    """A function of (what, done, total) that draws a bar, on a terminal with tqdm installed; else None."""
    try:
        from tqdm import tqdm
    except ImportError:
        tqdm = None
    if tqdm is None or not sys.stderr.isatty():
        yield None
        return
    bars = {}

    def report(what, done, total):
        if what not in bars:
            close()
            # Without a size of its own, tqdm draws nothing on a pseudo-terminal that says it is 0 by 0.
            size = shutil.get_terminal_size()
            place = {"ncols": size.columns, "nrows": size.lines, "leave": False, "file": sys.stderr}
            bars[what] = tqdm(desc=what, total=total, unit_scale=True, **place)
        bars[what].update(done - bars[what].n)

    def close():
        for bar in bars.values():
            bar.close()

    try:
        yield report
    finally:
        close()


# ---- the summary in words


def lines(result: CurateResult) -> list[str]:
    """The summary of a run, a line for each thing that happened."""
    summary = result.summary
    stages = summary["stages"]
    of = "" if summary["sources"] is None else f" of {summary['sources']} sources"
    found = [("read", f"{summary['prompts']} prompts, {summary['responses']} responses{of}")]
    if summary["bad_rows"]:
        found.append(("", f"{summary['bad_rows']} bad rows"))
    found += [(name, _SAID[name](stages[name])) for name in stages]
    if "pairs" in summary:
        found.append(("left out", _listed(summary["responses_left_out"], "responses")))
        found.append(("dropped", _listed(summary["dropped"], "pairs")))
        found.append(("length", _length(summary["length"])))
        found.append(("resample", _resample(summary["resample"])))
    if summary.get("rating_scale"):
        found.append(("ratings", _ratings(summary["rating_scale"])))
    for path, rows in summary.get("written", {}).items():
        found.append(("wrote", f"{path}: {rows} rows"))
    found.append(("", f"{summary['seconds']:.1f} s"))
    return [f"{name:<10} {said}" for name, said in found if said]


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


def _listed(counts, what) -> str:
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
