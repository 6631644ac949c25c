"""Training of LiT5Distill: it learns to generate the teacher's order of a window of passages.

A training example is a window of passages from a query's list. The student reads the passages with their identifiers
and learns to generate the target ranking string. This string has the identifiers in the teacher's order, best first,
such as "3 1 2". The windows vary in size and some windows are shuffled, so that the student depends neither on the
number of passages nor on their order. The first tokens of the target ranking string have larger weights in the loss
than later tokens, because the first tokens name the best passages. Sources: LiT and Lean, ECIR 2025; arXiv 2312.16098.

The recipe `lit5-distill-first` trains a student for `decoding="first"`. This recipe adds a second loss, which trains
the logits of the first decoding step to rank all passages (FIRST, arXiv 2406.15657).
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
    """A recipe for LiT5Distill. A training example is a window of passages, sampled from a query's list. The paper (LiT
    and Lean, ECIR 2025) varies the size of the windows and the order of the passages in a window. The paper does not
    state how the sizes and orders are distributed.

    Args:
        smallest: the smallest number of passages in a window.
        largest: the largest number of passages in a window. None is the student's window size.
        shuffle: the probability that a window is shuffled. A window that is not shuffled keeps the order of the first
            stage.
        decay: the token at position t of the target ranking string (t = 0, 1, ...) has the weight decay^t in the loss.
        first_weight: the weight of the loss on the first decoding step, for decoding="first". 0 omits this loss.
        dropout: the dropout rate of the T5.
        max_tokens: maximum tokens, including padding, in one forward pass of the encoder. None is 1,024 on a CPU and
            16,384 on a GPU.

    The fields of `trainer.Recipe` are accepted, too.
    """

    smallest: int = 2
    largest: int | None = None
    shuffle: float = 0.5
    decay: float = 0.95
    first_weight: float = 0.0

    def objective(self, student: LiT5Distill) -> Objective:
        """Return the training objective: the cross-entropy of the target ranking string, plus RankNet on the first
        decoding step if first_weight is above 0. Raises ValueError unless 2 <= smallest <= largest."""
        return objective(student, self)


# Source: LiT and Lean, section 3. The paper does not give the number of epochs. Its authors used the checkpoint of that
# epoch after which the model was best on development queries
V2 = WindowRecipe(5e-5, batch_size=64, epochs=10, warmup=100, schedule="linear", weight_decay=0.0)
RECIPES: dict[str, Recipe] = {
    "lit5-distill-v2": V2,
    "lit5-distill-first": V2.replace(first_weight=10.0),  # for decoding="first"; FIRST's code has this weight
}
FINE_TUNE = DISTIL = "lit5-distill-v2"  # the default recipe for labels and for a teacher's ranking


class OrderExample(NamedTuple):
    """A training example: a query, and the passages of a window in the order in which the student sees them. `order`
    holds the positions of the passages in the window (from 0), best first."""

    query: str
    passages: list[str]
    order: list[int]


def objective(student: LiT5Distill, recipe: WindowRecipe) -> Objective:
    """Return the training objective of a LiT5Distill for a recipe. Raises ValueError unless 2 <= smallest <=
    largest."""
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
    """Sample a window of at most `largest` passages from a list, and return it as a training example. The list has the
    columns `text_field` and `target`."""
    shown, order = window(given.columns["target"], recipe.smallest, largest, recipe.shuffle, rng)
    return OrderExample(given.query, take(given.columns[text_field], shown), order)


class WindowBatch(NamedTuple):
    """A batch of B windows. `prompts` holds, for each window, the token ids of the prompts of its passages. `answers`
    holds, for each window, the token ids of its target ranking string with EOS. `orders` holds, for each window, the
    positions of its passages (from 0), best first."""

    prompts: list[list[list[int]]]
    answers: list[list[int]]
    orders: list[list[int]]


def collate(student: LiT5Distill, examples: list[OrderExample]) -> WindowBatch:
    """Tokenise B examples, and return them as a batch."""
    texts = [" ".join(str(position + 1) for position in example.order) for example in examples]
    return WindowBatch(
        prompts=[student.prompts(example.query, example.passages) for example in examples],
        answers=[[*ids, EOS] for ids in student.load().pieces(texts)],
        orders=[example.order for example in examples],
    )


def loss(t5: T5Checkpoint, recipe: WindowRecipe, batch: WindowBatch) -> torch.Tensor:
    """Return the loss of B windows, a scalar tensor. The loss is the cross-entropy of the target ranking strings
    (`text_loss`), plus first_weight times the RankNet loss of the first decoding step (`first_step_loss`)."""
    fid = FiD(t5.network)
    memory = encode(fid, batch.prompts, recipe.max_tokens, recipe.checkpointing)
    total = text_loss(fid, *memory, batch.answers, recipe.decay)
    if recipe.first_weight:
        total = total + recipe.first_weight * first_step_loss(t5, *memory, batch.orders)
    return total


def first_step_loss(
    t5: T5Checkpoint, states: torch.Tensor, attention_mask: torch.Tensor, orders: list[list[int]]
) -> torch.Tensor:
    """Return the weighted RankNet loss over the log-probabilities of the identifiers at the first decoding step, a
    scalar tensor. With decoding="first", the student ranks by these log-probabilities.

    Args:
        t5: the T5 to train.
        states: the encoder states (B, S, D) of the windows, as `training.fid.encode` returns them.
        attention_mask: the mask (B, S) of these states.
        orders: for each window, the positions of its passages (from 0), best first.
    """
    counts = [len(order) for order in orders]
    words, pieces = identifiers(t5, max(counts))
    scores, inside = first_scores(Beginning(FiD(t5.network), states, attention_mask, pieces), words, counts)
    worth = [[-order.index(position) for position in range(len(order))] for order in orders]
    return weighted_ranknet(scores, padded(worth)[0].to(scores.device), inside)


class Beginning:
    """A `decoding.Reader` that returns a T5's logits for the first tokens of B answers, with gradients.

    Args:
        fid: the T5.
        states: the encoder states (B, S, D).
        attention_mask: the mask (B, S) of these states.
        pieces: the vocabulary ids of the R tokens that the reader can generate. The reader numbers these tokens from 0:
            token i has the vocabulary id pieces[i].
    """

    def __init__(self, fid: FiD, states: torch.Tensor, attention_mask: torch.Tensor, pieces: list[int]):
        self.fid, self.memory = fid, (states, attention_mask)
        self.pieces = torch.tensor(pieces, device=fid.device)  # (R,), vocabulary ids
        self.begin = self.pieces.new_full((len(states), 1), START)

    @property
    def device(self) -> torch.device:
        """The device of the T5."""
        return self.fid.device

    def start(self) -> torch.Tensor:
        """Return the logits (B, R) of the first token."""
        return self.read(self.pieces.new_empty((len(self.begin), 0)))[:, -1]

    def read(self, tokens: torch.Tensor) -> torch.Tensor:
        """Process m tokens (B, m) after the start token. Returns the logits (B, m, R) after each of these tokens. If m
        is 0, returns the logits (B, 1, R) after the start token."""
        written = torch.cat([self.begin, self.pieces[tokens]], 1)
        states = decode(self.fid, *self.memory, written)
        return self.fid.logits(states[:, min(tokens.shape[1], 1) :], self.pieces)
