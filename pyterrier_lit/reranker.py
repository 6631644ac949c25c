"""The base class of all rerankers: a transformer with keyword arguments that loads its checkpoint on first use."""

import copy
import dataclasses
import functools
import inspect
import math
import os
import tempfile
import threading
import uuid
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import pandas as pd
import pyterrier as pt
import torch
from tqdm import tqdm

from pyterrier_lit.frames import Columns, ColumnSets, not_finite, rerank, whole
from pyterrier_lit.models.checkpoints import Folder, fetch, write
from pyterrier_lit.models.devices import choose_device, choose_dtype, converted, dtype_name
from pyterrier_lit.models.hub import CARD, again, base_of, card, in_place_of, is_hub_id, push, read_card, trainings_of

Passages = Sequence[Sequence[str]] | Columns  # for each query the list of its passages' texts, or a dict of columns
Loaded = TypeVar("Loaded")
Named = TypeVar("Named")


@dataclasses.dataclass(eq=False, repr=False)
class Reranker(pt.Transformer):
    """A transformer that gives every passage a new score. It loads its checkpoint on first use.

    A subclass is a dataclass whose fields are the arguments of its constructor. The subclass sets two functions: `read`
    loads a checkpoint, and `begin` creates an untrained checkpoint from a pre-trained model. The subclass also
    implements the method `results`, which scores passages.

    Copies of a reranker share its checkpoint in memory. A pickle of a reranker contains the checkpoint if the
    checkpoint is in memory. Several threads may use one reranker.
    """

    model: str
    _: dataclasses.KW_ONLY
    revision: str | None = None
    text_field: str = "text"
    max_tokens: int | None = None
    device: str | torch.device | None = None
    dtype: str | torch.dtype | None = None
    verbose: bool = False

    loads_from: ClassVar[tuple[str, ...]] = (
        "model",
        "revision",
        "device",
        "dtype",
    )  # the arguments that `read` depends on
    read: ClassVar[Callable[..., Any]]  # (folder, device, dtype) -> a checkpoint
    # (folder of a pre-trained model, device, dtype) -> an untrained checkpoint. `begin` may have keyword arguments, too
    begin: ClassVar[Callable[..., Any]]

    def __new__(cls, *_: Any, **arguments: Any) -> Self:
        """Create the object. Raises TypeError for the argument `batch_size`, which many other libraries have."""
        if "batch_size" in arguments:
            raise TypeError(
                f"{cls.__name__} has no batch_size: a batch holds as many inputs as fit into max_tokens; set that, to"
                " batch_size times the tokens of a long input (32 of 256 are max_tokens=8192)"
            )
        instance: Self = super().__new__(cls)  # type: ignore[no-untyped-call]
        return instance

    def __post_init__(self) -> None:
        self._held = Held()

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Rerank a result frame.

        inp: a frame with the columns `qid`, `query` and `docno`, and with the input columns of the reranker, such as
        the texts of the passages. Returns a frame with the same rows in the same order and with new values in the
        columns `score` and `rank` (from 0). Raises the same errors as `frames.rerank`.
        """
        return rerank(inp, self.results, self.column_sets(), self.query_columns(), context=self)

    def score(self, queries: list[str], passages: Passages) -> list[list[float]]:
        """Score the passages of Q queries. Returns Q lists with one score per passage; higher is better.

        Args:
            queries: a list of Q texts.
            passages: for each query, the list of its passages' texts. Alternatively a dict of columns: column name -> a
                list per query, with one value per passage, such as {"docno": [["d1", "d2"], ["d7"]]}. The dict must
                have the column `docno` and the input columns of the reranker.

        Raises TypeError if `queries` or the passages of a query are a string instead of a list, or if a query or
        passage is not a string. Raises ValueError if the model returns NaN or an infinity.
        """
        if isinstance(queries, str):
            raise TypeError(f"queries={queries[:80]!r}; wanted a list of queries, and for each a list of its passages")
        columns = self.columns(passages)
        scores = self.results(texts("queries", queries), columns)["score"]
        for query, docnos, found in zip(queries, columns["docno"], scores, strict=True):
            wrong = [number for number, score in enumerate(found) if not math.isfinite(score)]
            if wrong:
                raise not_finite(found[wrong[0]], query, [docnos[number] for number in wrong])
        return scores

    def rank(
        self, query: str, passages: Sequence[str], top_k: int | None = None, return_documents: bool = False
    ) -> list[dict[str, Any]]:
        """The passages of one query, best first, in the form that sentence-transformers' CrossEncoder.rank returns.

        Args:
            query: the text of the query.
            passages: the texts of the passages.
            top_k: number of passages to return; None returns all passages.
            return_documents: whether to return the texts, too.

        Returns a list with a dict for each of the `top_k` best passages. In the dict, `corpus_id` is the position of
        the passage in `passages` (from 0), and `score` is the passage's score. If `return_documents` is True, `text` is
        the passage's text. Passages with equal scores keep their order. A listwise reranker decodes only the first
        `top_k` ranks. Raises the same errors as `score`.
        """
        if not passages:
            return []
        (scores,) = self.for_top(top_k).score([query], [passages])
        best = sorted(range(len(scores)), key=lambda number: -scores[number])[:top_k]
        shown = [{"text": passages[number]} if return_documents else {} for number in best]
        return [{"corpus_id": i, "score": scores[i]} | text for i, text in zip(best, shown, strict=True)]

    def for_top(self, top_k: int | None) -> Self:
        """The reranker that `rank` uses to find the `top_k` best passages. A CrossEncoder or LiT5Score
        returns itself. A `ListwiseReranker` returns a copy that decodes only `top_k` ranks. top_k: number of passages;
        None is all passages."""
        return self

    def results(self, queries: list[str], columns: Columns) -> dict[str, list[Any]]:
        """Score the passages of Q queries.

        columns: column name -> a list per query, with one value per passage, such as {"docno": [["d1", "d2"], ["d7"]]}.
        Returns a dict. Its entry `score` has Q lists with one score per passage. For each column name that
        `query_columns` returns, the dict also has an entry with Q values, one per query.
        """
        raise NotImplementedError(f"{type(self).__name__} must say how it scores passages")

    def column_sets(self) -> ColumnSets:
        """Alternative sets of input columns; each set maps a column name to the type of its values (str, or object for
        any type). The first set whose columns are all in the frame is used."""
        return [self.text_column()]

    def text_column(self) -> dict[str, type]:
        """A set of input columns with one column, the texts of the passages: `{text_field: str}`. Raises TypeError if
        `text_field` is not a single name."""
        if not isinstance(self.text_field, str):
            raise TypeError(
                f"text_field={self.text_field!r}; wanted the name of one column. Join several before:"
                " `pt.apply.text(lambda row: row['title'] + ' ' + row['body'])`"
            )
        return {self.text_field: str}

    def query_columns(self) -> list[str]:
        """The names of the columns that the reranker adds to a frame besides `score` and `rank`. All rows of a query
        have the same value in such a column."""
        return []

    def columns(self, passages: Passages) -> Columns:
        """The passages of Q queries as a dict of columns, such as {"docno": [["d1", "d2"], ["d7"]]}: each column has a
        list per query.

        passages: as in `score`. A dict is returned unchanged. If lists of texts are given, the column `docno` contains
        the positions of the passages in their list, as strings. Raises TypeError if the passages of a query are a
        string instead of a list, or if a passage is not a string.
        """
        if isinstance(passages, dict):
            return passages
        for number, given in enumerate(passages):
            if isinstance(given, str):
                raise TypeError(
                    f"passages[{number}] is a string, {given[:80]!r}; wanted for each query a list of its passages"
                )
        shown = [texts(f"passages[{number}]", given) for number, given in enumerate(passages)]
        return {"docno": [list(map(str, range(len(given)))) for given in shown], self.text_field: shown}

    def load(self) -> Any:
        """Return the checkpoint, and load it first if it is not in memory. Call `load` yourself if the first query
        should not wait for the loading.

        If `model`, `revision`, `device` or `dtype` has changed, `load` loads the checkpoint again. There is one
        exception: weights that exist in memory only (untrained, trained, or passed to `hold`) are converted when
        `device` or `dtype` changes. Raises FileNotFoundError or ValueError if a file is missing, damaged or of the
        wrong kind; the message names the file.
        """
        while True:
            held, source = self._held, self._source()
            with held.lock:
                if held.checkpoint is None:
                    (held.checkpoint, held.card), held.source = self._in_words(self._read), source
                    _mind_forks()
                if held.source == source:
                    return held.checkpoint
                if self._held is held:  # other copies of this reranker keep the old `Held`
                    self._held = self._converted(held) if held.given and self._is_of(held) else Held()

    def hold(self, checkpoint: Any) -> None:
        """Use the given checkpoint instead of the one that `load` would read for the current arguments. If `device` or
        `dtype` changes later, the given checkpoint is converted."""
        before = self._held
        self._held = Held(checkpoint, self._source(), given=True, trainings=before.trainings, card=before.card)
        _mind_forks()

    def hold_changed(self, how: str = "trained in memory") -> None:
        """Mark the weights in memory as changed: they are no longer the weights that `model` names.

        how: a description of the change, which `repr` shows.
        """
        self.load()
        self._held.given, self._held.changed, self._held.saved = True, f"{how}: {uuid.uuid4().hex[:8]}", ""

    def note_training(self, training: dict[str, str]) -> None:
        """Record facts about a training run for the model card. training: name of the fact -> its value."""
        self._held.trainings = (*self._held.trainings, training)

    def in_its_dtype(self) -> Self:
        """This reranker if its weights have the dtype that its argument `dtype` sets, else a copy with converted
        weights.

        During training, the weights may have another dtype than the argument sets.
        """
        checkpoint, device = self.load(), choose_device(self.device)
        dtype = choose_dtype(self.dtype, device)
        if all(parameter.dtype == dtype for parameter in checkpoint.network.parameters()):
            return self
        ready = copy.copy(self)
        ready.hold(converted(checkpoint, device, dtype))
        return ready

    def in_memory(self) -> Any | None:
        """The checkpoint if it is in memory and belongs to the current arguments, else None."""
        held = self._held
        return held.checkpoint if held.source == self._source() else None

    def once(self, build: Callable[[], Loaded]) -> Loaded:
        """The result of `build`. The function `build` reads a part of the checkpoint that `load` left out, such as
        PERank's passage encoder.

        Only one thread at a time runs `build` or loads the checkpoint. Raises the same errors as `load`.
        """
        with self._held.lock:
            return self._in_words(build)

    def save(self, path: str | Path) -> None:
        """Write the checkpoint into a folder, which the constructor accepts as `model`.

        path: the folder, which is created if necessary. Raises OSError if the checkpoint cannot be written; an older
        checkpoint in the folder is then unchanged.

        A model card, README.md, is written too. If the folder has a model card that `save` wrote earlier, the new card
        replaces it and keeps its license and language. Any other README.md is left as it is.
        """
        self.write(path, self.load())

    def write(self, path: str | Path, checkpoint: Any) -> None:
        """Write a checkpoint and its model card into a folder, and remember the folder for `repr`.

        checkpoint: a checkpoint that gives the same scores as the loaded checkpoint.
        """
        settings, place = self.saved_settings(), Path(path).expanduser()
        there, text = read_card(place), self._card(place.absolute().name, checkpoint, settings)
        new = text if there is None else in_place_of(text, there)

        def fill(folder: Path) -> None:
            checkpoint.save(folder, **settings)
            if new is not None:
                (folder / CARD).write_text(new, encoding="utf-8")

        write(path, fill)
        self._held.saved = str(path)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        token: str | None = None,
        **layout: Any,
    ) -> str:
        """Save the checkpoint to a repository on the hub. Returns the id of the commit, which the argument `revision`
        of the constructor accepts.

        Args:
            repo_id: owner/name of the repository, which is created if necessary.
            private: whether a new repository is private; None is the account's default.
            revision: the branch of the repository, which is created if necessary; None is the main branch.
            commit_message: message of the commit; None is a message with the name of the reranker's class.
            token: access token of the hub; None uses the environment variable HF_TOKEN or the token of `hf auth login`.
            layout: further keyword arguments of `save`. Only CrossEncoder's `save` has such an argument: `layout`.

        If the repository has a README.md that `save` did not write, this README.md is kept. Raises OSError if the
        upload fails.
        """
        held = self._held
        saved = held.saved
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / repo_id.rpartition("/")[2]
            try:
                self.save(folder, **layout)
                if text := read_card(folder):
                    (folder / CARD).write_text(again(text, folder.name, repo_id), encoding="utf-8")
                message = commit_message or f"{type(self).__name__} of pyterrier_lit"
                commit = push(folder, repo_id, private=private, revision=revision, message=message, token=token)
                saved = repo_id
            finally:
                held.saved = saved
        return commit

    def saved_settings(self) -> dict[str, Any]:
        """The settings that `save` records in the checkpoint, such as the maximum length of a prompt, as name ->
        value."""
        return {}

    def _card(self, name: str, checkpoint: Any, settings: Mapping[str, Any]) -> str:
        """The text of the model card that is saved with the checkpoint. If the weights are unchanged and `model` is a
        folder with a card, the text is that card with the new name of the checkpoint, `name`."""
        held, model, stock = self._held, Path(self.model).expanduser(), getattr(checkpoint, "stock", False)
        before = held.card
        if before is not None and not held.given and model.is_dir():
            return again(before, model.absolute().name, name, classifier=stock)
        base = str(self.model) if is_hub_id(self.model) else None
        facts = {"begun with" if held.given else "model": f"`{base or model.name}`"}
        if self.revision:
            facts["revision"] = f"`{self.revision}`"
        for key, value in settings.items():
            facts |= value if isinstance(value, dict) else {key: value}
        about = (inspect.getdoc(type(self)) or "").partition("\n")[0]
        base = base_of(before) if base is None and before is not None else base
        earlier = trainings_of(before or "")
        arguments = getattr(checkpoint, "arguments", "")
        return card(
            name, type(self).__name__, about, base, facts, held.trainings, earlier=earlier, classifier=stock,
            arguments=arguments,
        )  # fmt: skip

    @classmethod
    def from_backbone(cls, name: str, **arguments: Any) -> Self:
        """Create an untrained reranker from a pre-trained model. Weights that the pre-trained model does not have, such
        as those of a scoring head, are random; call `torch.manual_seed` first to make them reproducible.

        Args:
            name: hub id or folder of the pre-trained model.
            arguments: arguments of the constructor, and for PERank also `encoder_name`, `encoder_pooling`,
                `embedding_size` and `projector_type`.
        """
        options = {option: arguments.pop(option) for option in cls.begin_options() if option in arguments}
        reranker = cls(name, **arguments)
        device = choose_device(reranker.device)
        folder = reranker.folder()
        with torch.inference_mode(False):
            reranker.hold(cls.begin(folder, device, choose_dtype(reranker.dtype, device), **options))
        reranker._held.card = read_card(folder.path)
        return reranker

    def apply_attributes(self, **changes: Any) -> Self:
        """A copy with changed arguments. The copy has the same weights, unless `model` or `revision` changes.
        `pt.inspect.transformer_apply_attributes` calls this method.

        changes: argument name -> new value. Raises pt.inspect.InspectError for an unknown argument.
        """
        known = {attribute.name for attribute in pt.inspect.transformer_attributes(self)}
        if unknown := changes.keys() - known:
            raise pt.inspect.InspectError(f"{type(self).__name__} has no argument {', '.join(sorted(unknown))}")
        changed = copy.copy(self)
        for name, value in changes.items():
            setattr(changed, name, value)
        return changed

    @classmethod
    def begin_options(cls) -> dict[str, inspect.Parameter]:
        """The arguments that `from_backbone` accepts besides those of the constructor, as name -> parameter."""
        parameters = inspect.signature(cls.begin).parameters
        return {name: parameter for name, parameter in parameters.items() if parameter.kind == parameter.KEYWORD_ONLY}

    def folder(self) -> Folder:
        """The folder with the checkpoint's files, which are downloaded from the hub if necessary. Raises the same
        errors as `models.checkpoints.fetch`."""
        return fetch(self.model, revision=self.revision)

    def option(self, argument: str, known: Mapping[str, Named]) -> Named:
        """Look up the value of one of the reranker's arguments in the dict `known`.

        argument: the name of the argument. known: each valid value of the argument -> what to return for this value.
        Raises ValueError for an invalid value; the message lists the valid values.
        """
        name = getattr(self, argument)
        if name not in known:
            raise ValueError(f"{argument}={name!r}; wanted one of {', '.join(map(repr, known))}")
        return known[name]

    def progress(self, total: int, unit: str) -> tqdm:
        """A progress bar over `total` units of work. It is shown only if the argument `verbose` is True."""
        bar: tqdm = pt.tqdm(total=total, unit=unit, desc=type(self).__name__, disable=not self.verbose)
        return bar

    def _read(self) -> tuple[Any, str | None]:
        device = choose_device(self.device)
        dtype = choose_dtype(self.dtype, device)
        folder = self.folder()
        return type(self).read(folder, device, dtype), read_card(folder.path)

    def _in_words(self, build: Callable[[], Loaded]) -> Loaded:
        """Call `build` outside inference mode, so that the tensors of its result can be trained.

        If a library raises an unexpected error, ValueError is raised instead, with a message that names the model.
        """
        try:
            with torch.inference_mode(False):
                return build()
        except (ValueError, OSError, ImportError, MemoryError, NotImplementedError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise ValueError(
                f"model={str(self.model)!r} cannot be loaded: a field of its config or tokenizer files is missing or"
                f" makes no sense ({type(error).__name__}: {' '.join(str(error).split())[:300]})"
            ) from error

    def _converted(self, held: "Held") -> "Held":
        device = choose_device(self.device)
        checkpoint = self._in_words(lambda: converted(held.checkpoint, device, choose_dtype(self.dtype, device)))
        return Held(checkpoint, self._source(), True, held.changed, held.saved, held.trainings, held.card)

    def _source(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self.loads_from)

    def _is_of(self, held: "Held") -> bool:
        return held.source is not None and held.source[:2] == (self.model, self.revision)

    def call(self) -> str:
        """The constructor call of this reranker with its arguments, as text. The text does not show whether the weights
        were trained afterwards."""
        return representation(self, last=[field.name for field in dataclasses.fields(Reranker) if field.kw_only])

    def __repr__(self) -> str:
        held = self._held
        if not held.changed or not self._is_of(held):
            return self.call()
        how, _, name = held.changed.partition(": ")
        return f"{self.call()} <{how}, {f'saved as {held.saved!r}' if held.saved else 'not saved'}: {name}>"


class Held:
    """A checkpoint in memory, the arguments with which it was read, and a lock for reading it.

    Copies of a reranker share one `Held`. A pickle omits the lock.

    Args:
        checkpoint: the checkpoint, or None before it is read.
        source: the values that the arguments in `Reranker.loads_from`, such as `model` and `dtype`, had when the
            checkpoint was read or passed to `Reranker.hold`.
        given: whether the weights exist in memory only, because they were changed or passed to `Reranker.hold`.
        changed: what was done to the weights in memory, followed by a unique id, such as "trained in memory: 51c7acb7".
            It is "" if the weights are unchanged.
        saved: the folder or hub repository in which the checkpoint was saved last. It is "" if the checkpoint was not
            saved.
        trainings: facts about each training run, for the model card.
        card: the text of the model card that was read with the checkpoint, or None.
    """

    _all: ClassVar[weakref.WeakSet["Held"]] = weakref.WeakSet()

    def __init__(
        self,
        checkpoint: Any = None,
        source: tuple[Any, ...] | None = None,
        given: bool = False,
        changed: str = "",
        saved: str = "",
        trainings: tuple[dict[str, str], ...] = (),
        card: str | None = None,
    ):
        self.checkpoint = checkpoint
        self.source = source
        self.given, self.changed, self.saved, self.trainings, self.card = given, changed, saved, trainings, card
        self.lock = threading.RLock()
        self._all.add(self)

    def __reduce__(self) -> tuple[type["Held"], tuple[Any, ...]]:
        known = (self.given, self.changed, self.saved, self.trainings, self.card)
        return Held, (self.checkpoint, self.source, *known)

    @classmethod
    def after_fork(cls) -> None:
        """Prepare a new forked process, which has a single thread.

        All locks are replaced, since a thread that does not exist in the new process may hold one. torch is set to one
        thread, since it would otherwise wait for threads that do not exist in the new process.
        """
        torch.set_num_threads(1)
        for held in cls._all:
            held.lock = threading.RLock()


@functools.cache
def _mind_forks() -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=Held.after_fork)


def texts(name: str, given: Sequence[str]) -> list[str]:
    """The given texts in valid UTF-8, which tokenizers require.

    name: the name of the list, for the error message. Raises TypeError if an item is not a string; the message has the
    name of the list and the position of the item.
    """
    wrong = next((number for number, text in enumerate(given) if not isinstance(text, str)), None)
    if wrong is not None:
        raise TypeError(f"{name}[{wrong}] is {given[wrong]!r}; wanted a string")
    return list(map(whole, given))


def representation(transformer: pt.Transformer, last: Sequence[str] = ()) -> str:
    """The constructor call that rebuilds a transformer, as text, with its positional arguments and the keyword
    arguments that differ from their defaults.

    last: names of arguments that stand after all other arguments.
    """
    shown = []
    for argument in sorted(pt.inspect.transformer_attributes(transformer), key=lambda argument: argument.name in last):
        value = argument.value
        if isinstance(value, torch.dtype) or (argument.name == "dtype" and isinstance(value, str)):
            value = dtype_name(value)
        elif isinstance(value, torch.device | Path):
            value = str(value)
        if argument.init_parameter_kind == inspect.Parameter.POSITIONAL_OR_KEYWORD:
            shown.append(_in_one_line(value))
        elif argument.init_parameter_kind == inspect.Parameter.VAR_KEYWORD:
            shown += [f"{name}={setting!r}" for name, setting in value.items()]
        elif value is not argument.init_default_value and value != argument.init_default_value:
            shown.append(f"{argument.name}={_in_one_line(value)}")
    return f"{type(transformer).__name__}({', '.join(shown)})"


def _in_one_line(value: Any) -> str:
    return f"<{type(value).__name__} of {value.shape}>" if hasattr(value, "shape") else repr(value)
