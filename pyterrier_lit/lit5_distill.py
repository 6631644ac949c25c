"""LiT5Distill: a T5 reads every passage of a window with its identifier and generates the identifiers, best first.

Each passage gets its own prompt, "Search Query: ... Passage: [3] ... Relevance Ranking: ", and is encoded alone
(Fusion-in-Decoder). The decoder attends to all passages and generates "3 1 2 ...". The model was distilled from the
rankings of much larger language models. Source: arXiv 2312.16098; LiT and Lean, ECIR 2025.
"""

import dataclasses
import warnings
from itertools import chain
from typing import Any, ClassVar

import torch

from pyterrier_lit.decoding import Choices, at_once, in_turn
from pyterrier_lit.frames import Columns
from pyterrier_lit.listwise import ListwiseReranker, Prompt, of_windows
from pyterrier_lit.models.lit5 import WINDOWS, came_from, family, reader, warn_of_full_prompts
from pyterrier_lit.models.t5 import EOS, FiD, PieceReader, T5Checkpoint, read_t5
from pyterrier_lit.order import parse
from pyterrier_lit.windows import Window

IDENTIFIERS = 100  # the most that any checkpoint was trained with
LENGTH = 150  # tokens of a prompt in the papers, for MS MARCO
ANSWER_LENGTH = 140  # tokens that decoding="free" may generate, with the start token


