"""CrossEncoder: a query and a passage are read together by one encoder, which gives one score.

The encoder reads "[CLS] query [SEP] passage [SEP]", so every word of the passage can attend to every word of the query.
The score is a linear function of the state at [CLS]. Each pair is scored by itself (pointwise). Rank-DistiLLM's
monoELECTRA (arXiv 2405.07920) learned its scores from the rankings of large language models.
"""

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from pyterrier_lit.batching import encoder_tokens, inference, map_batches
from pyterrier_lit.frames import Columns
from pyterrier_lit.models.pair_encoder import PairCheckpoint, new_pairs, read_pairs
from pyterrier_lit.models.pairs import Pair, PairLayout
from pyterrier_lit.reranker import Reranker

QUERY_LENGTH, DOC_LENGTH = 32, 256  # pieces kept by Rank-DistiLLM's where neither the caller nor the checkpoint says

SPECIAL_TOKENS = {"parse": False, "text": True}  # whether those in a text are plain characters


@dataclasses.dataclass(eq=False, repr=False)
class CrossEncoder(Reranker):
    """Rerank by a cross-encoder that reads each (query, passage) pair: score(q, d) = w . h_[CLS] + b.

    Args:
        model: hub id or folder. Read are the checkpoints of lightning-ir over ELECTRA or BERT
            (`webis/monoelectra-base`, `webis/monoelectra-large`; all its formats since 2024) and ordinary sequence
            classification checkpoints with one label, or two of which the second is the score. No code of the
            checkpoint is run.
        query_length, doc_length: pieces kept of each query and passage; None takes what the checkpoint records, else 32
            and 256 for lightning-ir's; an ordinary classifier is cut as a pair alone. A pair is then cut to the model's
            maximum, the longer side first. A warning says when more than half of the passages were cut.
        special_tokens: "parse" reads [SEP], [CLS], ... inside a text as the reference does, as control tokens; "text"
            reads them as plain characters, for texts from strangers.
        text_field: the column with the passages.
        max_tokens: tokens per batch with padding; None is 4,096 on a CPU and 16,384 on a GPU. When memory runs out the
            batch is halved and the run goes on.
        device: None is the first GPU, else the CPU.
        dtype: None is bfloat16 on a GPU that has it, else float32.
        verbose: show a progress bar.

    `CrossEncoder.from_backbone("google/electra-base-discriminator")` is an untrained one, over the body of an ELECTRA
    or BERT. A pair's score depends on the pair alone, so `pyterrier_caching.ScorerCache` is safe; equal scores are ties
    and keep their incoming order. Source: Schlatt et al., Rank-DistiLLM, ECIR 2025; inference equal to lightning-ir's.
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
        """`score`: the model's, of every passage of every query. Equal pairs are computed once."""
        self.option("special_tokens", SPECIAL_TOKENS)  # before anything is read
        checkpoint: PairCheckpoint = self.load()
        asked = [
            [(query, text) for text in texts] for query, texts in zip(queries, columns[self.text_field], strict=True)
        ]
        distinct = list(dict.fromkeys(pair for pairs in asked for pair in pairs))
        layout, inputs = self.pairs(distinct, warn=True)

        def scores(batch: list[Pair]) -> torch.Tensor:
            return checkpoint.scores(layout.tensors(batch, checkpoint.pad_id))

        lengths = [layout.length(pair) for pair in inputs]
        with inference(), self.progress(len(inputs), "pair") as bar:
            max_tokens = encoder_tokens(checkpoint.device) if self.max_tokens is None else self.max_tokens
            computed = map_batches(scores, inputs, lengths, max_tokens, bar.update)
        score_of = dict(zip(distinct, computed, strict=True))
        return {"score": [[score_of[pair] for pair in pairs] for pairs in asked]}

    def pairs(self, texts: Sequence[tuple[str, str]], warn: bool = False) -> tuple[PairLayout, list[Pair]]:
        """P (query, passage) texts -> their layout, and P pairs of ids, truncated. Each text is tokenised once.

        warn: when more than half of the passages were truncated.
        """
        as_text = self.option("special_tokens", SPECIAL_TOKENS)
        lengths, checkpoint = self.lengths(), self.load()
        layout: PairLayout = checkpoint.layout(special_tokens_as_text=as_text)
        queries = list(dict.fromkeys(query for query, _ in texts))
        passages = list(dict.fromkeys(passage for _, passage in texts))
        prompted = [checkpoint.prompt + query for query in queries]
        pieces_of_query = dict(zip(queries, layout.pieces(prompted, lengths["query_length"]), strict=True))
        whole = dict(zip(passages, layout.pieces(passages, None), strict=True))
        pairs = [
            layout.fit(pieces_of_query[query], whole[passage][: lengths["doc_length"]]) for query, passage in texts
        ]
        cut = sum(len(pair[1]) < len(whole[passage]) for pair, (_, passage) in zip(pairs, texts, strict=True))
        if warn and cut > len(pairs) / 2:
            warnings.warn(
                f"{cut} of {len(pairs)} passages were truncated; doc_length keeps more of them, up to the model's"
                " maximum, or split them before: pt.text.sliding",
                stacklevel=2,
            )
        return layout, pairs

    def lengths(self) -> dict[str, int | None]:
        """The pieces kept of a query and of a passage: the caller's, else the checkpoint's, else Rank-DistiLLM's.

        None keeps all, as far as the pair fits: an ordinary classifier's.
        """
        checkpoint: PairCheckpoint = self.load()
        lengths: dict[str, int | None] = {}
        for name, default in (("query_length", QUERY_LENGTH), ("doc_length", DOC_LENGTH)):
            own = getattr(self, name)
            recorded = checkpoint.config.get(name) or (default if checkpoint.is_lightning_ir else None)
            length = recorded if own is None else own
            if length is not None and (not isinstance(length, int) or length < 1):
                raise ValueError(f"{name}={length!r}; wanted a whole number of pieces from 1 on")
            lengths[name] = length
        return lengths

    def saved_settings(self) -> dict[str, Any]:
        """The lengths, so that the saved checkpoint is read with them."""
        return self.lengths()
