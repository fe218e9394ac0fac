"""The operators of `torch.ops.fastpref`: every schema, with a fake and an implementation that load when first called.

A program saved by `torch.export.save`, or a compiled graph from a cache, names operators and nothing else: torch finds
them as soon as this module is imported. That needs neither Triton nor the native core, and imports no op's module.
`import fastpref` does it where torch is imported already; elsewhere the first name of fastpref that uses torch does.

The public functions of `fastpref` are the interface: they check, broadcast and differentiate. An operator takes what
they have checked, has no gradient of its own, and chooses its backend on the tensors that it is handed.

An implementation is named "module:function"; the function that infers its outputs' shapes has the same name with _fake.
"""

from collections.abc import Callable
from importlib import import_module

import torch

_LIBRARY = torch.library.Library("fastpref", "DEF")


def _define(schema: str, implementation: str):
    """Registers an operator, and returns it for direct calls."""
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, _loaded_at_first_call(implementation), "CompositeExplicitAutograd")
    fake = _nothing if schema.endswith("-> ()") else _loaded_at_first_call(implementation + "_fake")
    torch.library.register_fake(f"fastpref::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.fastpref, name).default


def _loaded_at_first_call(path: str) -> Callable:
    module, _, name = path.partition(":")
    function = None

    def run(*args):
        nonlocal function
        if function is None:
            function = getattr(import_module(module), name)
        if torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args):
            with torch.no_grad():  # in an exported program
                return function(*args)
        return function(*args)

    return run


def _nothing(*args) -> None:
    """What an operator returns that only writes to an argument."""


# ---- log-probs of tokens from logits ----

# z = softcap * tanh(scale * x / softcap) / temperature
_TRANSFORM = "float temperature, float? softcap, float scale, int ignore_index"

# logits [..., V], labels [...] int64 -> logps [...], lse [2, ...] (log-sum-exp, high and low), values [4 or 0, ...]
token_logps_fwd = _define(
    f"token_logps_fwd(Tensor logits, Tensor labels, {_TRANSFORM}, bool stats, str backend) -> (Tensor, Tensor, Tensor)",
    "fastpref._logps.token_logps:_fwd",
)
# grad [...] -> gradient of the logits, or written over them
_SAVED = f"Tensor labels, Tensor logps, Tensor lse, {_TRANSFORM}, str backend"
token_logps_bwd = _define(
    f"token_logps_bwd(Tensor grad, Tensor logits, {_SAVED}) -> Tensor",
    "fastpref._logps.token_logps:_bwd",
)
token_logps_bwd_ = _define(
    f"token_logps_bwd_(Tensor grad, Tensor(a!) logits, {_SAVED}) -> ()",
    "fastpref._logps.token_logps:_bwd_inplace",
)


# ---- preference losses of the fused family, from logits ----

# labels [2B, T] with lengths [2B], or [tokens] with cu_seqlens [2B + 1]; rating_gap and pair_weights [B]; num_items [];
# numbers: float64 [8] on the host, beta, the numbers of losses.Logistic, and num_items or 0 -> loss [], or [B] with
# reduction "none", losses [B], logps and rewards [2B], margins [B], lengths [2B], metrics [7] and counts [3] of
# csrc/preference.h, stat_sums [2B, 4] (empty without stats), tail and tail_begin [2B] (empty unless asked for, which
# needs the reference per token if there is one), coefficients [2B], logps and lse as token_logps_fwd has them
_LAYOUT = "Tensor labels, Tensor? cu_seqlens, Tensor? lengths, bool shift"
preference_fwd = _define(
    f"preference_fwd(Tensor logits, {_LAYOUT}, Tensor? ref_logits, Tensor? ref_token_logps, Tensor? ref_logps, "
    f"Tensor? rating_gap, Tensor? pair_weights, Tensor? num_items, str reduction, {_TRANSFORM}, bool stats, "
    "bool tail, Tensor numbers, bool drop_square, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, "
    "Tensor)",
    "fastpref._logps.preference:_fwd",
)
# tail_coefficients [2B] are added to the coefficients from the token tail_begin on
_COEFFICIENTS = "Tensor coefficients, Tensor? tail_coefficients, Tensor? tail_begin"
_SAVED = f"{_LAYOUT}, Tensor token_logps, Tensor lse, {_TRANSFORM}, str backend"
preference_bwd = _define(
    f"preference_bwd(Tensor grad_loss, {_COEFFICIENTS}, Tensor logits, {_SAVED}) -> Tensor",
    "fastpref._logps.preference:_bwd",
)
preference_bwd_ = _define(
    f"preference_bwd_(Tensor grad_loss, {_COEFFICIENTS}, Tensor(a!) logits, {_SAVED}) -> ()",
    "fastpref._logps.preference:_bwd_inplace",
)


