"""How a LiT5Score learns: to answer questions from passages. No passage is ever said to be relevant."""

import dataclasses
import random
from collections.abc import Sequence
from typing import NamedTuple

from pyterrier_lit.frames import Ranking
from pyterrier_lit.lit5_score import LiT5Score
from pyterrier_lit.models.t5 import EOS
from pyterrier_lit.training.fid import AnswerObjective, Read
from pyterrier_lit.training.trainer import Recipe


@dataclasses.dataclass(frozen=True)
class AnswerRecipe(Recipe):
    """A LiT5Score's recipe: an example is a question with the first passages of its list and one of its answers.

    Args:
        n_passages: how many; None: as many as the student reads.
        dropout: of the T5.
        max_tokens: what the encoder reads at once; None: by the device.
    """

    n_passages: int | None = None
    dropout: float = 0.1
    checkpointing: bool = True
    max_tokens: int | None = None

    def objective(self, student: LiT5Score) -> "ReaderObjective":
        """The cross-entropy of the answer."""
        return ReaderObjective(student, self)


RECIPES: dict[str, Recipe] = {
    # LiT5-Score's own is not published; this is the large reader of FiD (Izacard and Grave), from which it descends
    "fid-reader": AnswerRecipe(
        5e-5, batch_size=64, steps=15_000, warmup=1_000, schedule="linear", weight_decay=0.01, clip=1.0
    ),
}
FINE_TUNE, DISTIL = "fid-reader", None


class Question(NamedTuple):
    """A query, its passages, and the answer to write."""

    query: str
    passages: list[str]
    answer: str


class ReaderObjective(AnswerObjective):
    """An answer's text, read from up to 100 passages."""

    wanted = "wanted queries with a text or a list of texts in the column `answers`"

    def __init__(self, student: LiT5Score, recipe: AnswerRecipe):
        super().__init__(student.loaded(), recipe.dropout, 1.0, recipe.max_tokens)
        self.student, self.n_passages = student, recipe.n_passages or student.n_passages
        self.ways: list[dict[str, type]] = [{student.text_field: str, "answers": object}]

    def prepare(self, lists: Sequence[Ranking]) -> list[Ranking]:
        """The lists of questions that have an answer."""
        return [given for given in lists if _answers(given)]

    def draw(self, given: Ranking, chosen: random.Random) -> Question:
        """The first passages and one of the answers."""
        passages = given.columns[self.student.text_field][: self.n_passages]
        return Question(given.query, passages, chosen.choice(_answers(given)))

    def read(self, example: Question) -> Read:
        """The prompts of the passages and the answer, as long as the student may write it, in ids."""
        prompts = self.student.read(example.query, example.passages).prompts
        return prompts, [*self.t5.pieces([example.answer])[0][: self.student.lengths()["answer_length"] - 2], EOS]


def _answers(given: Ranking) -> list[str]:
    """What the first row of a query says: a text, or several."""
    found = given.columns["answers"][0]
    texts = [found] if isinstance(found, str) else list(found) if isinstance(found, Sequence) else []
    return [text for text in texts if isinstance(text, str) and text.strip()]
