"""Decoding of an order of passages: each passage is chosen once, best first. This module does not deal with texts, and
it accesses a model only through a `Reader`.

A `Reader` returns logits over the tokens that may be generated, and processes the tokens that were chosen. A candidate
stands for a passage and consists of one or more tokens. In LiT5, a candidate is an identifier of one or two tokens. In
PE-Rank, a candidate is a single token, which stands for the passage's vector. Shapes: B is the number of rows (one row
for each prompt), N the number of candidates, and R the number of tokens that may be generated.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

# Two lists with one entry per row. The first list has each row's chosen candidates, best first. The second list has 0
# for a row if the logits of all its choices were finite, else nan or an infinity
Choices = tuple[list[list[int]], list[float]]


class Reader(Protocol):
    """A model that generates tokens after each of B prompts. It may generate R different tokens, numbered from 0."""

    @property
    def device(self) -> torch.device:
        """The device of the model."""

    def start(self) -> torch.Tensor:
        """Process the prompts (prefill). Returns the logits of the first token, (B, R)."""

    def read(self, tokens: torch.Tensor) -> torch.Tensor:
        """Process the next m tokens of each row in one pass. tokens: the numbers of these tokens, (B, m). Returns the
        logits after each token, (B, m, R)."""


class Drafting(Reader, Protocol):
    """A reader that can remove the tokens of the latest pass from its cache. The function `in_turn` requires such a
    reader."""

    @property
    def costs(self) -> tuple[float, ...]:
        """The costs of passes over 1, 2, ... tokens, divided by the cost of a pass over one token. The costs are
        available after `start` was called.

        A pass has at most as many tokens as this tuple has entries. If the tuple has a single entry, `keep` is never
        called.
        """

    def keep(self, counts: Sequence[int]) -> None:
        """Of the tokens that the latest pass processed in row b, keep the first counts[b] and remove the rest.

        A row that keeps no token has ended; its later logits are meaningless.
        """


def in_turn(reader: Drafting, words: Sequence[Sequence[int]], counts: Sequence[int], tops: Sequence[int]) -> Choices:
    """Constrained greedy decoding: each step chooses the best token that continues a candidate not yet chosen.

    The method is draft and verify: speculative decoding without a draft model. The logits of one step rank all
    remaining candidates, so they also predict the tokens of the next steps. The predicted tokens are the draft. One
    pass processes the last chosen token and the draft without its last token. The logits of this pass show which token
    greedy decoding chooses at the place of each drafted token. Each row keeps its drafted tokens up to the first
    difference. The result is the same order as with one token per pass, in fewer passes. `Pace` sets the length of the
    draft.

    Args:
        words: the tokens of each of N candidates.
        counts: the number of candidates of each row. Row b has the first counts[b] candidates.
        tops: the number of candidates that each row must choose.

    Returns the chosen candidates of each row as `Choices`. If a row must choose all its candidates, the last candidate
    is not decoded and is not among the chosen candidates.
    """
    needed = [min(top, count - 1) for top, count in zip(tops, counts, strict=True)]
    speller = Speller(words, counts, needed)
    last, candidates = speller.step(reader.start().cpu())
    chosen, pace = [candidates], Pace(reader.costs)
    while speller.going.any():
        most = int(speller.left.max()) * speller.depth  # upper bound on the number of tokens still to choose
        draft = speller.draft(1 + pace.length(most - 1))  # the pass does not process the draft's last token
        read = reader.read(torch.cat([last[:, None], draft[:, :-1]], 1).to(reader.device)).cpu()
        agreeing, kept, agreed = speller.going, torch.zeros_like(last), 0
        for logits, drafted in zip(read.unbind(1), draft.unbind(1), strict=True):
            tokens, candidates = speller.step(logits, agreeing)
            chosen.append(candidates)
            last, kept = torch.where(agreeing, tokens, last), kept + agreeing
            agreeing = agreeing & (tokens == drafted)
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
    """Chooses the length of the next draft: the length that maximises the expected number of tokens per unit of cost.

    The acceptance rate is estimated from recent passes. It is the share of equal tokens among the drafted tokens that
    were compared with the choice of greedy decoding.
    """

    # Prior of the acceptance rate: as if greedy decoding had chosen 1 of 2.5 drafted tokens. With this prior, the first
    # pass drafts only if longer passes cost little
    HITS, TRIALS = 1.0, 2.5
    MEMORY = 0.9  # the weight of earlier passes is multiplied by this number after each pass

    def __init__(self, costs: Sequence[float]):
        self.costs = costs  # the cost of a pass over 1, 2, ... tokens
        self.hits, self.trials = self.HITS, self.TRIALS

    def length(self, most: int) -> int:
        """How many drafted tokens the next pass processes, at most `most`. The draft has one token more."""
        share = self.hits / self.trials
        expected = [sum(share**place for place in range(length + 1)) for length in range(len(self.costs))]
        gains = [tokens / cost for tokens, cost in zip(expected, self.costs, strict=True)][: most + 1]
        return gains.index(max(gains))

    def saw(self, hits: int, trials: int) -> None:
        """Record that greedy decoding chose `hits` of `trials` drafted tokens."""
        self.hits = self.MEMORY * self.hits + hits
        self.trials = self.MEMORY * self.trials + trials


def at_once(reader: Reader, words: Sequence[Sequence[int]], counts: Sequence[int]) -> Choices:
    """Order the candidates by their probability of being generated first. The function takes one pass, or two passes if
    there are candidates of two tokens.

    words: the tokens of each of N candidates. counts: the number of candidates of each row; row b has the first
    counts[b] candidates. Returns `Choices` with all candidates of each row. Raises the same errors as `first_scores`.
    Source: FIRST, arXiv 2406.15657, section 3.
    """
    likelihood, usable = first_scores(reader, words, counts)
    broken = not_finite(likelihood, usable).tolist()
    best = likelihood.masked_fill(~usable, float("-inf")).argsort(dim=1, descending=True, stable=True).tolist()
    return [order[:count] for order, count in zip(best, counts, strict=True)], broken


def first_scores(
    reader: Reader, words: Sequence[Sequence[int]], counts: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-probability that each candidate is generated first, up to a constant per row.

    For a candidate of one token, the log-probability is log p(token). For a candidate of two tokens, it is log p(first
    token) + log p(second token | first token). The second term is a log-softmax over the row's candidates of two
    tokens. words, counts: as in `at_once`. Returns the log-probabilities (B, N), and a mask (B, N) that is True for the
    candidates of each row.

    Raises ValueError if a candidate has more than two tokens, or if the candidates of two tokens do not all have the
    same first token.
    """
    begins = {word[0] for word in words if len(word) > 1}
    if len(begins) > 1 or max(map(len, words)) > 2:
        raise ValueError(
            "decoding='first' requires identifiers of one token, or of two with the same first token; this tokenizer"
            " splits them otherwise"
        )
    device, n = reader.device, torch.tensor(counts, device="cpu")[:, None]
    usable = (torch.arange(len(words), device="cpu") < n).to(device)  # (B, N)
    # log p(token) is the token's logit minus a constant per row. The constant does not change the order
    likelihood = reader.start().float()[:, torch.tensor([word[0] for word in words], device=device)]
    if begins:
        two = torch.tensor([len(word) > 1 for word in words], device=device) & usable
        begin = torch.full((len(counts), 1), begins.pop(), device=device)
        second = reader.read(begin)[:, 0].float()[:, torch.tensor([word[-1] for word in words], device=device)]
        # A finite number: with -inf, the gradients would be NaN in rows without candidates of two tokens
        least = torch.finfo(second.dtype).min
        likelihood = likelihood + second.masked_fill(~two, least).log_softmax(1).where(two, 0.0)
    return likelihood, usable


class Speller:
    """The state of constrained decoding for B rows: each step chooses the best token that continues an unused
    candidate.

    All tensors are on the CPU. Raises ValueError if a candidate is empty, equals another candidate, or is a prefix of
    another candidate.

    Args:
        words: the tokens of each of N candidates.
        counts: the number of candidates of each row. Row b has the first counts[b] candidates.
        needed: the number of candidates that each row must choose. None is all candidates of the row.
    """

    def __init__(self, words: Sequence[Sequence[int]], counts: Sequence[int], needed: Sequence[int] | None = None):
        whole = {tuple(word) for word in words}
        prefixes = {(), *(tuple(word[:end]) for word in words for end in range(len(word)))}
        if len(whole) < len(words) or whole & prefixes:
            raise ValueError(f"two candidates cannot be told apart, or one of them is empty: {list(words)}")
        self.words = words
        self.depth = max(map(len, words))  # number of tokens of the longest candidate
        table = [[*word, *[-1] * (self.depth - len(word))] for word in words]
        self.tokens = torch.tensor(table, device="cpu").T  # (depth, N)
        self.lengths = torch.tensor([len(word) for word in words], device="cpu")  # (N,)
        self.unused = torch.arange(len(words), device="cpu") < torch.tensor(counts, device="cpu")[:, None]  # (B, N)
        # (B, N): the unused candidates that begin with the chosen tokens of the current, unfinished candidate
        self.candidates_left = self.unused
        # (B,): the number of candidates still to choose
        self.left = torch.tensor(counts if needed is None else needed, device="cpu")
        # (B,): how many tokens of the current candidate have been chosen
        self.written = torch.zeros(len(counts), dtype=torch.long, device="cpu")
        # (B,): 0 if the logits of all choices were finite, else nan or an infinity
        self.broken = torch.zeros(len(counts), dtype=torch.float32, device="cpu")
        # Entry i has the latest logits for the i-th token of a candidate, (B, R); i counts from 0
        self.seen: list[torch.Tensor | None] = [None] * self.depth

    @property
    def going(self) -> torch.Tensor:
        """A mask (B,) of the rows that must still choose candidates and whose logits were finite so far."""
        return (self.left > 0) & (self.broken == 0)

    def step(self, logits: torch.Tensor, rows: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose the next token of each row by its logits (B, R).

        rows: a mask (B,) of the rows that choose a token; None is all rows.

        Returns two tensors (B,). The first has the chosen tokens. The second has the candidate that this token
        completes, or -1 if the token completes none. Rows that are not in `rows`, and rows without unused candidates,
        do not change: their token is meaningless, and their candidate is -1.
        """
        rows = torch.ones_like(self.going) if rows is None else rows
        for place in range(self.depth):
            old, here = self.seen[place], rows & (self.written == place)
            self.seen[place] = torch.where(here[:, None], logits, torch.zeros_like(logits) if old is None else old)
        following = self.tokens[self.written]  # (B, N)
        weights = self.candidates_left.to(logits.dtype)
        allowed = torch.zeros_like(logits).scatter_add_(1, following.clamp_min(0), weights) > 0
        self.broken = self.broken + not_finite(logits, allowed & rows[:, None])
        token = logits.masked_fill(~allowed, float("-inf")).argmax(1)
        going_on = self.candidates_left & (following == token[:, None])
        complete = going_on & (self.lengths == self.written[:, None] + 1) & rows[:, None]
        candidate = torch.where(complete.any(1), complete.int().argmax(1), -1)
        self.unused = self.unused & ~complete
        self.left = self.left - complete.any(1).long()
        fresh = complete.any(1) | ~going_on.any(1)
        going_on = torch.where(fresh[:, None], self.unused, going_on)
        self.candidates_left = torch.where(rows[:, None], going_on, self.candidates_left)
        self.written = torch.where(rows, (self.written + 1).masked_fill(fresh, 0), self.written)
        return token, candidate

    def draft(self, length: int) -> torch.Tensor:
        """The draft of each row: the next `length` tokens as the latest logits predict them, (B, length).

        The draft has the tokens of the unused candidates, from the most to the least probable candidate. A row may have
        chosen only the first tokens of a candidate. Its draft then begins with the rest of the most probable candidate
        that starts with these tokens.

        The probability of a candidate is the product of the probabilities of its tokens. If there are no logits yet for
        the i-th token of a candidate, all tokens at this place count as equally likely. Equally likely candidates keep
        their order.
        """
        likelihood = torch.zeros(self.unused.shape, device="cpu")
        for place, logits in enumerate(self.seen):
            goes_on = self.unused & (self.lengths > place)
            if logits is not None:
                logits = logits[:, self.tokens[place].clamp_min(0)].float().masked_fill(~goes_on, float("-inf"))
                likelihood = torch.where(goes_on, likelihood + logits.log_softmax(1), likelihood)
        likelihood = likelihood.masked_fill(~self.unused, float("-inf"))
        first = likelihood.masked_fill(~self.candidates_left, float("-inf")).argmax(1, keepdim=True)
        best = likelihood.scatter(1, first, float("inf")).argsort(dim=1, descending=True, stable=True)
        drafts = [
            [token for candidate in row for token in self.words[candidate]] for row in best[:, : length + 1].tolist()
        ]
        drafts = [row[done:] + [0] * length for row, done in zip(drafts, self.written.tolist(), strict=True)]
        return torch.tensor([row[:length] for row in drafts], device="cpu")


def not_finite(values: torch.Tensor, checked: torch.Tensor) -> torch.Tensor:
    """Whether the values of each row are finite, as a float32 tensor (B,): 0 if all checked values of the row are
    finite, else nan or an infinity.

    values: a tensor (B, N). checked: a boolean mask (B, N), true for the values to check.
    """
    return values.float().masked_fill(values.isfinite() | ~checked, 0.0).sum(1)
