"""Rounds in which every competitor runs once, their samples, and what belongs beside a time: memory, bytes, error."""

import ctypes
import gc
import statistics
import threading
import time
from pathlib import Path

import torch
from torch import Tensor

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

PLAIN = ("eager", "eager_step")  # what speed-ups are counted from


class Rounds:
    """Samples of all competitors, taken in turn: round k holds the k-th sample of each."""

    def __init__(self, competitors, device: torch.device, subject: str, before=lambda: None):
        self.competitors, self.device, self.before = competitors, device, before
        self.subject = next(c for c in competitors if c.name == subject)
        self.samples = {c.name: [] for c in competitors}

    def play_others(self):
        others = [c for c in self.competitors if c is not self.subject]
        turn = len(self.samples[self.subject.name]) % max(len(others), 1)
        for competitor in others[turn:] + others[:turn]:
            self._play(competitor)
        self.before()

    def play_subject(self):
        marks = new_marks(self.device)
        self.subject.run(marks)
        self.samples[self.subject.name].append(marks)

    def end_round(self):
        marks = self.samples[self.subject.name][-1]
        self.samples[self.subject.name][-1] = marks.read_ms()
        self.subject.clean()

    def _play(self, competitor):
        self.before()
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
                "median_ms": statistics.median(own),
                "min_ms": min(own),
                "max_ms": max(own),
                "times_subject": _median_ratio(own, totals[self.subject.name]),
                "speedup_over_plain": _median_ratio(totals[plain], own) if plain else None,
            }
            if len(samples[0]) == 2:
                for index, segment in enumerate(("forward_ms", "backward_ms")):
                    summary[competitor.name][segment] = statistics.median(sample[index] for sample in samples)
        return summary


def _median_ratio(above, below) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


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
            self._before = _status_bytes("VmRSS")
        except OSError:
            self._before = None
        return self

    def __exit__(self, *error):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            self.bytes = max(torch.cuda.max_memory_allocated() - self._before, 0)
        elif self._before is not None:
            self.bytes = max(_status_bytes("VmHWM") - self._before, 0)


def _trim_heap():
    """Gives freed memory back to the system, so that reusing it counts."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


# ---- bandwidth ----


def read_gbps(total_bytes=1 << 30, repeats=5) -> float:
    """Read bandwidth of this machine's memory, all threads: the faster of torch's sum and amax and libc's memchr."""
    data = torch.full((total_bytes // 4,), 1.0)
    readers = [data.sum, data.amax]
    if (memchr := getattr(ctypes.CDLL(None), "memchr", None)) is not None:
        readers.append(lambda: _search(memchr, data))
    best = min(_wall_seconds(reader) for reader in readers for _ in range(repeats))
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
    seconds = []
    for _ in range(repeats):
        marks = new_marks(device)
        marks()
        target.copy_(source)
        marks()
        seconds.append(marks.read_ms()[0] / 1e3)
    return 2 * total_bytes / min(seconds) / 1e9


def _wall_seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


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
