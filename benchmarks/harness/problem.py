"""One problem of linear algebra, its competitors, and the record that report.py makes a table of."""

import time

import torch
from measure import Rounds

CPU = torch.device("cpu")


def measured(benchmark, op: str, name: str, competitors, judge, seconds: float = 20, notes=(), **facts) -> dict:
    """Rounds of all competitors, the first of which is fastpref; returns the rows of the table, by name.

    judge(answer) -> dict of what the table says of an answer. Every competitor runs once before, for that; one that
    takes longer than `seconds` has no further run, one that takes a tenth has two.
    """
    first, verdicts = {}, {}
    for competitor in competitors:
        start = time.perf_counter()
        answer = competitor.run()
        first[competitor.name] = time.perf_counter() - start
        verdicts[competitor.name] = judge(answer)
    subject = competitors[0].name
    playing = [c for c in competitors if first[c.name] <= seconds or c.name == subject]
    few = [c.name for c in playing if first[c.name] > seconds / 10]
    each = sum(first[c.name] for c in playing if c.name not in few or c.name == subject)
    rounds = Rounds(playing, CPU, subject, few=few)
    count = max(3, min(50, round(seconds / each)))
    benchmark.pedantic(rounds.play_subject, setup=rounds.play_others, teardown=rounds.end_round, rounds=count)
    summary = rounds.summary()
    rows = {}
    for c in competitors:
        once = 1e3 * first[c.name]
        alone = {"title": c.title, "rounds": 1, "median_ms": once, "min_ms": once, "max_ms": once}
        rows[c.name] = summary.get(c.name) or alone | {"times_subject": once / summary[subject]["median_ms"]}
        rows[c.name] |= verdicts[c.name]
    benchmark.extra_info.update(
        op=op, name=name, problem=True, rounds=count, competitors=rows, notes=list(notes), absent={},
        threads=torch.get_num_threads(), **facts,
    )  # fmt: skip
    return rows
