"""The device and the precision of a reranker."""

import copy
from typing import Any

import torch
from torch import nn

from pyterrier_lit.models.errors import first_line

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OTHER_NAMES = {  # common alias of a dtype -> its name in torch
    **{"fp32": "float32", "float": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"},
    **{"fp64": "float64", "double": "float64"},
}


def choose_device(device: str | torch.device | None) -> torch.device:
    """Return the requested device. If `device` is None, return the first CUDA GPU, else Apple's GPU (mps), else the
    CPU.

    Raises ValueError if the device is unknown or unavailable.
    """
    if device is None:
        there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        return torch.device(next(kind for kind, found in there.items() if found))
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(
            f"device={device!r} cannot be used here; wanted None, 'cpu', 'cuda', 'cuda:1', ... ({first_line(error)})"
        ) from error
    return chosen


def choose_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """Return the requested dtype for a device.

    Args:
        dtype: a dtype of torch, its name, or a short name such as "bf16". None and "auto" are bfloat16 on a CUDA GPU
            that supports bfloat16. On a CPU with AVX512-BF16 or AMX, "auto" is bfloat16, too. In all other cases, None
            and "auto" are float32.
        device: the device.

    Raises ValueError if the dtype is not float32, bfloat16, float16 or float64.
    """
    if dtype is None or (isinstance(dtype, str) and dtype == "auto"):
        native = _computes_in_bfloat16(device) and (device.type == "cuda" or dtype == "auto")
        return torch.bfloat16 if native else torch.float32
    named = getattr(torch, dtype_name(dtype), None) if isinstance(dtype, str) else dtype
    if named not in DTYPES:
        raise ValueError(
            f"dtype={dtype!r}; wanted None, 'auto', 'float32', 'bfloat16' or 'float16', or a short name such as 'bf16'"
        )
    chosen: torch.dtype = named
    return chosen


def dtype_name(dtype: str | torch.dtype) -> str:
    """Return the name of a dtype in torch, such as "bfloat16" for "bf16", torch.bfloat16 and "torch.bfloat16"."""
    name = str(dtype).removeprefix("torch.")
    return OTHER_NAMES.get(name, name)


def check_int8(what: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raise ValueError unless the device is a CPU and the dtype is float32. A network in int8 runs only on a CPU, and
    computes all operations except matrix products in float32. `what` names the network in the message."""
    if (device.type, dtype) != ("cpu", torch.float32):
        raise ValueError(
            f"{what} is in int8 and runs only on a CPU, not on device={device.type!r} with dtype={dtype_name(dtype)!r};"
            " wanted device='cpu' and dtype=None"
        )


def converted(checkpoint: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Return a copy of a loaded checkpoint, with all parameters on the given device and in the given dtype.

    Buffers, such as position tables, are moved to the device but keep their dtype. A network in int8 has no parameters.
    For such a network, this function raises ValueError unless the device is a CPU and the dtype is float32.
    """
    networks = [part.network for part in (checkpoint, getattr(checkpoint, "encoder", None)) if part is not None]
    fixed = any(next(network.parameters(), None) is None for network in networks)
    if fixed:
        check_int8("the reranker", device, dtype)
    copies = {
        id(weight): nn.Parameter(weight.detach().to(device, dtype, copy=True), requires_grad=weight.requires_grad)
        for network in networks
        for weight in network.parameters()
    }
    copied = copy.deepcopy(checkpoint, copies)  # deepcopy takes the converted weights from `copies`
    for part in (copied, getattr(copied, "encoder", None)):
        if part is not None:
            part.network.to(device)
    return copied


def _computes_in_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, check, lambda: False)() for check in checks)
