"""PERank: a language model reads one vector per passage and decodes the passages, best first.

An encoder turns each passage into one vector, and a projector maps this vector into the input space of the language
model. In the prompt, the projected vector stands in place of the passage's text, so the prompt has a few tokens per
passage instead of hundreds. The model decodes passages, not words: the next passage is the one whose projected vector
has the largest dot product with the model's last hidden state. Source: arXiv 2406.14848.
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

MODES = {"embedding": False, "text+embedding": True}  # mode -> whether the prompt contains the texts of the passages


@dataclasses.dataclass(eq=False, repr=False)
class PERank(ListwiseReranker):
    """Rerank by PE-Rank: a language model reads one vector per passage and decodes a permutation of the passages.

    Args:
        model: hub id or folder of a PE-Rank checkpoint: `liuqi6777/pe-rank-mistral-jina`, or a folder that `save`
            wrote. Code inside a checkpoint is never run.
        window_size: number of passages per window. A list shorter than the window is read in one window.
        stride: number of passages by which the window moves up the list.
        passes: number of times that the windows slide over each list.
        top_k: number of ranks to decode; None decodes all ranks. The first `top_k` passages are the same as without
            `top_k`. The other passages follow in the order in which the windows left them. Compiling a rank cutoff also
            sets `top_k`: `((first_stage >> PERank()) % 10).compile()` sets `top_k` to 10.
        vectors: a pyterrier_dr.FlexIndex with the vectors of the passages. The vectors are looked up by `docno`; a
            column `docid` is ignored. If the frame has a column `doc_vec`, the vectors in this column are used instead.
            If there is neither an index nor a column `doc_vec`, the texts of the passages are encoded.
        encoder: a pyterrier_dr.BiEncoder that encodes the texts of the passages; None is the encoder inside the
            checkpoint. The encoder is used only without `vectors` and without a column `doc_vec`. All vectors must come
            from the encoder that the checkpoint was trained with. The column with the texts is required only if the
            texts are encoded or if `mode` is "text+embedding".
        mode: how the prompt represents a passage. "embedding", as in the paper, is the passage's vector;
            "text+embedding" is the vector followed by the passage's text.
        decoding: how the order of a window is decoded. "constrained", as in the paper, decodes one passage after the
            other. "first" sorts the passages by the logits of the first decoding step, so a window takes only one
            forward pass. The published checkpoints were not trained for "first".
        revision: a branch, tag or commit of the model on the hub; None takes the main branch.
        text_field: name of the column with the texts of the passages.
        max_tokens: maximum number of prompt tokens in a batch of windows. The keys and values of each token take
            memory: 131 kB per token with a Mistral 7B in bfloat16. If a batch does not fit into memory, the maximum is
            halved for the rest of the call, and the batch is computed again.
        device: device of the model, such as "cpu" or "cuda:1"; None takes the first CUDA GPU, else Apple's GPU (mps),
            else the CPU.
        dtype: data type of the weights, such as "float32" or "bfloat16"; None is bfloat16 on a CUDA GPU that supports
            bfloat16, else float32.
        verbose: show a progress bar.

    `PERank.from_backbone(name, encoder_name=..., encoder_pooling="mean", projector_type="mlp2x_gelu")` creates an
    untrained PERank. `name` is a causal language model such as "mistralai/Mistral-7B-Instruct-v0.2". `encoder_name` is
    an encoder such as "sentence-transformers/all-MiniLM-L6-v2", and `encoder_pooling` is "mean", "cls" or "last_token".
    If you give no encoder, give the dimension of the vectors as `embedding_size`. `projector_type` is "linear",
    "mlp2x_gelu" (with any digit from 1 to 9 in place of 2) or "identity".

    In a list of n passages, the first passage of the decoded order gets the score n, the second gets n - 1, and the
    last gets 1. In float32, the orders equal those of the original code, liuqi6777/pe_rank, with two exceptions. One is
    texts that contain special tokens. The other is lists of window_size - stride passages: liuqi6777/pe_rank does not
    rank them. Source: Liu et al., WWW 2025.
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
        """Rank the passages of Q queries. Returns for each query the positions of its passages in the given list (from
        0), best first.

        columns: column name -> a list per query, with one value per passage, such as {"docno": [["d1", "d2"], ["d7"]]}.
        The columns are `docno` and one of the sets that `column_sets` returns.
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
        """Two alternative sets of input columns; each set maps a column name to the type of its values.

        The first set has the column `doc_vec`. The second set has the column with the texts, or no column if the
        argument `vectors` is given. If the prompt contains the texts, both sets have the column with the texts.
        """
        text = self.text_column()
        shown: dict[str, type] = text if self.option("mode", MODES) else {}
        return [shown | {"doc_vec": object}, text if self.vectors is None else shown]

    def vectors_of(
        self, checkpoint: PERankCheckpoint, columns: Columns, budget: Budget
    ) -> tuple[torch.Tensor, list[list[int]]]:
        """The vectors of all passages, from the column `doc_vec`, from the index `vectors` or from the encoder.

        Returns a float32 tensor (D, d) with the unit vectors of D distinct passages, and for each query the rows of its
        passages in this tensor. budget: the maximum number of tokens in a batch of the encoder inside the checkpoint.
        """
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
        """An empty dict, so that PyTerrier does not show `vectors` and `encoder` as stages of the pipeline."""
        return {}

    def _encode(self, checkpoint: PERankCheckpoint, texts: list[str], budget: Budget) -> torch.Tensor:
        encoder = self.once(checkpoint.text_encoder)
        pieces = encoder.pieces(texts)
        lengths = [len(ids) for ids in pieces]
        with self.progress(len(texts), "passage") as bar:
            vectors = map_batches(lambda batch: list(encoder.encode(batch)), pieces, lengths, budget, bar.update)
        return torch.stack(vectors).cpu()


def constrained(checkpoint: PERankCheckpoint, batch: list[Prompt]) -> Choices:
    """The paper's decoding: each step chooses the best unused passage. The vector of the chosen passage is the input of
    the next step."""
    counts = [prompt.n for prompt in batch]
    return in_turn(_read(checkpoint, batch), _tokens(counts), counts, [prompt.top for prompt in batch])


def first(checkpoint: PERankCheckpoint, batch: list[Prompt]) -> Choices:
    """Order the passages of each window by the logits of the first decoding step."""
    counts = [prompt.n for prompt in batch]
    return at_once(_read(checkpoint, batch), _tokens(counts), counts)


DECODINGS = {"constrained": constrained, "first": first}


def _read(checkpoint: PERankCheckpoint, batch: list[Prompt]) -> VectorReader:
    ids, vectors = zip(*(prompt.content for prompt in batch), strict=True)
    return checkpoint.network.read(list(ids), list(vectors))


def _tokens(counts: list[int]) -> list[list[int]]:
    """The candidates for the functions of `decoding`: passage i is the single token i."""
    return [[passage] for passage in range(max(counts))]
