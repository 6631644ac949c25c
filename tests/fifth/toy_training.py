"""Training of Toy with the loss "lce", for the test that adds a fifth reranker to the package."""

import dataclasses
import random
from functools import partial
from typing import NamedTuple

import torch
from pyterrier_lit.toy import Toy, ToyCheckpoint
from torch.nn.utils.rnn import pad_sequence

from pyterrier_lit.frames import Ranking
from pyterrier_lit.training.data import uneven
from pyterrier_lit.training.losses import lce
from pyterrier_lit.training.trainer import Objective, Recipe


@dataclasses.dataclass(frozen=True)
class ToyRecipe(Recipe):
    """A Toy's recipe."""

    def objective(self, student: Toy) -> Objective:
        """Return the training objective: the cross-entropy of the best passage."""
        return Objective(
            network=student.load().network.requires_grad_(True),
            column_sets=[{student.text_field: str, "target": float}],
            prepare=uneven,
            sample=partial(sample, student.text_field),
            collate=list,
            loss=partial(loss, student.load()),
        )


RECIPES: dict[str, Recipe] = {"toy": ToyRecipe(1e-1, steps=20, batch_size=4, micro_batch=4)}
FINE_TUNE = DISTIL = "toy"


class Example(NamedTuple):
    """A query, its passages and their targets."""

    query: str
    passages: list[str]
    targets: list[float]


def sample(text_field: str, given: Ranking, rng: random.Random) -> Example:
    """Return the whole list as an example."""
    return Example(given.query, given.columns[text_field], given.columns["target"])


def loss(checkpoint: ToyCheckpoint, batch: list[Example]) -> torch.Tensor:
    """Return the mean over queries of -log softmax(scores) at the best passage."""
    rows = [checkpoint.vectors([example.query, *example.passages]) for example in batch]
    scores = pad_sequence([row[1:] @ row[0] for row in rows], batch_first=True)
    targets = pad_sequence([torch.tensor(example.targets) for example in batch], batch_first=True)
    mask = pad_sequence([torch.ones(len(example.targets), dtype=torch.bool) for example in batch], batch_first=True)
    return lce(scores, targets, mask)
