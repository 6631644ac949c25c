"""Decoding of an order: each candidate is chosen once, best first. Knows no text and no model.

A model is seen as a `Reader`, which gives logits over symbols and reads the symbols that are chosen. A candidate is
spelt in one or more symbols: LiT5's are identifiers of one or two pieces, PE-Rank's are passages, each a symbol of its
own. In the shapes B is the number of rows, N that of candidates, S that of symbols.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

# For each row the candidates that were chosen, best first, and 0, or the nan or inf that stood among their logits
Choices = tuple[list[list[int]], list[float]]


class Reader(Protocol):
    """A model with B prompts that decodes symbols, of which there are S."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    def start(self) -> torch.Tensor:
        """Read the prompts: logits (B, S) of the first symbol."""

    def read(self, symbols: torch.Tensor) -> torch.Tensor:
        """Read the next m symbols of each row, (B, m), in one pass: logits (B, m, S) after each of them."""


class Drafting(Reader, Protocol):
    """A reader that reads several symbols in a pass, and takes back what it should not have read."""

    @property
    def costs(self) -> tuple[float, ...]:
        """What a pass over 1, 2, ... symbols costs, in passes over one; after `start`. There are no longer passes: with
        one number there is nothing to take back."""

    def keep(self, counts: Sequence[int]) -> None:
        """Take back what the last pass read, but for the first counts[b] symbols of row b.

        A row that keeps none has ended: its further logits have no meaning.
        """


def in_turn(reader: Drafting, words: Sequence[Sequence[int]], counts: Sequence[int], tops: Sequence[int]) -> Choices:
    """Constrained greedy decoding: at each step the best symbol that some candidate not yet chosen goes on with.

    The logits of a step rank all that is left, and so guess what the next steps will choose. A pass therefore reads the
    last choice and behind it a draft, of which each row keeps the symbols that are its choices too: the order of one
    symbol a pass, in fewer passes. Drafts are as long as the `Pace` says.

    words: the symbols of N candidates, of which row b has the first counts[b]. tops: how many of them a row must
    choose. The last candidate that is left is not asked for.
    """
    needed = [min(top, count - 1) for top, count in zip(tops, counts, strict=True)]
    speller = Speller(words, counts, needed)
    last, candidates = speller.step(reader.start().cpu())
    chosen, pace = [candidates], Pace(reader.costs)
    while speller.going.any():
        most = int(speller.left.max()) * speller.depth  # symbols that may be left to choose
        draft = speller.draft(1 + pace.length(most - 1))  # the last of them is not read: it only tells how drafts fit
        read = reader.read(torch.cat([last[:, None], draft[:, :-1]], 1).to(reader.device)).cpu()
        agreeing, kept, agreed = speller.going, torch.zeros_like(last), 0
        for logits, drafted in zip(read.unbind(1), draft.unbind(1), strict=True):
            symbols, candidates = speller.step(logits, agreeing)
            chosen.append(candidates)
            last, kept = torch.where(agreeing, symbols, last), kept + agreeing
            agreeing = agreeing & (symbols == drafted)
            agreed += int(agreeing.sum())
            agreeing = agreeing & speller.going
            if not agreeing.any():
                break
        pace.saw(agreed, int(kept.sum()))
        if len(pace.costs) > 1:
            reader.keep(kept.tolist())
    rows = zip(torch.stack(chosen, 1).tolist(), needed, strict=True)
    return [
        [candidate for candidate in row if candidate >= 0][:enough] for row, enough in rows
    ], speller.broken.tolist()


