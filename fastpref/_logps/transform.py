"""The logit transform, z = softcap * tanh(scale * x / softcap) / temperature, and the label that does not count."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastpref import _checks


class Transform(NamedTuple):
    temperature: float = 1.0
    softcap: float | None = None  # None leaves the tanh out
    scale: float = 1.0
    ignore_index: int = -100

    def multiplier_and_tanh_scale(self) -> tuple[float, float]:
        """z = multiplier * v with v = x, or tanh(x * tanh_scale): the transform as the kernels take it."""
        if self.softcap is None:
            return self.scale / self.temperature, 0.0
        return self.softcap / self.temperature, self.scale / self.softcap

    def values_and_slopes(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """z and dz/dx, both float64: the specification."""
        x = logits.double()
        if self.softcap is None:
            return x * (self.scale / self.temperature), x.new_full((), self.scale / self.temperature)
        capped = torch.tanh(x * (self.scale / self.softcap))
        return capped * (self.softcap / self.temperature), (1 - capped * capped) * (self.scale / self.temperature)


def checked_transform(temperature, softcap, scale, ignore_index) -> Transform:
    """From the arguments of a public function."""
    _checks.transform(temperature, softcap, scale)
    _checks.ignore_index(ignore_index)
    return Transform(float(temperature), None if softcap is None else float(softcap), float(scale), ignore_index)
