"""What fastpref is compared with: one function per peer, (logits [..., V], labels [...]) -> log-probs [...].

`available(logits)` of each function is None, or the reason why the peer is absent for such logits; absent peers are
listed in the results with it. `spoils_logits` says that the call, or its backward, overwrites the logits.
"""

import functools
import importlib
import importlib.util
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

import fastpref
from fastpref import _native

IGNORE = -100
TOKEN_PEERS = {}  # name -> function, the order of the tables
PREFERENCE_PEERS = {}
COMPILER = "inductor"  # tests take one that starts faster


def peer(table, title, available=lambda logits: None, spoils_logits=False, around=nullcontext):
    """Enter a function into a table. `around` is a context for the whole measured call, its backward included."""

    def enter(function):
        function.title, function.available, function.spoils_logits = title, available, spoils_logits
        function.around = around
        table[function.__name__] = function
        return function

    return enter


def import_reason(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as error:  # a peer may break on this torch in any way
        return f"{module} cannot be imported ({type(error).__name__}: {str(error).splitlines()[0]})"
    return None


# ---- log-probs of tokens: fastpref ----


def backend_reason(backend):
    """Why that backend of fastpref cannot take tensors like those given, or None."""

    def available(given):
        found = fastpref.build_info()["backends"]["token_logps"][_native.device_kind(given.device)][backend]
        return None if found == "available" else found

    return available


@contextmanager
def _small_pages():
    """Gradients as torch.empty gives them: no huge-page advice, which fastpref adds from HUGE_OUTPUT_BYTES on."""
    threshold = _native.HUGE_OUTPUT_BYTES
    _native.HUGE_OUTPUT_BYTES = 1 << 62
    try:
        yield
    finally:
        _native.HUGE_OUTPUT_BYTES = threshold


def _cpu_only(logits):
    return None if logits.device.type == "cpu" else "huge-page advice concerns CPU memory"


@peer(TOKEN_PEERS, "fastpref")
def fastpref_default(logits, labels):
    return fastpref.token_logps(logits, labels)


@peer(TOKEN_PEERS, "fastpref, no huge-page advice", _cpu_only, around=_small_pages)
def fastpref_unadvised(logits, labels):
    return fastpref.token_logps(logits, labels)


@peer(TOKEN_PEERS, "fastpref, inplace_backward", spoils_logits=True)
def fastpref_inplace(logits, labels):
    return fastpref.token_logps(logits, labels, inplace_backward=logits.requires_grad)


@peer(TOKEN_PEERS, "fastpref, native", backend_reason("native"))
def fastpref_native(logits, labels):
    return fastpref.token_logps(logits, labels, backend="native")


@peer(TOKEN_PEERS, "fastpref, native, inplace_backward", backend_reason("native"), spoils_logits=True)
def fastpref_native_inplace(logits, labels):
    return fastpref.token_logps(logits, labels, backend="native", inplace_backward=logits.requires_grad)


@peer(TOKEN_PEERS, "fastpref, Triton", backend_reason("triton"))
def fastpref_triton(logits, labels):
    return fastpref.token_logps(logits, labels, backend="triton")


@peer(TOKEN_PEERS, "fastpref, Triton, inplace_backward", backend_reason("triton"), spoils_logits=True)
def fastpref_triton_inplace(logits, labels):
    return fastpref.token_logps(logits, labels, backend="triton", inplace_backward=logits.requires_grad)


def _on_a_gpu(backend):
    def available(logits):
        on_cpu = _native.device_kind(logits) == "cpu"
        return "by-products are measured on GPUs" if on_cpu else backend_reason(backend)(logits)

    return available


@peer(TOKEN_PEERS, "fastpref, native, entropy and top-1", _on_a_gpu("native"))
def fastpref_native_stats(logits, labels):
    return fastpref.token_logps(logits, labels, backend="native", stats=("entropy", "top1"))[0]


@peer(TOKEN_PEERS, "fastpref, Triton, entropy and top-1", _on_a_gpu("triton"))
def fastpref_triton_stats(logits, labels):
    return fastpref.token_logps(logits, labels, backend="triton", stats=("entropy", "top1"))[0]


# ---- plain PyTorch ----


@peer(TOKEN_PEERS, "log_softmax + gather")
def eager(logits, labels):
    kept = labels != IGNORE
    logps = torch.log_softmax(logits, -1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(kept, logps, 0.0)


def half_precision(logits):
    return "the same as log_softmax + gather" if logits.dtype == torch.float32 else None


@peer(TOKEN_PEERS, "log_softmax + gather of logits.float()", half_precision)
def eager_fp32(logits, labels):
    return eager(logits.float(), labels)


@functools.cache
def _compiled(function, backend):
    return torch.compile(function, backend=backend, dynamic=False)


@peer(TOKEN_PEERS, "torch.compile of log_softmax + gather")
def compiled(logits, labels):
    return _compiled(eager, COMPILER)(logits, labels)


def _tiles(rows):
    """Bands of rows with their column slices, 1 MiB in fp32 (a core's cache), on a GPU 32 MiB (what an L2 takes)."""
    count, vocab = rows.shape
    height, width = (1024 if rows.device.type == "cuda" else 32), 8192
    for top in range(0, count, height):
        band = slice(top, min(top + height, count))
        yield band, [slice(left, min(left + width, vocab)) for left in range(0, vocab, width)]


class _OnePass(torch.autograd.Function):
    """Log-sum-exp tile by tile with a running maximum, as flash attention has it, in torch alone."""

    @staticmethod
    def forward(ctx, logits, labels):
        rows, kept = logits.flatten(0, -2), (labels != IGNORE).flatten()
        target = labels.clamp(min=0).reshape(-1, 1)
        lse = torch.empty(rows.shape[0], dtype=torch.float32, device=rows.device)
        for band, columns in _tiles(rows):
            top = torch.full((band.stop - band.start, 1), -torch.inf, device=rows.device)
            total = torch.zeros_like(top)
            for tile in columns:
                x = rows[band, tile].float()
                new_top = torch.maximum(top, x.amax(-1, keepdim=True))
                total = total * (top - new_top).exp() + (x - new_top).exp_().sum(-1, keepdim=True)
                top = new_top
            lse[band] = (top + total.log()).squeeze(-1)
        ctx.save_for_backward(logits, target, lse, kept)
        logps = rows.gather(-1, target).squeeze(-1).float() - lse
        return torch.where(kept, logps, 0.0).view(labels.shape)

    @staticmethod
    def backward(ctx, grad):
        logits, target, lse, kept = ctx.saved_tensors
        rows, grad = logits.flatten(0, -2), torch.where(kept, grad.flatten(), 0.0).unsqueeze(-1)
        out = torch.empty_like(rows)
        for band, columns in _tiles(rows):
            for tile in columns:
                p = (rows[band, tile].float() - lse[band, None]).exp_()
                out[band, tile] = p.mul_(-grad[band])
        target_p = (rows.gather(-1, target).float() - lse.unsqueeze(-1)).exp_()
        out.scatter_(-1, target, (grad * (1 - target_p)).to(out.dtype))  # scatter_add_ takes an fp32 copy of bf16
        return out.view(logits.shape), None


@peer(TOKEN_PEERS, "one pass in plain torch, tiled")
def one_pass(logits, labels):
    return _OnePass.apply(logits, labels)


# ---- TRL ----


def _trl_reason(logits):
    return import_reason("trl.trainer.utils")


@peer(TOKEN_PEERS, "TRL selective_log_softmax (DPOTrainer 1.16 has no logits and does not call it)", _trl_reason)
def trl_selective(logits, labels):
    from trl.trainer.utils import selective_log_softmax

    kept = labels != IGNORE
    return selective_log_softmax(logits, labels.masked_fill(~kept, 0), row_mask=kept)


@functools.cache
def _trl_kernel():
    """TRL's Triton kernel, from the file: importing its package takes transformers, datasets and accelerate along."""
    spec = importlib.util.find_spec("trl")
    if spec is None:
        return None
    path = Path(spec.submodule_search_locations[0]) / "kernels" / "logprob_entropy.py"
    if not path.exists():
        return None
    spec = importlib.util.spec_from_file_location("trl_logprob_entropy", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.selective_log_softmax_and_entropy


def _trl_kernel_reason(logits):
    if importlib.util.find_spec("trl") is None:
        return "trl is not installed"
    if logits.device.type != "cuda":
        return "TRL runs its Triton kernel on GPUs only"
    if _trl_kernel() is None:
        return "this TRL has no kernels/logprob_entropy.py (1.16 has)"
    return None


@peer(TOKEN_PEERS, "TRL Triton kernel (log-prob and entropy)", _trl_kernel_reason)
def trl_kernel(logits, labels):
    kept = labels != IGNORE
    return _trl_kernel()(logits, labels.masked_fill(~kept, 0), row_mask=kept)[0]


# ---- Liger ----


def _liger_reason(logits):
    if logits.device.type != "cuda":
        return "Liger's cross entropy runs on GPUs only"
    return import_reason("liger_kernel.ops.cross_entropy")


@peer(TOKEN_PEERS, "Liger cross entropy, reduction none", _liger_reason, spoils_logits=True)
def liger(logits, labels):
    from liger_kernel.transformers.functional import liger_cross_entropy

    loss = liger_cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORE, reduction="none")
    return -loss.view(labels.shape)


# ---- a preference step: (logits, Batch) -> (loss, margins [B]) ----


class Batch:
    """What a step needs beside the logits.

    labels [2B, T], or [tokens] of packed sequences whose `lengths` the host knows; the reference as log-probs per token
    or as logits; rating gaps [B]. stats: by-products that fastpref is asked for beside the loss; no peer forms them.
    """

    def __init__(
        self, labels: Tensor, ref_token_logps: Tensor | None, rating_gap: Tensor, loss: str, beta=0.1, *,
        ref_logits: Tensor | None = None, lengths: list[int] | None = None, stats: tuple[str, ...] = (),
    ):  # fmt: skip
        self.labels, self.ref_token_logps, self.rating_gap = labels, ref_token_logps, rating_gap
        self.loss, self.beta, self.beta_rating = loss, beta, 0.3
        self.ref_logits, self.lengths, self.stats = ref_logits, lengths, stats
        self.cu_seqlens = None
        if lengths is not None:
            self.cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(labels.device, copy=True)

    @property
    def options(self) -> dict:
        return {"beta_rating": self.beta_rating} if self.loss == "rdpo" else {}

    def scored(self, logps) -> "Batch":
        """The same with the reference's log-probs, by the peer's own logps(logits, labels), where logits are given."""
        if self.ref_logits is None:
            return self
        with torch.no_grad():
            ref_token_logps = logps(self.ref_logits, self.labels)
        return Batch(self.labels, ref_token_logps, self.rating_gap, self.loss, self.beta, lengths=self.lengths)


def logistic_loss(token_logps, batch) -> tuple[Tensor, Tensor]:
    """DPO, or RDPO with its rating gap, as a user writes it: loss of the batch, margins [B]."""
    difference = token_logps - batch.ref_token_logps.to(token_logps.dtype)
    if batch.lengths is None:
        sums = difference.sum(-1)
    else:
        sums = torch.stack([part.sum() for part in difference.split(batch.lengths)])
    chosen, rejected = sums.chunk(2)
    margins = batch.beta * (chosen - rejected)
    offset = batch.beta / batch.beta_rating * batch.rating_gap if batch.loss == "rdpo" else 0.0
    return -torch.nn.functional.logsigmoid(margins - offset).mean(), margins


@peer(PREFERENCE_PEERS, "fastpref")
def fastpref_step(logits, batch):
    return _fastpref_step(logits, batch)


@peer(PREFERENCE_PEERS, "fastpref, inplace_backward", spoils_logits=True)
def fastpref_step_inplace(logits, batch):
    return _fastpref_step(logits, batch, inplace_backward=True)


@peer(PREFERENCE_PEERS, "fastpref, the loss as torch on vectors")
def fastpref_vectors(logits, batch):
    function = fastpref.losses.LOSSES[batch.loss]
    options = {"beta": batch.beta, **batch.options}
    return _fastpref_step(logits, batch, loss=lambda pairs: function(pairs, **options), loss_options=None)


@peer(PREFERENCE_PEERS, "fastpref, native", backend_reason("native"))
def fastpref_step_native(logits, batch):
    return _fastpref_step(logits, batch, backend="native")


@peer(PREFERENCE_PEERS, "fastpref, Triton", backend_reason("triton"))
def fastpref_step_triton(logits, batch):
    return _fastpref_step(logits, batch, backend="triton")


def _fastpref_step(logits, batch, **more):
    options = {"loss": batch.loss, "loss_options": batch.options, "beta": batch.beta, "stats": batch.stats} | more
    reference = {"ref_token_logps": batch.ref_token_logps, "ref_logits": batch.ref_logits}
    if batch.cu_seqlens is not None:
        options["cu_seqlens"] = batch.cu_seqlens
    out = fastpref.preference_loss(logits, batch.labels, rating_gap=batch.rating_gap, **reference, **options)
    return out.loss, out.margins


def _step(logps, logits, batch):
    """A peer's log-probs, then the formula."""
    return logistic_loss(logps(logits, batch.labels), batch.scored(logps))


@peer(PREFERENCE_PEERS, "log_softmax + gather + logsigmoid")
def eager_step(logits, batch):
    return _step(eager, logits, batch)


@peer(PREFERENCE_PEERS, "the same of logits.float()", half_precision)
def eager_fp32_step(logits, batch):
    return _step(lambda x, labels: eager(x.float(), labels), logits, batch)


def _tensors_step(logits, labels, ref_token_logps, rating_gap, loss):
    return _step(eager, logits, Batch(labels, ref_token_logps, rating_gap, loss))


@peer(PREFERENCE_PEERS, "torch.compile of the plain step")
def compiled_step(logits, batch):
    step = _compiled(_tensors_step, COMPILER)
    return step(logits, batch.labels, batch.ref_token_logps, batch.rating_gap, batch.loss)


@peer(PREFERENCE_PEERS, "one pass in plain torch + logsigmoid")
def one_pass_step(logits, batch):
    return _step(one_pass, logits, batch)


@peer(PREFERENCE_PEERS, "TRL selective_log_softmax (DPOTrainer 1.16 does not call it) + its DPO formula", _trl_reason)
def trl_step(logits, batch):
    return _step(trl_selective, logits, batch)


@peer(PREFERENCE_PEERS, "TRL Triton kernel + its DPO formula", _trl_kernel_reason)
def trl_kernel_step(logits, batch):
    return _step(trl_kernel, logits, batch)


@peer(PREFERENCE_PEERS, "Liger cross entropy + logsigmoid", _liger_reason, spoils_logits=True)
def liger_step(logits, batch):
    return _step(liger, logits, batch)
