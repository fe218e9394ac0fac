"""Fused kernels for preference optimisation of language models, and for the preference data that goes into it."""

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
    from fastpref._native import CudaError, set_simd_level

# name -> module; imported on first use, so that `fastpref --help` and fastpref.curate never import torch
_PUBLIC = {
    "CudaError": "fastpref._native",
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
    return value


def __dir__():
    return sorted(__all__)
