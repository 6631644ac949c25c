"""FineTune and Distil: a student that is fitted inside a pipeline, from labels or from a teacher's rankings."""

from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import ir_measures
import pandas as pd
import pyterrier as pt

from pyterrier_lit.cross_encoder import CrossEncoder
from pyterrier_lit.frames import rankings
from pyterrier_lit.lit5_distill import LiT5Distill
from pyterrier_lit.lit5_score import LiT5Score
from pyterrier_lit.pe_rank import PERank
from pyterrier_lit.reranker import Reranker, representation
from pyterrier_lit.training import cross_encoder, lit5_distill, lit5_score, pe_rank
from pyterrier_lit.training.data import Teacher, with_labels, with_teacher
from pyterrier_lit.training.trainer import Recipe, train

ROOMS: dict[type[Reranker], ModuleType] = {  # how each student learns
    CrossEncoder: cross_encoder,
    LiT5Distill: lit5_distill,
    LiT5Score: lit5_score,
    PERank: pe_rank,
}


class Training(pt.Estimator):
    """What FineTune and Distil share: in a pipeline they are their student, which `fit` trains."""

    student: Reranker
    recipe: str | Recipe | None
    folder: str | Path | None
    every: int | None
    patience: int | None
    seed: int
    verbose: bool
    settings: dict[str, Any]
    log: pd.DataFrame

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """What the student makes of the frame."""
        return self.student.transform(inp)

    def fuse_rank_cutoff(self, k: int) -> pt.Transformer | None:
        """What the student does with a cutoff behind it."""
        fuse = getattr(self.student, "fuse_rank_cutoff", None)
        return fuse(k) if fuse else None

    def default_recipe(self, room: ModuleType) -> str:
        """The name of the recipe that is taken when none is named."""
        raise NotImplementedError

    def with_targets(self, frame: pd.DataFrame, qrels: pd.DataFrame | None) -> pd.DataFrame:
        """The frame with what each passage is worth."""
        raise NotImplementedError

    def chosen_recipe(self) -> Recipe:
        """The recipe, by name or by default, with the settings. ValueError and TypeError name what there is."""
        room = next((room for student, room in ROOMS.items() if isinstance(self.student, student)), None)
        if room is None:
            raise TypeError(
                f"{self.student!r} cannot be trained; wanted one of {', '.join(kind.__name__ for kind in ROOMS)}"
            )
        recipe = self.default_recipe(room) if self.recipe is None else self.recipe
        if isinstance(recipe, str):
            if recipe not in room.RECIPES:
                raise ValueError(
                    f"recipe={recipe!r}; {type(self.student).__name__} has {', '.join(map(repr, room.RECIPES))}"
                )
            recipe = room.RECIPES[recipe]
        return recipe.but(**self.settings)

    def fit(
        self,
        topics_or_res_tr: pd.DataFrame,
        qrels_tr: pd.DataFrame | None = None,
        topics_or_res_va: pd.DataFrame | None = None,
        qrels_va: pd.DataFrame | None = None,
    ) -> None:
        """Train the student on result frames with the columns it reads; `log` then holds what was measured, a row a time.

        With validation frames the student is measured by `nDCG@10` `every` so many steps, and ends with the weights of the best
        time. Raises what `data.with_labels` and `data.with_teacher` raise, and ValueError where there is nothing to learn from.
        """
        recipe = self.chosen_recipe()
        objective = recipe.objective(self.student)
        frame = topics_or_res_tr
        if any("target" in way for way in objective.ways):
            frame = self.with_targets(frame, qrels_tr)
        given = rankings(frame, objective.ways, context=self)
        lists = objective.prepare(given)
        if not lists:
            raise ValueError(f"there is nothing to learn from in {len(given)} queries; {objective.wanted}")
        validate = None
        if topics_or_res_va is not None and qrels_va is not None:
            validate = partial(ndcg_at_10, self.student, topics_or_res_va, qrels_va)
        network, device = objective.network, objective.device
        dtype = next(network.parameters()).dtype
        try:
            log = train(
                objective.float().train(),
                lists,
                recipe,
                folder=self.folder,
                described=repr(self.student),
                seed=self.seed,
                validate=validate,
                every=self.every,
                patience=self.patience,
                verbose=self.verbose,
            )
        finally:
            network.to(device, dtype).eval()
        self.log = pd.DataFrame(log)

    def __repr__(self) -> str:
        return representation(self)


