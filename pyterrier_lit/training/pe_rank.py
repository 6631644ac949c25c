"""How a PERank learns: first to read a passage's vector as its text, then to rank by vectors as it does by texts."""

import dataclasses
import random
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from pyterrier_lit.batching import Budget
from pyterrier_lit.frames import Ranking
from pyterrier_lit.models.pe_prompts import RANK
from pyterrier_lit.models.vector_lm import VectorLM
from pyterrier_lit.pe_rank import PERank
from pyterrier_lit.training.data import uneven, window
from pyterrier_lit.training.losses import list_kl, list_mle
from pyterrier_lit.training.trainer import Batch, Objective, Recipe


@dataclasses.dataclass(frozen=True)
class AlignmentRecipe(Recipe):
    """A PERank's recipe, stage 1: the projector alone learns, and each passage of the lists is an example.

    Args:
        max_length: tokens of question and text.
    """

    max_length: int = 512

    def objective(self, student: PERank) -> "AlignmentObjective":
        """The cross-entropy of a passage's text, written from its vector."""
        return AlignmentObjective(student, self)


@dataclasses.dataclass(frozen=True)
class RankingRecipe(Recipe):
    """A PERank's recipe, stage 2: an example is a window drawn from a list.

    Args:
        smallest, largest: passages of a window; None is the student's window size.
        shuffle: the probability that a window's passages stand in any order, in place of the first stage's.
        text_weight: of ranking with the texts in the prompt; 0 leaves them out.
        kl_weight: of the divergence between both.
        reduction: the loss of a window is the "sum" over its ranks, as in the published code until 2024-10, or their "mean", as since then; the
            divergence is a sum in both, so that in "mean" it weighs n times as much. With "mean" a retraining is reported to be far worse
            (the code's issue tracker: .6355 for .7046).
        max_length: tokens of a prompt with its answer.
    """

    smallest: int | None = None
    largest: int | None = None
    shuffle: float = 0.5
    text_weight: float = 1.0
    kl_weight: float = 0.2
    reduction: str = "sum"
    max_length: int = 4096

    def objective(self, student: PERank) -> "RankingObjective":
        """ListMLE over the passages' vectors, with and without their texts in the prompt, and the divergence of the two."""
        return RankingObjective(student, self)


# The published scripts: AdamW, cosine, warm-up of 3 %; stage 1 on 4 GPUs of (by README and paper) 1 or 8, stage 2 on 4 x 4 x 2
RECIPES: dict[str, Recipe] = {
    "pe-rank-alignment": AlignmentRecipe(
        1e-3, batch_size=32, warmup=0.03, schedule="cosine", weight_decay=0.0, checkpointing=True
    ),
    "pe-rank-ranking": RankingRecipe(
        2e-5, batch_size=32, warmup=0.03, schedule="cosine", weight_decay=0.0, clip=1.0, checkpointing=True
    ),
}
FINE_TUNE = DISTIL = "pe-rank-ranking"


class Passage(NamedTuple):
    """A text, and its row among the vectors."""

    row: int
    text: str


class Taught(NamedTuple):
    """A query with its passages: their texts, if they are shown, their rows among the vectors, and what each is worth."""

    query: str
    texts: list[str]
    rows: list[int]
    targets: list[float]


class Window(NamedTuple):
    """The ids of the views of a window, the rows of its passages as they are shown, and the positions of these best first."""

    views: list[list[int]]
    rows: list[int]
    order: list[int]


class VectorObjective(Objective):
    """What both stages share: passages' vectors, looked up once as the student does, and prompts with placeholders."""

    network: VectorLM
    vectors: torch.Tensor  # (D, d) of all passages

    def __init__(self, student: PERank, max_length: int):
        self.ranker = student.loaded()
        super().__init__(self.ranker.network)
        self.student, self.max_length = student, max_length
        self.prompter = self.ranker.prompter
        self.register_buffer("vectors", torch.empty(0), persistent=False)
        text: dict[str, type] = {student.text_field: str}
        self.ways: list[dict[str, type]] = [text | {"doc_vec": object}, text]

    def look_up(self, lists: Sequence[Ranking]) -> list[list[int]]:
        """Keep the vectors of all passages; returns for each list the rows of its passages."""
        columns = (
            {name: [given.columns[name] for given in lists] for name in lists[0].columns} if lists else {"docno": []}
        )
        with torch.no_grad():
            vectors, rows = self.student.look_up(self.ranker, columns, Budget(self.student.max_tokens))
        self.vectors = vectors.to(self.device)
        return rows

    def states(
        self, ids: Sequence[list[int]], rows: Sequence[list[int]], order: Sequence[list[int]]
    ) -> tuple[torch.Tensor, ...]:
        """B prompts, padded on the right, with projected vectors for their placeholders and, in the order given, for their ranks:
        states (B, L, H), ids (B, L), passages (B, N, H), and which of these there are, (B, N)."""
        device = self.device
        padded = pad_sequence([torch.tensor(row) for row in ids], batch_first=True).to(device)
        mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in ids], batch_first=True).to(device)
        inside = pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in rows], batch_first=True).to(device)
        passages = self.network.projector(
            self.vectors[pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(device)]
        )
        inputs = self.network.embed(padded, mask, passages, inside)
        named = passages.gather(1, _padded(order, device)[..., None].expand_as(passages)) if order else passages
        inputs = inputs.masked_scatter((padded == self.prompter.rank)[..., None], named[inside].to(inputs.dtype))
        states = self.network.body(inputs_embeds=inputs, attention_mask=mask, use_cache=False).last_hidden_state
        return states, padded, passages, inside


