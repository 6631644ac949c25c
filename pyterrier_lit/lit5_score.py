"""LiT5Score: a T5 answers the query from all passages; the attention that a passage draws is its score."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pandas as pd
import torch

from pyterrier_lit.batching import map_batches
from pyterrier_lit.frames import rerank
from pyterrier_lit.models.checkpoints import T5, choose_device, choose_dtype, fetch, read_t5, write
from pyterrier_lit.models.t5 import EOS, FiD
from pyterrier_lit.reranker import Reranker


class Aggregation(NamedTuple):
    """How attention mass becomes a passage's score."""

    layers: Callable[[int], list[float]]  # number of layers -> a weight for each, 1 on average
    tokens: str  # over the passage's tokens: "sum" or "amax"


AGGREGATIONS = {
    "mean": Aggregation(lambda n: [1.0] * n, "sum"),
    "max": Aggregation(lambda n: [1.0] * n, "amax"),
    "late": Aggregation(lambda n: [2 * (layer + 1) / (n + 1) for layer in range(n)], "sum"),
}


class LiT5Score(Reranker):
    """Rerank by LiT5-Score: T5 Fusion-in-Decoder answers the query, and its cross-attention tells where it looked::

        score(d) = sum over answer positions t, layers l, tokens s of d of  a[l, t, s]  / (256 * layers)
        a[l, t, s] = mean over heads of  attention weight (softmax over all passages) * length of the value vector

    t runs from the start token to the position that predicts the end of the answer; s leaves out the query, which each
    prompt repeats.

    Args:
        model: hub id or folder: `castorini/LiT5-Score-{base,large,xl}`, or what `save` wrote.
        n_passages: the first that are read together, the paper's 100. All passages of a query share one attention, so scores
            of separate windows could not be compared: what lies below stays there in its incoming order, scored -1, -2, ...
        max_length: tokens of a prompt, cut on the right; None takes what the checkpoint records, else the paper's 150.
        answer_length: tokens of the answer with its start token; None takes what the checkpoint records, else the paper's 20.
        aggregation: "mean" is the paper's, as above; "max" takes the largest sum over layers among a passage's tokens in
            place of their sum; "late" weighs layer l of n (from 1) by 2 l / (n + 1). The latter two are ours.
        answer_field: a column for the answer that was written, the same in all rows of a query; None adds none.
        text_field: the column with the passages.
        max_tokens: prompt tokens of the queries that are read and answered together. When memory runs out it is halved.
        device: None is the first GPU, else the CPU.
        dtype: None is bfloat16 on a GPU that has it, else float32.
        verbose: show a progress bar.

    Although each passage gets a score of its own, it depends on the others: `pyterrier_caching.ScorerCache` is not safe.
    Source: arXiv 2312.16098 v1, section 3.2; in float32 equal to castorini/LiT5 within 1e-4 for lists that are full.
    """

    schematic: ClassVar[dict[str, str]] = {"label": "LiT5-Score"}

    def __init__(
        self,
        model: str = "castorini/LiT5-Score-base",
        *,
        n_passages: int = 100,
        max_length: int | None = None,
        answer_length: int | None = None,
        aggregation: str = "mean",
        answer_field: str | None = None,
        text_field: str = "text",
        max_tokens: int = 65_536,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        verbose: bool = False,
    ):
        self.model = model
        self.n_passages = n_passages
        self.max_length = max_length
        self.answer_length = answer_length
        self.aggregation = aggregation
        self.answer_field = answer_field
        self.text_field = text_field
        self.max_tokens = max_tokens
        self.device = device
        self.dtype = dtype
        self.verbose = verbose

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """The same rows with the model's score and the rank that follows. See `frames.rerank` for what is raised."""
        if self.answer_field is None:
            return rerank(inp, self.score, self.text_field, context=self)
        return rerank(inp, self.score_and_answer, self.text_field, context=self, query_columns=[self.answer_field])

    def score(self, queries: list[str], passages: list[list[str]]) -> list[list[float]]:
        """The score of every passage of every query: Q queries, Q lists of passages -> Q lists of scores."""
        return self.score_and_answer(queries, passages)[0]

    def score_and_answer(self, queries: list[str], passages: list[list[str]]) -> tuple[list[list[float]], list[str]]:
        """Q queries, Q lists of passages -> Q lists of scores, Q answers."""
        if not isinstance(self.n_passages, int) or self.n_passages < 1:
            raise ValueError(f"n_passages={self.n_passages!r}; wanted a whole number, at least 1")
        if self.aggregation not in AGGREGATIONS:
            raise ValueError(f"aggregation={self.aggregation!r}; wanted one of {', '.join(map(repr, AGGREGATIONS))}")
        t5, aggregation = self.loaded(), AGGREGATIONS[self.aggregation]
        answer_length = self.lengths()["answer_length"]
        lists = [self.read(query, ranking) for query, ranking in zip(queries, passages, strict=True)]
        lengths = [sum(map(len, read.prompts)) for read in lists]
        with torch.inference_mode(), self.progress(len(lists), "query") as bar:
            answered = map_batches(
                lambda batch: attend(t5, batch, aggregation, answer_length),
                lists,
                lengths,
                self.max_tokens,
                bar.update,
            )
        below = [[-1.0 - i for i in range(len(ranking) - self.n_passages)] for ranking in passages]
        return [found.scores + rest for found, rest in zip(answered, below, strict=True)], [
            t5.pieces.decode(found.answer) for found in answered
        ]

    def load(self) -> T5:
        """Read the checkpoint: FileNotFoundError or ValueError says what is missing, damaged or of another kind."""
        device = choose_device(self.device)
        return read_t5(fetch(self.model), device, choose_dtype(self.dtype, device))

    def save(self, path: str | Path) -> None:
        """Write a folder that the constructor loads again, with the lengths of prompts and of answers."""
        t5, lengths = self.loaded(), self.lengths()
        write(path, lambda folder: t5.save(folder, lengths=lengths))

    @classmethod
    def from_backbone(cls, name: str, **arguments: Any) -> "LiT5Score":
        """An untrained LiT5: a T5 as it was pre-trained.

        Args:
            name: hub id or folder, such as "google/t5-v1_1-base".
            arguments: those of the constructor.
        """
        return cls(name, **arguments)

    def lengths(self) -> dict[str, int]:
        """Tokens of a prompt and of an answer: the caller's, else the checkpoint's, else the paper's."""
        t5 = self.loaded()
        return {
            "max_length": t5.length("max_length", self.max_length, 150),
            "answer_length": t5.length("answer_length", self.answer_length, 20, least=2),
        }

    def read(self, query: str, passages: list[str]) -> "Asked":
        """The prompts of a query's first `n_passages` passages, at most `max_length` ids each with </s> at the end."""
        pieces_of, length = self.loaded().pieces, self.lengths()["max_length"]
        texts = [f"question: {query} context: {passage}" for passage in passages[: self.n_passages]]
        question, *pieces = pieces_of([f"question: {query}", *texts])
        prompts = [[*ids[: length - 1], EOS] for ids in pieces]
        return Asked(prompts, min(len(question), length), query)