@dataclasses.dataclass(eq=False, repr=False)
class LiT5Distill(ListwiseReranker):
    """Rerank lists by LiT5-Distill: T5 Fusion-in-Decoder over windows of up to 100 passages.

    Args:
        model: hub id or folder: `castorini/LiT5-Distill-{base,large,xl}` (v1: windows of 20), the same names with `-v2`
            (one window of 100), or a folder that `save` wrote.
        window_size, stride: passages per window (at most 100), and how many positions the window moves. window_size
            None takes the size that the checkpoint records; else 100 or 20 if its name or path says v2 or v1; else 20
            with a warning. stride None is half the window. A list shorter than the window is one window.
        passes: how often the windows slide over each list.
        max_length: maximum tokens of a prompt, which is truncated on the right. None takes the length that the
            checkpoint records, else 150, as in the papers for MS MARCO (512 for BEIR). Queries are not truncated; a
            query that leaves no room for a passage causes a warning.
        top_k: decode only the first k ranks. They equal the first k ranks of the full order; the passages below stay
            where the windows leave them. `((first >> LiT5Distill()) % 10).compile()` sets it.
        decoding: "constrained" generates each identifier exactly once, so the result is a permutation. "free" is
            unconstrained greedy decoding with the original code's clean-up: repeated identifiers are dropped, missing
            ones follow in incoming order. Where the generated text is a permutation, both give the same order. "first"
            ranks by the probability of each identifier at the first decoding step (FIRST, arXiv 2406.15657). It takes
            one step, or two for windows of more than 56 passages. Published checkpoints were not trained for this; the
            recipe `lit5-distill-first` trains for it.
        revision: a branch, tag or commit of the model on the hub; None is its main branch.
        text_field: the column with the passages.
        max_tokens: prompt tokens per batch of windows. Each token needs memory for its keys and values (37 kB for base
            in bfloat16). When memory runs out, max_tokens is halved and the batch retried.
        device: None is the first GPU (CUDA's, else Apple's mps), else the CPU.
        dtype: None is bfloat16 on a GPU that has it, else float32.
        verbose: show a progress bar.

    `LiT5Distill.from_backbone("google/t5-v1_1-base")` starts from a pre-trained T5 or mT5 that has not learned to rank.
    The scores of n passages are n, n - 1, ... 1 in the decoded order. Source: arXiv 2312.16098 (v1); LiT and Lean, ECIR
    2025 (v2). In float32 the orders equal those of castorini/LiT5 for lists that fill their windows; castorini/LiT5
    pads a shorter list with empty passages, and this class does not.
    """

    model: str = "castorini/LiT5-Distill-base-v2"
    _: dataclasses.KW_ONLY
    max_length: int | None = None
    max_tokens: int = 65_536

    schematic: ClassVar[dict[str, str]] = {"label": "LiT5-Distill"}
    read = staticmethod(reader("LiT5Distill"))
    begin = staticmethod(read_t5)

    def order_columns(self, queries: list[str], columns: Columns) -> list[list[int]]:
        """The positions of each query's passages, best first."""
        decode = self.option("decoding", DECODINGS)
        checkpoint: T5Checkpoint = self.load()
        texts = columns[self.text_field]
        size, _ = shape = self.window()
        heads = [_head(query, min(len(ranking), size)) for query, ranking in zip(queries, texts, strict=True)]
        warn_of_full_prompts(checkpoint, queries, heads, self.length())

        def prompts(windows: list[Window]) -> list[Prompt]:
            read = [
                self.prompts(queries[window.query], passages)
                for window, passages in zip(windows, of_windows(texts, windows), strict=True)
            ]
            return [
                Prompt(ids, sum(map(len, ids)), len(ids), window.top) for ids, window in zip(read, windows, strict=True)
            ]

        return self.slide(queries, columns, shape, prompts, lambda batch: decode(checkpoint, batch))

    def saved_settings(self) -> dict[str, Any]:
        """The reranker's name, window size, stride and prompt length."""
        size, stride = self.window()
        return {
            "reranker": "LiT5Distill",
            "window_size": size,
            "stride": stride,
            "lengths": {"max_length": self.length()},
        }

    def window(self) -> tuple[int, int]:
        """Window size and stride: the caller's, else those that the checkpoint records, else those of its family (v1 or
        v2)."""
        recorded = self.load().config
        size = self.window_size if self.window_size is not None else recorded.get("window_size")
        if size is None:
            size = WINDOWS[self.family()]
        if size > IDENTIFIERS:
            raise ValueError(
                f"window_size={size}: LiT5 was trained with identifiers up to {IDENTIFIERS}; use at most that"
            )
        stride = recorded.get("stride") if self.window_size is None else None
        return size, (stride or max(size // 2, 1)) if self.stride is None else self.stride

    def family(self) -> str:
        """ "v1" or "v2", as the name of the checkpoint, or of the one that it was saved from, says. If no name says it,
        "v1", with one warning for a trained checkpoint."""
        checkpoint: T5Checkpoint = self.load()
        known = family([str(self.model).rstrip("/"), checkpoint.path, came_from(checkpoint.config)])
        if known is None and checkpoint.path and not checkpoint.warned:
            checkpoint.warned = True
            warnings.warn(
                f"neither the name nor the config of {checkpoint.path} says whether this LiT5-Distill is v2, trained"
                " with window_size=100, or v1, trained with window_size=20, which is taken; give window_size=",
                stacklevel=2,
            )
        return known or "v1"

    def length(self) -> int:
        """Maximum tokens of a prompt: the caller's, else the length that the checkpoint records, else 150."""
        checkpoint: T5Checkpoint = self.load()
        return checkpoint.length("max_length", self.max_length, LENGTH)

    def prompts(self, query: str, passages: list[str]) -> list[list[int]]:
        """The token ids of each passage's prompt, at most `max_length` including </s> at the end."""
        length = self.length()
        texts = [f"{_head(query, i)} {passage} Relevance Ranking: " for i, passage in enumerate(passages, 1)]
        return [[*ids[: length - 1], EOS] for ids in self.load().pieces(texts)]


def _head(query: str, number: int) -> str:
    """The part of a prompt before the passage."""
    return f"Search Query: {query} Passage: [{number}]"


def constrained(checkpoint: T5Checkpoint, batch: list[Prompt]) -> Choices:
    """Greedy decoding in which each step chooses among tokens that continue an unused identifier."""
    words, pieces = identifiers(checkpoint, max(prompt.n for prompt in batch))
    reader = PieceReader(FiD(checkpoint.network), [prompt.content for prompt in batch], pieces, sum(map(len, words)))
    return in_turn(reader, words, [prompt.n for prompt in batch], [prompt.top for prompt in batch])


def first(checkpoint: T5Checkpoint, batch: list[Prompt]) -> Choices:
    """Order by the probability of each identifier at the first decoding step."""
    words, pieces = identifiers(checkpoint, max(prompt.n for prompt in batch))
    reader = PieceReader(FiD(checkpoint.network), [prompt.content for prompt in batch], pieces, max(map(len, words)))
    return at_once(reader, words, [prompt.n for prompt in batch])


def free(checkpoint: T5Checkpoint, batch: list[Prompt]) -> Choices:
    """The original code's decoding: unconstrained greedy decoding, then its clean-up of the text. Generates all ranks
    and ignores `top`."""
    sequences, broken = greedy(checkpoint, batch, ANSWER_LENGTH)
    texts = map(checkpoint.pieces.decode, sequences)
    return [parse(text, prompt.n) for text, prompt in zip(texts, batch, strict=True)], broken


def greedy(checkpoint: T5Checkpoint, batch: list[Prompt], max_length: int) -> tuple[list[list[int]], list[float]]:
    """The tokens that the decoder generates before EOS, at most max_length - 1; and 0, or the nan or inf in its
    logits."""
    fid = FiD(checkpoint.network)
    memory = fid.read_prompts([prompt.content for prompt in batch], max_length)
    written, broken = zip(*((ids, broken) for ids, _, broken, _ in fid.greedy(memory, max_length)), strict=True)
    rows = torch.stack(written, 1).tolist()
    return [row[: row.index(EOS)] if EOS in row else row for row in rows], torch.stack(broken).sum(0).tolist()


DECODINGS = {"constrained": constrained, "free": free, "first": first}


def identifiers(checkpoint: T5Checkpoint, n: int) -> tuple[list[list[int]], list[int]]:
    """The identifiers 1..n as lists of tokens, which are numbered from 0; and the vocabulary id of each token."""
    spelt = checkpoint.pieces([str(i) for i in range(1, n + 1)])
    pieces = sorted(set(chain.from_iterable(spelt)))
    return [[pieces.index(piece) for piece in word] for word in spelt], pieces
