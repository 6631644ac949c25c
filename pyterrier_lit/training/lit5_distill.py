"""How a LiT5Distill learns: to write the order of a window of passages as its teacher would.

An example is a window of passages from a teacher's ranking. The student reads the passages with their identifiers, and
learns to write the identifiers best first, such as "3 1 2". So that it neither counts on a certain number of passages
nor on the order in which they come, the windows vary in size and, some of them, have their passages shuffled. Early
tokens weigh more in the loss, as they name the best passages. Source: LiT and Lean, ECIR 2025; arXiv 2312.16098.
"""

import dataclasses
import random
from functools import partial
from typing import NamedTuple

from pyterrier_lit.frames import Ranking
from pyterrier_lit.lit5_distill import LiT5Distill
from pyterrier_lit.models.t5 import EOS, T5Checkpoint
from pyterrier_lit.training.data import uneven, window
from pyterrier_lit.training.fid import FiDRecipe, PromptsAndAnswer, answer_loss, collate, set_dropout
from pyterrier_lit.training.trainer import Objective, Recipe


@dataclasses.dataclass(frozen=True)
class WindowRecipe(FiDRecipe):
    """A LiT5Distill's recipe: an example is a window sampled from a list. The paper varies the windows' size and order,
    and does not say by which distributions.

    Args:
        smallest, largest: passages of a window; None for largest is the student's window size.
        shuffle: the probability that the passages of a window are shuffled; else they keep the first stage's order.
        decay: how much a token weighs in the loss relative to the token before it.
        dropout, max_tokens: see `training.fid.FiDRecipe`.
    """

    smallest: int = 2
    largest: int | None = None
    shuffle: float = 0.5
    decay: float = 0.95

    def objective(self, student: LiT5Distill) -> Objective:
        """The cross-entropy of the order as text. Raises ValueError for sizes of windows that cannot be."""
        return objective(student, self)


RECIPES: dict[str, Recipe] = {
    # LiT and Lean, section 3, which does not give the number of epochs: the best on development queries was taken
    "lit5-distill-v2": WindowRecipe(5e-5, batch_size=64, epochs=10, warmup=100, schedule="linear", weight_decay=0.0),
}
FINE_TUNE = DISTIL = "lit5-distill-v2"  # the recipe taken when none is named


class OrderExample(NamedTuple):
    """A query, passages in the order in which the student reads them, and their positions best first."""

    query: str
    passages: list[str]
    order: list[int]


def objective(student: LiT5Distill, recipe: WindowRecipe) -> Objective:
    """What a LiT5Distill learns by a recipe."""
    t5: T5Checkpoint = student.load()
    largest = recipe.largest or student.window()[0]
    if not 2 <= recipe.smallest <= largest:
        raise ValueError(f"windows of {recipe.smallest} to {largest} passages; wanted 2 <= smallest <= largest")
    set_dropout(t5.network, recipe.dropout)
    return Objective(
        network=t5.network.requires_grad_(True),
        column_sets=[{student.text_field: str, "target": float}],
        prepare=uneven,
        sample=partial(sample_window, student.text_field, recipe, largest),
        collate=partial(collate, partial(read, student)),
        loss=partial(answer_loss, t5, recipe.decay, recipe.max_tokens, recipe.checkpointing),
    )


def sample_window(
    text_field: str, recipe: WindowRecipe, largest: int, given: Ranking, rng: random.Random
) -> OrderExample:
    """A window of some passages of a list."""
    shown, order = window(given.columns["target"], recipe.smallest, largest, recipe.shuffle, rng)
    return OrderExample(given.query, [given.columns[text_field][i] for i in shown], order)


def read(student: LiT5Distill, example: OrderExample) -> PromptsAndAnswer:
    """The prompts of a window's passages, and its order as text, in ids."""
    identifiers = " ".join(str(position + 1) for position in example.order)
    return student.prompts(example.query, example.passages), [*student.load().pieces([identifiers])[0], EOS]
