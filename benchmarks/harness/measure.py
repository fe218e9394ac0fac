"""Rounds in which every competitor runs once, their samples, and what belongs beside a time: memory, bytes, error."""

import ctypes
import gc
import os
import statistics
import threading
import time
from pathlib import Path

import torch
from torch import Tensor

CPU = torch.device("cpu")

# ---- clocks ----


class WallMarks:
    """Call it at the borders of the timed segments."""

    def __init__(self):
        self.times = []

    def __call__(self):
        self.times.append(time.perf_counter())

    def read_ms(self) -> list[float]:
        return [1e3 * (b - a) for a, b in zip(self.times, self.times[1:], strict=False)]


class EventMarks:
    """The same, on the GPU's own time line."""

    def __init__(self):
        self.events = []

    def __call__(self):
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.events.append(event)

    def read_ms(self) -> list[float]:
        self.events[-1].synchronize()
        return [a.elapsed_time(b) for a, b in zip(self.events, self.events[1:], strict=False)]


def new_marks(device: torch.device):
    return EventMarks() if device.type == "cuda" else WallMarks()


# ---- competitors ----


class _Head(torch.autograd.Function):
    """Stands for the model's last layer: hands out the logits and takes their gradient, without touching either."""

    @staticmethod
    def forward(ctx, anchor, logits, received):
        ctx.received = received
        return logits.detach()

    @staticmethod
    def backward(ctx, gradient):
        ctx.received.append(gradient)
        return None, None, None


class Logits:
    """The logits all competitors read, and a clean copy for those that overwrite them."""

    def __init__(self, values: Tensor):
        self.values = values
        self._clean = None

    def keep_clean_copy(self):
        if self._clean is None:
            self._clean = self.values.clone()

    def restore(self):
        self.values.copy_(self._clean)


class Competitor:
    """One peer on one input. `call` takes logits and returns what is differentiated and what is compared."""

    def __init__(self, name, function, logits: Logits, call, grad: Tensor | None, backward: bool):
        self.name, self.title, self.around = name, function.title, function.around
        self.spoils = function.spoils_logits and backward
        self.logits, self.call, self.grad, self.backward = logits, call, grad, backward
        self.received = []
        if self.spoils:
            logits.keep_clean_copy()

    def run(self, mark=lambda: None):
        """Forward, or forward and backward; returns what is compared. The gradient is left in `received`."""
        with self.around():
            if not self.backward:
                with torch.no_grad():
                    mark()
                    _, compared = self.call(self.logits.values)
                    mark()
                return compared
            anchor = torch.zeros((), device=self.logits.values.device, requires_grad=True)
            mark()
            logits = _Head.apply(anchor, self.logits.values, self.received)
            differentiated, compared = self.call(logits)
            mark()
            differentiated.backward(None if self.grad is None else self.grad.to(differentiated.dtype))
            mark()
            return compared

    def clean(self):
        """Outside the timed part: the gradient is let go, overwritten logits are restored by a copy."""
        self.received.clear()
        if self.spoils:
            self.logits.restore()


class HeadCompetitor:
    """One peer from hidden states and LM head. `call` takes both and returns what is differentiated and compared.

    Every run has leaves of its own, so that no gradient is added to an earlier one. `received` is left with the
    gradients of the hidden states and of the weight, None where the head is frozen.
    """

    def __init__(self, name, function, hidden: Tensor, weight: Tensor, call, grad: Tensor | None, backward, trained):
        self.name, self.title, self.around = name, function.title, function.around
        self.hidden, self.weight, self.call, self.grad = hidden, weight, call, grad
        self.backward, self.trained = backward, trained
        self.received = ()

    def run(self, mark=lambda: None):
        """Forward, or forward and backward; returns what is compared."""
        hidden = self.hidden.detach().requires_grad_(self.backward)
        weight = self.weight.detach().requires_grad_(self.backward and self.trained)
        with self.around(), torch.set_grad_enabled(self.backward):
            mark()
            differentiated, compared = self.call(hidden, weight)
            mark()
            if self.backward:
                differentiated.backward(None if self.grad is None else self.grad.to(differentiated.dtype))
                mark()
                self.received = (hidden.grad, weight.grad)
        return compared.detach()

    def clean(self):
        self.received = ()


