"""One case: inputs, the competitors that can run there, and the record that a report is made of."""

import time
from typing import NamedTuple

import peers
import torch
from measure import Competitor, Logits, PeakMemory, Rounds, Truth, try_out
from torch import Tensor

SUBJECT = {"token_logps": "fastpref_default", "preference": "fastpref_step"}


class Case(NamedTuple):
    op: str  # token_logps or preference
    mode: str  # forward (no gradient asked for) or step (forward and backward)
    tokens: int
    vocab: int
    dtype: str
    masked: float = 0.0  # share of tokens that are ignored
    sequences: int = 4
    loss: str = ""

    def __str__(self):
        parts = [self.loss, self.mode, f"{self.tokens}x{self.vocab}", self.dtype, f"masked{round(100 * self.masked)}"]
        return "-".join(part for part in parts if part)

    def logits_bytes(self) -> int:
        return self.tokens * self.vocab * getattr(torch, self.dtype).itemsize

    def floor_bytes(self) -> int:
        """What must move: logits that count are read, by each pass; a backward writes every logit's gradient."""
        read = round((1 - self.masked) * self.logits_bytes())
        return read if self.mode == "forward" else 2 * read + self.logits_bytes()


class Contest:
    """A case made ready: warm competitors in `rounds`, the reasons of those who are not there in `absent`."""

    def __init__(self, case: Case, device: torch.device, subject=None, leave_out=None, flush=lambda: None):
        self.case, self.device = case, device
        subject = subject or SUBJECT[case.op]
        torch.manual_seed(0)
        logits, labels = _logits_and_labels(case, device)
        self.logits = Logits(logits)
        self.absent, self._leave_out = {}, leave_out or {}
        competitors, self.truth, self.compared_error = _INPUTS[case.op](self, labels)
        competitors = try_out(competitors, self.absent, subject)
        start = time.perf_counter()
        self.checks = {competitor.name: self._check(competitor) for competitor in competitors}
        self.round_seconds = time.perf_counter() - start
        self.rounds = Rounds(competitors, device, subject, flush)

    def _check(self, competitor) -> dict:
        """Peak memory and error of one warm run."""
        with PeakMemory(self.device) as peak:
            compared = competitor.run()
        check = {"peak_bytes": peak.bytes, "error": self.compared_error(compared)}
        if competitor.backward:
            check["gradient_error"] = self.truth.gradient_error(competitor.received[0])
        competitor.clean()
        return check

    def affordable_rounds(self, seconds: float, least=5, most=30) -> int:
        return max(least, min(most, int(seconds / self.round_seconds)))

    def present(self, table) -> dict:
        """The functions of a table that can take these logits; the others' reasons go to `absent`."""
        chosen = {}
        for name, function in table.items():
            if self.case.mode == "forward" and ("inplace" in name or "unadvised" in name):
                continue  # the same forward under another name
            if reason := self._leave_out.get(name) or function.available(self.logits.values):
                self.absent[name] = reason
            else:
                chosen[name] = function
        return chosen

    def record(self, bandwidth: dict) -> dict:
        """bandwidth: {"read_gbps" or "copy_gbps": number}; a forward is held against reading where that is known."""
        case = self.case
        kind = "read" if case.mode == "forward" and "read_gbps" in bandwidth else "copy"
        summary = self.rounds.summary()
        for name, row in summary.items():
            row.update(self.checks[name])
            row["gbps"] = case.floor_bytes() / row["median_ms"] / 1e6
            row["bandwidth_share"] = row["gbps"] / bandwidth[f"{kind}_gbps"]
        return {
            **case._asdict(),
            "name": str(case),
            "device": self.device.type,
            "rounds": len(self.rounds.samples[self.rounds.subject.name]),
            "subject": self.rounds.subject.name,
            "floor_bytes": case.floor_bytes(),
            "gradient_bytes": case.logits_bytes() if case.mode == "step" else 0,
            "bandwidth_kind": kind,
            "competitors": summary,
            "absent": self.absent,
        }


def measured(case: Case, device: torch.device, bandwidth: dict, seconds: float, **options) -> dict:
    """The record of one case, in about this many seconds of rounds."""
    start = time.perf_counter()
    contest = Contest(case, device, **options)
    contest.rounds.play(contest.affordable_rounds(seconds))
    return contest.record(bandwidth) | {"seconds": round(time.perf_counter() - start, 1)}


def _logits_and_labels(case: Case, device) -> tuple[Tensor, Tensor]:
    """[sequences, T, V], standard deviation 3, and labels whose first part of each sequence is ignored, as a prompt."""
    per_sequence = case.tokens // case.sequences
    logits = torch.randn(case.sequences, per_sequence, case.vocab, device=device).mul_(3)
    labels = torch.randint(0, case.vocab, (case.sequences, per_sequence), device=device)
    labels[:, : round(case.masked * per_sequence)] = peers.IGNORE
    return logits.to(getattr(torch, case.dtype)), labels


def _token_logps(contest: Contest, labels):
    case, logits = contest.case, contest.logits
    grad = torch.randn(labels.shape, device=labels.device)

    def call(function):
        def one(x):
            logps = function(x, labels)
            return logps, logps

        return one

    competitors = [
        Competitor(name, function, logits, call(function), grad, case.mode == "step")
        for name, function in contest.present(peers.TOKEN_PEERS).items()
    ]
    truth = Truth(logits.values, labels, grad)
    return competitors, truth, truth.logps_error


def _preference(contest: Contest, labels):
    case, logits = contest.case, contest.logits
    with torch.no_grad():
        noise = 0.1 * torch.randn(labels.shape, device=labels.device)
        ref_token_logps = torch.where(labels == peers.IGNORE, 0.0, peers.one_pass(logits.values, labels) + noise)
    gap = torch.rand(case.sequences // 2, device=labels.device)
    batch = peers.Batch(labels, ref_token_logps, gap, case.loss)

    def call(function):
        return lambda x: function(x, batch)

    competitors = [
        Competitor(name, function, logits, call(function), None, case.mode == "step")
        for name, function in contest.present(peers.PREFERENCE_PEERS).items()
    ]
    true_logps = _float64_logps(logits.values, labels).requires_grad_()
    loss, margins = peers.logistic_loss(true_logps, batch)
    loss.backward()
    truth = Truth(logits.values, labels, true_logps.grad)
    return competitors, truth, lambda got: (got.double() - margins).abs().max().item()


def _float64_logps(logits, labels) -> Tensor:
    """In slices of 64 rows: a float64 copy of the logits would be four times their bytes."""
    rows, target = logits.flatten(0, -2), labels.clamp(min=0).flatten()
    pieces = [
        torch.log_softmax(x.double(), -1).gather(-1, y.unsqueeze(-1)).squeeze(-1)
        for x, y in zip(rows.split(64), target.split(64), strict=True)
    ]
    return torch.where(labels == peers.IGNORE, 0.0, torch.cat(pieces).view(labels.shape))


_INPUTS = {"token_logps": _token_logps, "preference": _preference}
