"""Fused kernels for preference optimisation of language models, and for the preference data that goes into it."""

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING

if find_spec("fastpref._build") is None:
    raise ImportError(
        f"this is fastpref's bare source tree ({__path__[0]}), which has no native core; "
        "install it with `pip install .` and run from another folder, or by a console script"
    )

from fastpref._build import version as __version__

if TYPE_CHECKING:
    from fastpref import curate, losses, preference_matrix
    from fastpref._native import CudaError, build_info, set_simd_level
    from fastpref.bradley_terry import BradleyTerryInfo, BradleyTerryResult, Edges, bradley_terry
    from fastpref.linear_logps import linear_token_logps
    from fastpref.linear_preference import linear_preference_loss
    from fastpref.lm_head import FusedLMHead
    from fastpref.plan import Plan, plan
    from fastpref.preference import PreferenceOutput, SequenceLogps, preference_loss, sequence_logps
    from fastpref.rpca import RPCAInfo, RPCAProgress, RPCAResult, SparseCOO, rpca
    from fastpref.svt import SVTResult, svt
    from fastpref.token_logps import TokenStats, token_logps

# name -> module; imported on first use, so that `fastpref --help` and fastpref.curate never import torch
_PUBLIC = {
    "CudaError": "fastpref._native",
    "build_info": "fastpref._native",
    "set_simd_level": "fastpref._native",
    "BradleyTerryInfo": "fastpref.bradley_terry",
    "BradleyTerryResult": "fastpref.bradley_terry",
    "Edges": "fastpref.bradley_terry",
    "bradley_terry": "fastpref.bradley_terry",
    "curate": "fastpref.curate",
    "losses": "fastpref.losses",
    "linear_token_logps": "fastpref.linear_logps",
    "linear_preference_loss": "fastpref.linear_preference",
    "FusedLMHead": "fastpref.lm_head",
    "Plan": "fastpref.plan",
    "plan": "fastpref.plan",
    "PreferenceOutput": "fastpref.preference",
    "SequenceLogps": "fastpref.preference",
    "preference_loss": "fastpref.preference",
    "sequence_logps": "fastpref.preference",
    "preference_matrix": "fastpref.preference_matrix",
    "RPCAInfo": "fastpref.rpca",
    "RPCAProgress": "fastpref.rpca",
    "RPCAResult": "fastpref.rpca",
    "SparseCOO": "fastpref.rpca",
    "rpca": "fastpref.rpca",
    "SVTResult": "fastpref.svt",
    "svt": "fastpref.svt",
    "TokenStats": "fastpref.token_logps",
    "token_logps": "fastpref.token_logps",
}
__all__ = [*_PUBLIC, "__version__"]


class _Package(ModuleType):
    def __setattr__(self, name, value):
        # The import system binds the submodule token_logps over the function of the same name: keep the function.
        if isinstance(value, ModuleType) and _PUBLIC.get(name) == value.__name__ and hasattr(value, name):
            value = getattr(value, name)
        super().__setattr__(name, value)

    def __reduce__(self):  # a function that names this module travels to other processes by cloudpickle (Ray, Spark)
        return import_module, (self.__name__,)


sys.modules[__name__].__class__ = _Package


def __getattr__(name):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fastpref' has no attribute {name!r}")
    module = import_module(_PUBLIC[name])
    value = module if module.__name__ == f"fastpref.{name}" and not hasattr(module, name) else getattr(module, name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)
