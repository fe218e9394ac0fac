"""What a run says of its pairs on the page: verdict, what to do first, and the data of every section."""

import math
import os
from datetime import datetime, timezone

import numpy as np

from fastpref._build import version
from fastpref.curate.files.samples import texts
from fastpref.curate.length import length_report
from fastpref.curate.notices import Notice
from fastpref.curate.pairs import select_pairs
from fastpref.curate.pipeline.config import CurateConfig
from fastpref.curate.pipeline.report import Action, Example, ReportData
from fastpref.curate.pipeline.report_sections import MarginPairs, PairLengths, PickedScores, SourceTable, percent
from fastpref.curate.pipeline.scores import primary_field, primary_scores
from fastpref.curate.pipeline.state import State

EXAMPLES_SHOWN = 3
ACTIONS = 3


def report_of_run(state: State, config: CurateConfig, summary: dict, notices, command=None) -> ReportData:
    """Gathers the page.

    Args:
        state: at the end of the run.
        config: of the run.
        summary: as in its result.
        notices: as in its result, the most urgent first.
        command: the line that started it; None where it was no command.

    Returns:
        What `write_report` takes.
    """
    samples, kept = state.samples, state.kept
    pairs, field = state.kept_pairs, primary_field(samples, config)
    audited = summary["stages"].get("audit", {}).get("sources")
    sources = audited and SourceTable(
        names=[row["source"] for row in audited],
        **{key: np.array([row[key] for row in audited], np.float64) for key in ("unexplained", "low", "high")},
        flagged=np.array([row["flagged"] for row in audited], bool),
        chosen=np.array([row["would_supply_chosen"] for row in audited]),
    )
    scores = None
    if field is not None:
        unit = field.name if field.scale == "raw" else f"{field.scale} of {field.name}"
        scores = PickedScores(np.where(state.valid, state.score, np.nan), pairs, samples.offsets, unit)
    implicit = state.pairs.get("margin_implicit")
    told = [notice for notice in notices if not notice.kind.technical]
    urgent = [notice for notice in told if notice.severity != "finding"]
    return ReportData(
        title=f"Pairs of {os.path.basename(samples.path)}",
        summary=_headlines(summary),
        verdict=_verdict(summary["pairs"], urgent),
        severity=urgent[0].severity if urgent and summary["pairs"] else "serious" if urgent else "finding",
        actions=[*map(_action, urgent[:ACTIONS]), *_further_actions(summary)][:ACTIONS],
        findings=[_action(notice) for notice in [*urgent[ACTIONS:], *(n for n in told if n.severity == "finding")]],
        scores=scores,
        sources=sources,
        before_after=_before_after(state, config),
        margins=None if implicit is None else MarginPairs(state.margin(state.score), implicit, kept),
        counts={
            "responses": {"kept": int(state.valid.sum())} | summary["responses_left_out"],
            "pairs": {"kept": summary["pairs"]} | summary["dropped"],
        },
        lengths=PairLengths(
            *(samples.lengths[state.place(side)[kept]] for side in ("chosen", "rejected")),
            unit=config.read.lengths or "characters",
            found=state.length_report(),
        ),
        rating_scale=summary.get("rating_scale"),
        examples=_examples(state, pairs),
        provenance=_provenance(samples.path, config, command),
    )


def _verdict(pairs, urgent) -> str:
    if not pairs:
        return "No pair was kept: there is nothing to train on yet."
    if any(notice.severity == "serious" for notice in urgent):
        return (
            f"{pairs:,} pairs, but do not train on them yet: what stands first below probably makes some of them wrong."
        )
    if urgent:
        things = "one thing" if len(urgent) == 1 else f"{len(urgent)} things"
        return f"{pairs:,} pairs, with {things} to look at before you train on them."
    return f"{pairs:,} pairs, and nothing was found that speaks against training on them."


def _action(notice: Notice) -> Action:
    return Action(notice.kind.title, notice.text, notice.kind.advice)


