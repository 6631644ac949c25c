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
LENGTH = 150  # maximum length of a prompt in tokens in the papers' experiments on MS MARCO
ANSWER_LENGTH = 140  # maximum number of tokens that decoding="free" generates, including the start token


@dataclasses.dataclass(eq=False, repr=False)
class LiT5Distill(ListwiseReranker):
    """Rerank lists by LiT5-Distill: T5 Fusion-in-Decoder over windows of up to 100 passages.

    Args:
        model: hub id or folder of a LiT5-Distill checkpoint. The checkpoints `castorini/LiT5-Distill-{base,large,xl}`
            (v1) were trained with windows of 20 passages. The checkpoints `castorini/LiT5-Distill-{base,large,xl}-v2`
            (v2) were trained with one window of 100 passages. A folder that `save` wrote can be given, too.
        window_size: number of passages per window, at most 100. None takes the size that the checkpoint records. If the
            checkpoint records no size, its hub id or path decides, else the entry `_name_or_path` of its config. A name
            with "LiT5-Distill" means 100 if "v2" follows, else 20. For any other name, "v2" in the last folder's name
            means 100. If no name decides, the size is 20, and a warning appears. A list shorter than the window is read
            in one window.
        stride: number of passages by which the window moves up the list. None takes half of the window size. If
            `window_size` is None, too, a stride that the checkpoint records comes first.
        passes: number of times that the windows slide over each list.
        max_length: maximum length of a prompt in tokens. A longer prompt is truncated on the right, where the text of
            the passage is. None takes the maximum that the checkpoint records. If the checkpoint records no maximum,
            None is 150, which the papers used for MS MARCO. For BEIR, the papers used 512. A long query leaves less
            room for the passage. If no room is left, a warning appears.
        top_k: number of ranks to decode; None decodes all ranks. The first `top_k` passages are the same as without
            `top_k`. The other passages follow in the order in which the windows left them. Compiling a rank cutoff also
            sets `top_k`: `((first_stage >> LiT5Distill()) % 10).compile()` sets `top_k` to 10.
        decoding: how the order of a window is generated. "constrained" is greedy decoding that generates each
            identifier exactly once, so the result is a permutation. "free" is greedy decoding without constraints,
            followed by the clean-up of the original code. The clean-up drops repeated identifiers. The passages whose
            identifier is missing are appended in their incoming order. If the freely generated text is a permutation,
            "constrained" and "free" give the same order. "first" sorts the passages by the probability of their
            identifiers at the first decoding step (FIRST, arXiv 2406.15657). A window then takes one decoding step, or
            two steps if it has more than 56 passages. The published checkpoints were not trained for "first"; the
            training recipe `lit5-distill-first` trains a checkpoint for "first".
        revision: a branch, tag or commit of the model on the hub; None takes the main branch.
        text_field: name of the column with the texts of the passages.
        max_tokens: maximum number of prompt tokens in a batch of windows. The keys and values of each token take
            memory: 37 kB per token with a base model in bfloat16. If a batch does not fit into memory, the maximum is
            halved for the rest of the call, and the batch is computed again.
        device: device of the model, such as "cpu" or "cuda:1"; None takes the first CUDA GPU, else Apple's GPU (mps),
            else the CPU.
        dtype: data type of the weights, such as "float32" or "bfloat16"; None is bfloat16 on a CUDA GPU that supports
            bfloat16, else float32.
        verbose: show a progress bar.

    `LiT5Distill.from_backbone("google/t5-v1_1-base")` creates an untrained LiT5Distill from a pre-trained T5 or mT5. It
    must then be trained to rank.

    In a list of n passages, the first passage of the decoded order gets the score n, the second gets n - 1, and the
    last gets 1. In float32, the orders equal those of the original code, castorini/LiT5, if every window of a list is
    full. If a list is shorter than the window, castorini/LiT5 adds empty passages, and this class does not. Sources:
    arXiv 2312.16098 for v1; LiT and Lean, ECIR 2025, for v2.
    """

    model: str = "castorini/LiT5-Distill-base-v2"
    _: dataclasses.KW_ONLY
    max_length: int | None = None
    max_tokens: int = 65_536

    schematic: ClassVar[dict[str, str]] = {"label": "LiT5-Distill"}
    read = staticmethod(reader("LiT5Distill"))
    begin = staticmethod(read_t5)

    def order_columns(self, queries: list[str], columns: Columns) -> list[list[int]]:
        """Rank the passages of Q queries. Returns for each query the positions of its passages in the given list (from
        0), best first.

        columns: column name -> a list per query, with one value per passage, such as {"docno": [["d1", "d2"], ["d7"]]}.
        Only `docno` and the column with the texts are used.
        """
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
        """The settings that `save` records in the checkpoint: the reranker's name, the window size and the stride in
        passages, and the maximum length of a prompt in tokens."""
        size, stride = self.window()
        return {
            "reranker": "LiT5Distill",
            "window_size": size,
            "stride": stride,
            "lengths": {"max_length": self.length()},
        }

    def window(self) -> tuple[int, int]:
        """The window size and the stride in passages.

        If the argument `window_size` or `stride` is None, its value is chosen as the docstring of the class says.
        Raises ValueError if the window size is more than 100.
        """
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
        """The family of the checkpoint, "v1" or "v2".

        The family is taken from the checkpoint's hub id or path, such as castorini/LiT5-Distill-base-v2, else from the
        entry `_name_or_path` of the checkpoint's config. If neither shows a family, "v1" is assumed. For a trained
        checkpoint, one warning then says so.
        """
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
        """The maximum length of a prompt in tokens: the argument `max_length`, else the length that the checkpoint
        records, else 150."""
        checkpoint: T5Checkpoint = self.load()
        return checkpoint.length("max_length", self.max_length, LENGTH)

    def prompts(self, query: str, passages: list[str]) -> list[list[int]]:
        """For each passage of a window, the token ids of its prompt, including </s> at the end. A prompt has at most
        `self.length()` tokens.

        passages: the texts of the passages. The first passage has the identifier 1.
        """
        length = self.length()
        texts = [f"{_head(query, i)} {passage} Relevance Ranking: " for i, passage in enumerate(passages, 1)]
        return [[*ids[: length - 1], EOS] for ids in self.load().pieces(texts)]


