"""LiT5Score: a T5 answers the query from all passages, and a passage's score is the attention that it receives.

Each passage becomes a prompt "question: ... context: ..." and is encoded separately (Fusion-in-Decoder). The decoder
attends to all prompts of the query and generates an answer. Passages that contain the answer receive more attention
than others, so training needs no relevance judgements: questions with answers are enough. Source: arXiv 2312.16098 v1,
section 3.2.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch

from pyterrier_lit.batching import inference, map_batches, padded
from pyterrier_lit.frames import Columns, not_finite
from pyterrier_lit.models.lit5 import reader, warn_of_full_prompts
from pyterrier_lit.models.t5 import EOS, FiD, T5Checkpoint, read_t5
from pyterrier_lit.reranker import Reranker


class Aggregation(NamedTuple):
    """How the attention mass of a passage's tokens, as defined in `LiT5Score`, becomes the score of the passage."""

    layers: Callable[[int], list[float]]  # number of decoder layers -> a weight for each layer; the mean weight is 1
    tokens: str  # how the masses of a passage's tokens are combined: "sum" or "amax" (their maximum)


AGGREGATIONS = {
    "mean": Aggregation(lambda n: [1.0] * n, "sum"),
    "max": Aggregation(lambda n: [1.0] * n, "amax"),
    "late": Aggregation(lambda n: [2 * (layer + 1) / (n + 1) for layer in range(n)], "sum"),
}


@dataclasses.dataclass(eq=False, repr=False)
class LiT5Score(Reranker):
    """Rerank by LiT5-Score: T5 Fusion-in-Decoder answers the query, and its cross-attention scores the passages::

        score(d) = sum over t, l, s of  a[l, t, s] / (256 * layers)
        a[l, t, s] = mean over heads of  attention weight * norm of value vector

    `a[l, t, s]` is the attention mass of token `s` in decoder layer `l` at decoding step `t`. `l` runs over all decoder
    layers. `t` runs from the start token to the position that predicts the end of the answer. `s` runs over the tokens
    in the prompt of passage `d`, except the tokens of "question: QUERY" at its start. The softmax that gives the
    attention weights is over the tokens of all prompts of the query.

    Args:
        model: hub id or folder of a LiT5-Score checkpoint: `castorini/LiT5-Score-{base,large,xl}`, or a folder that
            `save` wrote.
        n_passages: number of passages of each list that are scored, from the top of the list; 100 in the paper. The
            model reads these passages together, since one softmax is over all their tokens. It does not read them in
            windows, because scores from different windows would not be comparable. The passages below the first
            `n_passages` keep their incoming order and get the scores -1, -2, ...
        max_length: maximum length of a prompt in tokens. A longer prompt is truncated on the right, where the text of
            the passage is. None takes the maximum that the checkpoint records. If the checkpoint records none, the
            maximum is 150, as in the paper. A long query leaves less room for the passage. If no room is left, a
            warning appears.
        answer_length: maximum length of the generated answer in tokens, including the start token. None takes the
            maximum that the checkpoint records. If the checkpoint records none, the maximum is 20, as in the paper.
        aggregation: how the attention mass of a passage's tokens becomes the passage's score. "mean", as in the paper,
            sums the mass over tokens, layers and decoding steps, and divides the sum by 256 times the number of layers.
            (256 is a constant of the authors' code; it does not affect the order.) "max" is like "mean", but at each
            decoding step, the largest mass of a token in the passage replaces the sum over tokens. "late" is like
            "mean", but layer `l` of `n` layers (`l` from 1) gets the weight `2l/(n+1)`. "max" and "late" are not from
            the paper.
        answer_field: name of a new column with the generated answer. All rows of a query have the same answer. None
            adds no column.
        revision: a branch, tag or commit of the model on the hub; None takes the main branch.
        text_field: name of the column with the texts of the passages.
        max_tokens: maximum number of prompt tokens in a batch of queries. If a batch does not fit into memory, the
            maximum is halved for the rest of the call, and the batch is computed again.
        device: device of the model, such as "cpu" or "cuda:1"; None takes the first CUDA GPU, else Apple's GPU (mps),
            else the CPU.
        dtype: data type of the weights, such as "float32" or "bfloat16"; None is bfloat16 on a CUDA GPU that supports
            bfloat16, else float32.
        verbose: show a progress bar.

    `LiT5Score.from_backbone("google/t5-v1_1-base")` creates an untrained LiT5Score from a pre-trained T5 or mT5. It
    must then be trained to answer questions.

    The score of a passage depends on the other passages of the query, so do not cache scores with
    `pyterrier_caching.ScorerCache`. In float32, for lists of `n_passages` passages, the scores equal those of the
    original code, castorini/LiT5, within 1e-4. Source: arXiv 2312.16098 v1, section 3.2.
    """

    model: str = "castorini/LiT5-Score-base"
    _: dataclasses.KW_ONLY
    n_passages: int = 100
    max_length: int | None = None
    answer_length: int | None = None
    aggregation: str = "mean"
    answer_field: str | None = None
    max_tokens: int = 65_536

    schematic: ClassVar[dict[str, str]] = {"label": "LiT5-Score"}
    read = staticmethod(reader("LiT5Score"))
    begin = staticmethod(read_t5)

    def results(self, queries: list[str], columns: Columns) -> dict[str, list[Any]]:
        """Score the passages of Q queries.

        columns: column name -> a list per query, with one value per passage, such as {"docno": [["d1", "d2"], ["d7"]]}.
        Returns a dict. Its entry `score` has Q lists with one score per passage. If the argument `answer_field` is not
        None, the entry with the name `answer_field` has the generated answers to the Q queries.
        """
        if not isinstance(self.n_passages, int) or self.n_passages < 1:
            raise ValueError(f"n_passages={self.n_passages!r}; wanted a whole number, at least 1")
        aggregation = self.option("aggregation", AGGREGATIONS)
        checkpoint: T5Checkpoint = self.load()
        max_length, answer_length = self.lengths().values()
        texts = columns[self.text_field]
        heads = [f"question: {query} context:" for query in queries]
        warn_of_full_prompts(checkpoint, queries, heads, max_length)
        prompts = [self.prompts(query, passages) for query, passages in zip(queries, texts, strict=True)]
        lengths = [sum(map(len, each.ids)) for each in prompts]

        def attended(batch: list[Prompts]) -> list[Attended]:
            return attend(checkpoint, batch, aggregation, answer_length)

        with inference(), self.progress(len(prompts), "query") as bar:
            answered = map_batches(attended, prompts, lengths, self.max_tokens, bar.update)
        for query, docnos, found in zip(queries, columns["docno"], answered, strict=True):
            if found.broken != 0:
                raise not_finite(found.broken, query, docnos)
        below = [[-1.0 - i for i in range(len(passages) - self.n_passages)] for passages in texts]
        added = {"score": [found.scores + rest for found, rest in zip(answered, below, strict=True)]}
        if self.answer_field is not None:
            added[self.answer_field] = [checkpoint.pieces.decode(found.answer) for found in answered]
        return added

    def query_columns(self) -> list[str]:
        """A list with the name of the column for the generated answers. The list is empty if the argument
        `answer_field` is None."""
        return [] if self.answer_field is None else [self.answer_field]

    def saved_settings(self) -> dict[str, Any]:
        """The settings that `save` records in the checkpoint: the reranker's name, and the maximum lengths of a prompt
        and of an answer in tokens."""
        return {"reranker": "LiT5Score", "lengths": self.lengths()}

    def lengths(self) -> dict[str, int]:
        """The maximum lengths of a prompt and of an answer in tokens, in a dict with the keys `max_length` and
        `answer_length`.

        Each value is the reranker's argument of the same name. If the argument is None, the maximum is the one that the
        checkpoint records. If the checkpoint records none, the maximum is the paper's: 150 tokens for a prompt and 20
        for an answer.
        """
        checkpoint: T5Checkpoint = self.load()
        return {
            "max_length": checkpoint.length("max_length", self.max_length, 150),
            "answer_length": checkpoint.length("answer_length", self.answer_length, 20, least=2),
        }

    def prompts(self, query: str, passages: list[str]) -> "Prompts":
        """The prompts for the first `n_passages` passages of a query. passages: the texts of all passages of the query.

        Each prompt has at most `max_length` tokens, including </s> at the end.
        """
        pieces_of, length = self.load().pieces, self.lengths()["max_length"]
        texts = [f"question: {query} context: {passage}" for passage in passages[: self.n_passages]]
        question, *pieces = pieces_of([f"question: {query}", *texts])
        return Prompts([[*ids[: length - 1], EOS] for ids in pieces], min(len(question), length))