class Asked(NamedTuple):
    """The prompts of a query's passages, how many tokens at the start of each are the query's, and the query itself."""

    prompts: list[list[int]]
    question: int
    query: str


class Answered(NamedTuple):
    """The scores of a query's passages, and the answer's tokens without the end."""

    scores: list[float]
    answer: list[int]


def attend(t5: T5, asked: list[Asked], aggregation: Aggregation, answer_length: int) -> list[Answered]:
    """Answer B queries together and add up, step by step, the attention that each passage draws.

    Equal to the reference, which keeps all of [layers, T, S] and reads its last step; here memory is [B, P].
    """
    fid = FiD(t5.network, t5.tied)
    memory = fid.read_prompts([query.prompts for query in asked], answer_length, watch=True)
    n_layers, most = len(memory.keys), max(len(query.prompts) for query in asked)
    weights = aggregation.layers(n_layers)
    owner = _owners(asked, most).to(fid.device)  # (B, S): the passage of each token, `most` for what does not count
    total, written = torch.zeros(len(asked), most, device=fid.device), []
    for ids, unfinished, mass in fid.greedy(memory, answer_length, [each.query for each in asked]):
        step = sum((weight * layer for weight, layer in zip(weights, mass, strict=True)), total.new_zeros(()))
        drawn = step.new_zeros(len(asked), most + 1).scatter_reduce_(1, owner, step, aggregation.tokens)[:, :most]
        total += drawn * unfinished[:, None]
        written.append(ids)
    scores = (total / (256 * n_layers)).tolist()
    answers = torch.stack(written, 1).tolist()
    return [
        Answered(row[: len(query.prompts)], answer[: answer.index(EOS)] if EOS in answer else answer)
        for query, row, answer in zip(asked, scores, answers, strict=True)
    ]


def _owners(asked: list[Asked], nobody: int) -> torch.Tensor:
    rows = [
        [
            passage if at >= query.question else nobody
            for passage, ids in enumerate(query.prompts)
            for at in range(len(ids))
        ]
        for query in asked
    ]
    longest = max(map(len, rows))
    return torch.tensor([row + [nobody] * (longest - len(row)) for row in rows])
