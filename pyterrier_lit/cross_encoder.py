"""CrossEncoder: one encoder reads a query and a passage together and returns one score.

The encoder reads "[CLS] query [SEP] passage [SEP]", so every word of the passage can attend to every word of the query.
The score is a linear function of the state at [CLS]. Each pair is scored independently (pointwise).
Rank-DistiLLM's monoELECTRA (arXiv 2405.07920) is distilled from the rankings of large language models.
"""

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch

from pyterrier_lit.batching import encoder_tokens, inference, map_batches
from pyterrier_lit.frames import Columns
from pyterrier_lit.models.export import as_classifier
from pyterrier_lit.models.pair_encoder import LENGTHS, PairCheckpoint, new_pairs, read_pairs
from pyterrier_lit.models.pairs import Pair, PairLayout
from pyterrier_lit.reranker import Reranker

SPECIAL_TOKENS = {"parse": False, "text": True}  # whether special tokens inside a text are plain characters


@dataclasses.dataclass(eq=False, repr=False)
class CrossEncoder(Reranker):
    """Rerank by a cross-encoder that reads each (query, passage) pair: score(q, d) = w . h_[CLS] + b.

    Args:
        model: hub id or folder. Supported are lightning-ir's checkpoints with ELECTRA or BERT
            (`webis/monoelectra-base`, `webis/monoelectra-large`; all formats since 2024), and sequence classification
            checkpoints with one label, whose logit is the score, or with two labels, where the score is the difference
            of their logits. Tokenizer, token types and default prompt are used as transformers and
            sentence-transformers use them. Code inside a checkpoint is never run.
        query_length, doc_length: maximum tokens of a query and of a passage. None takes the lengths that the checkpoint
            records; lightning-ir's checkpoints that record none get 32 and 256. For other classifiers, None truncates
            the pair as sentence-transformers does: at the checkpoint's maximum length, the longer side first. A warning
            appears when more than half of the passages of a call were truncated; `verbose` shows how many.
        special_tokens: "parse" reads [SEP], [CLS], ... inside a text as control tokens, as lightning-ir does; "text"
            reads them as plain characters, for untrusted text.
        revision: a branch, tag or commit of the model on the hub; None is its main branch.
        text_field: the column with the passages.
        max_tokens: tokens per batch, including padding. None is 1,024 on a CPU and 16,384 on a GPU. When memory runs
            out, max_tokens is halved and the batch retried.
        device: None is the first GPU (CUDA's, else Apple's mps), else the CPU.
        dtype: None is bfloat16 on a GPU that has it, else float32.
        verbose: show a progress bar.

    `CrossEncoder.from_backbone("google/electra-base-discriminator")` puts an untrained scoring head on ELECTRA or BERT;
    for ModernBERT, DeBERTa, RoBERTa, XLM-R, DistilBERT and other encoders it builds transformers' sequence classifier.
    The score of a pair depends on that pair alone, so `pyterrier_caching.ScorerCache` is safe. Passages with equal
    scores keep their incoming order. Source: Schlatt et al., Rank-DistiLLM, ECIR 2025; scores equal those of
    lightning-ir.
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
        """`score`: the model's score of every passage of every query. Identical pairs are computed once."""
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
        """The scores of P (query, passage) pairs, as sentence-transformers' CrossEncoder.predict returns them: a
        float32 array (P,), or a number for a single pair. Scores are logits, before any sigmoid. Raises what `score`
        does.

        Listwise rerankers do not have this method: their score of a pair depends on the other passages of the query.
        """
        if pairs and isinstance(pairs[0], str):
            return self.predict([cast(tuple[str, str], pairs)])[0]
        queries, passages = zip(*pairs, strict=True) if pairs else ((), ())
        scores = self.score(list(queries), [[passage] for passage in passages])
        return torch.tensor(scores, dtype=torch.float32).reshape(-1).numpy()

    def pairs(self, texts: Sequence[tuple[str, str]]) -> tuple[PairLayout, list[Pair]]:
        """P (query, passage) texts -> their layout, and P truncated pairs of token ids. Each text is tokenised once."""
        layout, pairs, _ = self.cut_pairs(texts)
        return layout, pairs

    def cut_pairs(self, texts: Sequence[tuple[str, str]]) -> tuple[PairLayout, list[Pair], int]:
        """Like `pairs`; also returns in how many pairs the passage was truncated."""
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
        """Maximum tokens of a query and of a passage: the caller's, else those that the checkpoint records; None is no
        maximum."""
        checkpoint: PairCheckpoint = self.load()
        lengths: dict[str, int | None] = {}
        for name in LENGTHS:
            own = getattr(self, name)
            lengths[name] = length = checkpoint.lengths[name] if own is None else own
            if length is not None and (not isinstance(length, int) or length < 1):
                raise ValueError(f"{name}={length!r}; wanted a positive whole number of tokens")
        return lengths

    def save(self, path: str | Path, layout: str | None = None) -> None:
        """Write a folder that the constructor can load. If this fails, OSError is raised, and a folder that existed
        before is unchanged.

        Args:
            path: the folder.
            layout: None keeps the format of the checkpoint (lightning-ir's or a classifier). "transformers" writes a
                BERT sequence classifier with the same scores (ELECTRA where the embeddings are smaller than the hidden
                states), which sentence-transformers, Text Embeddings Inference, vLLM and ONNX exporters read. Raises
                ValueError where no such classifier computes the same scores.
        """
        if layout not in (None, "transformers"):
            raise ValueError(f"layout={layout!r}; wanted None or 'transformers'")
        checkpoint = self.load()
        self.write(path, as_classifier(checkpoint, self.lengths()) if layout == "transformers" else checkpoint)

    def saved_settings(self) -> dict[str, Any]:
        """The lengths, which the saved checkpoint records."""
        return self.lengths()