class FunctionCompetitor:
    """A function of tensors; nothing is differentiated."""

    def __init__(self, name, title, function, *tensors):
        self.name, self.title, self.function, self.tensors = name, title, function, tensors

    def run(self, mark=lambda: None):
        mark()
        result = self.function(*self.tensors)
        mark()
        return result

    def clean(self):
        pass


class Gemm:
    """The bare product of the rows that count with the head, into memory that is there: the unit U of the others."""

    name, title = "gemm", "bare GEMM (U)"

    def __init__(self, rows: Tensor, weight: Tensor):
        self.rows, self.weight = rows, weight.t()
        self.out = torch.empty(rows.shape[0], weight.shape[0], dtype=rows.dtype, device=rows.device).zero_()

    def run(self, mark=lambda: None):
        mark()
        torch.mm(self.rows, self.weight, out=self.out)
        mark()

    def clean(self):
        pass


def try_out(competitors, absent: dict, must_run: str) -> list[Competitor]:
    """Runs each once (compilation, first allocations); one that fails is entered into `absent`, the subject raises."""
    ready = []
    for competitor in competitors:
        try:
            competitor.run()
        except Exception as error:
            if competitor.name == must_run:
                raise
            absent[competitor.name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        else:
            ready.append(competitor)
        competitor.clean()
    return ready


# ---- rounds ----

PLAIN = ("eager", "eager_step", "plain_head", "plain_head_step")  # what speed-ups are counted from


class Rounds:
    """Samples of all competitors, taken in turn: round k holds the k-th sample of each.

    With a `unit`, that runs before each sample, and the two are read as a pair. `few` names those that leave after
    FEW rounds, so that the slowest do not take most of the time.
    """

    FEW = 2

    def __init__(self, competitors, device: torch.device, subject: str, before=lambda: None, unit=None, few=()):
        self.competitors, self.device, self.before, self.unit = competitors, device, before, unit
        self.few = frozenset(few) - {subject}
        self.subject = next(c for c in competitors if c.name == subject)
        self.samples = {c.name: [] for c in competitors}
        self.unit_samples = {c.name: [] for c in competitors}

    def play_others(self):
        played = len(self.samples[self.subject.name])
        others = [c for c in self.competitors if c is not self.subject]
        others = [c for c in others if played < self.FEW or c.name not in self.few]
        turn = played % max(len(others), 1)
        for competitor in others[turn:] + others[:turn]:
            self._play(competitor)
        self._prepare(self.subject)

    def play_subject(self):
        marks = new_marks(self.device)
        self.subject.run(marks)
        self.samples[self.subject.name].append(marks)

    def end_round(self):
        marks = self.samples[self.subject.name][-1]
        self.samples[self.subject.name][-1] = marks.read_ms()
        self.subject.clean()

    def _prepare(self, competitor):
        self.before()
        if self.unit is not None:
            marks = new_marks(self.device)
            self.unit.run(marks)
            self.unit_samples[competitor.name].append(marks.read_ms()[0])
            self.before()

    def _play(self, competitor):
        self._prepare(competitor)
        marks = new_marks(self.device)
        competitor.run(marks)
        self.samples[competitor.name].append(marks.read_ms())
        competitor.clean()

    def play(self, count: int):
        for _ in range(count):
            self.play_others()
            self.play_subject()
            self.end_round()

    def summary(self) -> dict:
        """Per competitor: median, min and max, forward and backward apart, and medians of the ratios of each round."""
        totals = {name: [sum(sample) for sample in samples] for name, samples in self.samples.items()}
        plain = next((name for name in PLAIN if name in totals), None)
        summary = {}
        for competitor in self.competitors:
            samples = self.samples[competitor.name]
            own = totals[competitor.name]
            summary[competitor.name] = {
                "title": competitor.title,
                "rounds": len(own),
                "median_ms": statistics.median(own),
                "min_ms": min(own),
                "max_ms": max(own),
                "times_subject": _median_ratio(own, totals[self.subject.name]),
                "speedup_over_plain": _median_ratio(totals[plain], own) if plain else None,
            }
            if self.unit is not None:
                summary[competitor.name]["times_unit"] = _median_ratio(own, self.unit_samples[competitor.name])
            if len(samples[0]) == 2:
                for index, segment in enumerate(("forward_ms", "backward_ms")):
                    summary[competitor.name][segment] = statistics.median(sample[index] for sample in samples)
        return summary

    def unit_summary(self) -> dict:
        samples = [sample for samples in self.unit_samples.values() for sample in samples]
        return {
            "title": self.unit.title,
            "rounds": len(samples),
            "median_ms": statistics.median(samples),
            "min_ms": min(samples),
            "max_ms": max(samples),
            "times_unit": 1.0,
        }


def _median_ratio(above, below) -> float:
    """Of the rounds that both were in."""
    return statistics.median(a / b for a, b in zip(above, below, strict=False))


# ---- memory ----


class PeakMemory:
    """The most memory held beyond what was there on entry, in `bytes`; None where it cannot be told.

    CUDA: torch's allocator. Linux: the resident high-water mark, reset on entry, good to some 100 KiB.
    """

    def __init__(self, device: torch.device):
        self.device, self.bytes = device, None

    def __enter__(self):
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            return self
        try:
            _trim_heap()
            Path("/proc/self/clear_refs").write_text("5")
            self._before = _bytes_of("VmRSS", "/proc/self/status")
        except OSError:
            self._before = None
        return self

    def __exit__(self, *error):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            self.bytes = max(torch.cuda.max_memory_allocated() - self._before, 0)
        elif self._before is not None:
            self.bytes = max(_bytes_of("VmHWM", "/proc/self/status") - self._before, 0)


def _trim_heap():
    """Gives freed memory back to the system, so that reusing it counts."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def free_bytes(device: torch.device) -> int:
    """What may still be allocated there."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        return _bytes_of("MemAvailable", "/proc/meminfo")
    except OSError:  # no Linux
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _bytes_of(field: str, path: str) -> int:
    for line in Path(path).read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{path} has no {field}")


# ---- bandwidth ----


def read_gbps(device: torch.device = CPU, total_bytes=1 << 30, repeats=5) -> float:
    """Read bandwidth of the device's memory: the faster of torch's sum and amax and, of all threads, libc's memchr."""
    data = torch.full((total_bytes // 4,), 1.0, device=device)
    readers = [data.sum, data.amax]
    memchr = getattr(ctypes.CDLL(None), "memchr", None)
    if memchr is not None and device.type == "cpu":
        readers.append(lambda: _search(memchr, data))
    best = min(_seconds(reader, device) for reader in readers for _ in range(repeats))
    return total_bytes / best / 1e9


def _search(memchr, data: Tensor):
    """memchr for a byte that 1.0f does not have, on as many threads as torch uses: ctypes lets the GIL go."""
    memchr.restype, memchr.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    threads = torch.get_num_threads()
    share = data.nbytes // threads
    pieces = [(data.data_ptr() + i * share, 0x55, share) for i in range(threads)]
    running = [threading.Thread(target=memchr, args=piece) for piece in pieces]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()


def copy_gbps(device: torch.device, total_bytes=1 << 30, repeats=7) -> float:
    """Copy bandwidth, counting bytes read and bytes written; the fastest of `repeats`."""
    source = torch.ones(total_bytes // 4, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * total_bytes / min(_seconds(lambda: target.copy_(source), device) for _ in range(repeats)) / 1e9


def gemm_tflops(device: torch.device, m: int, n: int, k: int, dtype: torch.dtype, repeats=7) -> float:
    """Of torch's own product [m, k] x [k, n] on random data; the fastest of `repeats`."""
    rows, weight = (torch.randn(size, k, device=device).to(dtype) for size in (m, n))
    gemm = Gemm(rows, weight)
    gemm.run()
    return 2 * m * n * k / min(_seconds(gemm.run, device) for _ in range(repeats)) / 1e12


def _seconds(function, device: torch.device) -> float:
    marks = new_marks(device)
    between_runs(device)
    marks()
    function()
    marks()
    return marks.read_ms()[0] / 1e3


SLEEP_CYCLES = 2_000_000  # about a millisecond


def between_runs(device: torch.device) -> None:
    """Last before the start mark: the GPU is kept busy while the host enqueues what is timed, so that the host's own
    time up to the first kernel is not measured as the GPU's."""
    if device.type == "cuda":
        torch.cuda._sleep(SLEEP_CYCLES)


# ---- error against float64 ----


class Truth:
    """Log-probs and their gradient in float64, for at most `limit` of the tokens that count."""

    def __init__(self, logits: Tensor, labels: Tensor, grad: Tensor, ignore_index=-100, limit=64):
        kept = (labels.flatten() != ignore_index).nonzero().squeeze(-1)
        self.rows = kept[:: max(1, kept.numel() // limit)][:limit]
        x = logits.reshape(-1, logits.shape[-1])[self.rows].double()
        target = labels.flatten()[self.rows].unsqueeze(-1)
        log_p = torch.log_softmax(x, -1)
        self.logps = log_p.gather(-1, target).squeeze(-1)
        unit = log_p.exp_().neg_()
        unit.scatter_add_(-1, target, torch.ones_like(target, dtype=torch.float64))
        self.gradient = unit.mul_(grad.flatten()[self.rows].double().unsqueeze(-1))

    def logps_error(self, logps: Tensor) -> float:
        """Largest absolute error of a token's log-prob, in nats."""
        return (logps.detach().flatten()[self.rows].double() - self.logps).abs().max().item()

    def gradient_error(self, gradient: Tensor) -> float:
        """Largest error of a token's gradient, as a share of that gradient's norm."""
        rows = gradient.reshape(-1, gradient.shape[-1])[self.rows].double()
        return ((rows - self.gradient).norm(dim=-1) / self.gradient.norm(dim=-1)).max().item()


class HeadTruth:
    """Log-probs of every token in float64, and from their gradient those of hidden states and weight."""

    ROWS = 128  # at a time: float64 logits of all rows would be the largest tensor of the benchmark

    def __init__(self, hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index=-100):
        self.labels, self.ignore_index = labels, ignore_index
        self.kept = (labels != ignore_index).flatten()
        self.rows = hidden.reshape(-1, hidden.shape[-1])[self.kept].double()
        self.weight = weight.double()
        self.target = labels.flatten()[self.kept].unsqueeze(-1)
        self.shape = labels.shape
        pieces = [log_p.gather(-1, target).squeeze(-1) for _, target, log_p in self._slices()]
        self.kept_logps = torch.cat(pieces) if pieces else self.rows.new_zeros(0)

    def _slices(self):
        for rows, target in zip(self.rows.split(self.ROWS), self.target.split(self.ROWS), strict=True):
            yield rows, target, torch.log_softmax(rows @ self.weight.t(), -1)

    def of(self, hidden: Tensor) -> "HeadTruth":
        """Of other hidden states before the same head and labels."""
        return HeadTruth(hidden, self.weight, self.labels, self.ignore_index)

    @property
    def logps(self) -> Tensor:
        return self.kept_logps.new_zeros(self.kept.shape).masked_scatter(self.kept, self.kept_logps).view(self.shape)

    def differentiate(self, grad: Tensor, trained: bool):
        """grad: of the log-probs, in the shape of labels."""
        self.hidden_gradient = torch.empty_like(self.rows)
        self.weight_gradient = torch.zeros_like(self.weight) if trained else None
        coefficients = grad.flatten()[self.kept].double().unsqueeze(-1)
        start = 0
        for rows, target, log_p in self._slices():
            band = slice(start, start := start + rows.shape[0])
            unit = log_p.exp_().neg_()
            # 1 - p as the sum of the others: 1 - exp(log p) cancels where p is almost 1
            unit.scatter_(-1, target, 0.0).scatter_(-1, target, -unit.sum(-1, keepdim=True))
            unit.mul_(coefficients[band])
            torch.mm(unit, self.weight, out=self.hidden_gradient[band])
            if trained:
                self.weight_gradient.addmm_(unit.t(), rows)

    def logps_errors(self, logps: Tensor) -> Tensor:
        """Absolute error of each token that counts, in nats."""
        return (logps.flatten()[self.kept].double() - self.kept_logps).abs()

    def hidden_errors(self, gradient: Tensor) -> Tensor:
        """Error of the gradient of each token that counts, as a share of that gradient's norm."""
        rows = gradient.reshape(-1, gradient.shape[-1])[self.kept].double()
        return (rows - self.hidden_gradient).norm(dim=-1) / self.hidden_gradient.norm(dim=-1)

    def weight_error(self, gradient: Tensor) -> float:
        """Of the whole matrix, as a share of its norm."""
        return ((gradient.double() - self.weight_gradient).norm() / self.weight_gradient.norm()).item()