# ---- from hidden states and the LM head ----

# hidden [tokens, H], weight [V, H], bias [V], adapter_a [r, H], adapter_b [V, r]
_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor? adapter_a, Tensor? adapter_b"
# labels [tokens]; cu_seqlens [S + 1]; ref_hidden [tokens, H_ref] with its head. A caller that has chosen the rows to
# project hands over kept [tokens], whose leading kept_bounds[S] entries are these rows, whether they count or not, and
# kept_bounds [S + 1], on the host, where each sequence begins among them; cu_seqlens is then kept_bounds on the device
_TOKENS = (
    "Tensor labels, Tensor? cu_seqlens, Tensor? kept, Tensor? kept_bounds, "
    "Tensor? ref_hidden, Tensor? ref_weight, Tensor? ref_bias"
)
# max_active_tokens -1 and max_tile_bytes 0 mean None; group: a process group's name or ""
_BUDGET = "int max_active_tokens, int max_tile_bytes, ScalarType? logits_dtype, str group, str backend"

# -> logps [tokens], lse [2, tokens], values [4 or 0, tokens], the hidden gradient per unit coefficient (or empty), the
# reference's logps (or empty), index [tokens] and bounds of the tokens that count
linear_logps_fwd = _define(
    f"linear_logps_fwd({_HEAD}, {_TOKENS}, {_TRANSFORM}, bool stats, bool unit, {_BUDGET}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "fastpref._logps.linear_logps:_fwd",
)
# has_kept: whether linear_logps_fwd was handed kept rows -> a gradient for each part of the head, empty where `needs`
# says that it is not asked for
linear_logps_bwd = _define(
    f"linear_logps_bwd(Tensor grad, {_HEAD}, Tensor labels, Tensor logps, Tensor lse, Tensor index, Tensor bounds, "
    f"{_TRANSFORM}, bool has_kept, bool[] needs, {_BUDGET}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "fastpref._logps.linear_logps:_bwd",
)
# ref_token_logps [tokens], ref_logps and scores [2B], rating_gap and scale_of_pair [B]; losses, loss_options and
# numbers: pairs.EncodedLoss -> loss [], losses [B], logps, logratios and lengths [2B], values [4 or 0, tokens], and the
# gradients of the loss as linear_logps_bwd has them
linear_preference_fwd = _define(
    f"linear_preference_fwd({_HEAD}, {_TOKENS}, Tensor? ref_token_logps, Tensor? ref_logps, Tensor? rating_gap, "
    f"Tensor? scores, Tensor scale_of_pair, {_TRANSFORM}, bool stats, bool[] needs, str[] losses, "
    f"str[] loss_options, Tensor numbers, {_BUDGET}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "fastpref._logps.linear_preference:_fwd",
)


# token_logps and labels [tokens], bounds [2B + 1] of the sequences among them, ref_token_logps [tokens] or ref_logps
# [2B], rating_gap and scale_of_pair [B]; numbers: float64 [7] on the host, beta and those of losses.Logistic -> the sum
# of scale_of_pair times the losses, losses [B], logps, logratios and lengths [2B], and that sum's gradient [tokens]
pair_epilogue = _define(
    "pair_epilogue(Tensor token_logps, Tensor labels, Tensor bounds, Tensor? ref_token_logps, Tensor? ref_logps, "
    "Tensor? rating_gap, Tensor scale_of_pair, int ignore_index, Tensor numbers, bool drop_square, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "fastpref._logps.pair_epilogue:_fwd",
)


# ---- low rank ----

# matrix [batch, M, N], threshold [batch] -> low_rank [batch, M, N], rank [batch]
svt = _define(
    "svt(Tensor matrix, Tensor threshold, str backend) -> (Tensor, Tensor)",
    "fastpref._lowrank.svt:_fwd",
)
# matrix [m, n], left [m, r], right [n, r] -> the fields of residual_pass.ResidualPass
residual_pass = _define(
    "residual_pass(Tensor matrix, Tensor left, Tensor right, str psi, float zeta, float scale, bool skew, "
    "Tensor? row_weights, Tensor? column_weights, bool squares, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "fastpref._lowrank.residual_pass:_pass",
)
# matrix [batch, N, N] -> scores, components and rejected [batch, N], statistics [batch, len(STATS)]
bradley_terry_dense = _define(
    "bradley_terry_dense(Tensor matrix, str data, float tol, int max_iter, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    "fastpref._lowrank.bradley_terry:_dense",
)
# a graph in compressed rows: offsets [N + 1], columns, values and votes [edges] -> as above, of one matrix
bradley_terry_edges = _define(
    "bradley_terry_edges(Tensor offsets, Tensor columns, Tensor values, Tensor votes, str data, float tol, "
    "int max_iter, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    "fastpref._lowrank.bradley_terry:_edges",
)
