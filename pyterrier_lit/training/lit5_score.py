"""Training of LiT5Score: it learns to answer questions from passages, without any relevance labels.

A training example consists of a question, the first passages of its first-stage ranking, and one of its answers. The
student learns to generate the answer. To do so, the student must attend to the passages that contain the answer. When
the student ranks, this attention gives the scores of the passages. Source: arXiv 2312.16098. The model is the FiD
reader of Izacard and Grave, arXiv 2007.01282.
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
    """A recipe for LiT5Score. A training example consists of a question, the first passages of its first-stage
    ranking, and one of its answers.

    Args:
        n_passages: the number of passages per example. None is the student's n_passages.
        dropout: the dropout rate of the T5.
        max_tokens: maximum tokens, including padding, in one forward pass of the encoder. None is 1,024 on a CPU and
            16,384 on a GPU.

    The fields of `trainer.Recipe` are accepted, too.
    """

    n_passages: int | None = None

    def objective(self, student: LiT5Score) -> Objective:
        """Return the training objective: the cross-entropy of the answer."""
        return objective(student, self)


RECIPES: dict[str, Recipe] = {
    # The recipe of LiT5-Score is not published. `fid-reader` is the recipe of the large FiD reader (Izacard and Grave),
    # the predecessor of LiT5-Score
    "fid-reader": AnswerRecipe(
        5e-5, batch_size=64, steps=15_000, warmup=1_000, schedule="linear", weight_decay=0.01, clip=1.0
    ),
}
# The default recipes for FineTune and Distil. DISTIL is None, since a teacher's ranking has no answers
FINE_TUNE, DISTIL = "fid-reader", None


class AnswerExample(NamedTuple):
    """A training example: a question, the texts of its passages, and the answer to generate."""

    query: str
    passages: list[str]
    answer: str


def objective(student: LiT5Score, recipe: AnswerRecipe) -> Objective:
    """Return the training objective of a LiT5Score for a recipe."""
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
    """Return the lists of the questions that have at least one answer."""
    return [given for given in lists if answers_of(given)]


def sample_answer(text_field: str, n_passages: int, given: Ranking, rng: random.Random) -> AnswerExample:
    """Return a training example: the first passages of a question, and one of its answers, chosen at random."""
    return AnswerExample(given.query, given.columns[text_field][:n_passages], rng.choice(answers_of(given)))


def read(student: LiT5Score, example: AnswerExample) -> PromptsAndAnswer:
    """Tokenise an example. Returns the token ids of each passage's prompt, and the token ids of the answer with EOS.
    The answer is truncated to the student's answer_length."""
    pieces = student.load().pieces([example.answer])[0]
    most = student.lengths()["answer_length"] - 2  # answer_length includes START and EOS
    return student.prompts(example.query, example.passages).ids, [*pieces[:most], EOS]


def answers_of(given: Ranking) -> list[str]:
    """Return the answers to a question. The answers are read from the first row of the column `answers`, which holds
    one text or a list of texts."""
    found = given.columns["answers"][0]
    texts = [found] if isinstance(found, str) else list(found) if isinstance(found, Sequence) else []
    return [text for text in texts if isinstance(text, str) and text.strip()]
