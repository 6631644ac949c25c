"""LiT5Distill: a T5 reads every passage of a window with its identifier and generates the identifiers, best first.

Each passage gets its own prompt, "Search Query: ... Passage: [3] ... Relevance Ranking: ", and is encoded separately
(Fusion-in-Decoder). The decoder attends to all passages of the window and generates "3 1 2 ...". The published
checkpoints were distilled from rankings by much larger language models. Sources: arXiv 2312.16098; LiT and Lean, ECIR
2025.
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

IDENTIFIERS = 100  # the largest identifier that a published checkpoint was trained with
LENGTH = 150  # maximum tokens of a prompt, in the papers' experiments on MS MARCO
ANSWER_LENGTH = 140  # maximum tokens that decoding="free" generates, including the start token


@dataclasses.dataclass(eq=False, repr=False)
class LiT5Distill(ListwiseReranker):
    """Rerank lists by LiT5-Distill: T5 Fusion-in-Decoder over windows of up to 100 passages.

    Args:
        model: hub id or folder of a LiT5-Distill checkpoint. `castorini/LiT5-Distill-{base,large,xl}` (v1) were trained
            with windows of 20 passages, `castorini/LiT5-Distill-{base,large,xl}-v2` (v2) with one window of 100. A
            folder that `save` wrote can be given, too.
        window_size: passages per window, at most 100. None takes the size that the checkpoint records. If it records
            none, the size follows from the checkpoint's name or path: 100 for v2 and 20 for v1. If neither the name nor
            the path says v1 or v2, the size is 20, with a warning. A list shorter than the window is read in one
            window.
        stride: how many positions the window moves up between two windows. None takes the stride that the checkpoint
            records, if window_size is None as well, and otherwise half of the window size.
        passes: how many times the windows slide over each list.
        max_length: maximum length of a prompt in tokens. A longer prompt is truncated on the right, where the text of
            the passage is. None takes the length that the checkpoint records, else 150, as in the papers for MS MARCO.
            For BEIR, the papers used 512. A long query leaves less room for the passage. If there is no room left, a
            warning appears.
        top_k: decode only the first k ranks. These ranks are the same as without `top_k`; the other passages follow in
            the order in which the windows leave them. None decodes all ranks. Compiling a rank cutoff sets `top_k`, as
            in `((first_stage >> LiT5Distill()) % 10).compile()`.
        decoding: how the order of a window is generated. "constrained" is greedy decoding that generates each
            identifier exactly once, so the result is a permutation. "free" is greedy decoding without constraints,
            followed by the original code's clean-up: repeated identifiers are dropped, and passages whose identifier is
            missing are appended in their incoming order. If the freely generated text is a permutation, "constrained"
            and "free" give the same order. "first" sorts the passages by the probability of their identifiers at the
            first decoding step (FIRST, arXiv 2406.15657). This takes one decoding step, or two for windows of more than
            56 passages. The published checkpoints were not trained for "first"; the recipe `lit5-distill-first` trains
            a checkpoint for it.
        revision: a branch, tag or commit of the model on the hub; None takes the main branch.
        text_field: name of the column with the texts of the passages.
        max_tokens: maximum number of prompt tokens in a batch of windows. The keys and values of each token take
            memory: 37 kB per token with a base model in bfloat16. If a batch does not fit into memory, `max_tokens` is
            halved and the batch is computed again.
        device: device of the model; None takes the first CUDA GPU, else Apple's GPU (mps), else the CPU.
        dtype: data type of the weights; None is bfloat16 on a CUDA GPU that supports it, else float32.
        verbose: show a progress bar.

    `LiT5Distill.from_backbone("google/t5-v1_1-base")` starts from a pre-trained T5 or mT5, which must then be trained
    to rank.

    In a list of n passages, the first passage of the decoded order gets the score n, the second n - 1, and the last 1.
    In float32, the orders equal those of castorini/LiT5 for lists that fill their windows. castorini/LiT5 adds empty
    passages to a shorter list, and this class does not. Sources: arXiv 2312.16098 for v1; LiT and Lean, ECIR 2025, for
    v2.
    """

    model: str = "castorini/LiT5-Distill-base-v2"
    _: dataclasses.KW_ONLY
    max_length: int | None = None
    max_tokens: int = 65_536

    schematic: ClassVar[dict[str, str]] = {"label": "LiT5-Distill"}
    read = staticmethod(reader("LiT5Distill"))
    begin = staticmethod(read_t5)

    def order_columns(self, queries: list[str], columns: Columns) -> list[list[int]]:
        """For each query, the positions of its passages in its list (from 0), best first."""
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
        """What `save` records in the checkpoint: the reranker's name, the window size, the stride and the maximum
        length of a prompt."""
        size, stride = self.window()
        return {
            "reranker": "LiT5Distill",
            "window_size": size,
            "stride": stride,
            "lengths": {"max_length": self.length()},
        }

    def window(self) -> tuple[int, int]:
        """The window size and the stride in passages: the arguments, else what the checkpoint records, else those of
        its family (v1 or v2). Raises ValueError if the window size is more than 100."""
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
        """The family of the checkpoint, "v1" or "v2". It is read from the checkpoint's name, else from the name of the
        checkpoint that it was saved from. If no name says it, the family is taken to be "v1", with one warning for a
        trained checkpoint."""
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
        """Maximum length of a prompt in tokens: the argument, else the length that the checkpoint records, else 150."""
        checkpoint: T5Checkpoint = self.load()
        return checkpoint.length("max_length", self.max_length, LENGTH)

    def prompts(self, query: str, passages: list[str]) -> list[list[int]]:
        """For each passage, the token ids of its prompt: at most `max_length`, including </s> at the end."""
        length = self.length()
        texts = [f"{_head(query, i)} {passage} Relevance Ranking: " for i, passage in enumerate(passages, 1)]
        return [[*ids[: length - 1], EOS] for ids in self.load().pieces(texts)]


def _head(query: str, number: int) -> str:
    """The part of a prompt before the text of the passage. number: the passage's identifier."""
    return f"Search Query: {query} Passage: [{number}]"


