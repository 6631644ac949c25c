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

Passages = Sequence[Sequence[str]] | Columns  # the texts of each query's passages, or several columns of them
Loaded = TypeVar("Loaded")
Named = TypeVar("Named")


@dataclasses.dataclass(eq=False, repr=False)
class Reranker(pt.Transformer):
    """A transformer that gives every passage a new score. It loads its checkpoint on first use.

    A subclass is a dataclass whose fields are its arguments. It names the functions that load a checkpoint (`read`) and
    create an untrained one from a pre-trained model (`begin`), and implements `results`. Copies share the checkpoint in
    memory, a pickle contains it, and several threads may use one reranker.
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
    begin: ClassVar[Callable[..., Any]]  # as `read`, for a pre-trained model; may have more keyword arguments

    def __new__(cls, *_: Any, **arguments: Any) -> Self:
        """Raises TypeError for batch_size, an argument of other libraries."""
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
        """The same rows in the same order with new `score` and `rank`. Raises what `frames.rerank` does."""
        return rerank(inp, self.results, self.column_sets(), self.query_columns(), context=self)

    def score(self, queries: list[str], passages: Passages) -> list[list[float]]:
        """The score of every passage (higher is better): Q queries, Q lists of passages -> Q lists of scores.

        Raises TypeError for a string in place of a list and for any other object in place of a string, and ValueError
        where the model returned NaN or an infinity.
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
        """The passages of one query, best first, as sentence-transformers' CrossEncoder.rank returns them.

        Returns a dict for each of the first top_k passages (None: all) with `corpus_id`, its position in `passages`;
        `score`; and, with return_documents, `text`. Passages with equal scores keep their order. Raises what `score`
        does.
        """
        if not passages:
            return []
        (scores,) = self.score([query], [passages])
        best = sorted(range(len(scores)), key=lambda number: -scores[number])[:top_k]
        shown = [{"text": passages[number]} if return_documents else {} for number in best]
        return [{"corpus_id": i, "score": scores[i]} | text for i, text in zip(best, shown, strict=True)]

    def results(self, queries: list[str], columns: Columns) -> dict[str, list[Any]]:
        """Q queries and the columns of their passages -> `score` (Q lists of scores) and each of `query_columns` (Q
        values)."""
        raise NotImplementedError(f"{type(self).__name__} must say how it scores passages")

    def column_sets(self) -> ColumnSets:
        """Alternative sets of input columns. The first set that a frame has is used."""
        return [self.text_column()]

    def text_column(self) -> dict[str, type]:
        """The column with the passages. Raises TypeError where `text_field` is not a single name."""
        if not isinstance(self.text_field, str):
            raise TypeError(
                f"text_field={self.text_field!r}; wanted the name of one column. Join several before:"
                " `pt.apply.text(lambda row: row['title'] + ' ' + row['body'])`"
            )
        return {self.text_field: str}

    def query_columns(self) -> list[str]:
        """The columns that are added to a frame, besides score and rank."""
        return []

    def columns(self, passages: Passages) -> Columns:
        """Passages as columns. For plain texts, the docnos are their positions."""
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
        """Load the checkpoint, or return the one in memory. Call it to warm up before the first query.

        A change of `model`, `revision`, `device` or `dtype` loads it again. Weights that exist in memory only
        (untrained, trained, or passed to `hold`) are converted instead when `device` or `dtype` changes. Raises
        FileNotFoundError or ValueError, which say what is missing, damaged or of the wrong kind.
        """
        while True:
            held, source = self._held, self._source()
            with held.lock:
                if held.checkpoint is None:
                    (held.checkpoint, held.card), held.source = self._in_words(self._read), source
                    _mind_forks()
                if held.source == source:
                    return held.checkpoint
                if self._held is held:  # copies of this reranker keep the old one
                    self._held = self._converted(held) if held.given and self._is_of(held) else Held()

    def hold(self, checkpoint: Any) -> None:
        """Use this checkpoint instead of the one that `load` would read for the current arguments."""
        self._held = Held(checkpoint, self._source(), given=True)
        _mind_forks()

    def hold_trained(self) -> None:
        """Mark the weights in memory as trained: they are no longer those of `model`."""
        self.load()
        self._held.given, self._held.trained, self._held.saved = True, uuid.uuid4().hex[:8], ""

    def note_training(self, training: dict[str, str]) -> None:
        """Record a training run (name -> value) for the model card."""
        self._held.trainings = (*self._held.trainings, training)

    def in_its_dtype(self) -> Self:
        """This reranker; or, where its weights are in another dtype than `dtype` says (as during training), a converted
        copy."""
        checkpoint, device = self.load(), choose_device(self.device)
        dtype = choose_dtype(self.dtype, device)
        if all(parameter.dtype == dtype for parameter in checkpoint.network.parameters()):
            return self
        ready = copy.copy(self)
        ready.hold(converted(checkpoint, device, dtype))
        return ready

    def in_memory(self) -> Any | None:
        """The checkpoint if it is loaded, else None."""
        held = self._held
        return held.checkpoint if held.source == self._source() else None

    def once(self, build: Callable[[], Loaded]) -> Loaded:
        """The result of `build`, which reads a part of the checkpoint that `load` did not read. It runs under the lock
        of `load` and raises the same errors."""
        with self._held.lock:
            return self._in_words(build)

    def save(self, path: str | Path) -> None:
        """Write a folder that the constructor can load. If this fails, OSError is raised, and a folder that existed
        before is unchanged.

        It also writes a model card, README.md. A card that `save` wrote earlier is replaced, but its license is kept;
        any other README.md is left as it is.
        """
        self.write(path, self.load())

    def write(self, path: str | Path, checkpoint: Any) -> None:
        """Save a checkpoint that gives the same scores as the loaded one, and record the path."""
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
        """Save to a repository on the hub, created if necessary, and return the commit's id, which `revision=` accepts.

        Args:
            repo_id: owner/name.
            private: whether a new repository is private; None is the account's default.
            revision: the branch, created if necessary; None is main.
            commit_message: None names the reranker's class.
            token: None uses HF_TOKEN or the token of `hf auth login`.
            layout: further arguments of `save`.

        A README.md that `save` did not write is kept. Raises OSError when the upload fails.
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
        """What `save` records with the weights: arguments that belong to the checkpoint, such as lengths."""
        return {}

    def _card(self, name: str, checkpoint: Any, settings: Mapping[str, Any]) -> str:
        """The model card of the loaded checkpoint: the card in its folder, else a new one."""
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
        return card(name, type(self).__name__, about, base, facts, held.trainings, earlier=earlier, classifier=stock)

    @classmethod
    def from_backbone(cls, name: str, **arguments: Any) -> Self:
        """An untrained reranker on top of a pre-trained model. `torch.manual_seed` fixes its random weights.

        Args:
            name: hub id or folder of the model.
            arguments: those of the constructor, and the keyword arguments of `begin`.
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
        """A copy with other arguments and the same weights, for `pt.inspect.transformer_apply_attributes`."""
        known = {attribute.name for attribute in pt.inspect.transformer_attributes(self)}
        if unknown := changes.keys() - known:
            raise pt.inspect.InspectError(f"{type(self).__name__} has no argument {', '.join(sorted(unknown))}")
        changed = copy.copy(self)
        for name, value in changes.items():
            setattr(changed, name, value)
        return changed

    @classmethod
    def begin_options(cls) -> dict[str, inspect.Parameter]:
        """What `from_backbone` accepts besides the constructor's arguments."""
        parameters = inspect.signature(cls.begin).parameters
        return {name: parameter for name, parameter in parameters.items() if parameter.kind == parameter.KEYWORD_ONLY}

    def folder(self) -> Folder:
        """The files of the model, downloaded from the hub if necessary. Raises what `fetch` does."""
        return fetch(self.model, revision=self.revision)

    def option(self, argument: str, known: Mapping[str, Named]) -> Named:
        """What an argument whose value is a name stands for. ValueError lists the known names."""
        name = getattr(self, argument)
        if name not in known:
            raise ValueError(f"{argument}={name!r}; wanted one of {', '.join(map(repr, known))}")
        return known[name]

    def progress(self, total: int, unit: str) -> tqdm:
        """A progress bar over `total` units of work, shown when `verbose`."""
        bar: tqdm = pt.tqdm(total=total, unit=unit, desc=type(self).__name__, disable=not self.verbose)
        return bar

    def _read(self) -> tuple[Any, str | None]:
        """The checkpoint, and the model card in its folder."""
        device = choose_device(self.device)
        dtype = choose_dtype(self.dtype, device)
        folder = self.folder()
        return type(self).read(folder, device, dtype), read_card(folder.path)

    def _in_words(self, build: Callable[[], Loaded]) -> Loaded:
        """The result of `build`, called outside inference mode so that its tensors can be trained. Unexpected errors of
        a library become a ValueError that names the model."""
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
        return Held(checkpoint, self._source(), True, held.trained, held.saved, held.trainings, held.card)

    def _source(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self.loads_from)

    def _is_of(self, held: "Held") -> bool:
        """Whether the held checkpoint came from the current `model` and `revision`."""
        return held.source is not None and held.source[:2] == (self.model, self.revision)

    def call(self) -> str:
        """The constructor call with these arguments, whether or not the weights were trained since."""
        return representation(self, last=[field.name for field in dataclasses.fields(Reranker) if field.kw_only])

    def __repr__(self) -> str:
        held = self._held
        if not held.trained or not self._is_of(held):
            return self.call()
        where = f"saved as {held.saved!r}" if held.saved else "not saved"
        return f"{self.call()} <trained in memory, {where}: {held.trained}>"