class Pace:
    """How long a draft is: so that a pass is expected to give the most symbols for its cost.

    A drafted symbol is expected to be right as often as those of the last passes were, whether they were read or not.
    """

    HITS, TRIALS = 1.0, 2.5  # as if seen before: drafts that pay from the start only where they cost little
    MEMORY = 0.9  # what earlier passes weigh, from each pass to the next

    def __init__(self, costs: Sequence[float]):
        self.costs = costs  # of a pass over 1, 2, ... symbols
        self.hits, self.trials = self.HITS, self.TRIALS

    def length(self, most: int) -> int:
        """The number of symbols of the next draft, at most `most`."""
        share = self.hits / self.trials
        expected = [sum(share**place for place in range(length + 1)) for length in range(len(self.costs))]
        gains = [symbols / cost for symbols, cost in zip(expected, self.costs, strict=True)][: most + 1]
        return gains.index(max(gains))

    def saw(self, hits: int, trials: int) -> None:
        """Of so many drafted symbols so many were right."""
        self.hits = self.MEMORY * self.hits + hits
        self.trials = self.MEMORY * self.trials + trials


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

    No candidate begins another. Everything stays on the CPU. ValueError for candidates that cannot be told apart.

    words: the symbols of N candidates. counts: how many of them a row has. needed: how many of these it must choose;
    None is all.
    """

    def __init__(self, words: Sequence[Sequence[int]], counts: Sequence[int], needed: Sequence[int] | None = None):
        whole = {tuple(word) for word in words}
        prefixes = {tuple(word[:end]) for word in words for end in range(len(word))}
        if len(whole) < len(words) or whole & prefixes:
            raise ValueError(f"two candidates cannot be told apart, or one of them is empty: {list(words)}")
        self.words = words
        self.depth = max(map(len, words))  # symbols of the longest candidate
        table = [[*word, *[-1] * (self.depth - len(word))] for word in words]
        self.symbols = torch.tensor(table, device="cpu").T  # (depth, N)
        self.lengths = torch.tensor([len(word) for word in words], device="cpu")  # (N,)
        self.unused = torch.arange(len(words), device="cpu") < torch.tensor(counts, device="cpu")[:, None]  # (B, N)
        self.candidates_left = self.unused  # (B, N): unused candidates that begin as the present one does
        self.left = torch.tensor(counts if needed is None else needed, device="cpu")  # (B,): candidates to choose
        # (B,): how many symbols of the present candidate are chosen
        self.written = torch.zeros(len(counts), dtype=torch.long, device="cpu")
        # (B,): 0, or the nan or inf that stood among the logits of a choice
        self.broken = torch.zeros(len(counts), dtype=torch.float32, device="cpu")
        self.seen: list[torch.Tensor | None] = [None] * self.depth  # (B, S): the last logits after so many symbols

    @property
    def going(self) -> torch.Tensor:
        """(B,): which rows have candidates left to choose, and finite logits to choose them by."""
        return (self.left > 0) & (self.broken == 0)

    def step(self, logits: torch.Tensor, rows: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """logits (B, S) -> the symbol that each row chooses, (B,), and the candidate that it completes, (B,), or -1.

        rows: (B,), those that choose; None is all. The others stay as they are, and complete none; nor does a row that
        has used all its candidates. The symbols of these have no meaning.
        """
        rows = torch.ones_like(self.going) if rows is None else rows
        for place in range(self.depth):
            old, here = self.seen[place], rows & (self.written == place)
            self.seen[place] = torch.where(here[:, None], logits, torch.zeros_like(logits) if old is None else old)
        following = self.symbols[self.written]  # (B, N)
        weights = self.candidates_left.to(logits.dtype)
        allowed = torch.zeros_like(logits).scatter_add_(1, following.clamp_min(0), weights) > 0
        self.broken = self.broken + not_finite(logits, allowed & rows[:, None])
        symbol = logits.masked_fill(~allowed, float("-inf")).argmax(1)
        going_on = self.candidates_left & (following == symbol[:, None])
        complete = going_on & (self.lengths == self.written[:, None] + 1) & rows[:, None]
        candidate = torch.where(complete.any(1), complete.int().argmax(1), -1)
        self.unused = self.unused & ~complete
        self.left = self.left - complete.any(1).long()
        fresh = complete.any(1) | ~going_on.any(1)
        going_on = torch.where(fresh[:, None], self.unused, going_on)
        self.candidates_left = torch.where(rows[:, None], going_on, self.candidates_left)
        self.written = torch.where(rows, (self.written + 1).masked_fill(fresh, 0), self.written)
        return symbol, candidate

    def draft(self, length: int) -> torch.Tensor:
        """A guess of the next symbols of each row, (B, length): the unused candidates by the last logits.

        A candidate of several symbols is as likely as the product of their probabilities. Logits that were not seen
        yet are equal, and equal candidates keep their order.
        """
        likelihood = torch.zeros(self.unused.shape, device="cpu")
        for place, logits in enumerate(self.seen):
            goes_on = self.unused & (self.lengths > place)
            if logits is not None:
                logits = logits[:, self.symbols[place].clamp_min(0)].float().masked_fill(~goes_on, float("-inf"))
                likelihood = torch.where(goes_on, likelihood + logits.log_softmax(1), likelihood)
        likelihood = likelihood.masked_fill(~self.unused, float("-inf"))
        first = likelihood.masked_fill(~self.candidates_left, float("-inf")).argmax(1, keepdim=True)
        best = likelihood.scatter(1, first, float("inf")).argsort(dim=1, descending=True, stable=True)
        drafts = [
            [symbol for candidate in row for symbol in self.words[candidate]] for row in best[:, : length + 1].tolist()
        ]
        drafts = [row[done:] + [0] * length for row, done in zip(drafts, self.written.tolist(), strict=True)]
        return torch.tensor([row[:length] for row in drafts], device="cpu")


def not_finite(values: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """values (B, N), which of them count (B, N) -> float32 (B,): 0 where these are finite, else nan or an infinity."""
    return values.float().masked_fill(values.isfinite() | ~counts, 0.0).sum(1)
