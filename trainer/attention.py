"""Attention of short training sequences on a CPU, by plain products.

The fused CPU kernel's backward pass takes three to four times as long as these products at the lengths
that demonstrations have (16 sequences of 60 tokens: 27 ms a layer against 7), and it is half of a step.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "ratchet_short"
LONGEST = 512
"""Tokens above which the [tokens, tokens] scores cost more memory than they save time."""


def short_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Causal attention, or by a bool mask [batch, 1, tokens, tokens] that is True where a token may look;
    query [batch, heads, tokens, d], key and value [batch, kv heads, tokens, d].

    Everything but a forward pass with gradients on a CPU goes to the fused kernel.
    """
    batch, heads, tokens, size = query.shape
    plain = (
        query.requires_grad
        and query.device.type == "cpu"
        and (attention_mask is None or attention_mask.dtype == torch.bool)
        and tokens == key.shape[2] <= LONGEST
        and not kwargs.get("dropout")
    )
    if not plain and attention_mask is not None and query.device.type == "cpu" and not query.requires_grad:
        # transformers would copy keys and values once for each query head: most of a decode step's attention.
        out = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=kwargs.get("scaling"), enable_gqa=True
        )
        return out.transpose(1, 2).contiguous(), None
    if not plain:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    scaling = kwargs.get("scaling") or size**-0.5
    groups = key.shape[1]
    grouped = (query * scaling).reshape(batch, groups, heads // groups * tokens, size)
    scores = (grouped @ key.transpose(-1, -2)).float().view(batch, groups, heads // groups, tokens, tokens)
    if attention_mask is None:
        hidden = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).triu(1)
    else:
        hidden = attention_mask[:, :, None].logical_not()
    weights = torch.softmax(scores.masked_fill_(hidden, float("-inf")), -1).to(value.dtype)
    out = weights.view(batch, groups, heads // groups * tokens, tokens) @ value
    return out.view(batch, heads, tokens, size).transpose(1, 2).contiguous(), None


def register() -> str:
    """Make the function known to transformers; returns the name that `attn_implementation` takes."""
    AttentionInterface.register(NAME, short_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME
