"""What listwise rerankers share: sliding windows, scores from orders, and the fusion with `% k`. This module does not
deal with the texts of prompts or with models.

A listwise reranker reads the passages of a window together and returns their order. A list that is longer than a window
is reranked in overlapping windows that slide from the bottom of the list to the top (RankGPT, arXiv 2304.09542).
"""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import pyterrier as pt

from pyterrier_lit.batching import Budget, inference, map_batches
from pyterrier_lit.decoding import Choices
from pyterrier_lit.frames import Columns, not_finite
from pyterrier_lit.order import complete, scores
from pyterrier_lit.reranker import Passages, Reranker
from pyterrier_lit.windows import Window, slide, sliding_windows


class Prompt(NamedTuple):
    """The prompt for one window."""

    content: Any  # the prompt in the form that the model takes
    tokens: int  # length of the prompt in tokens; prompts of similar length share a batch
    n: int  # number of passages in the window
    top: int  # how many ranks must be decoded; the other passages follow in their incoming order


Decode = Callable[[list[Prompt]], Choices]  # decodes a batch of prompts


@dataclasses.dataclass(eq=False, repr=False)
class ListwiseReranker(Reranker):
    """A reranker that decodes the order of the passages in a window and can stop after the first `top_k` ranks.

    Compiling `reranker % k` sets `top_k` to k. A subclass implements `order_columns`, which calls `slide`.
    """

    _: dataclasses.KW_ONLY
    window_size: int | None = None
    stride: int | None = None
    passes: int = 1
    top_k: int | None = None
    decoding: str = "constrained"
    max_tokens: int = 16_384

    def order(self, queries: list[str], passages: Passages) -> list[list[int]]:
        """Rank the passages of Q queries. Returns Q permutations: for each query, the positions of its passages in
        the given list (from 0), best first.

        Args:
            queries: a list of Q texts.
            passages: for each query, the list of its passages' texts. Alternatively a dict of columns: column name -> a
                list per query, with one value per passage, such as {"docno": [["d1", "d2"], ["d7"]]}. The dict must
                have the column `docno` and the input columns of the reranker.

        Raises TypeError if a passage is not a string, and ValueError if the model returns NaN or an infinity.
        """
        return self.order_columns(queries, self.columns(passages))

    def order_columns(self, queries: list[str], columns: Columns) -> list[list[int]]:
        """Like `order`, for passages that are given as a dict of columns."""
        raise NotImplementedError(f"{type(self).__name__} must say how it orders passages")

    def results(self, queries: list[str], columns: Columns) -> dict[str, list[Any]]:
        """Score the passages of Q queries.

        columns: column name -> a list per query, with one value per passage, such as {"docno": [["d1", "d2"], ["d7"]]}.
        Returns a dict with one entry, `score`: Q lists with one score per passage. Of n passages, the best has the
        score n and the last has the score 1.
        """
        return {"score": [scores(order) for order in self.order_columns(queries, columns)]}

    def slide(
        self,
        queries: list[str],
        columns: Columns,
        shape: tuple[int, int],
        prompts: Callable[[list[Window]], list[Prompt]],
        decode: Decode,
        budget: Budget | None = None,
    ) -> list[list[int]]:
        """Order the passages of each query by sliding windows. Returns for each query the positions of its passages in
        the given list (from 0), best first.

        In round r, the r-th windows of all queries are ordered together. If the model returns NaN or an infinity,
        ValueError is raised; its message names the query and the docnos.

        Args:
            queries: the text of each query.
            columns: the columns of the passages; only `docno` is used.
            shape: window size and stride, in passages.
            prompts: a function that takes a list of windows and returns a list with their prompts.
            decode: a function that takes a batch of prompts and decodes the order of each prompt's passages.
            budget: the maximum number of tokens in a batch; None is a budget of `max_tokens`.
        """
        size, stride = shape
        counts = [len(docnos) for docnos in columns["docno"]]
        total = self.passes * sum(len(sliding_windows(n, size, stride)) for n in counts)
        budget = Budget(self.max_tokens) if budget is None else budget

        def order_windows(windows: list[Window]) -> list[list[int]]:
            read = prompts(windows)
            asked = [i for i, prompt in enumerate(read) if min(prompt.top, prompt.n - 1) > 0]
            bar.update(len(read) - len(asked))
            answers = map_batches(
                lambda batch: list(zip(*decode(batch), strict=True)),
                [read[i] for i in asked],
                [read[i].tokens for i in asked],
                budget,
                bar.update,
            )
            chosen: list[list[int]] = [[] for _ in read]
            for i, (choice, value) in zip(asked, answers, strict=True):
                if value != 0:
                    raise not_finite(value, queries[windows[i].query], of_windows(columns["docno"], [windows[i]])[0])
                chosen[i] = choice[: read[i].top]
            return [complete(choice, prompt.n) for choice, prompt in zip(chosen, read, strict=True)]

        with inference(), self.progress(total, "window") as bar:
            return slide(counts, size, stride, order_windows, passes=self.passes, k=self.top_k)

    def for_top(self, top_k: int | None) -> Self:
        """A copy that decodes at most the first `top_k` ranks."""
        shorter = copy.copy(self)
        shorter.top_k = min((k for k in (self.top_k, top_k) if k is not None), default=None)
        return shorter

    def fuse_rank_cutoff(self, k: int) -> pt.Transformer | None:
        """The pipeline that `compile` puts in place of `self >> RankCutoff(k)`. This pipeline returns the same k
        passages in fewer decoding steps.

        Returns None if `top_k` is already at most k, or if k is less than 1.
        """
        if k < 1 or (self.top_k is not None and self.top_k <= k):
            return None
        shorter = copy.copy(self)
        shorter.top_k = k
        return shorter >> pt.RankCutoff(k)


def of_windows(values: Sequence[Sequence[Any]], windows: Sequence[Window]) -> list[list[Any]]:
    """Return a list for each window, with the values of the window's passages.

    values: one list per query, with one value per passage, such as its text or docno.
    """
    return [[values[window.query][number] for number in window.passages] for window in windows]
