"""FineTune and Distil: train a student inside a pipeline, from labels or from a teacher's ranking.

A student is a reranker that is trained. FineTune and Distil read the columns that the student needs from the
training frame. If the recipe needs targets, FineTune and Distil add a target for each passage (a number, higher is
better). Then they call `trainer.train` with the recipe. The recipes of a student are in its training module. For
example, the training module of `pyterrier_lit.cross_encoder.CrossEncoder` is `pyterrier_lit.training.cross_encoder`.
"""

import copy
import dataclasses
import re
import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import ir_measures
import pandas as pd
import pyterrier as pt

from pyterrier_lit.frames import Ranking, rankings
from pyterrier_lit.reranker import Reranker, representation
from pyterrier_lit.training.data import Teacher, digest, judgements, with_labels, with_teacher
from pyterrier_lit.training.stored import StoredLists, StoredRun
from pyterrier_lit.training.trainer import MEASURE, Log, Objective, Recipe, Settings, train

Given = pd.DataFrame | StoredRun  # training data: a result frame or a stored run
FOR_EVERY_RECIPE = frozenset(field.name for field in dataclasses.fields(Settings))


class Training(pt.Estimator):
    """The common base class of FineTune and Distil. `fit` trains the student, and `transform` reranks with the student.

    The arguments of the constructor are those of FineTune.
    """

    def __init__(self, student: Reranker, *, recipe: str | Recipe | None = None, verbose: bool = True, **settings: Any):
        self.student = student
        self.recipe = recipe
        self.verbose = verbose
        self.settings = settings
        self._logs: list[pd.DataFrame] = []  # the log of each `fit`; copies from `fuse_rank_cutoff` share it

    @property
    def log(self) -> pd.DataFrame:
        """The log of the last `fit`: a frame with one row per log entry. The frame has the columns `step`, `loss`,
        `learning_rate`, `grad_norm` and, if `fit` had a validation frame, `nDCG@10`. The loss of a step and the
        `nDCG@10` after this step are in different rows. A value that a row does not have is NaN.

        Raises AttributeError before the first `fit`.
        """
        if not self._logs:
            raise AttributeError(f"{type(self).__name__} has no log before it is fitted")
        return self._logs[-1]

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Rerank a result frame with the student. The result is that of the student's own `transform`. Warns if `fit`
        was never called."""
        if len(inp) and not self._logs:
            name = type(self).__name__
            warnings.warn(
                f"{name} has not been fitted: its student ranks with its initial weights. A pipeline's fit"
                f" reaches only the stages of a `>>`, not a {name} inside `+`, `**` or a cache; fit that one by"
                " itself, on a result frame",
                stacklevel=2,
            )
        return self.student.transform(inp)

    def fuse_rank_cutoff(self, k: int) -> pt.Transformer | None:
        """Return a pipeline that gives the same result as this stage followed by `% k`. In this pipeline, the student
        decodes only the first k ranks. PyTerrier calls this method when it compiles a pipeline.

        Returns None if the student has no method `fuse_rank_cutoff`, or if this method of the student returns None.
        """
        fuse = getattr(self.student, "fuse_rank_cutoff", None)
        fused = fuse(k) if fuse else None
        if fused is None:
            return None
        shorter = copy.copy(self)
        shorter.student, cutoff = fused
        pipeline: pt.Transformer = shorter >> cutoff
        return pipeline

    def default_recipe(self, module: ModuleType) -> str:
        """Return the name of the student's default recipe. `module` is the student's training module."""
        raise NotImplementedError

    def with_targets(self, given: Given, qrels: pd.DataFrame | None) -> Given:
        """Return the training data with a target for each passage. A frame gets the column `target`. A stored run gets
        one target per row."""
        raise NotImplementedError

    def chosen_recipe(self) -> Recipe:
        """Return the recipe that `fit` uses. It is the argument `recipe` or, if `recipe` is None, the student's default
        recipe. The constructor's `settings` override fields of this recipe.

        Raises TypeError if the student cannot be trained or if a setting is unknown. Raises ValueError if the recipe is
        unknown.
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
        """Return the `trainer.Settings` that `fit` uses. A field that the constructor's arguments do not set has its
        default."""
        chosen = {name: self.settings[name] for name in self.settings if name in FOR_EVERY_RECIPE}
        return Settings(verbose=self.verbose, **chosen)

    def fit(
        self,
        topics_or_res_tr: Given,
        qrels_tr: pd.DataFrame | None = None,
        topics_or_res_va: pd.DataFrame | None = None,
        qrels_va: pd.DataFrame | None = None,
    ) -> None:
        """Train the student in place on a result frame or a stored run. Afterwards, `log` has the losses and, if
        there is validation data, the `nDCG@10`. Training starts from the student's current weights, so a second `fit`
        continues the first.

        Args:
            topics_or_res_tr: the training data: a result frame with the columns that the student reads, or a StoredRun,
                which does not hold the texts in memory.
            qrels_tr: the labels of the training queries, a frame with qid, docno and label. FineTune needs them if the
                recipe learns from labels. Distil ignores them.
            topics_or_res_va: a result frame with the validation queries and their passages, or None.
            qrels_va: the labels of the validation queries, or None.

        If the two validation arguments are given, the `nDCG@10` of the student on the validation queries is measured
        several times during training. The setting `every` is the number of steps between two measurements. The measured
        value equals the `nDCG@10` that `pt.Experiment` would return. At the end, the student has the weights for which
        the measured `nDCG@10` was highest.

        If the student cannot read a frame, `fit` raises the same errors as the student's `transform`. It also raises
        the errors of StoredRun and of `trainer.train`. `fit` raises TypeError if the student cannot be trained or if a
        setting is unknown. `fit` raises ValueError

        - if the recipe is unknown, or if the value of a setting is invalid;
        - if FineTune needs labels and gets none, or if a label or a teacher's score is not a finite number;
        - if the teacher ranks none of the passages;
        - if the qrels judge none of the passages relevant;
        - if a validation frame is given without qrels, or validation qrels without a frame;
        - if the training data has no list from which the student can learn.
        """
        recipe, settings = self.chosen_recipe(), self.chosen_settings()
        measured_on = self.validation(topics_or_res_va, qrels_va)
        objective = recipe.objective(self.student)
        rows = topics_or_res_tr
        if any("target" in columns for columns in objective.column_sets):
            rows = self.with_targets(rows, qrels_tr)
        given: Sequence[Ranking]
        if isinstance(rows, StoredRun):
            given = rows.lists(objective.column_sets, self.student.text_field)
        else:
            given = rankings(rows, objective.column_sets, context=self)
        looked_up = given.some_texts() if isinstance(given, StoredLists) else []
        lists = objective.prepare(given)
        if not lists:
            raise ValueError(f"there is nothing to learn from in {len(given)} queries; {objective.wanted}")
        described = self.described(chain(given, looked_up), measured_on) if settings.folder else {}
        validate = partial(ndcg_at_10, self.student, *measured_on) if measured_on else None
        log = train(
            objective,
            lists,
            recipe,
            settings,
            described=described,
            validate=validate,
            begins=self.student.hold_changed,
        )
        self._logs.append(pd.DataFrame(log))
        self.student.note_training(self.told(recipe, objective, len(lists), log))

    def told(self, recipe: Recipe, objective: Objective, n_lists: int, log: Log) -> dict[str, str]:
        """Return facts about one `fit` for the student's model card, as name -> text. `n_lists` is the number of lists
        that the student learned from."""
        name = self.default_recipe(training_module(self.student)) if self.recipe is None else self.recipe
        name = type(name).__name__ if isinstance(name, Recipe) else name
        fields = [f"{name}={value!r}" for name, value in vars(recipe).items() if value is not None and value != {}]
        told = {
            "learned from": f"{self.learned_from(set().union(*objective.column_sets))}, {n_lists} lists",
            "recipe": _without_folders(f"{name} ({', '.join(fields)})"),
        }
        losses, measured = ([row for row in log if name in row] for name in ("loss", MEASURE))
        if losses:
            told["loss"] = f"{losses[-1]['loss']:.4f} at step {losses[-1]['step']:.0f}, the last"
        if measured:
            best = max(measured, key=lambda row: row[MEASURE])
            told[MEASURE] = f"{best[MEASURE]:.4f} on validation queries, at step {best['step']:.0f}, which is kept"
        return told

    def learned_from(self, columns: set[str]) -> str:
        """Return a description of the training data for the model card. `columns` are the names of the columns that the
        student reads."""
        raise NotImplementedError

    def validation(
        self, frame: pd.DataFrame | None, qrels: pd.DataFrame | None
    ) -> tuple[pd.DataFrame, pd.DataFrame] | None:
        """Return the validation frame, and the qrels of its queries in the form that ir_measures takes. Returns None if
        both arguments are None.

        Raises ValueError if only one of the arguments is given, or if the qrels judge none of the frame's passages
        relevant. Raises the same errors as the student's `transform` if the student cannot read the frame.
        """
        if frame is None and qrels is None:
            return None
        if frame is None or qrels is None:
            raise ValueError("fit(topics, qrels, valid_topics, valid_qrels) has only one of the last two; wanted both")
        rankings(frame, self.student.column_sets(), context=self)
        return frame, judgements(frame, qrels)

    def described(self, given: Iterable[Any], measured_on: tuple[pd.DataFrame, pd.DataFrame] | None) -> dict[str, str]:
        """Return a description of the student and the data, as name -> text. Training resumes from a checkpoint in the
        training folder only if this description is unchanged.

        Args:
            given: the training lists, and the texts that were looked up in a stored run.
            measured_on: what `validation` returned.
        """
        valid: list[Any] = []
        if measured_on:
            valid = [*rankings(measured_on[0], self.student.column_sets()), *measured_on[1].to_numpy().tolist()]
        return {
            "student": self.student.call(),
            "digest of lists and targets": digest(given),
            "digest of the validation": digest(valid),
        }

    def apply_attributes(self, **changes: Any) -> "Training":
        """Return a copy in which some arguments of the constructor have other values: `changes` is name -> value.
        `pt.inspect.transformer_apply_attributes` calls this method."""
        given = {attribute.name: attribute.value for attribute in pt.inspect.transformer_attributes(self)} | changes
        return type(self)(**given.pop("settings") | given)

    def __repr__(self) -> str:
        return representation(self)


