"""Attention of few queries over many keys: on a CPU, matrix products replace the fused kernel.

In this module, queries, keys and values are vectors of the attention mechanism. PyTorch's fused kernel
(`scaled_dot_product_attention`) is fast if there are about as many queries as keys. A decoding step has only one query
per new token. With so few queries, the fused kernel is slower than matrix products on a CPU.

Shapes: B is the batch size, and d the width of a head. There are m queries in each of H heads. There are S keys and S
values in each of K heads, and H is a multiple of K.
"""

from typing import Any

import torch
import torch.nn.functional as F

NAME = "few_queries"  # the name under which the attention function of this module is registered in transformers
# Up to this number of queries, matrix products were not slower than the fused kernel on CPUs with and without
# AVX512-BF16. FEW applies if each head has its own keys. FEW_WITH_SHARED_KEYS applies if several heads share keys. This
# limit is larger, since the fused kernel reads shared keys again for each head
FEW, FEW_WITH_SHARED_KEYS = 4, 16
DTYPES = (torch.bfloat16, torch.float32)


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Compute attention: query (B, H, m, d), keys and values (B, H, S, d) -> output (B, H, m, d).

    On a CPU, the function uses matrix products for up to FEW queries in a dtype of DTYPES. Otherwise, it uses the fused
    kernel.

    Args:
        mask: as in `attention_weights`.
        scale: the factor of the logits. None means d ** -0.5.
    """
    if not _few(query, keys):
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
    return weighted_sum(attention_weights(query, keys, mask, scale), values)


def attention_weights(
    query: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor | None = None, scale: float | None = None
) -> torch.Tensor:
    """Compute attention weights: query (B, H, m, d), keys (B, K, S, d) -> float32 weights (B, H, m, S), which sum to 1
    over S.

    Args:
        mask: a tensor that broadcasts to (B, H, m, S), or None. A float mask is added to the logits. A boolean mask is
            false for masked keys.
        scale: the factor of the logits. None means d ** -0.5.
    """
    logits = (
        (query.reshape(*keys.shape[:2], -1, query.shape[-1]) @ keys.transpose(-1, -2))
        .float()
        .view(*query.shape[:3], -1)
    )
    if scale != 1.0:
        logits = logits * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        seen_by_none = torch.finfo(logits.dtype).min  # finite, so that a query whose keys are all masked gives no NaN
        logits = logits.masked_fill(~mask, seen_by_none) if mask.dtype == torch.bool else logits + mask
    return logits.softmax(-1)


def weighted_sum(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Sum values by their weights: weights (B, H, m, S), values (B, K, S, d) -> weighted sums (B, H, m, d), in the
    dtype of the values."""
    rows = weights.to(values.dtype).view(*values.shape[:2], -1, values.shape[2])  # heads that share values become rows
    return (rows @ values).view(*weights.shape[:3], -1)


def use_for_few_queries(model: Any) -> None:
    """Let a model of transformers use matrix products for few queries, as `attend` does. In training mode, the model
    still uses the fused kernel. A model that never uses the fused kernel is unchanged."""
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
    """The attention function that a model of transformers calls in each layer: query (B, H, m, d), key and value (B, K,
    S, d) -> output (B, m, H, d), and None in place of the attention weights."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    causal = attention_mask is None and query.shape[2] > 1  # without a mask, transformers' function masks later tokens
    if module.training or causal or not _few(query, key):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    weights = attention_weights(query, key, attention_mask, scaling)
    return weighted_sum(weights, value).transpose(1, 2).contiguous(), None


def _few(query: torch.Tensor, keys: torch.Tensor) -> bool:
    most = FEW if query.shape[1] == keys.shape[1] else FEW_WITH_SHARED_KEYS
    return query.device.type == "cpu" and query.dtype in DTYPES and query.shape[2] <= most
