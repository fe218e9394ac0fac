"""One case: inputs, the competitors that can run there, and the record that a report is made of."""

import math
import time
from typing import NamedTuple

import torch
from torch import Tensor

import fastpref
from harness.measure import (
    Competitor,
    Gemm,
    HeadCompetitor,
    HeadTruth,
    Logits,
    PeakMemory,
    Rounds,
    Truth,
    free_bytes,
    try_out,
)
from peers import linear, token

SUBJECT = {
    "token_logps": "fastpref_default",
    "preference": "fastpref_step",
    "linear_logps": "fastpref_linear",
    "linear_preference": "fastpref_linear_step",
}


class Case(NamedTuple):
    op: str  # token_logps or preference
    mode: str  # forward (no gradient asked for) or step (forward and backward)
    tokens: int
    vocab: int
    dtype: str
    masked: float = 0.0  # share of tokens that are ignored
    sequences: int = 4
    loss: str = ""
    variant: str = ""  # of a preference step: ref_logits, packed or stats

    def __str__(self):
        parts = [self.loss, self.mode, f"{self.tokens}x{self.vocab}", self.dtype, f"masked{round(100 * self.masked)}"]
        return "-".join(part for part in [*parts, self.variant] if part)

    def logits_bytes(self) -> int:
        return self.tokens * self.vocab * getattr(torch, self.dtype).itemsize

    def largest_bytes(self) -> int:
        """Of the largest peer: about eight copies of the logits in fp32."""
        return 32 * self.tokens * self.vocab

    def floor_bytes(self) -> int:
        """What must move: logits that count are read, by each pass; a backward writes every logit's gradient."""
        read = round((1 - self.masked) * self.logits_bytes())
        forward = 2 * read if self.variant == "ref_logits" else read
        return forward if self.mode == "forward" else forward + read + self.logits_bytes()


class LinearCase(NamedTuple):
    op: str  # linear_logps or linear_preference
    mode: str  # forward (no gradient asked for) or step (forward and backward)
    tokens: int
    hidden_size: int
    vocab: int
    dtype: str
    trained: bool = True  # does the head get a gradient; hidden states always do
    masked: float = 0.0  # share of tokens that are ignored
    sequences: int = 8
    loss: str = ""
    reference: str = ""  # of a step: "given" as log-probs, or "scored" from its own hidden states by the same head

    def __str__(self):
        parts = [self.loss, self.mode, f"{self.tokens}x{self.hidden_size}x{self.vocab}", self.dtype]
        parts += ["trained" if self.trained else "frozen"] if self.mode == "step" else []
        parts += [f"masked{round(100 * self.masked)}", f"reference_{self.reference}" if self.reference else ""]
        return "-".join(part for part in parts if part)

    def gradient_bytes(self) -> int:
        rows = self.tokens + (self.vocab if self.trained else 0)
        return rows * self.hidden_size * getattr(torch, self.dtype).itemsize if self.mode == "step" else 0

    def largest_bytes(self) -> int:
        """Of the peers that keep all logits: these, their log-softmax in fp32, and a gradient of each; the truth."""
        logits = self.tokens * self.vocab
        return 2 * logits * (getattr(torch, self.dtype).itemsize + 4) + 20 * self.vocab * self.hidden_size


