"""Training of RankMistral: it learns to generate the teacher's order of a window of passages.

A training example is a window of passages from a query's list. The language model reads the texts of the passages in
one prompt and learns to generate the answer. The answer is a target ranking string, such as "[4] > [2] > [1] > [3]". As
in instruction tuning, the loss is the cross-entropy of the answer's tokens, including the end token. RankMistral is a
baseline of PE-Rank's authors, who have published no recipe for this baseline. The hyperparameters used here are those
of PE-Rank's stage 2.
"""

import dataclasses
import random
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from pyterrier_lit.batching import padded
from pyterrier_lit.frames import Ranking
from pyterrier_lit.models.pe_prompts import TextPrompter
from pyterrier_lit.models.text_lm import TextCheckpoint
from pyterrier_lit.rank_mistral import RankMistral
from pyterrier_lit.training.data import take, uneven, window
from pyterrier_lit.training.trainer import Objective, Recipe, device_of, enable_gradient_checkpointing


@dataclasses.dataclass(frozen=True)
class TextRankingRecipe(Recipe):
    """A recipe for RankMistral. A training example is a window of passages, sampled from a query's list.

    Args:
        smallest: the smallest number of passages in a window. None is the same as `largest`.
        largest: the largest number of passages in a window. None is the student's window size.
        shuffle: the probability that a window is shuffled. A window that is not shuffled keeps the order of the first
            stage.
        max_length: maximum tokens of a prompt and its answer together.

    The fields of `trainer.Recipe` are accepted, too.
    """

    smallest: int | None = None
    largest: int | None = None
    shuffle: float = 0.5
    max_length: int = 4096

    def objective(self, student: RankMistral) -> Objective:
        """Return the training objective: the cross-entropy of the target ranking string."""
        return objective(student, self)


RECIPES: dict[str, Recipe] = {
    "rank-mistral": TextRankingRecipe(
        2e-5, batch_size=32, warmup=0.03, schedule="cosine", weight_decay=0.0, clip=1.0, checkpointing=True
    ),
}
FINE_TUNE = DISTIL = "rank-mistral"  # the default recipe for labels and for a teacher's ranking


class Conversation(NamedTuple):
    """A prompt with its answer: their token ids, and the position of the answer's first token (from 0)."""

    ids: list[int]
    start: int


def objective(student: RankMistral, recipe: TextRankingRecipe) -> Objective:
    """Return the training objective of a RankMistral for a recipe."""
    checkpoint: TextCheckpoint = student.load()
    checkpoint.network.requires_grad_(True)
    if recipe.checkpointing:
        enable_gradient_checkpointing(checkpoint.network)
    return Objective(
        network=checkpoint.network,
        column_sets=[{student.text_field: str, "target": float}],
        prepare=uneven,
        sample=partial(sample_window, checkpoint.prompter, recipe, student.text_field, student.window_size),
        collate=list,
        loss=partial(answer_loss, checkpoint),
    )


def sample_window(
    prompter: TextPrompter, recipe: TextRankingRecipe, text_field: str, size: int, given: Ranking, rng: random.Random
) -> Conversation:
    """Sample a window of passages from a list. Return a training example: the prompt with the texts of these passages,
    and the answer, which is the target ranking string. `size` is the student's window size, in passages.

    Raises ValueError if the prompt with the answer has more than the recipe's max_length tokens.
    """
    largest = recipe.largest or size
    shown, order = window(given.columns["target"], recipe.smallest or largest, largest, recipe.shuffle, rng)
    texts = take(given.columns[text_field], shown)
    ids, start = prompter.answered(prompter.messages(given.query, texts), prompter.answer(order))
    if len(ids) > recipe.max_length:
        raise ValueError(
            f"the prompt for query {given.query!r} with {len(shown)} passages and its answer have {len(ids)} tokens;"
            f" wanted at most {recipe.max_length}: truncate the texts, or use fewer passages (largest=)"
        )
    return Conversation(ids, start)


def answer_loss(checkpoint: TextCheckpoint, batch: list[Conversation]) -> torch.Tensor:
    """Return the mean of -log p(token) over the tokens of all answers, a scalar tensor."""
    network, device = checkpoint.network, device_of(checkpoint.network)
    ids, mask = (tensor.to(device) for tensor in padded([row.ids for row in batch]))
    starts = torch.tensor([row.start for row in batch], device=device)[:, None]
    answer = mask[:, 1:] & (torch.arange(1, ids.shape[1], device=device) >= starts)
    states = network.body(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
    head: Any = network.model.get_output_embeddings()
    return F.cross_entropy(head(states[:, :-1][answer]).float(), ids[:, 1:][answer])
