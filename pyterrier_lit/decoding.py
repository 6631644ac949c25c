"""Constrained greedy decoding: candidates spelt symbol by symbol, each at most once. Knows no text and no model."""

from collections.abc import Sequence

import torch


class Speller:
    """B rows that spell candidates, a symbol a step and always the best one that some unused candidate allows.

    A candidate is a word of one or more symbols, and no word begins another: LiT5's are identifiers of one or two pieces,
    PE-Rank's are passages, each a symbol of its own. Everything stays on the device; nothing waits for it.

    words: the symbols of N candidates. counts: (B,) how many of them, the first ones, each row may use.
    """

    def __init__(self, words: Sequence[Sequence[int]], counts: Sequence[int], device: torch.device | str = "cpu"):
        whole, begun = (
            {tuple(word) for word in words},
            {tuple(word[:end]) for word in words for end in range(len(word))},
        )
        if len(whole) < len(words) or whole & begun:
            raise ValueError(f"two candidates cannot be told apart, or one of them is empty: {list(words)}")
        depth = max(map(len, words))
        padded = [[*word, *[-1] * (depth - len(word))] for word in words]
        self.symbols = torch.tensor(padded, device=device).T  # (depth, N)
        self.lengths = torch.tensor([len(word) for word in words], device=device)  # (N,)
        self.unused = torch.arange(len(words), device=device) < torch.tensor(counts, device=device)[:, None]  # (B, N)
        self.alive = self.unused  # (B, N): unused candidates that begin with what is spelt of the present word
        self.spelt = torch.zeros(len(counts), dtype=torch.long, device=device)  # (B,): symbols of the present word
        self.broken = torch.zeros(
            len(counts), dtype=torch.bool, device=device
        )  # (B,): a logit was NaN where it mattered

    def step(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """logits (B, S) over symbols -> the symbol each row spells next, (B,), and the candidate it completes, (B,), or -1.

        A row whose candidates are all used goes on with symbols that mean nothing, and completes none.
        """
        following = self.symbols[self.spelt]  # (B, N)
        allowed = torch.zeros_like(logits).scatter_add_(1, following.clamp_min(0), self.alive.to(logits.dtype)) > 0
        self.broken |= (logits.isnan() & allowed).any(1)
        symbol = logits.masked_fill(~allowed, float("-inf")).argmax(1)
        self.alive = self.alive & (following == symbol[:, None])
        self.spelt = self.spelt + 1
        complete = self.alive & (self.lengths == self.spelt[:, None])
        candidate = torch.where(complete.any(1), complete.int().argmax(1), -1)
        self.unused = self.unused & ~complete
        fresh = complete.any(1) | ~self.unused.any(1)
        self.alive = torch.where(fresh[:, None], self.unused, self.alive)
        self.spelt = self.spelt.masked_fill(fresh, 0)
        return symbol, candidate