class _Contest:
    """A case made ready: warm competitors in `rounds`, the reasons of those who are not there in `absent`.

    Subclasses: _enter() -> the competitors (and what their errors are measured by), _errors(competitor, compared).
    """

    unit = None
    slow = None  # so many times the subject's time: after FEW rounds such rows leave

    def __init__(self, case, device: torch.device, subject=None, leave_out=None, flush=lambda: None):
        self.case, self.device = case, device
        subject = subject or SUBJECT[case.op]
        torch.manual_seed(0)
        self.absent, self._leave_out = {}, leave_out or {}
        competitors = try_out(self._enter(), self.absent, subject)
        self.checks, self._seconds = {}, {}
        for competitor in competitors:
            self.checks[competitor.name] = self._check(competitor)
        limit = self._seconds[subject] * (self.slow or math.inf)
        few = [name for name, seconds in self._seconds.items() if seconds > limit]
        self.round_seconds = sum(seconds for name, seconds in self._seconds.items() if name not in few)
        self.rounds = Rounds(competitors, device, subject, flush, self.unit, few)

    def _check(self, competitor) -> dict:
        """Peak memory and error of one warm run."""
        start = time.perf_counter()
        with PeakMemory(self.device) as peak:
            compared = competitor.run()
        self._seconds[competitor.name] = time.perf_counter() - start
        check = {"peak_bytes": peak.bytes, **self._errors(competitor, compared)}
        competitor.clean()
        return check

    def affordable_rounds(self, seconds: float, least=5, most=30) -> int:
        return max(least, min(most, int(seconds / self.round_seconds)))

    def present(self, table, given) -> dict:
        """The functions of a table that can take what is given; the others' reasons go to `absent`."""
        chosen = {}
        for name, function in table.items():
            if self.case.mode == "forward" and ("inplace" in name or "unadvised" in name):
                continue  # the same forward under another name
            if reason := self._leave_out.get(name) or function.available(given):
                self.absent[name] = reason
            else:
                chosen[name] = function
        return chosen

    def _record(self, summary: dict, **more) -> dict:
        for name, row in summary.items():
            row.update(self.checks.get(name, {}))
        return {
            **self.case._asdict(),
            "name": str(self.case),
            "device": self.device.type,
            "rounds": len(self.rounds.samples[self.rounds.subject.name]),
            "subject": self.rounds.subject.name,
            **more,
            "competitors": summary,
            "absent": self.absent,
        }


class Contest(_Contest):
    """From logits."""

    def _enter(self):
        logits, labels = _logits_and_labels(self.case, self.device)
        self.logits = Logits(logits)
        competitors, self.truth, self.compared_error = _INPUTS[self.case.op](self, labels)
        return competitors

    def _errors(self, competitor, compared) -> dict:
        errors = {"error": self.compared_error(compared)}
        if competitor.backward:
            errors["gradient_error"] = self.truth.gradient_error(competitor.received[0])
        return errors

    def record(self, bandwidth: dict) -> dict:
        """bandwidth: {"read_gbps" or "copy_gbps": number}; a forward is held against reading where that is known."""
        case = self.case
        kind = "read" if case.mode == "forward" and "read_gbps" in bandwidth else "copy"
        summary = self.rounds.summary()
        for row in summary.values():
            row["gbps"] = case.floor_bytes() / row["median_ms"] / 1e6
            row["bandwidth_share"] = row["gbps"] / bandwidth[f"{kind}_gbps"]
            if "backward_ms" in row:
                forward, whole = case._replace(mode="forward").floor_bytes(), case.floor_bytes()
                reading = bandwidth.get("read_gbps", bandwidth["copy_gbps"])
                row["forward_share"] = forward / row["forward_ms"] / 1e6 / reading
                row["backward_share"] = (whole - forward) / row["backward_ms"] / 1e6 / bandwidth["copy_gbps"]
        return self._record(
            summary,
            floor_bytes=case.floor_bytes(),
            gradient_bytes=case.logits_bytes() if case.mode == "step" else 0,
            bandwidth_kind=kind,
        )


class LinearContest(_Contest):
    """From hidden states and LM head. Times are also told in units of the bare product of the rows that count."""

    slow = 3

    def _enter(self):
        torch.compiler.reset()  # a case must not be slowed by what the compiler has seen of others
        case = self.case
        hidden, weight, labels = _hidden_weight_labels(case, self.device)
        self.unit = Gemm(hidden[labels != token.IGNORE], weight)
        self.unit.run()
        return _LINEAR_INPUTS[case.op](self, hidden, weight, labels)

    def _errors(self, competitor, compared) -> dict:
        errors = {"error": self.compared_error(compared)}
        if competitor.backward:
            hidden_gradient, weight_gradient = competitor.received
            errors["hidden_error"] = self.truth.hidden_errors(hidden_gradient).max().item()
            if weight_gradient is not None:
                errors["weight_error"] = self.truth.weight_error(weight_gradient)
        return errors

    def record(self, bandwidth=None) -> dict:
        case = self.case
        gradients = case.gradient_bytes()
        summary = {self.unit.name: self.rounds.unit_summary(), **self.rounds.summary()}
        for row in summary.values():
            row.setdefault("times_unit", None)
        for name, check in self.checks.items():
            peak = check["peak_bytes"]
            summary[name]["beyond_gradients_bytes"] = None if peak is None else max(peak - gradients, 0)
        return self._record(
            summary,
            unit_flop=2 * self.unit.out.numel() * case.hidden_size,
            gradient_bytes=gradients,
            plan=_plan(case, self.truth.kept, self.device),
        )


