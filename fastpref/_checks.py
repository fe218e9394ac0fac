"""Argument checks. Every message names the argument, what was expected and what came."""

import warnings

import torch
from torch import Tensor

LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tensor(name: str, value) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def as_tensor(value) -> Tensor:
    """torch.as_tensor; memory that is read-only stays so, since nothing is written to it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        return torch.as_tensor(value)


def array(name: str, value) -> Tensor:
    """A tensor, or an array or list of numbers as one; integers of any width become int64."""
    try:
        found = as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        what = type(value).__name__
        raise TypeError(f"{name} must be a tensor or an array of numbers, got {what}: {error}") from error
    if found.is_complex():
        raise TypeError(f"{name} must be real numbers, got {found.dtype}")
    return found if found.is_floating_point() or found.dtype == torch.bool else found.long()


def real(name: str, value) -> Tensor:
    """The same as a floating-point tensor; integers and booleans become float64."""
    found = array(name, value)
    return found if found.is_floating_point() else found.double()


def logits(name: str, value) -> None:
    tensor(name, value)
    if value.dtype not in LOGITS_DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {value.dtype}")
    if value.dim() < 1:
        raise ValueError(f"{name} must have shape [..., vocab], got a scalar")
    if value.shape[-1] == 0:
        raise ValueError(f"{name} must have at least one column, got shape {list(value.shape)}")


def integers(name: str, value) -> None:
    tensor(name, value)
    if value.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be int64 or int32, got {value.dtype}")


def floats(name: str, value) -> None:
    tensor(name, value)
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name} must be a floating-point tensor, got {value.dtype}")


def finite_or_nan(name: str, value: Tensor) -> None:
    if value.isinf().any():
        where = value.isinf().nonzero()[0].tolist()
        raise ValueError(f"{name} must be finite (NaN: missing), got {value[tuple(where)].item()} at {where}")


def labels(value, like: Tensor, like_name: str = "logits") -> None:
    integers("labels", value)
    if value.shape != like.shape[:-1]:
        raise ValueError(
            f"labels must have shape {list(like.shape[:-1])} to match {like_name} {list(like.shape)}, "
            f"got {list(value.shape)}"
        )
    same_device("labels", value, like_name, like)


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{name} must be on {other.device} like {other_name}, got {value.device}")


def shaped_like(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.shape != other.shape:
        raise ValueError(f"{name} must have shape {list(other.shape)} like {other_name}, got {list(value.shape)}")
    same_device(name, value, other_name, other)


def vector(name: str, value, length: int, what: str, like_name: str, like: Tensor) -> None:
    """value is a floating-point tensor of shape [length], on like's device."""
    floats(name, value)
    if value.dim() != 1 or value.shape[0] != length:
        raise ValueError(f"{name} must have shape [{length}] ({what}), got {list(value.shape)}")
    same_device(name, value, like_name, like)


def positive(name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a positive float, got {type(value).__name__}")
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be positive and finite, got {value}")


def number(name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def between(name: str, value, low: float, high: float) -> None:
    number(name, value)
    if not low < value < high:
        raise ValueError(f"{name} must lie between {low} and {high}, got {value}")


def not_negative(name: str, value) -> None:
    number(name, value)
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be >= 0 and finite, got {value}")


def positive_int(name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a positive int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be positive, got {value}")


def natural(name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int >= 0, got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{name} must be >= 0, got {value}")


def transform(temperature, softcap, scale) -> None:
    positive("temperature", temperature)
    positive("scale", scale)
    if softcap is not None:
        positive("softcap", softcap)
        _normal_float32("softcap / temperature", softcap / temperature)
        _normal_float32("scale / softcap", scale / softcap)
    else:
        _normal_float32("scale / temperature", scale / temperature)


def _normal_float32(name: str, value: float) -> None:
    if not 2.0**-126 <= value < 2.0**128:
        raise ValueError(f"{name} must be a normal float32, got {value}")


def ignore_index(value) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"ignore_index must be an int, got {type(value).__name__}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"ignore_index must fit 64 bits, got {value}")
