"""Attention of few queries over many keys: on a CPU products of matrices, where the fused kernel is slow.

The fused kernel (`scaled_dot_product_attention`) is made for about as many queries as keys. A decoder that reads one to
a few tokens a pass asks it for little and waits for most of the time. In the shapes B is the batch, H the heads of the
queries, K those of keys and values (H is a multiple of K), m the number of queries, S that of keys, d the width of a
head.
"""

from typing import Any

import torch
import torch.nn.functional as F

NAME = "few_queries"  # by which the library finds `_library_attention`
# Queries up to which products were not slower, on CPUs with and without AVX512-BF16 (bench.py). The fused kernel
# reads keys that several heads share once for each of these heads.
FEW, FEW_WITH_SHARED_KEYS = 4, 16
DTYPES = (torch.bfloat16, torch.float32)


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """query (B, H, m, d), keys and values (B, H, S, d) -> (B, H, m, d), by the kernel that is fast for so many queries.

    mask: as `attention_weights` takes it. scale: None is d ** -0.5.
    """
    if not _few(query, keys):
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
    return weighted_sum(attention_weights(query, keys, mask, scale), values)


def attention_weights(
    query: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor | None = None, scale: float | None = None
) -> torch.Tensor:
    """query (B, H, m, d), keys (B, K, S, d) -> float32 (B, H, m, S), 1 in sum over S.

    mask: broadcasts to (B, H, m, S); numbers are added to the logits, a boolean one is false where a key is not seen.
    """
    logits = (query.reshape(*keys.shape[:2], -1, query.shape[-1]) @ keys.mT).float().view(*query.shape[:3], -1)
    if scale != 1.0:
        logits = logits * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        seen_by_none = torch.finfo(logits.dtype).min  # finite: a query that sees nothing is padding, and not nan
        logits = logits.masked_fill(~mask, seen_by_none) if mask.dtype == torch.bool else logits + mask
    return logits.softmax(-1)


def weighted_sum(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """weights (B, H, m, S), values (B, K, S, d) -> (B, H, m, d) in the dtype of the values."""
    rows = weights.to(values.dtype).view(*values.shape[:2], -1, values.shape[2])  # heads that share values: as rows
    return (rows @ values).view(*weights.shape[:3], -1)


def use_for_few_queries(model: Any) -> None:
    """Let a model of the library that takes the fused kernel take `attend`'s choice, pass by pass."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _library_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)


def _library_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """What the library calls in each layer: (B, m, H, d), and no weights."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    causal = attention_mask is None and query.shape[2] > 1  # without a mask the fused kernel sees to it
    if module.training or causal or not _few(query, key):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    weights = attention_weights(query, key, attention_mask, scaling)
    return weighted_sum(weights, value).transpose(1, 2).contiguous(), None


def _few(query: torch.Tensor, keys: torch.Tensor) -> bool:
    most = FEW if query.shape[1] == keys.shape[1] else FEW_WITH_SHARED_KEYS
    return query.device.type == "cpu" and query.dtype in DTYPES and query.shape[2] <= most
