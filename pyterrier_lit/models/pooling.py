"""Pooling: the hidden states of an input's tokens -> one vector."""

from collections.abc import Callable

import torch

# Name of a pooling -> its function. The function maps hidden states (B, L, H) and a mask (B, L) to vectors (B, H). The
# mask is 1 for each token and 0 on padding. B is the batch size, L the length in tokens, and H the width of the network
POOLING: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "first": lambda states, mask: states[:, 0],
    "cls": lambda states, mask: states[:, 0],
    "mean": lambda states, mask: (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp_min(1),
    "sum": lambda states, mask: (states * mask[..., None]).sum(1),
    "max": lambda states, mask: states.masked_fill(mask[..., None] == 0, float("-inf")).amax(1),
    "last_token": lambda states, mask: states[torch.arange(len(states), device=mask.device), mask.sum(1) - 1],
}


def check_pooling(name: str, names: tuple[str, ...], source: str) -> None:
    """Raise ValueError if `name` is not in `names`, the supported poolings. `source` is the name of the setting, with
    which the error message begins."""
    if name not in names:
        raise ValueError(f"{source}={name!r}; wanted one of {', '.join(map(repr, names))}")
