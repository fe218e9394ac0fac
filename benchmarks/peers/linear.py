"""What the linear half of fastpref is compared with: one function per peer, from hidden states and LM head.

LOGPS_PEERS: (hidden [..., H], weight [V, H], labels [...]) -> log-probs [...]. STEP_PEERS: (hidden [2B, T, H], weight,
HeadBatch) -> (loss, margins [B]). `available(inputs)` of each is None, or the reason why it is absent there.

Each peer is called as its own users call it. Tokens that do not count are dropped before the product only by those that
do so themselves; "of the tokens that count" is what a user of plain PyTorch can do by hand.
"""

from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

import fastpref
from fastpref import _native
from peers import token
from peers.token import IGNORE, import_reason, logistic_loss, peer

LOGPS_PEERS = {}  # name -> function, the order of the tables
STEP_PEERS = {}


class HeadBatch(token.Batch):
    """What a step needs beside hidden states and head: the reference's log-probs per token, or its hidden states."""

    def __init__(self, labels: Tensor, ref_token_logps: Tensor | None, ref_hidden: Tensor | None, loss="sigmoid"):
        super().__init__(labels, ref_token_logps, torch.zeros(labels.shape[0] // 2, device=labels.device), loss)
        self.ref_hidden = ref_hidden

    def scored(self, logps, weight: Tensor) -> "HeadBatch":
        """The same with the reference's log-probs, taken from its hidden states by the same head, frozen."""
        if self.ref_hidden is None:
            return self
        with torch.no_grad():
            ref_token_logps = logps(self.ref_hidden, weight.detach(), self.labels)
        return HeadBatch(self.labels, ref_token_logps, None, self.loss)


class Inputs(NamedTuple):
    """What all competitors of a case are given; `batch` for a step."""

    hidden: Tensor  # [..., H]
    weight: Tensor  # [V, H]
    labels: Tensor  # [...]
    trained: bool = True
    batch: HeadBatch | None = None

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden.dtype


def counted(function):
    """`function` of the tokens that count alone, as rows; zeros at the others."""

    def logps(hidden, weight, labels):
        kept = labels != IGNORE
        counting = function(hidden[kept], weight, labels[kept])
        return counting.new_zeros(labels.shape).masked_scatter(kept, counting)

    return logps


def _nothing_masked(inputs):
    return None if (inputs.labels == IGNORE).any() else "nothing is masked: the same as without dropping"


# ---- fastpref ----


def _enter_fastpref(table, call, name, title):
    """By default, with the product rounded, and on each backend by name."""
    for backend in (None, "native", "triton"):
        for rounded in (False, True):

            def function(hidden, weight, given, options=(backend, rounded)):
                backend, rounded = options
                return call(hidden, weight, given, backend=backend, logits_dtype=hidden.dtype if rounded else None)

            def available(inputs, options=(backend, rounded)):
                backend, rounded = options
                if rounded and inputs.dtype == torch.float32:
                    return "fp32 has nothing to round to"
                return None if backend is None else token.backend_reason(backend)(inputs)

            function.__name__ = "_".join(filter(None, [name, "rounded" if rounded else "", backend]))
            named = {None: "", "native": ", native", "triton": ", Triton"}[backend]
            peer(table, title + named + (", product rounded" if rounded else ""), available)(function)


def _fastpref_logps(hidden, weight, labels, **options):
    return fastpref.linear_token_logps(hidden, weight, labels, **options)


def _fastpref_step(hidden, weight, batch, **options):
    out = fastpref.linear_preference_loss(
        hidden,
        weight,
        batch.labels,
        ref_hidden=batch.ref_hidden,
        ref_token_logps=batch.ref_token_logps,
        loss=batch.loss,
        beta=batch.beta,
        **options,
    )
    return out.loss, out.margins


_enter_fastpref(LOGPS_PEERS, _fastpref_logps, "fastpref_linear", "fastpref")


def _enter_stats(backend, title):
    def available(inputs):
        on_cpu = _native.device_kind(inputs.device) == "cpu"
        return "by-products are measured on GPUs" if on_cpu else token.backend_reason(backend)(inputs)

    def function(hidden, weight, labels):
        return _fastpref_logps(hidden, weight, labels, backend=backend, stats=("entropy", "top1"))[0]

    function.__name__ = f"fastpref_linear_stats_{backend}"
    peer(LOGPS_PEERS, title, available)(function)


_enter_stats("native", "fastpref, native, entropy and top-1")
_enter_stats("triton", "fastpref, Triton, entropy and top-1")
_enter_fastpref(STEP_PEERS, _fastpref_step, "fastpref_linear_step", "fastpref")


# ---- plain PyTorch ----


@peer(LOGPS_PEERS, "linear + log_softmax + gather")
def plain_head(hidden, weight, labels):
    return token.eager(linear(hidden, weight), labels)


@peer(LOGPS_PEERS, "the same of logits.float()", token.half_precision)
def plain_head_fp32(hidden, weight, labels):
    return token.eager(linear(hidden, weight).float(), labels)


@peer(LOGPS_PEERS, "linear + log_softmax + gather of the tokens that count", _nothing_masked)
def plain_head_counted(hidden, weight, labels):
    return counted(plain_head)(hidden, weight, labels)


def _linear_cross_entropy_reason(inputs):
    if hasattr(torch.nn.functional, "linear_cross_entropy"):
        return None
    return f"torch {torch.__version__} has no linear_cross_entropy (2.13 has)"


@peer(LOGPS_PEERS, "torch linear_cross_entropy, reduction none, chunked", _linear_cross_entropy_reason)
def torch_linear_cross_entropy(hidden, weight, labels):
    """Per token it comes back in the dtype of the hidden states."""
    loss = torch.nn.functional.linear_cross_entropy(
        hidden.flatten(0, -2),
        weight,
        labels.flatten(),
        reduction="none",
        ignore_index=IGNORE,
        options=torch.nn.LinearCrossEntropyOptions(),
    )
    return -loss.view(labels.shape).float()


# ---- TRL ----

TRAINED_OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")  # what DPOTrainer asks the head for


def _trl_reason(inputs):
    return import_reason("trl.trainer.utils")


class _Backbone(NamedTuple):
    """What add_fused_lm_head reads of a causal LM's backbone's output."""

    last_hidden_state: Tensor


class _FusedModel:
    """As much of a transformers model as TRL's add_fused_lm_head needs: hidden states that are there, and a head."""

    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace())

    def __init__(self, hidden, weight):
        self.hidden, self.head = hidden, SimpleNamespace(weight=weight, bias=None)

    def forward(self):
        raise NotImplementedError("only fused_lm_head=True is called")

    def base_model(self, **kwargs):
        return _Backbone(self.hidden)

    def get_output_embeddings(self):
        return self.head


def _trl_logps(hidden, weight, labels, outputs=TRAINED_OUTPUTS):
    from trl.trainer.utils import add_fused_lm_head

    model = _FusedModel(hidden, weight)
    add_fused_lm_head(model, outputs=outputs)
    return model.forward(shift_labels=labels, fused_lm_head=True).log_probs


@peer(LOGPS_PEERS, "TRL 1.16 as DPOTrainer trains: add_fused_lm_head, with entropy, mean logit and top-1", _trl_reason)
def trl_head(hidden, weight, labels):
    """TRL scores the tokens that count on a GPU, and all of them on a CPU."""
    return _trl_logps(hidden, weight, labels)


@peer(LOGPS_PEERS, "TRL 1.16 add_fused_lm_head, log-probs alone", _trl_reason)
def trl_head_plain(hidden, weight, labels):
    return _trl_logps(hidden, weight, labels, ("log_probs",))


def _trl_counted_reason(inputs):
    if reason := _trl_reason(inputs):
        return reason
    if inputs.device.type == "cuda":
        return "TRL drops tokens itself on a GPU: see its other rows"
    return _nothing_masked(inputs)


@peer(LOGPS_PEERS, "TRL 1.16 add_fused_lm_head, log-probs of the tokens that count, as on a GPU", _trl_counted_reason)
def trl_head_counted(hidden, weight, labels):
    return counted(trl_head_plain)(hidden, weight, labels)


# ---- Liger ----


def _liger_scaled_reason(inputs):
    return import_reason("liger_kernel.ops.fused_linear_scaled_cross_entropy")


@peer(LOGPS_PEERS, "Liger fused linear scaled cross entropy", _liger_scaled_reason)
def liger_scaled(hidden, weight, labels):
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    loss = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden.flatten(0, -2), weight, labels.flatten())
    return -loss.view(labels.shape)


