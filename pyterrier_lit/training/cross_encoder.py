"""Training of CrossEncoder: it learns to order a query's passages, from labels or from a teacher.

A training example is a query with some of its passages. Each passage has a target: its label in the qrels, or its score
from a teacher. The network scores each query-passage pair, and a loss compares the scores with the targets.
Rank-DistiLLM (arXiv 2405.07920) trains in two stages. In stage 1, the student learns from labels with the loss "lce".
Each example has one relevant passage and several passages that are not relevant. In stage 2, the student learns from
the rankings of a large language model with the loss "ranknet". This loss compares all pairs of passages in a ranking.
"""

import dataclasses
import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from pyterrier_lit.batching import encoder_tokens, like_lengths, padded
from pyterrier_lit.cross_encoder import CrossEncoder
from pyterrier_lit.frames import Ranking
from pyterrier_lit.models.int8 import Int8Scorer
from pyterrier_lit.models.pair_encoder import PairCheckpoint
from pyterrier_lit.models.pairs import Pair, PairLayout
from pyterrier_lit.training import losses
from pyterrier_lit.training.data import sample, take, uneven
from pyterrier_lit.training.trainer import Objective, Recipe, enable_gradient_checkpointing

LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "lce": losses.lce,
    "ranknet": losses.ranknet,
    "adr_mse": losses.adr_mse,
    "kl": losses.kl,
    "margin_mse": losses.margin_mse,
    "mse": losses.mse,
    "list_mle": losses.list_mle,
}


@dataclasses.dataclass(frozen=True)
class PairRecipe(Recipe):
    """A recipe for CrossEncoder. A training example is a query with some of its passages.

    Args:
        loss: "lce", "ranknet", "adr_mse", "kl", "margin_mse", "mse" or "list_mle"; see `training.losses`.
        loss_options: further arguments of the loss, such as {"temperature": 0.05}.
        n_passages: how many of the query's passages are sampled for a training example. None takes all passages. With
            the sampling "single_relevant", None takes one passage with a positive target and all passages without a
            positive target.
        sampling: how the passages are sampled. "top" takes the first passages of the ranking. "random" samples
            uniformly. "top_and_random" takes the first n_passages / 2 passages, and samples the same number of the
            later passages uniformly. "log_random" samples the passage at rank r = 1, 2, ... with weight 1 / log(1 + r).
            "single_relevant" samples one passage with a positive target, and n_passages - 1 passages without a positive
            target. If no passage of a query has a positive target, for example because the targets are negative ranks,
            "single_relevant" raises ValueError.
        max_tokens: maximum tokens, including padding, in one forward pass. None is 1,024 on a CPU and 16,384 on a GPU.

    The fields of `trainer.Recipe` are accepted, too.
    """

    loss: str = "ranknet"
    loss_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    n_passages: int | None = None
    sampling: str = "top"
    max_tokens: int | None = None

    def objective(self, student: CrossEncoder) -> Objective:
        """Return the training objective: the recipe's loss over the scores of a query's passages. Raises ValueError if
        the loss is unknown, or if the student is in int8."""
        return objective(student, self)


RECIPES: dict[str, Recipe] = {
    # Source: Rank-DistiLLM, appendix C, and its authors' configurations. The authors use AdamW with learning rate 1e-5,
    # weight decay 0.01 on all parameters, no warm-up, and no learning rate schedule
    "rank-distillm-labels": PairRecipe(
        1e-5, steps=20_000, loss="lce", n_passages=8, sampling="single_relevant", micro_batch=8
    ),
    "rank-distillm-rankings": PairRecipe(1e-5, epochs=3, loss="ranknet"),
}
# The default recipes for learning from labels and from a teacher's ranking
FINE_TUNE, DISTIL = "rank-distillm-labels", "rank-distillm-rankings"


class Example(NamedTuple):
    """A query, some of its passages, and the target of each of these passages."""

    query: str
    passages: list[str]
    targets: list[float]


class PairBatch(NamedTuple):
    """The tokenised query-passage pairs of Q queries, grouped by query, and the targets of each query's passages."""

    pairs: list[Pair]
    targets: list[list[float]]


def objective(student: CrossEncoder, recipe: PairRecipe) -> Objective:
    """Return the training objective of a CrossEncoder for a recipe. Raises ValueError if the loss is unknown, or if the
    student is in int8."""
    checkpoint: PairCheckpoint = student.load()
    if isinstance(checkpoint.network, Int8Scorer):
        raise ValueError("a reranker in int8 cannot be trained; train it in float32, and quantize it after that")
    if recipe.loss not in LOSSES:
        raise ValueError(f"loss={recipe.loss!r}; wanted one of {', '.join(map(repr, LOSSES))}")
    if recipe.checkpointing:
        enable_gradient_checkpointing(checkpoint.network)
    layout, _ = student.pairs([])
    return Objective(
        network=checkpoint.network,
        column_sets=[{student.text_field: str, "target": float}],
        prepare=uneven,
        sample=partial(sample_passages, student.text_field, recipe),
        collate=partial(collate, student),
        loss=partial(loss, checkpoint, layout, recipe),
    )


def sample_passages(text_field: str, recipe: PairRecipe, given: Ranking, rng: random.Random) -> Example:
    """Sample some of a query's passages, and return them as a training example. The recipe's `n_passages` and
    `sampling` determine the sample."""
    passages, targets = given.columns[text_field], given.columns["target"]
    positions = sample(targets, recipe.n_passages, recipe.sampling, rng)
    return Example(given.query, take(passages, positions), [targets[i] for i in positions])


def collate(student: CrossEncoder, examples: list[Example]) -> PairBatch:
    """Tokenise Q examples, and return them as a batch."""
    _, pairs = student.pairs([(example.query, passage) for example in examples for passage in example.passages])
    return PairBatch(pairs, [example.targets for example in examples])


def loss(checkpoint: PairCheckpoint, layout: PairLayout, recipe: PairRecipe, batch: PairBatch) -> torch.Tensor:
    """Return the recipe's loss for Q queries, a scalar tensor. The loss compares the scores with the targets. Both are
    tensors (Q, N), where N is the largest number of passages of a query."""
    counts = [len(targets) for targets in batch.targets]
    scores = pad_sequence(
        list(score(checkpoint, layout, batch.pairs, recipe.max_tokens).split(counts)), batch_first=True
    )
    targets = pad_sequence([torch.tensor(targets) for targets in batch.targets], batch_first=True)
    _, mask = padded([range(count) for count in counts])
    return LOSSES[recipe.loss](scores, targets.to(checkpoint.device), mask.to(checkpoint.device), **recipe.loss_options)


def score(checkpoint: PairCheckpoint, layout: PairLayout, pairs: list[Pair], max_tokens: int | None) -> torch.Tensor:
    """Return the scores (P,) of P query-passage pairs, in the order of the pairs. The scores are computed in batches of
    pairs with similar lengths. A batch has at most `max_tokens` tokens, including padding. None is 1,024 on a CPU and
    16,384 on a GPU."""
    lengths = [layout.length(pair) for pair in pairs]
    parts = list(like_lengths(lengths, max_tokens or encoder_tokens(checkpoint.device)))
    computed = torch.cat(
        [checkpoint.scores(layout.tensors([pairs[i] for i in part], checkpoint.pad_id)) for part in parts]
    )
    positions = torch.tensor([i for part in parts for i in part], device=checkpoint.device)
    return torch.zeros_like(computed).index_copy(0, positions, computed)
