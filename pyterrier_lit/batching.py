"""Token-budget batches: items of similar length together, answers back in input order. Knows no text and no models."""

import contextlib
import contextvars
import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

Batch = tuple[list[int], Any]  # which items, and their answers


class Budget:
    """How many tokens are computed at once: `tokens` with padding, and half of what was tried whenever memory runs out.

    Calls of `map_batches` that share one learn once how much memory there is, and warn once.
    """

    def __init__(self, tokens: int):
        if not isinstance(tokens, int) or tokens < 1:
            raise ValueError(f"max_tokens={tokens!r}; wanted a whole number from 1 on")
        self.tokens = tokens
        self.warned = False

    def halve(self, items: int, longest: int) -> None:
        """A batch of so many items, padded to `longest`, did not fit."""
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
    """Tokens of computed batches: of their items alone, and with the padding between them."""

    real: int = 0
    padded: int = 0


_counting: contextvars.ContextVar[Tokens] = contextvars.ContextVar("tokens")


@contextlib.contextmanager
def counted_tokens() -> Iterator[Tokens]:
    """Count the tokens of all batches that this thread computes in the block.

    A batch whose function calls `map_batches` itself, as for a window whose prompts are encoded, is counted by those
    inner batches alone.
    """
    tokens = Tokens()
    before = _counting.set(tokens)
    try:
        yield tokens
    finally:
        _counting.reset(before)


@contextlib.contextmanager
def inference() -> Iterator[None]:
    """Compute without gradients, and in the model's own dtype whatever autocast is on around the call."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def encoder_tokens(device: torch.device) -> int:
    """How many tokens an encoder should read at once: on a CPU what stays in its caches, else what fills a GPU."""
    return 1_024 if device.type == "cpu" else 16_384


def like_lengths(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Batches of item numbers: similar lengths together, the longest first, at most `max_tokens` with padding."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        count = max(max_tokens // max(lengths[order[0]], 1), 1)
        yield order[:count]
        order = order[count:]


def padded(rows: Sequence[Sequence[int]], value: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """B rows of integers -> int64 (B, L), padded with `value` on the right, and a mask (B, L), true inside the rows."""
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
    """`function` over all items, in batches of at most `max_tokens` tokens with padding, the longest items first.

    function: list of items -> one answer per item, as a list or as a tensor with the batch first. A tensor may be
        asynchronous (a GPU still computes it): it is read one batch late, so that the GPU never waits for the host.
    lengths: tokens of each item; one that is longer than `max_tokens` makes a batch of its own.
    max_tokens: a number, or a `Budget` that remembers between calls what did not fit.
    progress: told how many items more are done, such as the `update` of a progress bar.

    Returns the answers in the order of the items, tensors as (nested) lists. Where memory runs out the batch is halved,
    the following ones with it, and one warning says so. Raises MemoryError when a single item does not fit.
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
    order = sorted(range(len(items)), key=lambda i: -lengths[i])  # longest first: memory runs out at once or never
    start, tokens = 0, _counting.get(Tokens())
    while start < len(order):
        longest = max(lengths[order[start]], 1)
        batch = order[start : start + max(budget.tokens // longest, 1)]
        counted = tokens.padded
        computed = _attempt(function, [items[i] for i in batch], longest)
        if computed is None:
            budget.halve(len(batch), longest)
            continue
        if tokens.padded == counted:  # else the function has mapped batches of its own
            tokens.real += sum(lengths[i] for i in batch)
            tokens.padded += len(batch) * longest
        yield batch, computed
        start += len(batch)


def _attempt(function: Callable[[list[Any]], Any], batch: list[Any], longest: int) -> Any:
    """The answers, or None when the batch did not fit into memory (which is free again once this has returned)."""
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
    """Yield each batch after the next one was started."""
    held: list[Batch] = []
    for thing in made:
        held.append(thing)
        if len(held) > 1:
            yield held.pop(0)
    yield from held