class FineTune(Training):
    """Train a student on labels: `pipe = first_stage >> text >> FineTune(student); pipe.fit(topics, qrels)`.

    In this pipeline, `text` is a stage that adds the texts of the passages, such as `dataset.text_loader()`.

    Args:
        student: a reranker, usually from `from_backbone`. `fit` trains it in place, and the pipeline then reranks with
            it.
        recipe: the name of one of the student's recipes, or a Recipe. None selects the student's default recipe.
        verbose: show progress.
        settings: any field of the recipe, such as steps=1_000, learning_rate=2e-5 or loss="lce". The class of the
            recipe explains its fields. The fields of `trainer.Settings` are accepted, too. `folder` is the folder in
            which checkpoints are saved, so that training can resume. `every` is the number of steps between two
            checkpoints, and between two measurements on the validation frame. `patience` stops training after this many
            measurements in a row without a better `nDCG@10`. `seed` is the random seed (default 42).

    A LiT5Score learns from answers instead of labels. It reads the answers from a column `answers`. For each query,
    this column holds a text or a list of texts. The recipe "pe-rank-alignment" of a PERank learns from the texts of the
    passages alone, without labels.
    """

    def default_recipe(self, module: ModuleType) -> str:
        """Return the name of the student's default recipe for labels. `module` is the student's training module."""
        return str(module.FINE_TUNE)

    def learned_from(self, columns: set[str]) -> str:
        """Return what the student learns from: "labels", "answers" or "the passages alone". `columns` are the names of
        the columns that the student reads."""
        return "labels" if "target" in columns else "answers" if "answers" in columns else "the passages alone"

    def with_targets(self, given: Given, qrels: pd.DataFrame | None) -> Given:
        """Return the frame or stored run with the labels of the qrels as targets."""
        return given.labelled(qrels) if isinstance(given, StoredRun) else with_labels(given, qrels)