def constrained(checkpoint: T5Checkpoint, batch: list[Prompt]) -> Choices:
    """Greedy decoding in which each step chooses among the tokens that continue an unused identifier."""
    words, pieces = identifiers(checkpoint, max(prompt.n for prompt in batch))
    reader = PieceReader(FiD(checkpoint.network), [prompt.content for prompt in batch], pieces, sum(map(len, words)))
    return in_turn(reader, words, [prompt.n for prompt in batch], [prompt.top for prompt in batch])


def first(checkpoint: T5Checkpoint, batch: list[Prompt]) -> Choices:
    """Order the passages by the probability of their identifiers at the first decoding step."""
    words, pieces = identifiers(checkpoint, max(prompt.n for prompt in batch))
    reader = PieceReader(FiD(checkpoint.network), [prompt.content for prompt in batch], pieces, max(map(len, words)))
    return at_once(reader, words, [prompt.n for prompt in batch])


def free(checkpoint: T5Checkpoint, batch: list[Prompt]) -> Choices:
    """The original code's decoding: greedy decoding without constraints, then a clean-up of the generated text. It
    always generates all ranks, whatever the `top` of a prompt."""
    sequences, broken = greedy(checkpoint, batch, ANSWER_LENGTH)
    texts = map(checkpoint.pieces.decode, sequences)
    return [parse(text, prompt.n) for text, prompt in zip(texts, batch, strict=True)], broken


def greedy(checkpoint: T5Checkpoint, batch: list[Prompt], max_length: int) -> tuple[list[list[int]], list[float]]:
    """For each prompt, the token ids that the decoder generates before EOS, at most max_length - 1. Also for each
    prompt, 0 if all logits were finite, else nan or an infinity."""
    fid = FiD(checkpoint.network)
    memory = fid.read_prompts([prompt.content for prompt in batch], max_length)
    written, broken = zip(*((ids, broken) for ids, _, broken, _ in fid.greedy(memory, max_length)), strict=True)
    rows = torch.stack(written, 1).tolist()
    return [row[: row.index(EOS)] if EOS in row else row for row in rows], torch.stack(broken).sum(0).tolist()


DECODINGS = {"constrained": constrained, "free": free, "first": first}


def identifiers(checkpoint: T5Checkpoint, n: int) -> tuple[list[list[int]], list[int]]:
    """The identifiers 1 to n, each as a list of token numbers from 0, and the vocabulary id of each token number."""
    spelt = checkpoint.pieces([str(i) for i in range(1, n + 1)])
    pieces = sorted(set(chain.from_iterable(spelt)))
    return [[pieces.index(piece) for piece in word] for word in spelt], pieces