def _head(query: str, number: int) -> str:
    return f"Search Query: {query} Passage: [{number}]"


def constrained(checkpoint: T5Checkpoint, batch: list[Prompt]) -> Choices:
    """Greedy decoding in which each step chooses among the tokens that continue an unused identifier."""
    words, pieces = identifiers(checkpoint, max(prompt.n for prompt in batch))
    reader = PieceReader(FiD(checkpoint.network), [prompt.content for prompt in batch], pieces, sum(map(len, words)))
    return in_turn(reader, words, [prompt.n for prompt in batch], [prompt.top for prompt in batch])


def first(checkpoint: T5Checkpoint, batch: list[Prompt]) -> Choices:
    """Order the passages of each window by the probability of their identifiers at the first decoding step."""
    words, pieces = identifiers(checkpoint, max(prompt.n for prompt in batch))
    reader = PieceReader(FiD(checkpoint.network), [prompt.content for prompt in batch], pieces, max(map(len, words)))
    return at_once(reader, words, [prompt.n for prompt in batch])


def free(checkpoint: T5Checkpoint, batch: list[Prompt]) -> Choices:
    """The original code's decoding: greedy decoding without constraints, then a clean-up of the generated text. The
    text is generated to its end, even if only the first ranks of the window are needed (`Prompt.top`)."""
    sequences, broken = greedy(checkpoint, batch, ANSWER_LENGTH)
    texts = map(checkpoint.pieces.decode, sequences)
    return [parse(text, prompt.n) for text, prompt in zip(texts, batch, strict=True)], broken


def greedy(checkpoint: T5Checkpoint, batch: list[Prompt], max_length: int) -> tuple[list[list[int]], list[float]]:
    """Generate token ids for each prompt by greedy decoding.

    Returns two lists with one entry per prompt. The first list has the generated token ids before EOS, at most
    max_length - 1 ids per prompt. The second list has 0 for a prompt if all its logits were finite, else nan or an
    infinity.
    """
    fid = FiD(checkpoint.network)
    memory = fid.read_prompts([prompt.content for prompt in batch], max_length)
    written, broken = zip(*((ids, broken) for ids, _, broken, _ in fid.greedy(memory, max_length)), strict=True)
    rows = torch.stack(written, 1).tolist()
    return [row[: row.index(EOS)] if EOS in row else row for row in rows], torch.stack(broken).sum(0).tolist()


DECODINGS = {"constrained": constrained, "free": free, "first": first}


def identifiers(checkpoint: T5Checkpoint, n: int) -> tuple[list[list[int]], list[int]]:
    """The tokens of the identifiers 1 to n.

    The distinct tokens of these identifiers are numbered from 0. Returns two lists: the token numbers of each
    identifier, and the vocabulary id of each token number.
    """
    spelt = checkpoint.pieces([str(i) for i in range(1, n + 1)])
    pieces = sorted(set(chain.from_iterable(spelt)))
    return [[pieces.index(piece) for piece in word] for word in spelt], pieces