class Prompts(NamedTuple):
    """The prompts of a query's passages."""

    ids: list[list[int]]  # the token ids of each prompt
    question: int  # number of tokens of "question: QUERY" at the start of each prompt


class Attended(NamedTuple):
    """What the model returns for one query."""

    scores: list[float]  # one score for each passage
    answer: list[int]  # the token ids of the answer, without EOS
    broken: float  # 0 if all logits were finite, else nan or an infinity


def attend(
    checkpoint: T5Checkpoint, prompts: list[Prompts], aggregation: Aggregation, answer_length: int
) -> list[Attended]:
    """Generate the answers to B queries, and score each passage by the sum of its attention mass over all decoding
    steps.

    Args:
        prompts: the prompts of each query.
        aggregation: how the attention mass of a passage's tokens becomes its score.
        answer_length: maximum length of an answer in tokens, including the start token.

    The original code stores the attention mass of every token at every step in every layer: (layers, T, S) for T steps
    and S tokens. This function stores only one sum per passage, (B, P) for at most P passages per query, and returns
    the same scores.
    """
    fid = FiD(checkpoint.network)
    memory = fid.read_prompts([each.ids for each in prompts], answer_length, mass=True)
    n_layers, most = len(memory.keys), max(len(each.ids) for each in prompts)
    weights = aggregation.layers(n_layers)
    owner = _owners(prompts, most).to(fid.device)  # (B, S): the index of each token's passage, or `most`
    total, written, broken = torch.zeros(len(prompts), most, dtype=torch.float32, device=fid.device), [], []
    for ids, unfinished, not_finite_now, mass in fid.greedy(memory, answer_length):
        step = sum((weight * layer for weight, layer in zip(weights, mass, strict=True)), total.new_zeros(()))
        drawn = step.new_zeros(len(prompts), most + 1).scatter_reduce_(1, owner, step, aggregation.tokens)[:, :most]
        total += drawn * unfinished[:, None]
        written.append(ids)
        broken.append(not_finite_now)
    rows = zip(
        prompts,
        (total / (256 * n_layers)).tolist(),
        torch.stack(written, 1).tolist(),
        torch.stack(broken).sum(0).tolist(),
        strict=True,
    )
    return [
        Attended(scores[: len(each.ids)], answer[: answer.index(EOS)] if EOS in answer else answer, value)
        for each, scores, answer, value in rows
    ]


def _owners(prompts: list[Prompts], nobody: int) -> torch.Tensor:
    """For each token of the prompts, the index of its passage, as a tensor (B, S). For the tokens of "question: QUERY"
    and for padding, the index is `nobody`."""
    rows = [
        [passage if at >= each.question else nobody for passage, ids in enumerate(each.ids) for at in range(len(ids))]
        for each in prompts
    ]
    return padded(rows, nobody)[0]