class Distil(Training):
    """Train a student on a teacher's ranking: `pipe = first_stage >> text >> Distil(student, teacher)`, and then
    `pipe.fit(topics, None)`.

    In this pipeline, `text` is a stage that adds the texts of the passages, such as `dataset.text_loader()`.

    Args:
        student: as for FineTune.
        teacher: a transformer that reranks the passages of the training queries, or a run, as a frame or a file. With
            None, the student learns the order of the first stage.
        recipe: as for FineTune.
        verbose: as for FineTune.
        settings: as for FineTune.

    In the pipeline, `first_stage % 50` limits each query to 50 passages, the depth in the Rank-DistiLLM paper.
    `topics.sample(1_000)` samples 1,000 training queries.
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
        """Return the name of the student's default recipe for a teacher's ranking. `module` is the student's training
        module. Raises TypeError if the student learns from answers."""
        if module.DISTIL is None:
            raise TypeError(
                f"{type(self.student).__name__} learns from answers, not from a teacher's ranking; use FineTune"
            )
        return str(module.DISTIL)

    def learned_from(self, columns: set[str]) -> str:
        """Return a description of the teacher for the model card. Local paths are shortened to their last part."""
        if self.teacher is None:
            return "the order of the candidates"
        if isinstance(self.teacher, str | Path):
            return f"the run {Path(self.teacher).name}"
        if isinstance(self.teacher, pd.DataFrame):
            return "the order of a run"
        return f"the ranking of {_without_folders(repr(self.teacher))}"

    def with_targets(self, given: Given, qrels: pd.DataFrame | None) -> Given:
        """Return the frame or stored run with the teacher's scores as targets. `qrels` is ignored."""
        if isinstance(given, StoredRun):
            return given.taught(self.teacher, self.student.text_field)
        return with_teacher(given, self.teacher)


def training_module(student: pt.Transformer) -> ModuleType:
    """Return the training module of a student's class. If this class has none, return the training module of its
    nearest parent class that has one.

    Raises TypeError if none of these classes has a training module.
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


def ndcg_at_10(student: Reranker, frame: pd.DataFrame, judged: pd.DataFrame) -> float:
    """Rerank a result frame with the student, and return the mean `nDCG@10` over the queries of `judged`.

    Args:
        student: the reranker to measure.
        frame: the validation frame.
        judged: qrels from `data.judgements`.
    """
    run = student.in_its_dtype().transform(frame).rename(columns={"qid": "query_id", "docno": "doc_id"})
    run = run[["query_id", "doc_id", "score"]].astype({"query_id": "str", "doc_id": "str"})
    return float(ir_measures.calc_aggregate([ir_measures.nDCG @ 10], judged, run)[ir_measures.nDCG @ 10])


def _without_folders(call: str) -> str:
    """Shorten each quoted local path to its last part: "CrossEncoder('/home/me/model')" -> "CrossEncoder('model')"."""
    return re.sub(r"(?<=['\"])[/~][^'\"]*/", "", call)
