"""The options of `fastpref denoise`, and which of them a kind of input takes. No torch: a refusal needs none."""

import math
from dataclasses import dataclass, field

import numpy as np

from fastpref.errors import InputError


@dataclass(frozen=True)
class DenoiseOptions:
    """What the flags of `fastpref denoise` gave; its --help explains them. None: not given."""

    inputs: list[str]
    output_file: str
    array: str | None = None
    layout: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    output: str | None = None
    rank: int | None = None
    structure: str | None = None
    corruption: str | None = None
    method: str | None = None
    lam: float | None = None
    scale: float | None = None
    robust: bool | None = None
    stderr: bool | None = None
    flagged: str | None = None
    tol: float | None = None
    max_iter: int | None = None
    max_dense: float | None = None
    threads: int | None = None
    plot: str | None = None
    csv_safe: bool = False

    @property
    def name(self) -> str:
        """What messages call IN."""
        return self.inputs[0] if len(self.inputs) == 1 else f"{self.inputs[0]} and {len(self.inputs) - 1} more"

    def given(self, *names) -> dict:
        """Returns those of these options that were given, as keywords of the function behind them."""
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def refuse(self, names, what: str) -> None:
        for name in self.given(*names):
            flag = "no-robust" if name == "robust" else name.replace("_", "-")
            raise InputError(f"--{flag} is not for {what}")


MATRIX_OPTIONS = ("output", "rank", "structure", "corruption", "method", "lam", "scale")
COMPARISON_OPTIONS = ("robust", "stderr", "flagged")


def check_ending(name: str, path, formats, what: str = "") -> None:
    if not str(path).endswith(formats):
        raise InputError(f"{name} must end in {', '.join(formats)}{what}, got {path}")


def spread_of(values):
    """Returns for JSON a number, or of several their smallest, median and largest; None for what is not finite.

    values: a tensor or an array.
    """
    values = np.asarray(values)
    if values.ndim == 0:
        number = values.item()
        return number if math.isfinite(number) else None
    known = values[np.isfinite(values)]
    if not len(known):
        return None
    return {"min": known.min().item(), "median": float(np.median(known)), "max": known.max().item()}
