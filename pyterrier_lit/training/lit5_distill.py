"""How a LiT5Distill learns: windows of a teacher's ranking, their passages in changing orders, and the identifiers best first as text."""

import dataclasses
import random
from collections.abc import Sequence
from typing import NamedTuple

from pyterrier_lit.frames import Ranking
from pyterrier_lit.lit5_distill import LiT5Distill
from pyterrier_lit.models.t5 import EOS
from pyterrier_lit.training.data import uneven, window
from pyterrier_lit.training.fid import AnswerObjective, Read
from pyterrier_lit.training.trainer import Recipe


@dataclasses.dataclass(frozen=True)
class WindowRecipe(Recipe):
    """A LiT5Distill's recipe: an example is a window drawn from a list. The paper varies its size and order and gives no distribution.

    Args:
        smallest, largest: passages of a window; None for largest is the student's window size.
        shuffle: the probability that a window's passages stand in any order, in place of the first stage's.
        decay: of the loss from one token to the next.
        dropout: of the T5.
        max_tokens: what the encoder reads at once; None: by the device.
    """

    smallest: int = 2
    largest: int | None = None
    shuffle: float = 0.5
    decay: float = 0.95
    dropout: float = 0.1
    checkpointing: bool = True
    max_tokens: int | None = None

    def objective(self, student: LiT5Distill) -> "OrderObjective":
        """The cross-entropy of the order as text."""
        return OrderObjective(student, self)


RECIPES: dict[str, Recipe] = {
    # LiT and Lean, ECIR 2025, section 3; the number of epochs is not given: the best on development queries was taken
    "lit5-distill-v2": WindowRecipe(5e-5, batch_size=64, epochs=10, warmup=100, schedule="linear", weight_decay=0.0),
}
FINE_TUNE = DISTIL = "lit5-distill-v2"


class Window(NamedTuple):
    """A query, passages as they are shown, and the positions of these best first."""

    query: str
    passages: list[str]
    order: list[int]


class OrderObjective(AnswerObjective):
    """The text "3 1 2" for a window whose third passage is the best."""

    def __init__(self, student: LiT5Distill, recipe: WindowRecipe):
        super().__init__(student.loaded(), recipe.dropout, recipe.decay, recipe.max_tokens)
        self.student, self.recipe = student, recipe
        self.largest = recipe.largest or student.window()[0]
        self.ways: list[dict[str, type]] = [{student.text_field: str, "target": float}]
        if not 2 <= recipe.smallest <= self.largest:
            raise ValueError(
                f"windows of {recipe.smallest} to {self.largest} passages; wanted 2 <= smallest <= largest"
            )

    def prepare(self, lists: Sequence[Ranking]) -> list[Ranking]:
        """The lists that say which passage is better."""
        return uneven(lists)

    def draw(self, given: Ranking, chosen: random.Random) -> Window:
        """A window of some passages of a list."""
        recipe, passages = self.recipe, given.columns[self.student.text_field]
        shown, order = window(given.columns["target"], recipe.smallest, self.largest, recipe.shuffle, chosen)
        return Window(given.query, [passages[i] for i in shown], order)

    def read(self, example: Window) -> Read:
        """The prompts of a window and its order as text, in ids."""
        identifiers = " ".join(str(position + 1) for position in example.order)
        return self.student.prompts(example.query, example.passages), [*self.t5.pieces([identifiers])[0], EOS]