class Held:
    """A checkpoint in memory, the arguments that it was read with, and a lock for reading it.

    given: whether it was passed to `hold` instead of read from `model`. trained: a unique name if it was trained in
    memory. saved: the folder or the hub repository in which it was saved. trainings: facts about each training run, for
    the model card. card: the model card that was read with it. Copies of a reranker share one `Held`. A pickle omits
    the lock.
    """

    _all: ClassVar[weakref.WeakSet["Held"]] = weakref.WeakSet()

    def __init__(
        self,
        checkpoint: Any = None,
        source: tuple[Any, ...] | None = None,
        given: bool = False,
        trained: str = "",
        saved: str = "",
        trainings: tuple[dict[str, str], ...] = (),
        card: str | None = None,
    ):
        self.checkpoint = checkpoint
        self.source = source
        self.given, self.trained, self.saved, self.trainings, self.card = given, trained, saved, trainings, card
        self.lock = threading.RLock()
        self._all.add(self)

    def __reduce__(self) -> tuple[type["Held"], tuple[Any, ...]]:
        known = (self.given, self.trained, self.saved, self.trainings, self.card)
        return Held, (self.checkpoint, self.source, *known)

    @classmethod
    def after_fork(cls) -> None:
        """A forked process has no other threads, so torch must not wait for its thread pool, and nothing for a lock
        that another thread held."""
        torch.set_num_threads(1)
        for held in cls._all:
            held.lock = threading.RLock()


@functools.cache
def _mind_forks() -> None:
    """Prepare this process for forks, once a checkpoint is loaded."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=Held.after_fork)


def texts(name: str, given: Sequence[str]) -> list[str]:
    """The texts in valid UTF-8, as tokenizers require. TypeError names the first that is not a string."""
    wrong = next((number for number, text in enumerate(given) if not isinstance(text, str)), None)
    if wrong is not None:
        raise TypeError(f"{name}[{wrong}] is {given[wrong]!r}; wanted a string")
    return list(map(whole, given))


def representation(transformer: pt.Transformer, last: Sequence[str] = ()) -> str:
    """The constructor call that rebuilds a transformer, with the arguments that differ from their defaults.

    last: arguments to print after the others.
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
    """The repr of an argument on one line; for a frame or an array, its type and shape."""
    return f"<{type(value).__name__} of {value.shape}>" if hasattr(value, "shape") else repr(value)
