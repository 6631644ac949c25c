"""CrossEncoder: one encoder reads a query and a passage together and returns one score.

The encoder reads "[CLS] query [SEP] passage [SEP]", so every word of the passage can attend to every word of the query.
A scoring head computes the score from the encoder's last hidden state at [CLS]. Each query-passage pair is scored on
its own (pointwise). The default model, Rank-DistiLLM's monoELECTRA (arXiv 2405.07920), was distilled from rankings by
large language models.
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
from pyterrier_lit.frames import Columns, sampled
from pyterrier_lit.models.devices import choose_device, choose_dtype
from pyterrier_lit.models.export import as_classifier
from pyterrier_lit.models.pair_encoder import LENGTHS, PairCheckpoint, in_int8, new_pairs, read_pairs
from pyterrier_lit.models.pairs import Pair, PairLayout
from pyterrier_lit.reranker import Reranker, texts

# Value of the argument `special_tokens` -> whether a special token inside a text is read as plain characters
SPECIAL_TOKENS = {"parse": False, "text": True}


@dataclasses.dataclass(eq=False, repr=False)
class CrossEncoder(Reranker):
    """Rerank by a cross-encoder that reads each (query, passage) pair: `score(q, d) = w . h_[CLS] + b`.

    In this formula of Rank-DistiLLM, `h_[CLS]` is the encoder's last hidden state at the token [CLS]. `w` and `b` are
    the weights of the scoring head. A sequence classifier of transformers may have another scoring head.

    Args:
        model: hub id or folder of a checkpoint. The checkpoint is a cross-encoder of lightning-ir or a sequence
            classifier of transformers. A cross-encoder of lightning-ir is an ELECTRA or BERT, such as
            `webis/monoelectra-base` or `webis/monoelectra-large`. All of lightning-ir's formats since 2024 are
            supported. A sequence classifier of transformers has one or two labels. With one label, the score is the
            logit of this label. With two labels, the score is the logit of the second label minus the logit of the
            first. A sequence classifier is used with its own tokenizer, token types and default prompt, as in
            sentence-transformers. A folder that `save` wrote can be given, too. Code inside a checkpoint is never run.
        query_length: maximum length of a query in tokens. None takes the maximum that the checkpoint records. If the
            checkpoint records no maximum, the maximum is 32 for a cross-encoder of lightning-ir, and there is none for
            a sequence classifier.
        doc_length: maximum length of a passage in tokens. None takes the maximum that the checkpoint records. If the
            checkpoint records no maximum, the maximum is 256 for a cross-encoder of lightning-ir, and there is none for
            a sequence classifier. If a query and a passage together exceed the model's maximum input length, the longer
            of the two texts is truncated first, as in sentence-transformers. If the passage is truncated in more than
            half of the query-passage pairs of a call, a warning appears. With `verbose`, the progress bar shows the
            number of pairs with a truncated passage.
        special_tokens: how the characters of a special token, such as [SEP], are read inside a query or passage.
            "parse" reads these characters as a control token, as lightning-ir does. "text" reads them as plain
            characters; choose "text" for untrusted queries or passages.
        revision: a branch, tag or commit of the model on the hub; None takes the main branch.
        text_field: name of the column with the texts of the passages.
        max_tokens: maximum number of tokens in a batch, including padding. None is 1,024 on a CPU and 16,384 on a GPU.
            If a batch does not fit into memory, the maximum is halved for the rest of the call, and the batch is
            computed again.
        device: device of the model, such as "cpu" or "cuda:1"; None takes the first CUDA GPU, else Apple's GPU (mps),
            else the CPU.
        dtype: data type of the weights, such as "float32" or "bfloat16"; None is bfloat16 on a CUDA GPU that supports
            bfloat16, else float32.
        verbose: show a progress bar.

    `CrossEncoder.from_backbone("google/electra-base-discriminator")` creates an untrained cross-encoder: an ELECTRA or
    BERT with a new scoring head. From a ModernBERT, DeBERTa, RoBERTa, XLM-R, DistilBERT or another encoder,
    `from_backbone` creates a sequence classifier of transformers.

    The score of a query-passage pair depends on this pair alone, so the scores can be cached with
    `pyterrier_caching.ScorerCache`. Passages with equal scores keep their incoming order. For a checkpoint of
    lightning-ir, the scores equal those that lightning-ir computes. Source: Schlatt et al., Rank-DistiLLM, ECIR 2025.
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
        """Score the passages of Q queries.

        columns: column name -> a list per query, with one value per passage, such as {"docno": [["d1", "d2"], ["d7"]]}.
        Returns a dict with one entry, `score`: Q lists with one score per passage. Identical query-passage pairs are
        scored only once.
        """
        self.option("special_tokens", SPECIAL_TOKENS)  # raises ValueError before the checkpoint is loaded
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
        """The scores of P query-passage pairs, in the form that sentence-transformers' CrossEncoder.predict returns.

        pairs: a list of P (query, passage) tuples, or a single (query, passage) tuple; each query and each passage is a
        text. Returns a float32 array (P,), or a number for a single tuple. The scores are logits: no sigmoid is
        applied. Raises the same errors as `score`.

        The other rerankers do not have this method, because they score a passage together with the other passages of
        its query.
        """
        if pairs and isinstance(pairs[0], str):
            return self.predict([cast(tuple[str, str], pairs)])[0]
        queries, passages = zip(*pairs, strict=True) if pairs else ((), ())
        scores = self.score(list(queries), [[passage] for passage in passages])
        return torch.tensor(scores, dtype=torch.float32).reshape(-1).numpy()

    def quantize(self, frame: pd.DataFrame, n_pairs: int = 64) -> "CrossEncoder":
        """Return this reranker in int8. On a CPU with VNNI instructions, int8 is faster than float32.

        NNCF quantises the weights and the activations of the network, and OpenVINO computes the scores. Quantisation
        takes some 10 seconds for a model of MiniLM's size, and longer for a larger model. The scores and the rankings
        differ slightly from those in float32. The returned reranker runs only on a CPU. It can be saved and loaded like
        any CrossEncoder, but it cannot be trained.

        Args:
            frame: candidates, one row per query-passage pair, with a column `query` and with the column of the texts
                that `text_field` names. The ranges of the activations are measured on these pairs, so take candidates
                from the collection that you will rerank.
            n_pairs: number of rows of `frame` to use. The rows are drawn at random with a fixed seed.

        OpenVINO and NNCF send anonymous usage data to their authors, unless you run `opt_in_out --opt_out` once.

        Raises ImportError if OpenVINO or NNCF (the package's extra `int8`) is not installed, and TypeError if a query
        or passage is not a string. Raises ValueError if `frame` lacks one of the two columns or has no rows, or if
        `n_pairs` is less than 1. Also raises ValueError if the encoder is not a BERT, CamemBERT, ELECTRA, RoBERTa or
        XLM-R, or if this reranker is in int8 already.
        """
        drawn = sampled(frame, ["query", *self.text_column()], n_pairs)
        queries, passages = (
            texts(f"the {name} of the frame", given) for name, given in zip(("query", "text"), drawn, strict=True)
        )
        device = choose_device(self.device)
        as_it_is = device.type == "cpu" and choose_dtype(self.dtype, device) == torch.float32
        exact = self if as_it_is else self.apply_attributes(device="cpu", dtype=None)
        _, pairs = exact.pairs(list(zip(queries, passages, strict=True)))
        quantized = copy.copy(exact)
        quantized.hold(in_int8(exact.load(), pairs))
        quantized.hold_changed("in int8")
        quantized.note_training({"quantised": f"to int8, calibrated on {len(pairs)} query-passage pairs"})
        return quantized

    def pairs(self, texts: Sequence[tuple[str, str]]) -> tuple[PairLayout, list[Pair]]:
        """Tokenise and truncate P query-passage pairs.

        texts: P (query, passage) tuples of texts. Returns the `PairLayout` that joins a query and a passage into one
        input, and P tuples (token ids of the query, token ids of the passage). Each distinct text is tokenised once.
        """
        layout, pairs, _ = self.cut_pairs(texts)
        return layout, pairs

    def cut_pairs(self, texts: Sequence[tuple[str, str]]) -> tuple[PairLayout, list[Pair], int]:
        """Like `pairs`, with a third result: the number of pairs whose passage was truncated."""
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
        """The maximum length of a query and of a passage in tokens, in a dict with the keys `query_length` and
        `doc_length`.

        Each value is the reranker's argument of the same name. If the argument is None, the maximum comes from the
        checkpoint. None in the result means that there is no maximum. Raises ValueError if a length is not a positive
        whole number.
        """
        checkpoint: PairCheckpoint = self.load()
        lengths: dict[str, int | None] = {}
        for name in LENGTHS:
            own = getattr(self, name)
            lengths[name] = length = checkpoint.lengths[name] if own is None else own
            if length is not None and (not isinstance(length, int) or length < 1):
                raise ValueError(f"{name}={length!r}; wanted a positive whole number of tokens")
        return lengths

    def save(self, path: str | Path, layout: str | None = None) -> None:
        """Write the checkpoint into a folder, which the constructor accepts as `model`.

        Args:
            path: the folder, which is created if necessary.
            layout: the format of the written checkpoint. None keeps the format of the loaded checkpoint. "transformers"
                writes a sequence classifier, which sentence-transformers, Text Embeddings Inference, vLLM and ONNX
                exporters can read. The sequence classifier is an ELECTRA if the sizes of embeddings and hidden states
                differ, else a BERT. An ELECTRA gives the same scores. A BERT changes a score of 20 by 4e-5, and smaller
                scores by less.

        A model card, README.md, is written too. If the folder has a model card that `save` wrote earlier, the new card
        replaces it and keeps its license and language. Any other README.md is left as it is.

        Raises ValueError if no sequence classifier can compute the scores, as for a checkpoint in int8. Raises OSError
        if the checkpoint cannot be written; an older checkpoint in the folder is then unchanged.
        """
        if layout not in (None, "transformers"):
            raise ValueError(f"layout={layout!r}; wanted None or 'transformers'")
        checkpoint = self.load()
        self.write(path, as_classifier(checkpoint, self.lengths()) if layout == "transformers" else checkpoint)

    def saved_settings(self) -> dict[str, Any]:
        """The settings that `save` records in the checkpoint: the maximum lengths of a query and of a passage in
        tokens."""
        return self.lengths()
