"""LoRA: low-rank adapters on the frozen linear layers of a network. This module does not deal with texts.

Source: Hu et al., arXiv 2106.09685. The implementation is that of the library peft.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def adapted(network: Any, rank: int, seed: int) -> Iterator[None]:
    """Return a context manager that adds LoRA adapters to all linear layers of `network`. Inside the context manager,
    the adapters can be trained, and the weights of `network` are frozen. At the end, the adapters are merged into the
    weights. After an error, the adapters are removed instead.

    Without an adapter, a linear layer with weights W maps its input x to W x. With an adapter, the layer maps x to
    W x + 2 B A x. The matrices A (rank, input size) and B (output size, rank) are in float32. B starts at zero, and A
    is initialised at random.

    Args:
        network: a model of transformers, which is changed in place.
        rank: the rank of the adapters.
        seed: the random seed for A.

    Raises ImportError if peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("LoRA needs peft: pip install pyterrier-lit[lora]") from error
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, network)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    learned = False
    try:
        yield
        learned = True
    finally:
        _remove(network, merge=learned)


def _remove(network: nn.Module, merge: bool) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for parent in list(network.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, BaseTunerLayer):
                if merge:
                    layer.merge()
                setattr(parent, name, layer.get_base_layer())
    if hasattr(network, "peft_config"):
        del network.peft_config
