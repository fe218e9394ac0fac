"""One problem of linear algebra: what is put in, its competitors, and the record that report.py makes a table of."""

import math
import time

import torch

from harness.measure import CPU, Rounds

# ---- what is put in ----


def corrupted(
    m, n, rank, share, seed=0, dtype=torch.float32, *, size=10.0, noise=0.0, observed=1.0, condition=1.0
):  # fmt: skip
    """L [m, n] float64 of this rank, and D: a share of the entries is off by up to size * mean |L|.

    noise: standard deviation of a normal error of every entry, in units of mean |L|; observed: share of the entries
    that are there, the others are NaN; condition: largest over smallest of L's singular values that are not 0.
    """
    rng = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(side, rank, generator=rng, dtype=torch.float64) for side in (m, n))
    if condition > 1:
        left = n * torch.linalg.qr(left).Q * torch.logspace(0, -math.log10(condition), rank, dtype=torch.float64)
        right = torch.linalg.qr(right).Q
    low = left @ right.t()
    data = low + gross_errors(low, share, rng, size)
    data += noise * low.abs().mean() * torch.randn(m, n, generator=rng, dtype=torch.float64)
    return low, data.masked_fill(torch.rand(m, n, generator=rng) >= observed, torch.nan).to(dtype)


def corrupted_scores(items, share, seed=0, dtype=torch.float32):
    """w [items] float64, L = w 1^T - 1 w^T, and D with a share of the pairs off by up to 10 mean |L|."""
    rng = torch.Generator().manual_seed(seed)
    w = torch.randn(items, generator=rng, dtype=torch.float64)
    w -= w.mean()
    low = w.unsqueeze(1) - w
    off = gross_errors(low, share, rng).triu(1)
    return w, low, (low + off - off.t()).to(dtype)


def gross_errors(low, share, rng, size=10.0):
    """[m, n] float64: 0, but at a share of the entries uniform from -size to size times mean |L|."""
    wrong = torch.rand(low.shape, generator=rng) < share
    return wrong * size * low.abs().mean() * (2 * torch.rand(low.shape, generator=rng, dtype=torch.float64) - 1)


# ---- how near the answers are ----


def judge_by(truth, dims):
    """A judge of answers in the shape of truth: relative error over dims, the median and the share below 1e-3."""

    def judge(found):
        error = (found.reshape(truth.shape).double() - truth).norm(dim=dims) / truth.norm(dim=dims)
        return {"error": float(error.median()), "recovered": float((error < 1e-3).double().mean())}

    return judge


# ---- rounds ----


class _FirstRuns:
    """Each competitor once, for its verdict and for how many rounds it can afford. One that takes longer than `seconds`
    has no further run, one that takes a tenth has two."""

    def __init__(self, competitors, judge, device, seconds):
        self.competitors, self.times, self.verdicts = competitors, {}, {}
        for competitor in competitors:
            answer, taken = _timed(competitor, device)
            if device.type == "cuda" and taken < seconds:  # without what is compiled and allocated once
                answer, taken = _timed(competitor, device)
            self.times[competitor.name], self.verdicts[competitor.name] = taken, judge(answer)
        subject = competitors[0].name
        self.playing = [c for c in competitors if self.times[c.name] <= seconds or c.name == subject]
        self.few = [c.name for c in self.playing if self.times[c.name] > seconds / 10]
        each = sum(self.times[c.name] for c in self.playing if c.name not in self.few or c.name == subject)
        self.count = min(50, round(seconds / each))

    def rows(self, rounds: Rounds | None) -> dict:
        """Of the table, by name; without rounds those of the first runs."""
        summary = rounds.summary() if rounds else {}
        subject = self.competitors[0].name
        fastest = summary[subject]["median_ms"] if rounds else 1e3 * self.times[subject]
        rows = {}
        for c in self.competitors:
            once = 1e3 * self.times[c.name]
            alone = {"title": c.title, "rounds": 1, "median_ms": once, "min_ms": once, "max_ms": once}
            rows[c.name] = summary.get(c.name) or alone | {"times_subject": once / fastest}
            rows[c.name] |= self.verdicts[c.name]
        return rows


def _timed(competitor, device):
    start = time.perf_counter()
    answer = competitor.run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return answer, time.perf_counter() - start


def measured(
    benchmark, op: str, name: str, competitors, judge, seconds: float = 20, notes=(), absent=None, **facts
) -> dict:
    """Rounds of all competitors, the first of which is fastpref; returns the rows of the table, by name.

    judge(answer) -> dict of what the table says of an answer. absent: {peer: reason}.
    """
    first = _FirstRuns(competitors, judge, CPU, seconds)
    rounds, count = Rounds(first.playing, CPU, competitors[0].name, few=first.few), max(3, first.count)
    benchmark.pedantic(rounds.play_subject, setup=rounds.play_others, teardown=rounds.end_round, rounds=count)
    rows = first.rows(rounds)
    benchmark.extra_info.update(_record(op, name, count, rows, notes, absent), **facts)
    return rows


def played(op: str, name: str, competitors, judge, device, seconds: float, before, notes=(), absent=None) -> dict:
    """The same on any device and without pytest-benchmark: the record. A subject that takes longer than `seconds` has
    the one run. before(): ahead of every sample."""
    first = _FirstRuns(competitors, judge, device, seconds)
    rounds, count = None, 1
    if first.times[competitors[0].name] <= seconds:
        rounds, count = Rounds(first.playing, device, competitors[0].name, before, few=first.few), max(2, first.count)
        rounds.play(count)
    return _record(op, name, count, first.rows(rounds), notes, absent)


def _record(op, name, count, rows, notes, absent) -> dict:
    return {
        "op": op,
        "name": name,
        "problem": True,
        "rounds": count,
        "competitors": rows,
        "notes": list(notes),
        "absent": absent or {},
        "threads": torch.get_num_threads(),
    }
