"""A linear layer whose forward computes the loss: its weight is read inside forward, where wrappers expect it to be."""

import torch
from torch import Tensor

from fastpref._logps.linear_logps import linear_token_logps
from fastpref._logps.linear_preference import linear_preference_loss
from fastpref._logps.pairs import PreferenceOutput
from fastpref._logps.token_logps import TokenStats


class FusedLMHead(torch.nn.Linear):
    """An LM head that goes from hidden states to log-probs or to a preference loss, logits never stored.

    Takes the place of torch.nn.Linear(hidden_size, vocab_size): same parameters, same state_dict, can be tied to an
    embedding. Because forward itself reads the weight, the hooks of DistributedDataParallel, FSDP and ZeRO fire as for
    any other layer: nothing reaches around the module for `lm_head.weight`.
    """

    __module__ = "fastpref"

    @classmethod
    def from_linear(cls, linear: torch.nn.Linear) -> "FusedLMHead":
        """A head that shares the linear layer's parameters."""
        if not isinstance(linear, torch.nn.Linear):
            raise TypeError(f"linear must be a torch.nn.Linear, got {type(linear).__name__}")
        head = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        head.weight, head.bias = linear.weight, linear.bias
        return head.train(linear.training)

    def forward(
        self, hidden: Tensor, labels: Tensor | None = None, *, loss=None, **options
    ) -> Tensor | tuple[Tensor, TokenStats] | PreferenceOutput:
        """Logits of hidden [..., H] without labels; with labels [...] linear_token_logps, and with a loss too
        linear_preference_loss, each with its keyword options but weight and bias."""
        if labels is None:
            if loss is not None or options:
                given = ["loss"] * (loss is not None) + list(options)
                raise ValueError(f"labels must be given with {', '.join(given)}, got None")
            return super().forward(hidden)
        if loss is None:
            return linear_token_logps(hidden, self.weight, labels, bias=self.bias, **options)
        return linear_preference_loss(hidden, self.weight, labels, bias=self.bias, loss=loss, **options)
