"""What every reranker is as a PyTerrier transformer: a repr that rebuilds it, and weights that load on first use."""

import copy
import inspect
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pyterrier as pt
import torch
from tqdm import tqdm


class Reranker(pt.Transformer):
    """A transformer whose constructor only keeps its arguments. Subclasses give `load`, `save` and `from_backbone`, and name what `load` reads.

    Copies share loaded weights; a pickle carries them; several threads may call one reranker.
    """

    # The arguments that decide what `load` returns
    loads_from: ClassVar[tuple[str, ...]] = ("model", "device", "dtype")
    model: str
    device: str | torch.device | None
    dtype: str | torch.dtype | None
    verbose: bool
    _lock: ClassVar[threading.RLock] = threading.RLock()
    _held: tuple[tuple[Any, ...], Any] | None = None

    def load(self) -> Any:
        """Read the checkpoint named by `self.model`."""
        raise NotImplementedError(f"{type(self).__name__} must say how to load {self.model!r}")

    def save(self, path: str | Path) -> None:
        """Write a folder that the constructor loads again."""
        raise NotImplementedError(f"{type(self).__name__} must say how it is saved")

    @classmethod
    def from_backbone(cls, name: str, **arguments: Any) -> "Reranker":
        """An untrained reranker over the pre-trained model `name`."""
        raise NotImplementedError(f"{cls.__name__} must say how it begins from {name!r}")

    def loaded(self) -> Any:
        """What `load` returned, called on first use and again only after an argument in `loads_from` has been changed."""
        with self._lock:
            if self._held is not None and self._held[0] == self._source():
                return self._held[1]
            loaded = self._in_words(self.load)
            self.hold(loaded)
            return loaded

    def hold(self, loaded: Any) -> None:
        """Use these weights for the present arguments, in place of what `load` would read."""
        self._held = self._source(), loaded

    def progress(self, total: int, unit: str) -> tqdm:
        """A bar over `total` units of work, shown when `verbose`."""
        bar: tqdm = pt.tqdm(total=total, unit=unit, desc=type(self).__name__, disable=not self.verbose)
        return bar

    def _in_words(self, load: Callable[[], Any]) -> Any:
        """What `load` returns. Whatever the libraries raise for a field that makes no sense becomes a ValueError."""
        try:
            return load()
        except (ValueError, OSError, ImportError, MemoryError, NotImplementedError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise ValueError(
                f"model={str(self.model)!r} cannot be loaded: a field of its config or tokenizer files is missing or makes no sense"
                f" ({type(error).__name__}: {' '.join(str(error).split())[:300]})"
            ) from error

    def _source(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self.loads_from)

    def __repr__(self) -> str:
        return representation(self)


class ListwiseReranker(Reranker):
    """A reranker that writes an order and can stop after the first `top_k` ranks, which `% k` tells it when compiled."""

    top_k: int | None

    def fuse_rank_cutoff(self, k: int) -> pt.Transformer | None:
        """What `(first >> self % k).compile()` puts in place of `self >> RankCutoff(k)`: the same top k for fewer steps."""
        if self.top_k is not None and self.top_k <= k:
            return None
        shorter = copy.copy(self)
        shorter.top_k = k
        return shorter >> pt.RankCutoff(k)


def representation(transformer: pt.Transformer) -> str:
    """The call that rebuilds a transformer: arguments by position as they are, and by name those that are not the default."""
    shown = []
    for argument in pt.inspect.transformer_attributes(transformer):
        value = argument.value
        if isinstance(value, torch.dtype | torch.device | Path):
            value = str(value).removeprefix("torch.")
        if argument.init_parameter_kind == inspect.Parameter.POSITIONAL_OR_KEYWORD:
            shown.append(_in_one_line(value))
        elif argument.init_parameter_kind == inspect.Parameter.VAR_KEYWORD:
            shown += [f"{name}={setting!r}" for name, setting in value.items()]
        elif value is not argument.init_default_value and value != argument.init_default_value:
            shown.append(f"{argument.name}={_in_one_line(value)}")
    return f"{type(transformer).__name__}({', '.join(shown)})"


def _in_one_line(value: Any) -> str:
    """How an argument is shown; of a frame or an array, which no call in a line rebuilds, its kind and shape."""
    return f"<{type(value).__name__} of {value.shape}>" if hasattr(value, "shape") else repr(value)


def _alone() -> None:
    """In a forked process the other threads are gone: torch would wait for its own for ever, and the lock may be held."""
    torch.set_num_threads(1)
    Reranker._lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_alone)
