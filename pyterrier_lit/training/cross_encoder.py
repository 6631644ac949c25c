"""How a CrossEncoder learns: the passages of a query as pairs, and a loss over their scores. Rank-DistiLLM's recipes."""

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from pyterrier_lit.batching import encoder_tokens, like_lengths
from pyterrier_lit.cross_encoder import CrossEncoder
from pyterrier_lit.frames import Ranking
from pyterrier_lit.training import losses
from pyterrier_lit.training.data import sample, uneven
from pyterrier_lit.training.trainer import Batch, Objective, Recipe

LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "lce": losses.lce,
    "ranknet": losses.ranknet,
    "adr_mse": losses.adr_mse,
    "kl": losses.kl,
    "margin_mse": losses.margin_mse,
    "list_mle": losses.list_mle,
}


@dataclasses.dataclass(frozen=True)
class PairRecipe(Recipe):
    """A CrossEncoder's recipe: an example is a query with some of its passages.

    Args:
        loss: "lce", "ranknet", "adr_mse", "kl", "margin_mse" or "list_mle"; see `training.losses`.
        loss_options: further arguments of the loss, such as {"temperature": 0.05}.
        n_passages, sampling: which passages of a list an example holds, see `data.sample`.
        max_tokens: the pairs of at_once lists are computed in parts of so many tokens; None: by the device.
    """

    loss: str = "ranknet"
    loss_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    n_passages: int | None = None
    sampling: str = "top"
    max_tokens: int | None = None

    def objective(self, student: CrossEncoder) -> "PairObjective":
        """A loss over the scores of a query's passages."""
        return PairObjective(student, self)


RECIPES: dict[str, Recipe] = {
    # Rank-DistiLLM, appendix C and the authors' configurations: AdamW 1e-5, weight decay 0.01 on everything, no warm-up, no schedule
    "rank-distillm-labels": PairRecipe(
        1e-5, steps=20_000, loss="lce", n_passages=8, sampling="single_relevant", at_once=8
    ),
    "rank-distillm-rankings": PairRecipe(1e-5, epochs=3, loss="ranknet"),
}
FINE_TUNE, DISTIL = "rank-distillm-labels", "rank-distillm-rankings"  # the recipes taken when none is named


class Example(NamedTuple):
    """A query, some of its passages, and what each is worth."""

    query: str
    passages: list[str]
    targets: list[float]


class PairObjective(Objective):
    """The loss over scores (Q, N) of the pairs of Q queries, shorter lists masked."""

    def __init__(self, student: CrossEncoder, recipe: PairRecipe):
        encoder = student.loaded()
        super().__init__(encoder.network)
        if recipe.loss not in LOSSES:
            raise ValueError(f"loss={recipe.loss!r}; wanted one of {', '.join(map(repr, LOSSES))}")
        self.student, self.encoder, self.recipe = student, encoder, recipe
        self.layout, _ = student.pairs([])
        self.ways: list[dict[str, type]] = [{student.text_field: str, "target": float}]

    def prepare(self, lists: Sequence[Ranking]) -> list[Ranking]:
        """The lists that say which passage is better."""
        return uneven(lists)

    def draw(self, given: Ranking, chosen: random.Random) -> Example:
        """Some passages of a list."""
        passages, targets = given.columns[self.student.text_field], given.columns["target"]
        picked = sample(targets, self.recipe.n_passages, self.recipe.sampling, chosen)
        return Example(given.query, [passages[i] for i in picked], [targets[i] for i in picked])

    def collate(self, examples: list[Example]) -> dict[str, Batch]:
        """Pairs in ids, and the targets."""
        _, pairs = self.student.pairs(
            [(example.query, passage) for example in examples for passage in example.passages]
        )
        return {"batch": Batch(pairs=pairs, targets=[example.targets for example in examples])}

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The loss of Q examples."""
        layout, pad = self.layout, self.encoder.pad_id
        lengths = [layout.length(pair) for pair in batch.pairs]
        parts = list(like_lengths(lengths, self.recipe.max_tokens or encoder_tokens(self.device)))
        computed = torch.cat(
            [self.encoder.scores(layout.tensors([batch.pairs[i] for i in part], pad)) for part in parts]
        )
        at = torch.tensor([i for part in parts for i in part], device=self.device)
        flat = torch.zeros_like(computed).index_copy(0, at, computed)
        mask = _padded([[True] * len(targets) for targets in batch.targets], False).to(self.device)
        scores = flat.new_zeros(mask.shape).masked_scatter(mask, flat)
        targets = _padded(batch.targets, 0.0).to(self.device)
        return {"loss": LOSSES[self.recipe.loss](scores, targets, mask, **self.recipe.loss_options)}


def _padded(rows: Sequence[Sequence[Any]], value: Any) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])
