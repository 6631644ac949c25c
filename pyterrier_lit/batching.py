"""Batches of inputs with similar lengths, within a token budget; results are in input order. This module does not deal
with texts or models."""

import contextlib
import contextvars
import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

Batch = tuple[list[int], Any]  # the indices of the items in the batch, and the results for these items


class Budget:
    """The maximum number of tokens in a batch, including padding.

    If a batch does not fit into memory, the budget becomes half the number of tokens in this batch. Several calls of
    `map_batches` can share a budget. The number of tokens that fits into memory is then found only once, with one
    warning. Raises ValueError if the initial maximum, `tokens`, is not a positive whole number.
    """

    def __init__(self, tokens: int):
        if not isinstance(tokens, int) or tokens < 1:
            raise ValueError(f"max_tokens={tokens!r}; wanted a positive whole number")
        self.tokens = tokens
        self.warned = False

    def halve(self, items: int, longest: int) -> None:
        """Set the budget to half of a batch that did not fit into memory. The batch had `items` items, each padded to
        `longest` tokens."""
        self.tokens = items // 2 * longest
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if not self.warned:
            warnings.warn(
                f"out of memory in a batch of {items * longest} tokens; continuing with half"
                f" (max_tokens={self.tokens} avoids this)",
                stacklevel=5,
            )
            self.warned = True


@dataclasses.dataclass
class Tokens:
    """The total number of tokens in several batches."""

    real: int = 0  # without padding
    padded: int = 0  # with padding


_counting: contextvars.ContextVar[Tokens] = contextvars.ContextVar("tokens")


@contextlib.contextmanager
def counted_tokens() -> Iterator[Tokens]:
    """A context manager that counts the tokens of all batches that this thread computes inside the block. The context
    manager yields a `Tokens`, which is updated after each batch.

    If the function that computes a batch calls `map_batches` itself, only the batches of this inner call are counted.
    For example, the function of a LiT5 reranker calls `map_batches` to encode the prompts of each batch.
    """
    tokens = Tokens()
    before = _counting.set(tokens)
    try:
        yield tokens
    finally:
        _counting.reset(before)


@contextlib.contextmanager
def inference() -> Iterator[None]:
    """A context manager that disables gradients and autocast. Inside the block, a model computes in its own dtype, even
    if the caller uses autocast."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def encoder_tokens(device: torch.device) -> int:
    """The default maximum number of tokens, including padding, in a batch of an encoder. On a CPU, the default is
    1,024, so that a batch fits into the CPU's caches. On a GPU, it is 16,384, so that the GPU is kept busy."""
    return 1_024 if device.type == "cpu" else 16_384


def like_lengths(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Split items into batches of similar lengths. Yields each batch as a list of indices in `lengths`; the longest
    items come first.

    lengths: the number of tokens of each item. max_tokens: the maximum number of tokens in a batch, including padding.
    An item with more tokens than `max_tokens` is a batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        count = max(max_tokens // max(lengths[order[0]], 1), 1)
        yield order[:count]
        order = order[count:]


def padded(rows: Sequence[Sequence[int]], value: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad B rows of at most L integers on the right with `value`. Returns an int64 tensor (B, L), and a mask (B, L)
    that is False on the padding. Both tensors are on the CPU."""
    numbers = [torch.tensor(row, dtype=torch.long, device="cpu") for row in rows]
    mask = [torch.ones(len(row), dtype=torch.bool, device="cpu") for row in rows]
    return pad_sequence(numbers, batch_first=True, padding_value=value), pad_sequence(mask, batch_first=True)


def map_batches(
    function: Callable[[list[Any]], Any],
    items: Sequence[Any],
    lengths: Sequence[int],
    max_tokens: int | Budget,
    progress: Callable[[int], Any] = lambda done: None,
) -> list[Any]:
    """Apply `function` to all items in batches of similar lengths, the longest items first.

    Args:
        function: a function that takes a list of items and returns one result per item, in a list or in a tensor whose
            first dimension is the batch. A returned tensor is copied to the CPU only after the next batch has started,
            so that a GPU does not wait.
        items: the inputs of `function`.
        lengths: the number of tokens of each item.
        max_tokens: the maximum number of tokens in a batch, including padding, or a `Budget` that several calls share.
            An item with more tokens than the maximum is a batch of its own.
        progress: a function that is called after each batch with the number of its items, such as the `update` of a
            progress bar.

    Returns a list of results in the order of the items. Results in a tensor become numbers or nested lists. If a batch
    does not fit into memory, the maximum becomes half the number of tokens in this batch, and its items are computed
    again. The new maximum holds for all later batches, too. One warning appears. Raises MemoryError if a single item
    does not fit into memory.
    """
    budget = max_tokens if isinstance(max_tokens, Budget) else Budget(max_tokens)
    answers: list[Any] = [None] * len(items)
    for batch, computed in _one_late(_computed(function, items, lengths, budget)):
        listed = computed.tolist() if isinstance(computed, torch.Tensor) else computed
        for i, answer in zip(batch, listed, strict=True):
            answers[i] = answer
        progress(len(batch))
    return answers


def _computed(
    function: Callable[[list[Any]], Any], items: Sequence[Any], lengths: Sequence[int], budget: Budget
) -> Iterator[Batch]:
    order = sorted(range(len(items)), key=lambda i: -lengths[i])  # longest first: memory runs out at the start or never
    start, tokens = 0, _counting.get(Tokens())
    while start < len(order):
        longest = max(lengths[order[start]], 1)
        batch = order[start : start + max(budget.tokens // longest, 1)]
        counted = tokens.padded
        computed = _attempt(function, [items[i] for i in batch], longest)
        if computed is None:
            budget.halve(len(batch), longest)
            continue
        if tokens.padded == counted:  # else a call of map_batches in `function` has counted the tokens
            tokens.real += sum(lengths[i] for i in batch)
            tokens.padded += len(batch) * longest
        yield batch, computed
        start += len(batch)


def _attempt(function: Callable[[list[Any]], Any], batch: list[Any], longest: int) -> Any:
    """The results of `function` for a batch, or None if the batch did not fit into memory. The memory of a failed batch
    is free again when `_attempt` has returned.

    Raises MemoryError if a batch of a single item does not fit into memory.
    """
    try:
        return function(batch)
    except (RuntimeError, MemoryError) as error:
        if not _out_of_memory(error):
            raise
        if len(batch) == 1:
            raise MemoryError(
                f"an input of {longest} tokens alone does not fit into memory: shorten it, or use another device"
            ) from error
    return None


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        words in str(error) for words in ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    )


def _one_late(made: Iterable[Batch]) -> Iterator[Batch]:
    """Yield each batch only after the next batch has started."""
    held: list[Batch] = []
    for thing in made:
        held.append(thing)
        if len(held) > 1:
            yield held.pop(0)
    yield from held
