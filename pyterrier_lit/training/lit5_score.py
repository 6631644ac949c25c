"""How a LiT5Score learns: to answer questions from passages. It is never told which passage is relevant.

An example is a question with the first passages of its list and one of its known answers, which the student learns to
write. To do so it has to attend to the passages that hold the answer, and this attention becomes their score when it
ranks. Source: arXiv 2312.16098; the reader is that of Izacard and Grave, arXiv 2007.01282.
"""

import dataclasses
import random
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from pyterrier_lit.frames import Ranking
from pyterrier_lit.lit5_score import LiT5Score
from pyterrier_lit.models.t5 import EOS, T5Checkpoint
from pyterrier_lit.training.fid import FiDRecipe, PromptsAndAnswer, answer_loss, collate, set_dropout
from pyterrier_lit.training.trainer import Objective, Recipe


@dataclasses.dataclass(frozen=True)
class AnswerRecipe(FiDRecipe):
    """A LiT5Score's recipe: an example is a question with the first passages of its list and one of its answers.

    Args:
        n_passages: passages of an example; None is as many as the student reads.
        dropout, max_tokens: see `training.fid.FiDRecipe`.
    """

    n_passages: int | None = None

    def objective(self, student: LiT5Score) -> Objective:
        """The cross-entropy of the answer."""
        return objective(student, self)


RECIPES: dict[str, Recipe] = {
    # LiT5-Score's own is not published; this is the large reader of FiD (Izacard and Grave), from which it descends
    "fid-reader": AnswerRecipe(
        5e-5, batch_size=64, steps=15_000, warmup=1_000, schedule="linear", weight_decay=0.01, clip=1.0
    ),
}
FINE_TUNE, DISTIL = "fid-reader", None  # the recipe taken when none is named; a teacher's ranking holds no answers


class AnswerExample(NamedTuple):
    """A question, its passages, and the answer to write."""

    query: str
    passages: list[str]
    answer: str


def objective(student: LiT5Score, recipe: AnswerRecipe) -> Objective:
    """What a LiT5Score learns by a recipe."""
    t5: T5Checkpoint = student.load()
    set_dropout(t5.network, recipe.dropout)
    return Objective(
        network=t5.network.requires_grad_(True),
        column_sets=[{student.text_field: str, "answers": object}],
        prepare=answered,
        sample=partial(sample_answer, student.text_field, recipe.n_passages or student.n_passages),
        collate=partial(collate, partial(read, student)),
        loss=partial(answer_loss, t5, 1.0, recipe.max_tokens, recipe.checkpointing),
        wanted="wanted queries with a text or a list of texts in the column `answers`",
    )


def answered(lists: Sequence[Ranking]) -> list[Ranking]:
    """The lists of the questions that have an answer."""
    return [given for given in lists if answers_of(given)]


def sample_answer(text_field: str, n_passages: int, given: Ranking, rng: random.Random) -> AnswerExample:
    """The first passages of a question, and one of its answers."""
    return AnswerExample(given.query, given.columns[text_field][:n_passages], rng.choice(answers_of(given)))


def read(student: LiT5Score, example: AnswerExample) -> PromptsAndAnswer:
    """The prompts of the passages, and as much of the answer as the student may write, in ids."""
    pieces = student.load().pieces([example.answer])[0]
    most = student.lengths()["answer_length"] - 2  # which counts START and EOS
    return student.prompts(example.query, example.passages).ids, [*pieces[:most], EOS]


def answers_of(given: Ranking) -> list[str]:
    """The answers in the first row of a question, which may hold one text or several."""
    found = given.columns["answers"][0]
    texts = [found] if isinstance(found, str) else list(found) if isinstance(found, Sequence) else []
    return [text for text in texts if isinstance(text, str) and text.strip()]
