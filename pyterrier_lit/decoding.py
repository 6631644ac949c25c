"""Decoding of an order: each candidate is chosen once, best first. Knows no text and no model.

A model is seen as a `Reader`, which gives logits over symbols and reads the symbols that are chosen. A candidate is
spelt in one or more symbols: LiT5's are identifiers of one or two pieces, PE-Rank's are passages, each a symbol of its
own.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

# For each row the candidates that were chosen, best first, and 0, or the nan or inf that stood among their logits
Choices = tuple[list[list[int]], list[float]]


class Reader(Protocol):
    """A model that has B prompts before it and goes on with symbols, of which there are S."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    def start(self) -> torch.Tensor:
        """Read the prompts: logits (B, S) of the first symbol."""

    def read(self, symbols: torch.Tensor) -> torch.Tensor:
        """Read the next m symbols of each row, (B, m), in one pass: logits (B, m, S) after each of them."""


def in_turn(reader: Reader, words: Sequence[Sequence[int]], counts: Sequence[int], tops: Sequence[int]) -> Choices:
    """Constrained greedy decoding: at each step the best symbol that some candidate not yet chosen goes on with.

    words: the symbols of N candidates, of which each row has the first counts[b]. tops: how many of them a row must
    choose. The last candidate that is left is not asked for. The host waits for the device only at the end, or from the
    step on at which all rows may be done.
    """
    needed = [min(top, count - 1) for top, count in zip(tops, counts, strict=True)]
    speller = Speller(words, counts, reader.device)
    logits, chosen, most = reader.start(), [], sum(map(len, words))
    while True:
        symbols, candidates = speller.step(logits)
        chosen.append(candidates)
        if _all_chosen(chosen, needed, speller.depth) or len(chosen) == most:  # the latter where logits are not finite
            break
        logits = reader.read(symbols[:, None])[:, -1]
    rows = zip(torch.stack(chosen, 1).tolist(), needed, strict=True)
    return [
        [candidate for candidate in row if candidate >= 0][:enough] for row, enough in rows
    ], speller.broken.tolist()


def at_once(reader: Reader, words: Sequence[Sequence[int]], counts: Sequence[int]) -> Choices:
    """All candidates by the probability of each to come first. One pass, or two where candidates have two symbols.

    Raises what `first_scores` raises. Source: FIRST, arXiv 2406.15657, section 3.
    """
    likelihood, usable = first_scores(reader, words, counts)
    broken = not_finite(likelihood, usable).tolist()
    best = likelihood.masked_fill(~usable, float("-inf")).argsort(dim=1, descending=True, stable=True).tolist()
    return [order[:count] for order, count in zip(best, counts, strict=True)], broken


def first_scores(
    reader: Reader, words: Sequence[Sequence[int]], counts: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """How likely each candidate is to come first: log p(symbol) or log p(first symbol) p(second | first), up to a
    constant of each row, (B, N); and which candidates a row has, (B, N).

    ValueError for candidates of more than two symbols, or for several first symbols of those with two.
    """
    begins = {word[0] for word in words if len(word) > 1}
    if len(begins) > 1 or max(map(len, words)) > 2:
        raise ValueError(
            "decoding='first' knows identifiers of one piece, or of two that begin alike; this tokenizer has others"
        )
    device, n = reader.device, torch.tensor(counts, device="cpu")[:, None]
    usable = (torch.arange(len(words), device="cpu") < n).to(device)  # (B, N)
    # Single symbols and the beginning of the others share one softmax, which does not change their order
    likelihood = reader.start().float()[:, torch.tensor([word[0] for word in words], device=device)]
    if begins:
        two = torch.tensor([len(word) > 1 for word in words], device=device) & usable
        begin = torch.full((len(counts), 1), begins.pop(), device=device)
        second = reader.read(begin)[:, 0].float()[:, torch.tensor([word[-1] for word in words], device=device)]
        least = torch.finfo(second.dtype).min  # no infinity, of which the gradient is none in rows without such words
        likelihood = likelihood + second.masked_fill(~two, least).log_softmax(1).where(two, 0.0)
    return likelihood, usable


class Speller:
    """B rows that choose candidates, a symbol a step, and always the best one that some unused candidate allows.

    No candidate begins another. Everything stays on the device; nothing waits for it. ValueError for candidates that
    cannot be told apart.
    """

    def __init__(self, words: Sequence[Sequence[int]], counts: Sequence[int], device: torch.device | str = "cpu"):
        whole = {tuple(word) for word in words}
        prefixes = {tuple(word[:end]) for word in words for end in range(len(word))}
        if len(whole) < len(words) or whole & prefixes:
            raise ValueError(f"two candidates cannot be told apart, or one of them is empty: {list(words)}")
        self.depth = max(map(len, words))  # symbols of the longest candidate
        table = [[*word, *[-1] * (self.depth - len(word))] for word in words]
        self.symbols = torch.tensor(table, device=device).T  # (depth, N)
        self.lengths = torch.tensor([len(word) for word in words], device=device)  # (N,)
        self.unused = torch.arange(len(words), device=device) < torch.tensor(counts, device=device)[:, None]  # (B, N)
        self.candidates_left = self.unused  # (B, N): unused candidates that begin as the present one does
        # (B,): how many symbols of the present candidate are chosen
        self.written = torch.zeros(len(counts), dtype=torch.long, device=device)
        # (B,): 0, or the nan or inf that stood among the logits of a choice
        self.broken = torch.zeros(len(counts), dtype=torch.float32, device=device)

    def step(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """logits (B, S) -> the symbol that each row chooses, (B,), and the candidate that it completes, (B,), or -1.

        A row that has used all its candidates completes none; the symbols that it chooses have no meaning.
        """
        following = self.symbols[self.written]  # (B, N)
        weights = self.candidates_left.to(logits.dtype)
        allowed = torch.zeros_like(logits).scatter_add_(1, following.clamp_min(0), weights) > 0
        self.broken = self.broken + not_finite(logits, allowed)
        symbol = logits.masked_fill(~allowed, float("-inf")).argmax(1)
        self.candidates_left = self.candidates_left & (following == symbol[:, None])
        self.written = self.written + 1
        complete = self.candidates_left & (self.lengths == self.written[:, None])
        candidate = torch.where(complete.any(1), complete.int().argmax(1), -1)
        self.unused = self.unused & ~complete
        fresh = complete.any(1) | ~self.candidates_left.any(1)
        self.candidates_left = torch.where(fresh[:, None], self.unused, self.candidates_left)
        self.written = self.written.masked_fill(fresh, 0)
        return symbol, candidate


def not_finite(values: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """values (B, N), which of them count (B, N) -> float32 (B,): 0 where these are finite, else nan or an infinity."""
    return values.float().masked_fill(values.isfinite() | ~counts, 0.0).sum(1)


def _all_chosen(chosen: list[torch.Tensor], needed: list[int], depth: int) -> bool:
    """Whether every row has the candidates that it needs. Where all have one symbol, the number of steps says so."""
    if len(chosen) < max(needed) or depth == 1:
        return len(chosen) >= max(needed)
    counts = (torch.stack(chosen, 1) >= 0).sum(1).tolist()
    return all(count >= enough for count, enough in zip(counts, needed, strict=True))