class FineTune(Training):
    """Train a student on labels: `pipe = first_stage >> text >> FineTune(student); pipe.fit(topics, qrels)`.

    Args:
        student: a reranker, mostly from `from_backbone`; it is trained in place, and this transformer ranks as it does.
        recipe: the name of one of the student's recipes, or a Recipe. None is the paper's.
        folder: where the training's state is kept, so that it goes on after a kill: see `trainer.train`.
        every: steps between states, and between measurements on validation frames.
        patience: stop after so many of these without a better `nDCG@10`.
        seed: of all chance.
        verbose: show progress.
        settings: fields of the recipe to change, such as steps=1_000, learning_rate=2e-5, loss="lce" (see the recipe's docstring).

    LiT5Score learns from answers instead of labels, in a column `answers` (a list of texts a query); PERank's alignment stage
    from the passages alone.
    """

    def __init__(
        self,
        student: Reranker,
        *,
        recipe: str | Recipe | None = None,
        folder: str | Path | None = None,
        every: int | None = None,
        patience: int | None = None,
        seed: int = 42,
        verbose: bool = True,
        **settings: Any,
    ):
        self.student = student
        self.recipe = recipe
        self.folder = folder
        self.every = every
        self.patience = patience
        self.seed = seed
        self.verbose = verbose
        self.settings = settings

    def default_recipe(self, room: ModuleType) -> str:
        """The student's recipe for labels."""
        return str(room.FINE_TUNE)

    def with_targets(self, frame: pd.DataFrame, qrels: pd.DataFrame | None) -> pd.DataFrame:
        """The frame with its labels."""
        return with_labels(frame, qrels)


class Distil(Training):
    """Train a student on a teacher's rankings: `pipe = first_stage >> text >> Distil(student, teacher); pipe.fit(topics, None)`.

    Args:
        teacher: any transformer, which reranks the training queries' passages; a run, as a frame or a file; None is the order in which
            the passages come. With `first_stage % 50` teacher and student see the first 50 (the paper's depths), with
            `topics.sample(1_000)` so many queries. The other arguments are those of FineTune.
    """

    def __init__(
        self,
        student: Reranker,
        teacher: Teacher = None,
        *,
        recipe: str | Recipe | None = None,
        folder: str | Path | None = None,
        every: int | None = None,
        patience: int | None = None,
        seed: int = 42,
        verbose: bool = True,
        **settings: Any,
    ):
        self.student = student
        self.teacher = teacher
        self.recipe = recipe
        self.folder = folder
        self.every = every
        self.patience = patience
        self.seed = seed
        self.verbose = verbose
        self.settings = settings

    def default_recipe(self, room: ModuleType) -> str:
        """The student's recipe for a teacher's rankings."""
        if room.DISTIL is None:
            raise TypeError(
                f"{type(self.student).__name__} learns from answers, not from a teacher's ranking; take FineTune"
            )
        return str(room.DISTIL)

    def with_targets(self, frame: pd.DataFrame, qrels: pd.DataFrame | None) -> pd.DataFrame:
        """The frame with what the teacher makes of it."""
        return with_teacher(frame, self.teacher)


def ndcg_at_10(student: pt.Transformer, frame: pd.DataFrame, qrels: pd.DataFrame) -> float:
    """nDCG@10 of what a student makes of a result frame, over the queries that have judgements."""
    run = student.transform(frame).rename(columns={"qid": "query_id", "docno": "doc_id"})
    judged = qrels.rename(columns={"qid": "query_id", "docno": "doc_id", "label": "relevance"})
    return float(ir_measures.calc_aggregate([ir_measures.nDCG @ 10], judged, run)[ir_measures.nDCG @ 10])
