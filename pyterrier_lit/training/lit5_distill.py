"""How a LiT5Distill learns: to write the order of a window of passages as its teacher would.

An example is a window of passages from a teacher's ranking. The student reads the passages with their identifiers, and
learns to write the identifiers best first, such as "3 1 2". So that it neither counts on a certain number of passages
nor on the order in which they come, the windows vary in size and, some of them, have their passages shuffled. Early
tokens weigh more in the loss, as they name the best passages. Source: LiT and Lean, ECIR 2025; arXiv 2312.16098.

For `decoding="first"` the student also learns that the probabilities of the first identifier order all passages (FIRST,
arXiv 2406.15657).
"""

import dataclasses
import random
from functools import partial
from typing import NamedTuple

import torch

from pyterrier_lit.batching import padded
from pyterrier_lit.decoding import first_scores
from pyterrier_lit.frames import Ranking
from pyterrier_lit.lit5_distill import LiT5Distill, identifiers
from pyterrier_lit.models.t5 import EOS, START, FiD, T5Checkpoint
from pyterrier_lit.training.data import take, uneven, window
from pyterrier_lit.training.fid import FiDRecipe, decode, encode, set_dropout, text_loss
from pyterrier_lit.training.losses import weighted_ranknet
from pyterrier_lit.training.trainer import Objective, Recipe


@dataclasses.dataclass(frozen=True)
class WindowRecipe(FiDRecipe):
    """A LiT5Distill's recipe: an example is a window sampled from a list. The paper varies the windows' size and order,
    and does not say by which distributions.

    Args:
        smallest, largest: passages of a window; None for largest is the student's window size.
        shuffle: the probability that the passages of a window are shuffled; else they keep the first stage's order.
        decay: how much a token weighs in the loss relative to the token before it.
        first_weight: of the loss on the first step, for decoding="first"; 0 leaves it out.
        dropout, max_tokens: see `training.fid.FiDRecipe`.
    """

    smallest: int = 2
    largest: int | None = None
    shuffle: float = 0.5
    decay: float = 0.95
    first_weight: float = 0.0

    def objective(self, student: LiT5Distill) -> Objective:
        """The cross-entropy of the order as text, and RankNet on the first step. Raises ValueError for sizes of windows
        that cannot be."""
        return objective(student, self)


# LiT and Lean, section 3, which does not give the number of epochs: the best on development queries was taken
V2 = WindowRecipe(5e-5, batch_size=64, epochs=10, warmup=100, schedule="linear", weight_decay=0.0)
RECIPES: dict[str, Recipe] = {
    "lit5-distill-v2": V2,
    "lit5-distill-first": V2.replace(first_weight=10.0),  # for decoding="first"; the weight is that of FIRST's code
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
        collate=partial(collate, student),
        loss=partial(loss, t5, recipe),
    )


def sample_window(
    text_field: str, recipe: WindowRecipe, largest: int, given: Ranking, rng: random.Random
) -> OrderExample:
    """A window of some passages of a list."""
    shown, order = window(given.columns["target"], recipe.smallest, largest, recipe.shuffle, rng)
    return OrderExample(given.query, take(given.columns[text_field], shown), order)


class WindowBatch(NamedTuple):
    """B windows: the prompts of their passages and the orders as text with EOS, in ids, and the orders themselves."""

    prompts: list[list[list[int]]]
    answers: list[list[int]]
    orders: list[list[int]]


def collate(student: LiT5Distill, examples: list[OrderExample]) -> WindowBatch:
    """B examples in ids."""
    texts = [" ".join(str(position + 1) for position in example.order) for example in examples]
    return WindowBatch(
        prompts=[student.prompts(example.query, example.passages) for example in examples],
        answers=[[*ids, EOS] for ids in student.load().pieces(texts)],
        orders=[example.order for example in examples],
    )


def loss(t5: T5Checkpoint, recipe: WindowRecipe, batch: WindowBatch) -> torch.Tensor:
    """L = cross-entropy of the order as text + a RankNet(first step), a mean over B windows; a is first_weight."""
    fid = FiD(t5.network)
    memory = encode(fid, batch.prompts, recipe.max_tokens, recipe.checkpointing)
    total = text_loss(fid, *memory, batch.answers, recipe.decay)
    if recipe.first_weight:
        total = total + recipe.first_weight * first_step_loss(t5, *memory, batch.orders)
    return total


def first_step_loss(
    t5: T5Checkpoint, states: torch.Tensor, attention_mask: torch.Tensor, orders: list[list[int]]
) -> torch.Tensor:
    """Weighted RankNet over how likely each identifier is to come first: what decoding="first" orders by."""
    counts = [len(order) for order in orders]
    words, pieces = identifiers(t5, max(counts))
    scores, inside = first_scores(Beginning(FiD(t5.network), states, attention_mask, pieces), words, counts)
    worth = [[-order.index(position) for position in range(len(order))] for order in orders]
    return weighted_ranknet(scores, padded(worth)[0].to(scores.device), inside)


class Beginning:
    """A `decoding.Reader` of an answer's first tokens, with a gradient. Token i is pieces[i] of the vocabulary."""

    def __init__(self, fid: FiD, states: torch.Tensor, attention_mask: torch.Tensor, pieces: list[int]):
        self.fid, self.memory = fid, (states, attention_mask)
        self.pieces = torch.tensor(pieces, device=fid.device)  # (S,)
        self.begin = self.pieces.new_full((len(states), 1), START)

    @property
    def device(self) -> torch.device:
        return self.fid.device

    def start(self) -> torch.Tensor:
        """Logits (B, S) of the first token."""
        return self.read(self.pieces.new_empty((len(self.begin), 0)))[:, -1]

    def read(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens (B, m), which follow the start -> logits (B, m, S) after each; after the start where m is 0."""
        written = torch.cat([self.begin, self.pieces[tokens]], 1)
        states = decode(self.fid, *self.memory, written)
        return self.fid.logits(states[:, min(tokens.shape[1], 1) :], self.pieces)
