"""Fused kernels for preference optimisation of language models, and for the preference data that goes into it.

Log-probabilities
    token_logps             log-prob of each label, from logits
    linear_token_logps      the same from hidden states and the LM head; the logits are never stored
    sequence_logps          their sums over sequences
    TokenStats              entropy and other by-products of the same read
    SequenceLogps           sums and lengths

Preference losses
    preference_loss         a whole step from logits
    linear_preference_loss  a whole step from hidden states and the LM head
    FusedLMHead             an LM head whose forward computes log-probs or the loss
    losses                  every loss as a function on vectors, by name in losses.LOSSES
    PreferenceOutput        the loss, and the metrics of the step
    plan                    which passes a linear call makes, and the memory it takes
    Plan                    what it says

Ratings and preference matrices
    bradley_terry           scores from comparisons, some of them corrupted
    BradleyTerryResult      scores, outliers, standard errors
    BradleyTerryInfo        how the fit went
    Edges                   comparisons as a list
    preference_matrix       comparisons to a matrix; denoise it, order it, audit its sources

Low rank
    rpca                    a matrix as low rank plus sparse
    RPCAResult              the two parts
    RPCAInfo                how the solve went
    RPCAProgress            what a callback gets
    SparseCOO               a sparse part
    svt                     singular values lowered by a threshold
    SVTResult               the matrix and its rank

Data
    curate                  cleaning, pairing, weighing and routing of preference data

This installation
    build_info              what was built, and which backend serves which op
    set_simd_level          the instruction set of the CPU kernels
    CudaError               a CUDA call failed
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

if find_spec("fastpref._build") is None:
    raise ImportError(
        f"this is fastpref's bare source tree ({__path__[0]}), which has no native core; "
        "install it with `pip install .` and run from another folder, or by a console script"
    )

from fastpref._build import version as __version__

if TYPE_CHECKING:
    from fastpref import curate, losses, preference_matrix
    from fastpref._build_info import build_info
    from fastpref._logps.linear_logps import linear_token_logps
    from fastpref._logps.linear_preference import linear_preference_loss
    from fastpref._logps.lm_head import FusedLMHead
    from fastpref._logps.pairs import PreferenceOutput
    from fastpref._logps.plan import Plan, plan
    from fastpref._logps.preference import preference_loss
    from fastpref._logps.sequences import SequenceLogps, sequence_logps
    from fastpref._logps.token_logps import TokenStats, token_logps
    from fastpref._lowrank.bradley_terry import BradleyTerryInfo, BradleyTerryResult, Edges, bradley_terry
    from fastpref._lowrank.result import RPCAInfo, RPCAProgress, RPCAResult, SparseCOO
    from fastpref._lowrank.rpca import rpca
    from fastpref._lowrank.svt import SVTResult, svt
    from fastpref._native import set_simd_level
    from fastpref.errors import CudaError

# name -> module; imported on first use, so that `fastpref --help` and fastpref.curate never import torch
_PUBLIC = {
    "CudaError": "fastpref.errors",
    "build_info": "fastpref._build_info",
    "set_simd_level": "fastpref._native",
    "BradleyTerryInfo": "fastpref._lowrank.bradley_terry",
    "BradleyTerryResult": "fastpref._lowrank.bradley_terry",
    "Edges": "fastpref._lowrank.bradley_terry",
    "bradley_terry": "fastpref._lowrank.bradley_terry",
    "curate": "fastpref.curate",
    "losses": "fastpref.losses",
    "linear_token_logps": "fastpref._logps.linear_logps",
    "linear_preference_loss": "fastpref._logps.linear_preference",
    "FusedLMHead": "fastpref._logps.lm_head",
    "Plan": "fastpref._logps.plan",
    "plan": "fastpref._logps.plan",
    "PreferenceOutput": "fastpref._logps.pairs",
    "SequenceLogps": "fastpref._logps.sequences",
    "preference_loss": "fastpref._logps.preference",
    "sequence_logps": "fastpref._logps.sequences",
    "preference_matrix": "fastpref.preference_matrix",
    "RPCAInfo": "fastpref._lowrank.result",
    "RPCAProgress": "fastpref._lowrank.result",
    "RPCAResult": "fastpref._lowrank.result",
    "SparseCOO": "fastpref._lowrank.result",
    "rpca": "fastpref._lowrank.rpca",
    "SVTResult": "fastpref._lowrank.svt",
    "svt": "fastpref._lowrank.svt",
    "TokenStats": "fastpref._logps.token_logps",
    "token_logps": "fastpref._logps.token_logps",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fastpref' has no attribute {name!r}")
    module = import_module(_PUBLIC[name])
    value = module if module.__name__ == f"fastpref.{name}" else getattr(module, name)
    globals()[name] = value
    _register_operators()
    return value


def _register_operators():
    """Where torch is imported, torch.ops.fastpref is there: a saved program names operators and nothing else."""
    if sys.modules.get("torch") is not None:  # None: an import that a test or a host has blocked
        import_module("fastpref.operators")


_register_operators()


def __dir__():
    return sorted(__all__)


def __reduce_ex__(protocol):  # pickle refuses modules: what holds this one travels to other processes with its name
    return import_module, (__name__,)