def _plan(case: LinearCase, kept: Tensor, device) -> dict:
    """What fastpref says it will do, and the bytes it predicts."""
    lengths = kept.view(case.sequences, -1).sum(-1).tolist()
    plan = fastpref.plan(
        lengths if case.loss else sum(lengths),
        case.hidden_size,
        case.vocab,
        dtype=getattr(torch, case.dtype),
        device=device,
        loss=case.loss or None,
        hidden_grad=case.mode == "step",
        weight_grad=case.mode == "step" and case.trained,
        total_tokens=case.tokens,
    )
    return {key: value if isinstance(value, (int, str)) else str(value) for key, value in plan._asdict().items()}


def too_large(case: Case | LinearCase, device: torch.device) -> str | None:
    needed, free = case.largest_bytes(), free_bytes(device)
    if needed > free:
        return f"{case} needs {needed / 2**30:.0f} GiB for its largest peer, {free / 2**30:.0f} GiB are free"
    return None


def measured(case, device: torch.device, bandwidth: dict, seconds: float, least=5, **options) -> dict:
    """The record of one case, in about this many seconds of rounds, of which there are at least so many."""
    start = time.perf_counter()
    made = (LinearContest if isinstance(case, LinearCase) else Contest)(case, device, **options)
    made.rounds.play(made.affordable_rounds(seconds, least))
    return made.record(bandwidth) | {"seconds": round(time.perf_counter() - start, 1)}


# ---- inputs: logits ----


def _logits_and_labels(case: Case, device) -> tuple[Tensor, Tensor]:
    """[sequences, T, V], standard deviation 3, and labels whose first part of each sequence is ignored, as a prompt."""
    per_sequence = case.tokens // case.sequences
    logits = torch.randn(case.sequences, per_sequence, case.vocab, device=device).mul_(3)
    labels = torch.randint(0, case.vocab, (case.sequences, per_sequence), device=device)
    labels[:, : round(case.masked * per_sequence)] = token.IGNORE
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
        for name, function in contest.present(token.TOKEN_PEERS, logits.values).items()
    ]
    truth = Truth(logits.values, labels, grad)
    return competitors, truth, truth.logps_error


