"""LoRA: a network whose linear layers learn by small matrices beside their frozen weights. Knows no texts.

Source: Hu et al., arXiv 2106.09685, as the library peft does it.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def adapted(network: Any, rank: int, seed: int) -> Iterator[None]:
    """Put adapters of a rank beside every linear layer of a model of transformers, which is frozen, and begin them by
    a seed. Afterwards they are merged into its weights; or, where learning failed, gone without a trace.

    W x becomes W x + 2 B A x with A (rank, in) and B (out, rank) in float32, B zero at first. ImportError without peft.
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