class AlignmentObjective(VectorObjective):
    """The mean over the tokens of the texts of -log p(token), written by the language model after a question with the vector."""

    wanted = "wanted passages with a text"

    head: torch.Tensor  # (V, H), which writes words

    def __init__(self, student: PERank, recipe: AlignmentRecipe):
        super().__init__(student, recipe.max_length)
        self.network.body.requires_grad_(False)
        self.register_buffer("head", self.ranker.head().to(self.device), persistent=False)

    def prepare(self, lists: Sequence[Ranking]) -> list[Passage]:
        """Each distinct passage that has a text."""
        texts = [text for given in lists for text in given.columns[self.student.text_field]]
        return [
            Passage(*passage)
            for passage in dict.fromkeys(zip(chain(*self.look_up(lists)), texts, strict=True))
            if passage[1].strip()
        ]

    def draw(self, given: Passage, chosen: random.Random) -> Passage:
        """The passage."""
        return given

    def collate(self, examples: list[Passage]) -> dict[str, Batch]:
        """Questions with their answers in ids, and where the answers begin."""
        conversations = [self.prompter.answered(*self.prompter.alignment(text)) for _, text in examples]
        return {
            "batch": Batch(
                ids=[ids[: self.max_length] for ids, _ in conversations],
                starts=[start for _, start in conversations],
                rows=[[example.row] for example in examples],
            )
        }

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The loss of B passages."""
        states, ids, *_ = self.states(batch.ids, batch.rows, [])
        starts, stops = (
            torch.tensor(at, device=self.device)[:, None] for at in (batch.starts, [len(row) for row in batch.ids])
        )
        at = torch.arange(1, ids.shape[1], device=self.device)
        answer = (at >= starts) & (at < stops)
        logits = F.linear(states[:, :-1][answer], self.head.to(states.dtype))
        return {"loss": F.cross_entropy(logits.float(), ids[:, 1:][answer])}


class RankingObjective(VectorObjective):
    """L = MLE(vectors) + a MLE(vectors and texts) + b KL(vectors and texts || vectors), the passages' vectors fed in the target order."""

    def __init__(self, student: PERank, recipe: RankingRecipe):
        super().__init__(student, recipe.max_length)
        self.recipe = recipe
        self.largest = recipe.largest or student.window_size
        self.smallest = recipe.smallest or self.largest
        if not recipe.text_weight:
            self.ways = student.ways()
        self.ways = [{**way, "target": float} for way in self.ways]
        self.network.requires_grad_(True)

    def prepare(self, lists: Sequence[Ranking]) -> list[Taught]:
        """The lists that say which passage is better, with their passages' vectors."""
        kept = uneven(lists)
        return [
            Taught(given.query, given.columns.get(self.student.text_field, []), rows, given.columns["target"])
            for given, rows in zip(kept, self.look_up(kept), strict=True)
        ]

    def draw(self, given: Taught, chosen: random.Random) -> Window:
        """A window of some passages of a list. ValueError where its prompt is too long."""
        shown, order = window(given.targets, self.smallest, self.largest, self.recipe.shuffle, chosen)
        texts: list[list[str | None]] = [[None] * len(shown)]
        if self.recipe.text_weight:
            texts.append([given.texts[i] for i in shown])
        views = [
            self.prompter.answered(self.prompter.messages(given.query, view), RANK * len(shown))[0] for view in texts
        ]
        if len(views[-1]) > self.max_length:
            raise ValueError(
                f"the prompt for query {given.query!r} with {len(shown)} passages has {len(views[-1])} tokens; wanted at most"
                f" {self.max_length}: cut the texts, or take fewer passages (largest=) or text_weight=0"
            )
        return Window(views, [given.rows[i] for i in shown], order)

    def collate(self, examples: list[Window]) -> dict[str, Batch]:
        """The windows, view by view."""
        return {
            "batch": Batch(
                views=[list(view) for view in zip(*(example.views for example in examples), strict=True)],
                rows=[example.rows for example in examples],
                order=[example.order for example in examples],
            )
        }

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The loss of B windows."""
        recipe, targets = self.recipe, _padded([_by_position(order) for order in batch.order], self.device)
        scores, inside = zip(*(self.scores(ids, batch.rows, batch.order) for ids in batch.views), strict=True)
        loss = list_mle(scores[0], targets, inside[0], recipe.reduction)
        if recipe.text_weight:
            loss = loss + recipe.text_weight * list_mle(scores[1], targets, inside[0], recipe.reduction)
            loss = loss + recipe.kl_weight * list_kl(scores[0], scores[1], targets, inside[0])
        return {"loss": loss}

    def scores(
        self, ids: Sequence[list[int]], rows: list[list[int]], order: list[list[int]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """h . e_j with the state h before each rank of B windows: (B, rank, N), and which passages there are, (B, N)."""
        states, padded, passages, inside = self.states(ids, rows, order)
        before = states[:, :-1][padded[:, 1:] == self.prompter.rank]
        at_ranks = torch.zeros_like(passages).masked_scatter(inside[..., None], before.to(passages.dtype))
        return torch.einsum("bih,bjh->bij", at_ranks.float(), passages.float()), inside


def _by_position(order: list[int]) -> list[int]:
    """n for the first of an order of n positions, 1 for the last, by position."""
    worth = dict(zip(order, range(len(order), 0, -1), strict=True))
    return [worth[position] for position in range(len(order))]


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(device)