def _further_actions(summary) -> list[Action]:
    """What is worth doing with any pairs, for a run that found little."""
    found = [
        Action(
            "Read the examples below",
            "three pairs from the beginning, the middle and the end of the file stand at the end of this page",
            "If you would choose otherwise, the scores are to blame, and no pipeline mends them.",
        )
    ]
    resample = summary["resample"]
    if resample is not None and resample["median_gain"] and resample["too_few"]:
        found.append(
            Action(
                "Sample more responses for small pools",
                f"{resample['too_few']:,} prompts have fewer than five responses",
                f"Twice as many would raise the best score by {resample['median_gain']:.2g} in the median.",
            )
        )
    longest = summary["length"]["longest_wins"]
    if longest is not None:
        text = f"the longer response is the chosen one in {percent(longest)} of the pairs"
        found.append(
            Action("Compare with length alone", text, "A trained model should do better than that on new pairs.")
        )
    found.append(
        Action(
            "Hold some prompts out",
            "--test FILE and --test-share 0.1 set a tenth of the prompts aside, by their hash",
            "So you will see whether the model learnt the preference or these texts.",
        )
    )
    return found


def _headlines(summary) -> dict:
    made = summary["stages"]["construct"]
    found = {name.replace("_", " "): summary[name] for name in ("prompts", "responses", "bad_rows", "pairs")}
    routed = summary["stages"].get("route", {})
    if "sft" in routed:
        found["of them to SFT"] = routed["sft"]
    rule = "sides as published" if made["rule"] == "published" else made["rule"]
    return found | {"chosen against rejected": rule}


def _provenance(path, config, command) -> dict:
    return {
        "input": path,
        "command": command or "curate.run in Python",
        "version": f"fastpref {version}",
        "seed": config.seed,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "stages": ", ".join(config.order),
    }


def _before_after(state, config) -> list[list]:
    """Rows of what, before and after: of the plainest pairs there are, and of those that were kept."""
    samples = state.samples
    if state.published:
        both = np.diff(samples.offsets) == 2
        prompts = np.flatnonzero(both)
        before = {"prompt": prompts, "chosen": np.zeros(len(prompts), int), "rejected": np.ones(len(prompts), int)}
    else:
        plain = select_pairs(primary_scores(samples, config), "max", "min", offsets=samples.offsets).table()
        before = {name: plain[name] for name in ("prompt", "chosen", "rejected")}
    as_read = primary_scores(samples, config)
    columns = []
    for pairs in (before, state.kept_pairs):
        at = {side: samples.offsets[pairs["prompt"]] + pairs[side] for side in ("chosen", "rejected")}
        scores = {side: as_read[place] for side, place in at.items()}
        lengths = length_report(samples.lengths, pairs, offsets=samples.offsets)
        columns.append(
            {
                "pairs": len(pairs["prompt"]),
                "mean score of the chosen": _mean(scores["chosen"]),
                "mean score of the rejected": _mean(scores["rejected"]),
                "mean margin": _mean(scores["chosen"] - scores["rejected"]),
                "the longer one is chosen": percent(lengths.longest_wins),
                "different chosen texts": len(np.unique(samples.text_hash[at["chosen"]])),
            }
        )
    if state.samples.sources is not None:
        for column, pairs in zip(columns, (before, state.kept_pairs), strict=True):
            chosen = samples.sources[samples.offsets[pairs["prompt"]] + pairs["chosen"]]
            counts = np.bincount(chosen[chosen >= 0], minlength=len(samples.source_names))
            top = int(np.argmax(counts)) if counts.any() else None
            column["most often chosen"] = "–" if top is None else f"{samples.source_names[top]} ({counts[top]:,})"
    return [[what, columns[0][what], columns[1][what]] for what in columns[0]]


def _mean(values) -> float:
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else math.nan


def _examples(state, pairs) -> list[Example]:
    """Three pairs from all over the file."""
    prompts, first = np.unique(pairs["prompt"], return_index=True)
    shown = np.unique(np.linspace(0, max(len(prompts) - 1, 0), EXAMPLES_SHOWN).astype(np.int64))[: len(prompts)]
    found = []
    for pair, (prompt, responses) in zip(first[shown], texts(state.samples, prompts[shown]), strict=True):
        begin = state.samples.offsets[pairs["prompt"][pair]]
        sides = [pairs[side][pair] for side in ("chosen", "rejected")]
        shown_texts = [_conversation(responses[k]) for k in sides]
        found.append(Example(_conversation(prompt), *shown_texts, *(float(state.score[begin + k]) for k in sides)))
    return found


def _conversation(text) -> str:
    if isinstance(text, str):
        return text
    return "\n\n".join(f"{message['role']}: {_said(message)}" for message in text)


def _said(message) -> str:
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(part.get("text") or f"<{part.get('type')}>" for part in content)
    calls = [f"{call}" for call in message.get("tool_calls") or ()]
    return "\n".join(filter(None, [content, *calls]))
