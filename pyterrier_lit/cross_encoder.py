"""CrossEncoder: one encoder reads a query and a passage together and returns one score.

The encoder reads "[CLS] query [SEP] passage [SEP]", so every word of the passage can attend to every word of the query.
The score is a linear function of the encoder's last state at [CLS]. Each query-passage pair is scored on its own
(pointwise). The default model, Rank-DistiLLM's monoELECTRA (arXiv 2405.07920), was distilled from rankings by large
language models.
"""

import copy
import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import pandas as pd
import torch

from pyterrier_lit.batching import encoder_tokens, inference, map_batches
from pyterrier_lit.frames import Columns
from pyterrier_lit.models.export import as_classifier
from pyterrier_lit.models.pair_encoder import LENGTHS, PairCheckpoint, in_int8, new_pairs, read_pairs
from pyterrier_lit.models.pairs import Pair, PairLayout
from pyterrier_lit.reranker import Reranker

SPECIAL_TOKENS = {"parse": False, "text": True}  # whether a special token inside a text is read as plain characters


@dataclasses.dataclass(eq=False, repr=False)
class CrossEncoder(Reranker):
    """Rerank by a cross-encoder that reads each (query, passage) pair: score(q, d) = w . h_[CLS] + b.

    h_[CLS] is the encoder's last state at the token [CLS]; w and b are the weights of the scoring head.

    Args:
        model: hub id or folder of a checkpoint of one of two kinds. The first kind is a cross-encoder of lightning-ir
            over ELECTRA or BERT, such as `webis/monoelectra-base` or `webis/monoelectra-large`, in any format since
            2024. The second kind is a sequence classifier of transformers: with one label, the score is the logit of
            this label; with two labels, the score is the second logit minus the first. A classifier is used with its
            tokenizer, token types and default prompt, as in sentence-transformers. Code inside a checkpoint is never
            run.
        query_length: maximum length of a query in tokens. None takes the length that the checkpoint records. If it
            records none, the maximum is 32 for a cross-encoder of lightning-ir, and a sequence classifier has no
            maximum.
        doc_length: maximum length of a passage in tokens. None takes the length that the checkpoint records. If it
            records none, the maximum is 256 for a cross-encoder of lightning-ir, and a sequence classifier has no
            maximum. A query-passage pair that is longer than the model's maximum input length is truncated further, the
            longer text first, as in sentence-transformers. A warning appears if the passage was truncated in more than
            half of the pairs of a call. With `verbose`, the progress bar shows the number of these pairs.
        special_tokens: how the characters of a special token, such as [SEP], are read inside a query or passage.
            "parse" reads them as a control token, as lightning-ir does. "text" reads them as plain characters; choose
            "text" for untrusted queries or passages.
        revision: a branch, tag or commit of the model on the hub; None takes the main branch.
        text_field: name of the column with the texts of the passages.
        max_tokens: maximum number of tokens in a batch, including padding. None is 1,024 on a CPU and 16,384 on a GPU.
            If a batch does not fit into memory, `max_tokens` is halved and the batch is computed again.
        device: device of the model; None takes the first CUDA GPU, else Apple's GPU (mps), else the CPU.
        dtype: data type of the weights; None is bfloat16 on a CUDA GPU that supports it, else float32.
        verbose: show a progress bar.

    `CrossEncoder.from_backbone("google/electra-base-discriminator")` creates an untrained cross-encoder: an ELECTRA or
    BERT with a new scoring head. With ModernBERT, DeBERTa, RoBERTa, XLM-R, DistilBERT and other encoders, it creates a
    sequence classifier of transformers.

    The score of a query-passage pair depends on this pair alone, so the scores can be cached with
    `pyterrier_caching.ScorerCache`. Passages with equal scores keep their incoming order. The scores equal those that
    lightning-ir computes. Source: Schlatt et al., Rank-DistiLLM, ECIR 2025.
    """

    model: str = "webis/monoelectra-base"
    _: dataclasses.KW_ONLY
    query_length: int | None = None
    doc_length: int | None = None
    special_tokens: str = "parse"

    schematic: ClassVar[dict[str, str]] = {"label": "CrossEncoder"}
    read = staticmethod(read_pairs)
    begin = staticmethod(new_pairs)

    def results(self, queries: list[str], columns: Columns) -> dict[str, list[Any]]:
        """`score`: for each query, the list of its passages' scores. Identical query-passage pairs are computed
        once."""
        self.option("special_tokens", SPECIAL_TOKENS)  # before the checkpoint is loaded
        checkpoint: PairCheckpoint = self.load()
        asked = [
            [(query, text) for text in texts] for query, texts in zip(queries, columns[self.text_field], strict=True)
        ]
        distinct = list(dict.fromkeys(pair for pairs in asked for pair in pairs))
        layout, inputs, cut = self.cut_pairs(distinct)
        if cut > len(distinct) / 2:
            warnings.warn(
                "more than half of the passages were truncated; a larger doc_length keeps more of each, up to the"
                " model's maximum, and pt.text.sliding splits them into shorter ones. verbose=True counts them",
                stacklevel=2,
            )

        def scores(batch: list[Pair]) -> torch.Tensor:
            return checkpoint.scores(layout.tensors(batch, checkpoint.pad_id))

        lengths = [layout.length(pair) for pair in inputs]
        with inference(), self.progress(len(inputs), "pair") as bar:
            bar.set_postfix(truncated=cut)
            max_tokens = encoder_tokens(checkpoint.device) if self.max_tokens is None else self.max_tokens
            computed = map_batches(scores, inputs, lengths, max_tokens, bar.update)
        score_of = dict(zip(distinct, computed, strict=True))
        return {"score": [[score_of[pair] for pair in pairs] for pairs in asked]}

    def predict(self, pairs: Sequence[tuple[str, str]] | tuple[str, str]) -> Any:
        """The scores of P (query, passage) pairs, in the form that sentence-transformers' CrossEncoder.predict returns:
        a float32 array (P,), or a number for a single pair. Scores are logits; no sigmoid is applied. Raises the same
        errors as `score`.

        The other rerankers do not have this method: with them, the score of a passage depends on the other passages of
        the query.
        """
        if pairs and isinstance(pairs[0], str):
            return self.predict([cast(tuple[str, str], pairs)])[0]
        queries, passages = zip(*pairs, strict=True) if pairs else ((), ())
        scores = self.score(list(queries), [[passage] for passage in passages])
        return torch.tensor(scores, dtype=torch.float32).reshape(-1).numpy()

    def quantize(self, frame: pd.DataFrame, n_pairs: int = 64) -> "CrossEncoder":
        """This reranker in int8, for CPUs with VNNI or AMX. It takes 10 to 60 seconds, and needs `pyterrier-lit[int8]`.

        Weights and activations are quantised by NNCF (SmoothQuant, static ranges), and OpenVINO computes the scores.
        The result can be saved and loaded like any CrossEncoder. It cannot be trained.

        Args:
            frame: candidates with the columns `query` and `text_field`. Their activations calibrate the ranges, so they
                should be of the collection that will be reranked.
            n_pairs: the number of query-passage pairs that are read, evenly spaced in `frame`.

        Raises ImportError if OpenVINO or NNCF is not installed, and ValueError for a frame without these columns or
        without rows, for an encoder other than BERT, CamemBERT, ELECTRA, RoBERTa and XLM-R, and for a reranker that is
        in int8 already.
        """
        columns = ["query", self.text_field]
        if frame.empty or not set(columns) <= set(frame.columns):
            raise ValueError(
                f"a frame of {len(frame)} rows with the columns {', '.join(map(str, frame.columns))} cannot calibrate;"
                f" wanted candidates with {' and '.join(columns)}"
            )
        rows = frame[columns].iloc[:: max(1, len(frame) // n_pairs)].head(n_pairs)
        exact = self.apply_attributes(device="cpu", dtype=None)
        _, pairs = exact.pairs(list(rows.itertuples(index=False, name=None)))
        quantized = copy.copy(exact)
        quantized.hold(in_int8(exact.load(), pairs, exact.lengths()))
        quantized.hold_changed("in int8")
        quantized.note_training({"quantised": f"to int8, calibrated on {len(pairs)} query-passage pairs"})
        return quantized

    def pairs(self, texts: Sequence[tuple[str, str]]) -> tuple[PairLayout, list[Pair]]:
        """For P (query, passage) texts: the layout of the model's inputs, and P truncated pairs of token ids. Each
        distinct text is tokenised once."""
        layout, pairs, _ = self.cut_pairs(texts)
        return layout, pairs

    def cut_pairs(self, texts: Sequence[tuple[str, str]]) -> tuple[PairLayout, list[Pair], int]:
        """The layout and the pairs of token ids as from `pairs`, and the number of pairs whose passage was
        truncated."""
        lengths = self.lengths()
        layout: PairLayout = self.load().layout(special_tokens_as_text=self.option("special_tokens", SPECIAL_TOKENS))
        queries = list(dict.fromkeys(query for query, _ in texts))
        passages = list(dict.fromkeys(passage for _, passage in texts))
        of_query = dict(zip(queries, layout.queries(queries, lengths["query_length"]), strict=True))
        of_passage = dict(zip(passages, layout.pieces(passages, lengths["doc_length"]), strict=True))
        pairs = [layout.fit(of_query[query], of_passage[passage]) for query, passage in texts]
        read = [(of_passage[passage], ids) for (_, passage), (_, ids) in zip(texts, pairs, strict=True)]
        return layout, pairs, sum(pieces.cut or len(ids) < pieces.total for pieces, ids in read)

    def lengths(self) -> dict[str, int | None]:
        """`query_length` and `doc_length` in tokens: the argument, or where it is None, the checkpoint's length. None
        in the result means no maximum. Raises ValueError for an argument that is not a positive whole number."""
        checkpoint: PairCheckpoint = self.load()
        lengths: dict[str, int | None] = {}
        for name in LENGTHS:
            own = getattr(self, name)
            lengths[name] = length = checkpoint.lengths[name] if own is None else own
            if length is not None and (not isinstance(length, int) or length < 1):
                raise ValueError(f"{name}={length!r}; wanted a positive whole number of tokens")
        return lengths

    def save(self, path: str | Path, layout: str | None = None) -> None:
        """Write the checkpoint into a folder that the constructor can load. Raises OSError if the checkpoint cannot be
        written; a checkpoint that was in the folder before is then unchanged.

        Args:
            path: the folder, which is created if necessary.
            layout: None keeps the checkpoint's format, which is lightning-ir's or that of a sequence classifier.
                "transformers" writes a sequence classifier with the same scores, which sentence-transformers, Text
                Embeddings Inference, vLLM and ONNX exporters can read: a BERT classifier, or an ELECTRA classifier if
                the embeddings are smaller than the hidden states. Raises ValueError if no such classifier computes the
                same scores.
        """
        if layout not in (None, "transformers"):
            raise ValueError(f"layout={layout!r}; wanted None or 'transformers'")
        checkpoint = self.load()
        self.write(path, as_classifier(checkpoint, self.lengths()) if layout == "transformers" else checkpoint)

    def saved_settings(self) -> dict[str, Any]:
        """The maximum lengths of a query and of a passage, which `save` records in the checkpoint."""
        return self.lengths()