def _preference(contest: Contest, labels):
    case, logits = contest.case, contest.logits
    ref_logits = None
    with torch.no_grad():
        noise = 0.1 * torch.randn(labels.shape, device=labels.device)
        ref_token_logps = torch.where(labels == token.IGNORE, 0.0, token.one_pass(logits.values, labels) + noise)
        if case.variant == "ref_logits":
            ref_logits, ref_token_logps = logits.values + 0.1 * torch.randn_like(logits.values), None
    lengths = None
    if case.variant == "packed":
        lengths = [labels.shape[1]] * case.sequences
        logits.values, labels, ref_token_logps = (
            logits.values.flatten(0, 1),
            labels.flatten(),
            ref_token_logps.flatten(),
        )
    gap = torch.rand(case.sequences // 2, device=labels.device)
    stats = ("entropy", "top1") if case.variant == "stats" else ()
    options = {"ref_logits": ref_logits, "lengths": lengths, "stats": stats}
    batch = token.Batch(labels, ref_token_logps, gap, case.loss, **options)

    def call(function):
        return lambda x: function(x, batch)

    competitors = [
        Competitor(name, function, logits, call(function), None, case.mode == "step")
        for name, function in contest.present(token.PREFERENCE_PEERS, logits.values).items()
    ]
    true_logps = _float64_logps(logits.values, labels).requires_grad_()
    loss, margins = token.logistic_loss(true_logps, batch.scored(_float64_logps))
    loss.backward()
    truth = Truth(logits.values, labels, true_logps.grad)
    return competitors, truth, lambda got: (got.double() - margins).abs().max().item()


def _float64_logps(logits, labels) -> Tensor:
    """In slices of 64 rows: a float64 copy of the logits would be four times their bytes."""
    rows, target = logits.flatten(0, -2), labels.flatten()
    pieces = [token.eager(x.double(), y) for x, y in zip(rows.split(64), target.split(64), strict=True)]
    return torch.cat(pieces).view(labels.shape)


_INPUTS = {"token_logps": _token_logps, "preference": _preference}

# ---- inputs: hidden states and LM head ----


def _hidden_weight_labels(case: LinearCase, device) -> tuple[Tensor, Tensor, Tensor]:
    """[sequences, T, H] and [V, H], logits of standard deviation 3; labels as those of logits."""
    per_sequence = case.tokens // case.sequences
    dtype = getattr(torch, case.dtype)
    hidden = torch.randn(case.sequences, per_sequence, case.hidden_size, device=device).to(dtype)
    weight = torch.randn(case.vocab, case.hidden_size, device=device).mul_(3 / case.hidden_size**0.5).to(dtype)
    labels = torch.randint(0, case.vocab, (case.sequences, per_sequence), device=device)
    labels[:, : round(case.masked * per_sequence)] = token.IGNORE
    return hidden, weight, labels


def _linear_logps(contest: LinearContest, hidden, weight, labels):
    case = contest.case
    grad = torch.randn(labels.shape, device=labels.device)
    contest.truth = HeadTruth(hidden, weight, labels)
    if case.mode == "step":
        contest.truth.differentiate(grad, case.trained)
    contest.compared_error = lambda logps: contest.truth.logps_errors(logps).max().item()

    def call(function):
        def one(h, w):
            logps = function(h, w, labels)
            return logps, logps

        return one

    inputs = linear.Inputs(hidden, weight, labels, case.trained)
    return [
        HeadCompetitor(name, function, hidden, weight, call(function), grad, case.mode == "step", case.trained)
        for name, function in contest.present(linear.LOGPS_PEERS, inputs).items()
    ]


def _linear_preference(contest: LinearContest, hidden, weight, labels):
    """The reference differs from the policy by a little noise: in its log-probs, or in its hidden states."""
    case = contest.case
    contest.truth = truth = HeadTruth(hidden, weight, labels)
    if case.reference == "given":
        noise = 0.1 * torch.randn(labels.shape, device=labels.device)
        ref_token_logps = truth.logps.float() + torch.where(labels == token.IGNORE, 0.0, noise)
        batch = linear.HeadBatch(labels, ref_token_logps, None, case.loss)
    else:
        ref_hidden = hidden + 0.02 * torch.randn(hidden.shape, device=hidden.device).to(hidden.dtype)
        batch = linear.HeadBatch(labels, None, ref_hidden, case.loss)
    _, margins, _ = step_truth(truth, batch, case.trained, case.mode == "step")
    contest.compared_error = lambda got: (got.double() - margins).abs().max().item()

    def call(function):
        return lambda h, w: function(h, w, batch)

    inputs = linear.Inputs(hidden, weight, labels, case.trained, batch)
    return [
        HeadCompetitor(name, function, hidden, weight, call(function), None, case.mode == "step", case.trained)
        for name, function in contest.present(linear.STEP_PEERS, inputs).items()
    ]


def step_truth(truth: HeadTruth, batch, trained: bool, gradients=True) -> tuple[HeadTruth, Tensor, Tensor]:
    """truth with the gradients of the step's loss; the margins; the coefficients of the tokens. All in float64."""
    exact = batch.scored(lambda hidden, _, labels: truth.of(hidden).logps, truth.weight)
    token_logps = truth.logps.requires_grad_()
    loss, margins = token.logistic_loss(token_logps, exact)
    loss.backward()
    if gradients:
        truth.differentiate(token_logps.grad, trained)
    return truth, margins.detach(), token_logps.grad


_LINEAR_INPUTS = {"linear_logps": _linear_logps, "linear_preference": _linear_preference}
