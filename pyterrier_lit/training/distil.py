"""FineTune and Distil: a student that is trained inside a pipeline, from labels or from a teacher's ranking.

Both read the student's columns from the training frame, add a target for each passage, and give `trainer.train` what
the student's recipe says. How a student learns stands in the module of this folder with the name of its own module:
`pyterrier_lit.cross_encoder.CrossEncoder` learns as `pyterrier_lit.training.cross_encoder` says.
"""

import dataclasses
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import ir_measures
import pandas as pd
import pyterrier as pt

from pyterrier_lit.frames import rankings
from pyterrier_lit.reranker import Reranker, representation
from pyterrier_lit.training.data import Teacher, with_labels, with_teacher
from pyterrier_lit.training.trainer import Recipe, Settings, train

FOR_EVERY_RECIPE = frozenset(field.name for field in dataclasses.fields(Settings))


class Training(pt.Estimator):
    """What FineTune and Distil share: in a pipeline they rank as their student does, which `fit` trains."""

    log: pd.DataFrame

    def __init__(self, student: Reranker, *, recipe: str | Recipe | None = None, verbose: bool = True, **settings: Any):
        self.student = student
        self.recipe = recipe
        self.verbose = verbose
        self.settings = settings

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """The frame as the student reranks it."""
        return self.student.transform(inp)

    def fuse_rank_cutoff(self, k: int) -> pt.Transformer | None:
        """What the student puts in place of itself and a cutoff after it."""
        fuse = getattr(self.student, "fuse_rank_cutoff", None)
        return fuse(k) if fuse else None

    def default_recipe(self, module: ModuleType) -> str:
        """The name of the recipe that is taken when none is named, from the student's training module."""
        raise NotImplementedError

    def with_targets(self, frame: pd.DataFrame, qrels: pd.DataFrame | None) -> pd.DataFrame:
        """The frame with a target for each passage."""
        raise NotImplementedError

    def chosen_recipe(self) -> Recipe:
        """The recipe, by name or by default, with those of the settings that are its fields.

        Raises TypeError for a student that cannot be trained and for an unknown setting, and ValueError for an unknown
        recipe.
        """
        module = training_module(self.student)
        recipe = self.default_recipe(module) if self.recipe is None else self.recipe
        if isinstance(recipe, str):
            if recipe not in module.RECIPES:
                raise ValueError(
                    f"recipe={recipe!r}; {type(self.student).__name__} has {', '.join(map(repr, module.RECIPES))}"
                )
            recipe = module.RECIPES[recipe]
        return recipe.replace(**{name: self.settings[name] for name in self.settings if name not in FOR_EVERY_RECIPE})

    def chosen_settings(self) -> Settings:
        """Those of the settings that do not depend on the recipe."""
        chosen = {name: self.settings[name] for name in self.settings if name in FOR_EVERY_RECIPE}
        return Settings(verbose=self.verbose, **chosen)

    def fit(
        self,
        topics_or_res_tr: pd.DataFrame,
        qrels_tr: pd.DataFrame | None = None,
        topics_or_res_va: pd.DataFrame | None = None,
        qrels_va: pd.DataFrame | None = None,
    ) -> None:
        """Train the student on result frames with the columns that it reads. `log` then holds what was measured, in a
        row for each step that was logged.

        With validation frames nDCG@10 is measured every `every` steps, and the student ends with the weights of the
        best measurement. Raises what `chosen_recipe`, `data.with_labels`, `data.with_teacher` and `trainer.train`
        raise, and ValueError where no list can be learned from.
        """
        recipe, settings = self.chosen_recipe(), self.chosen_settings()
        objective = recipe.objective(self.student)
        frame = topics_or_res_tr
        if any("target" in columns for columns in objective.column_sets):
            frame = self.with_targets(frame, qrels_tr)
        given = rankings(frame, objective.column_sets, context=self)
        lists = objective.prepare(given)
        if not lists:
            raise ValueError(f"there is nothing to learn from in {len(given)} queries; {objective.wanted}")
        validate = None
        if topics_or_res_va is not None and qrels_va is not None:
            validate = partial(ndcg_at_10, self.student, topics_or_res_va, qrels_va)
        log = train(objective, lists, recipe, settings, described=repr(self.student), validate=validate)
        self.log = pd.DataFrame(log)

    def apply_attributes(self, **changes: Any) -> "Training":
        """The same with other arguments or settings, as `pt.inspect.transformer_apply_attributes` asks for it."""
        given = {attribute.name: attribute.value for attribute in pt.inspect.transformer_attributes(self)} | changes
        return type(self)(**given.pop("settings") | given)

    def __repr__(self) -> str:
        return representation(self)