# ---- CCE ----


def _cce_reason(inputs):
    return import_reason("cut_cross_entropy")


@peer(LOGPS_PEERS, "CCE, torch_compile", _cce_reason)
def cce_compiled(hidden, weight, labels):
    """Takes the tokens that count itself; per token it returns fp32."""
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, labels, reduction="none", impl="torch_compile")


def _cce_kernel_reason(inputs):
    if inputs.device.type != "cuda":
        return "CCE's own kernel runs on GPUs only"
    return _cce_reason(inputs)


@peer(LOGPS_PEERS, "CCE", _cce_kernel_reason)
def cce(hidden, weight, labels):
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, labels, reduction="none", impl="cce").float()


# ---- a preference step of each: log-probs, then the formula of DPO ----


def _enter_step(name, logps, title):
    def step(hidden, weight, batch):
        return logistic_loss(logps(hidden, weight, batch.labels), batch.scored(logps, weight))

    step.__name__ = f"{name}_step"
    peer(STEP_PEERS, title, logps.available)(step)


_enter_step("fastpref_linear_vectors", LOGPS_PEERS["fastpref_linear"], "fastpref linear_token_logps + logsigmoid")
for _name, _logps in LOGPS_PEERS.items():
    if not _name.startswith("fastpref"):
        _enter_step(_name, _logps, f"{_logps.title} + logsigmoid")


def _liger_dpo_reason(inputs):
    if inputs.batch.ref_hidden is None:
        return "Liger's DPO loss takes no reference log-probs, only the reference's hidden states"
    return import_reason("liger_kernel.chunked_loss")


def _liger_dpo(hidden, weight, batch, compiled):
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss = LigerFusedLinearDPOLoss(ignore_index=IGNORE, beta=batch.beta, compiled=compiled, loss_type=batch.loss)
    value, (*_, chosen_rewards, rejected_rewards) = loss(
        weight, hidden, batch.labels, ref_input=batch.ref_hidden, ref_weight=weight.detach()
    )
    return value, chosen_rewards - rejected_rewards


@peer(STEP_PEERS, "Liger DPO loss, compiled=False", _liger_dpo_reason)
def liger_dpo(hidden, weight, batch):
    return _liger_dpo(hidden, weight, batch, compiled=False)


@peer(STEP_PEERS, "Liger DPO loss, compiled", _liger_dpo_reason)
def liger_dpo_compiled(hidden, weight, batch):
    return _liger_dpo(hidden, weight, batch, compiled=True)
