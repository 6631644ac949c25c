"""PERank: a language model reads one vector per passage and decodes the passages, best first.

An encoder turns each passage into one vector, and a projector maps it into the input space of the language model, where
it replaces the text of the passage. So the prompt has a few tokens per passage instead of hundreds. The model decodes
passages, not words: the next passage is the one whose vector has the largest dot product with the last hidden state.
Source: arXiv 2406.14848.
"""

import dataclasses
from collections.abc import Sequence
from itertools import chain
from typing import Any, ClassVar

import torch

from pyterrier_lit.batching import Budget, inference, map_batches
from pyterrier_lit.decoding import Choices, at_once, in_turn
from pyterrier_lit.frames import Columns, ColumnSets
from pyterrier_lit.listwise import ListwiseReranker, Prompt, of_windows
from pyterrier_lit.models.passage_vectors import distinct, from_column, from_encoder, from_index, normalised
from pyterrier_lit.models.pe_checkpoint import PERankCheckpoint, new_pe_rank, read_pe_rank
from pyterrier_lit.models.vector_lm import VectorReader
from pyterrier_lit.windows import Window

MODES = {"embedding": False, "text+embedding": True}  # whether the prompt also contains the texts


@dataclasses.dataclass(eq=False, repr=False)
class PERank(ListwiseReranker):
    """Rerank by PE-Rank: a language model reads one vector per passage and decodes a permutation of the passages.

    Args:
        model: hub id or folder of a PE-Rank checkpoint (`liuqi6777/pe-rank-mistral-jina`), or a folder that `save`
            wrote. Code inside a checkpoint is never run.
        window_size, stride: passages per window, and how many positions the window moves. A list shorter than the
            window is one window.
        passes: how often the windows slide over each list.
        top_k: decode only the first k ranks. They equal the first k ranks of the full order; the passages below stay
            where the windows leave them. `((first >> PERank()) % 10).compile()` sets it.
        vectors: a pyterrier_dr.FlexIndex with the vectors of the passages, looked up by `docno` (a `docid` column is
            ignored).
        encoder: a pyterrier_dr.BiEncoder that encodes passages; None is the encoder inside the checkpoint. A `doc_vec`
            column takes precedence over `vectors`, and `vectors` over an encoder. All vectors must come from the
            encoder that the checkpoint was trained with. The texts of the passages are needed only by an encoder or a
            mode with text.
        mode: how the prompt represents a passage: "embedding", as in the paper, by its vector; "text+embedding" by its
            vector followed by its text.
        decoding: "constrained", as in the paper, decodes one passage after the other. "first" ranks by the logits of
            the first decoding step, in one forward pass per window; the published checkpoints were not trained for
            this.
        revision: a branch, tag or commit of the model on the hub; None is its main branch.
        text_field: the column with the passages.
        max_tokens: prompt tokens per batch of windows. Each token needs memory for its keys and values (131 kB for a
            Mistral 7B in bfloat16). When memory runs out, max_tokens is halved and the batch retried.
        device: None is the first GPU (CUDA's, else Apple's mps), else the CPU.
        dtype: None is bfloat16 on a GPU that has it, else float32.
        verbose: show a progress bar.

    `PERank.from_backbone(name, encoder_name=..., encoder_pooling="mean", projector_type="mlp2x_gelu")` builds an
    untrained PERank from a causal language model such as "mistralai/Mistral-7B-Instruct-v0.2" and an encoder such as
    "sentence-transformers/all-MiniLM-L6-v2", pooled by "mean", "cls" or "last_token". Without an encoder, give the
    dimension of the vectors as `embedding_size`. The projector is "linear", "mlp2x_gelu" (with any number in place of
    2) or "identity".

    Scores are n, n - 1, ... 1 in the decoded order. Source: Liu et al., WWW 2025. In float32 the orders equal those of
    liuqi6777/pe_rank, except for texts with special tokens and for lists of window_size - stride passages, which
    liuqi6777/pe_rank does not rank.
    """

    model: str = "liuqi6777/pe-rank-mistral-jina"
    _: dataclasses.KW_ONLY
    window_size: int = 20
    stride: int = 10
    vectors: Any = None
    encoder: Any = None
    mode: str = "embedding"
    max_tokens: int = 16_384

    schematic: ClassVar[dict[str, str]] = {"label": "PE-Rank"}
    read = staticmethod(read_pe_rank)
    begin = staticmethod(new_pe_rank)

    def order_columns(self, queries: list[str], columns: Columns) -> list[list[int]]:
        """The positions of each query's passages, best first.

        columns: `docno`, and `doc_vec` or `text_field` as the mode and the source of the vectors require.
        """
        decode, shows_text = self.option("decoding", DECODINGS), self.option("mode", MODES)
        checkpoint: PERankCheckpoint = self.load()
        budget = Budget(self.max_tokens)
        with inference():
            vectors, rows = self.vectors_of(checkpoint, columns, budget)

        def prompts(windows: list[Window]) -> list[Prompt]:
            texts = of_windows(columns[self.text_field], windows) if shows_text else [[] for _ in windows]
            sizes = [len(window.passages) for window in windows]
            ids = checkpoint.prompts([queries[window.query] for window in windows], texts, sizes)
            shown = [vectors[each] for each in of_windows(rows, windows)]
            return [
                Prompt((prompt, passages), len(prompt) + window.top, len(passages), window.top)
                for prompt, passages, window in zip(ids, shown, windows, strict=True)
            ]

        shape = self.window_size, self.stride
        return self.slide(queries, columns, shape, prompts, lambda batch: decode(checkpoint, batch), budget)

    def column_sets(self) -> ColumnSets:
        """A column of vectors; without it, the text to encode, unless vectors are looked up by docno. Also the text if
        the prompt contains it."""
        text = self.text_column()
        shown: dict[str, type] = text if self.option("mode", MODES) else {}
        return [shown | {"doc_vec": object}, text if self.vectors is None else shown]

    def vectors_of(
        self, checkpoint: PERankCheckpoint, columns: Columns, budget: Budget
    ) -> tuple[torch.Tensor, list[list[int]]]:
        """Unit vectors (D, d) of the distinct passages, and for each query the row numbers of its passages."""
        docnos = columns["docno"]
        if "doc_vec" in columns:
            keys: Sequence[Sequence[Any]] = [[(i, j) for j in range(len(ranking))] for i, ranking in enumerate(docnos)]
            passages, names, rows = distinct(keys, docnos)
            vectors = from_column(list(chain(*columns["doc_vec"])), names)
        elif self.vectors is not None:
            passages, names, rows = distinct(docnos, docnos)
            vectors = from_index(self.vectors, names)
        else:
            passages, names, rows = distinct(columns[self.text_field], docnos)
            given = self.encoder is not None
            vectors = from_encoder(self.encoder, passages) if given else self._encode(checkpoint, passages, budget)
        if "doc_vec" in columns or self.vectors is not None:
            checkpoint.warn_of_other_encoders()
        return normalised(vectors, names, checkpoint.embedding_size, checkpoint.trained_on), rows

    def subtransformers(self) -> dict[str, Any]:
        """None: an index or encoder used for vectors is not a stage of the pipeline."""
        return {}

    def _encode(self, checkpoint: PERankCheckpoint, texts: list[str], budget: Budget) -> torch.Tensor:
        encoder = self.once(checkpoint.text_encoder)
        pieces = encoder.pieces(texts)
        lengths = [len(ids) for ids in pieces]
        with self.progress(len(texts), "passage") as bar:
            vectors = map_batches(lambda batch: list(encoder.encode(batch)), pieces, lengths, budget, bar.update)
        return torch.stack(vectors).cpu()


def constrained(checkpoint: PERankCheckpoint, batch: list[Prompt]) -> Choices:
    """The paper's decoding: each step chooses the best unused passage, whose vector is the next input."""
    counts = [prompt.n for prompt in batch]
    return in_turn(_read(checkpoint, batch), _tokens(counts), counts, [prompt.top for prompt in batch])


def first(checkpoint: PERankCheckpoint, batch: list[Prompt]) -> Choices:
    """Order the passages by the logits of the first decoding step."""
    counts = [prompt.n for prompt in batch]
    return at_once(_read(checkpoint, batch), _tokens(counts), counts)


DECODINGS = {"constrained": constrained, "first": first}


def _read(checkpoint: PERankCheckpoint, batch: list[Prompt]) -> VectorReader:
    ids, vectors = zip(*(prompt.content for prompt in batch), strict=True)
    return checkpoint.network.read(list(ids), list(vectors))


def _tokens(counts: list[int]) -> list[list[int]]:
    """Each passage is one token."""
    return [[passage] for passage in range(max(counts))]
