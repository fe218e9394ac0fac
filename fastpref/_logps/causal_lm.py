"""A causal LM of transformers taken apart: its hidden states, its head, and what lies between the head and the logits.

The fused log-probs need hidden states and the head's weight. Where a model gives no such pair (a quantised head, one
with an adapter, parts on several devices, soft prompts, a formula of its own for the logits), the model's logits do.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpref._logps.linear_logps import linear_token_logps
from fastpref._logps.token_logps import token_logps


def logit_transform(config) -> dict[str, Any]:
    """`scale` and `softcap` of linear_token_logps, by the names that model configs have for them."""
    names = ("logit_scale", "output_multiplier", "lm_head_multiplier")
    scale = next((value for name in names if (value := getattr(config, name, None)) is not None), None)
    if scale is None and (divisor := getattr(config, "logits_scaling", None)) is not None:
        scale = divisor if config.model_type == "hyperclovax" else 1 / divisor
    return {"scale": 1.0 if scale is None else scale, "softcap": getattr(config, "final_logit_softcapping", None)}


def is_plain_head(head) -> bool:
    """Whether its product with the hidden states may be formed from its weight and bias."""
    if isinstance(getattr(head, "modules_to_save", None), nn.ModuleDict):  # PEFT's: the head itself, and a trained copy
        head = head.original_module
    return isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward and head.weight.is_floating_point()


def completion_logps(model) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The function (input_ids, attention_mask, completion_mask), all [B, T] and padded on the right, -> [B] float64:
    log-probs summed over the completion tokens, on the model's device, with a gradient where one is asked for.

    Raises TypeError for a model that is no causal LM of transformers, or of PEFT around one.
    """
    if not hasattr(model, "get_output_embeddings") or not hasattr(model, "config"):
        raise TypeError(f"model must be a causal LM of transformers, got {type(model).__name__}")
    if model.config.is_encoder_decoder:
        raise TypeError(f"model must be decoder-only, got the encoder-decoder {type(model).__name__}")
    fused = _can_fuse(model)

    def logps(input_ids, attention_mask, completion_mask) -> Tensor:
        input_ids, attention_mask, completion_mask = (
            t.to(model.device) for t in (input_ids, attention_mask, completion_mask)
        )
        labels = input_ids.masked_fill(completion_mask == 0, -100)
        if fused:
            hidden, head, transform = _taken_apart(model, input_ids, attention_mask)
            tokens = linear_token_logps(hidden, head.weight, labels, bias=head.bias, shift=True, **transform)
        else:
            logits = _logits(model, input_ids, attention_mask)
            tokens = token_logps(logits, labels.to(logits.device), shift=True)
        return tokens.double().sum(1).to(model.device)

    return logps


def _taken_apart(model, input_ids, attention_mask) -> tuple[Tensor, nn.Module, dict[str, Any]]:
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model  # of a PEFT model
    body = causal.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    return body.last_hidden_state, causal.get_output_embeddings(), logit_transform(causal.config)


def _logits(model, input_ids, attention_mask) -> Tensor:
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    return logits[:, -input_ids.shape[1] :]  # behind the virtual tokens of a soft prompt


@torch.no_grad()
def _can_fuse(model) -> bool:
    """Decided on a short sequence: head and config must give the logits that the model gives."""
    prompted = getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
    spread = len(set(getattr(model, "hf_device_map", {}).values())) > 1
    if prompted or spread or not is_plain_head(model.get_output_embeddings()):
        return False
    ids = torch.arange(min(8, model.get_input_embeddings().weight.shape[0]), device=model.device).unsqueeze(0)
    mask = torch.ones_like(ids)
    with evaluating(model):
        expected = _logits(model, ids, mask)
        hidden, head, transform = _taken_apart(model, ids, mask)
    if hidden.dtype != head.weight.dtype:
        return False
    product = transform["scale"] * F.linear(hidden, head.weight, head.bias).float()
    if (softcap := transform["softcap"]) is not None:
        product = softcap * torch.tanh(product / softcap)
    tolerance = 8 * torch.finfo(hidden.dtype).eps * expected.abs().max()
    return bool(((product - expected).abs() <= tolerance).all())


@contextlib.contextmanager
def evaluating(model) -> Iterator[None]:
    """Without dropout; every module is afterwards in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def model_id(model) -> str:
    """SHA-256 of what a model computes with: its class, its config, and every parameter and persistent buffer.

    PEFT adapters count, and whether they are on. Where the model was loaded from does not. model: any torch.nn.Module.
    Raises ValueError for parameters without data (offloaded, "meta").
    """
    digest = hashlib.sha256(type(model).__name__.encode())
    if hasattr(model, "config"):
        digest.update(_settings(model.config))
    for name, config in getattr(model, "peft_config", {}).items():
        digest.update(name.encode() + _settings(config))
    if getattr(model, "_adapters_disabled", False):  # of PEFT, which has no module to say so for a soft prompt
        digest.update(b"disabled")
    for name, module in model.named_modules():
        if isinstance(off := getattr(module, "disable_adapters", None), bool):
            digest.update(f"{name} {off} {getattr(module, 'active_adapters', None)}".encode())
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor!r}".encode())
            continue
        if tensor.is_meta:
            raise ValueError(f"model has no data for {name} (device meta), so it needs a name: pass its id")
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return f"sha256:{digest.hexdigest()[:32]}"


# where a model came from, and what its class and its parameters say
_NOT_SETTINGS = (
    "architectures", "base_model_name_or_path", "dtype", "inference_mode", "revision", "torch_dtype",
    "transformers_version",
)  # fmt: skip


def _settings(config) -> bytes:
    fields = config.to_dict() if hasattr(config, "to_dict") else vars(config)
    kept = {name: value for name, value in fields.items() if not (name.startswith("_") or name in _NOT_SETTINGS)}
    return json.dumps(kept, sort_keys=True, default=str).encode()