class FineTune(Training):
    """Train a student on labels: `pipe = first_stage >> text >> FineTune(student); pipe.fit(topics, qrels)`.

    Args:
        student: a reranker, usually from `from_backbone`. It is trained in place, and a pipeline ranks with it.
        recipe: the name of one of the student's recipes, or a Recipe. None is the paper's.
        verbose: show progress.
        settings: by name, fields of the recipe to change, such as steps=1_000, learning_rate=2e-5 or loss="lce" (see
            the recipe's class); and fields of `trainer.Settings`: folder= (where the state is saved, so that a training
            that was killed resumes), every= (steps between saved states and between measurements on validation frames),
            patience= (measurements without a better nDCG@10 after which it stops) and seed= (42).

    LiT5Score learns from answers instead of labels, in a column `answers` (a text or a list of texts for each query);
    PERank's alignment stage learns from the passages alone.
    """

    def default_recipe(self, module: ModuleType) -> str:
        """The student's recipe for labels."""
        return str(module.FINE_TUNE)

    def with_targets(self, frame: pd.DataFrame, qrels: pd.DataFrame | None) -> pd.DataFrame:
        """The frame with its labels."""
        return with_labels(frame, qrels)


class Distil(Training):
    """Train a student on a teacher's ranking: `pipe = first_stage >> text >> Distil(student, teacher)`, and then
    `pipe.fit(topics, None)`.

    Args:
        student, recipe, verbose, settings: as for FineTune.
        teacher: a transformer, which reranks the passages of the training queries; a run, as a frame or a file; None is
            the order in which the passages come.

    With `first_stage % 50` teacher and student get the first 50 passages (the paper's depth), with
    `topics.sample(1_000)` this many queries.
    """

    def __init__(
        self,
        student: Reranker,
        teacher: Teacher = None,
        *,
        recipe: str | Recipe | None = None,
        verbose: bool = True,
        **settings: Any,
    ):
        super().__init__(student, recipe=recipe, verbose=verbose, **settings)
        self.teacher = teacher

    def default_recipe(self, module: ModuleType) -> str:
        """The student's recipe for a teacher's ranking. Raises TypeError for a student that learns from answers."""
        if module.DISTIL is None:
            raise TypeError(
                f"{type(self.student).__name__} learns from answers, not from a teacher's ranking; take FineTune"
            )
        return str(module.DISTIL)

    def with_targets(self, frame: pd.DataFrame, qrels: pd.DataFrame | None) -> pd.DataFrame:
        """The frame with the teacher's scores."""
        return with_teacher(frame, self.teacher)


def training_module(student: pt.Transformer) -> ModuleType:
    """The module that says how a student learns, or how the nearest of its parent classes does that has one.

    Raises TypeError for what cannot be trained.
    """
    package, _, here = __package__.rpartition(".")
    for kind in type(student).__mro__:
        parent, _, name = kind.__module__.rpartition(".")
        if parent == package and find_spec(f"{package}.{here}.{name}"):
            return import_module(f"{package}.{here}.{name}")
    raise TypeError(
        f"{student!r} cannot be trained; wanted one of the rerankers of {package}, such as CrossEncoder, or a subclass"
        " of one"
    )


def ndcg_at_10(student: pt.Transformer, frame: pd.DataFrame, qrels: pd.DataFrame) -> float:
    """nDCG@10 of a result frame as a student reranks it, over the queries that have judgements."""
    run = student.transform(frame).rename(columns={"qid": "query_id", "docno": "doc_id"})
    judged = qrels.rename(columns={"qid": "query_id", "docno": "doc_id", "label": "relevance"})
    return float(ir_measures.calc_aggregate([ir_measures.nDCG @ 10], judged, run)[ir_measures.nDCG @ 10])
