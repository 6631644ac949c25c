"""What every reranker is: a transformer with keyword arguments, whose checkpoint is read on first use."""

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

Passages = Sequence[Sequence[str]] | Columns  # the texts of each query's passages, or more about them, column by column
Loaded = TypeVar("Loaded")
Named = TypeVar("Named")


@dataclasses.dataclass(eq=False, repr=False)
class Reranker(pt.Transformer):
    """A transformer that gives every passage a new score, by a checkpoint that is loaded on first use.

    A subclass is a dataclass whose fields are its arguments. It names the functions that load its checkpoint (`read`)
    and start one from a pre-trained model (`begin`), and implements `results`. Copies share the checkpoint in memory, a
    pickle contains it, and several threads may call one reranker.
    """

    model: str
    _: dataclasses.KW_ONLY
    revision: str | None = None
    text_field: str = "text"
    max_tokens: int | None = None
    device: str | torch.device | None = None
    dtype: str | torch.dtype | None = None
    verbose: bool = False

    loads_from: ClassVar[tuple[str, ...]] = ("model", "revision", "device", "dtype")  # what `read` depends on
    read: ClassVar[Callable[..., Any]]  # (folder, device, dtype) -> a checkpoint
    begin: ClassVar[Callable[..., Any]]  # the same for a pre-trained model, perhaps with keyword arguments of its own

    def __new__(cls, *_: Any, **arguments: Any) -> Self:
        """TypeError for batch_size, which other libraries have."""
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
        """The score of every passage, higher is better: Q queries, Q lists of passages -> Q lists of scores.

        Raises TypeError for a string where a list is required, or something else where a string is, and ValueError
        where the model returned NaN.
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

        One dict for each of the first top_k passages (None: all): `corpus_id`, its position in `passages`; `score`; and
        with return_documents `text`. Equal scores keep the order of `passages`. Raises what `score` does.
        """
        if not passages:
            return []
        (scores,) = self.score([query], [passages])
        best = sorted(range(len(scores)), key=lambda number: -scores[number])[:top_k]
        shown = [{"text": passages[number]} if return_documents else {} for number in best]
        return [{"corpus_id": i, "score": scores[i]} | text for i, text in zip(best, shown, strict=True)]

    def results(self, queries: list[str], columns: Columns) -> dict[str, list[Any]]:
        """Q queries and the columns of their passages -> `score`, Q lists, and `query_columns`, Q values each."""
        raise NotImplementedError(f"{type(self).__name__} must say how it scores passages")

    def column_sets(self) -> ColumnSets:
        """Which columns of passages it takes. The first set that a frame has is used."""
        return [self.text_column()]

    def text_column(self) -> dict[str, type]:
        """The column with the passages. TypeError where `text_field` is not one name."""
        if not isinstance(self.text_field, str):
            raise TypeError(
                f"text_field={self.text_field!r}; wanted the name of one column. Join several before:"
                " `pt.apply.text(lambda row: row['title'] + ' ' + row['body'])`"
            )
        return {self.text_field: str}

    def query_columns(self) -> list[str]:
        """The columns that it adds to a frame, beside score and rank."""
        return []

    def columns(self, passages: Passages) -> Columns:
        """Passages as columns; those that come as texts alone have their positions as docnos."""
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

        After a change of `model` or `revision` it is loaded again. After a change of `device` or `dtype` too, except
        for weights that exist in memory only (untrained, trained, or given to `hold`), which are converted. Raises
        FileNotFoundError or ValueError, which say what is missing, damaged or of another kind.
        """
        while True:
            held, source = self._held, self._source()
            with held.lock:
                if held.checkpoint is None:
                    (held.checkpoint, held.card), held.source = self._in_words(self._read), source
                    _mind_forks()
                if held.source == source:
                    return held.checkpoint
                if self._held is held:  # one of our own: copies go on with theirs
                    self._held = self._converted(held) if held.given and self._is_of(held) else Held()

    def hold(self, checkpoint: Any) -> None:
        """Use this checkpoint for the present arguments, in place of the one that `load` would read."""
        self._held = Held(checkpoint, self._source(), given=True)
        _mind_forks()

    def hold_trained(self) -> None:
        """Say that the weights in memory are trained there: they are no longer those of `model`."""
        self.load()
        self._held.given, self._held.trained, self._held.saved = True, uuid.uuid4().hex[:8], ""

    def note_training(self, training: dict[str, str]) -> None:
        """Remember for the card what a training was, by name."""
        self._held.trainings = (*self._held.trainings, training)

    def in_its_dtype(self) -> Self:
        """This, or where its weights are in another dtype, as while they are trained, a copy with them in its own."""
        checkpoint, device = self.load(), choose_device(self.device)
        dtype = choose_dtype(self.dtype, device)
        if all(parameter.dtype == dtype for parameter in checkpoint.network.parameters()):
            return self
        ready = copy.copy(self)
        ready.hold(converted(checkpoint, device, dtype))
        return ready

    def in_memory(self) -> Any | None:
        """The checkpoint, if it is loaded."""
        held = self._held
        return held.checkpoint if held.source == self._source() else None

    def once(self, build: Callable[[], Loaded]) -> Loaded:
        """What `build` returns: a part of the checkpoint that is read later, with the lock and the errors of `load`."""
        with self._held.lock:
            return self._in_words(build)

    def save(self, path: str | Path) -> None:
        """Write a folder that the constructor loads. Raises OSError on failure, and then keeps what was there before.

        It also writes a model card, README.md. An earlier card of `save` is replaced and its license kept; a README.md
        of your own is kept.
        """
        self.write(path, self.load())

    def write(self, path: str | Path, checkpoint: Any) -> None:
        """Save this checkpoint, which gives the scores of the one that is loaded, and remember where."""
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

        private: whether a new repository is private; None is the account's default. revision: the branch, created if
        necessary; None is main. token: None is HF_TOKEN's, or that of `hf auth login`. layout: further arguments of
        `save`. A README.md that `save` did not write is kept. Raises OSError when the upload fails.
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
        """What `save` records beside the weights: arguments that belong to the checkpoint, such as lengths."""
        return {}

    def _card(self, name: str, checkpoint: Any, settings: Mapping[str, Any]) -> str:
        """The card of what is loaded: that of the folder it was read from, else a new one."""
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
        """An untrained reranker over a pre-trained model. `torch.manual_seed` fixes its random weights.

        Args:
            name: hub id or folder of the model.
            arguments: the constructor's, and the keyword arguments of `begin`.
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
        """The same with other arguments, as `pt.inspect.transformer_apply_attributes` asks for it, over the same
        weights."""
        known = {attribute.name for attribute in pt.inspect.transformer_attributes(self)}
        if unknown := changes.keys() - known:
            raise pt.inspect.InspectError(f"{type(self).__name__} has no argument {', '.join(sorted(unknown))}")
        changed = copy.copy(self)
        for name, value in changes.items():
            setattr(changed, name, value)
        return changed

    @classmethod
    def begin_options(cls) -> dict[str, inspect.Parameter]:
        """What `from_backbone` takes beside the constructor's arguments."""
        parameters = inspect.signature(cls.begin).parameters
        return {name: parameter for name, parameter in parameters.items() if parameter.kind == parameter.KEYWORD_ONLY}

    def folder(self) -> Folder:
        """The files of the model, brought from the hub where they are not here. Raises what `fetch` does."""
        return fetch(self.model, revision=self.revision)

    def option(self, argument: str, known: Mapping[str, Named]) -> Named:
        """What an argument names. ValueError lists what it may name."""
        name = getattr(self, argument)
        if name not in known:
            raise ValueError(f"{argument}={name!r}; wanted one of {', '.join(map(repr, known))}")
        return known[name]

    def progress(self, total: int, unit: str) -> tqdm:
        """A bar over `total` units of work, shown when `verbose`."""
        bar: tqdm = pt.tqdm(total=total, unit=unit, desc=type(self).__name__, disable=not self.verbose)
        return bar

    def _read(self) -> tuple[Any, str | None]:
        """The checkpoint, and the card beside it."""
        device = choose_device(self.device)
        dtype = choose_dtype(self.dtype, device)
        folder = self.folder()
        return type(self).read(folder, device, dtype), read_card(folder.path)

    def _in_words(self, build: Callable[[], Loaded]) -> Loaded:
        """What `build` returns, whose tensors can learn wherever the call stands. Whatever a library raises for a field
        that makes no sense becomes a ValueError."""
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
        """Whether what is held came from the model that is now asked for."""
        return held.source is not None and held.source[:2] == (self.model, self.revision)

    def call(self) -> str:
        """The constructor's call with these arguments, whatever became of the weights."""
        return representation(self, last=[field.name for field in dataclasses.fields(Reranker) if field.kw_only])

    def __repr__(self) -> str:
        held = self._held
        if not held.trained or not self._is_of(held):
            return self.call()
        where = f"saved as {held.saved!r}" if held.saved else "not saved"
        return f"{self.call()} <trained in memory, {where}: {held.trained}>"


class Held:
    """A checkpoint in memory, the arguments it was read for, and the lock that is held while it is read.

    given: whether it was not read from the model. trained: what tells it from all others if it was trained in memory.
    saved: the folder where `save` has written it. trainings: what is known of each. card: the model card that lay
    beside what was read. Copies of a reranker share one. A pickle leaves the lock out.
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
        """A forked process has no other threads: torch must not wait for its thread pool, nor anybody for a lock."""
        torch.set_num_threads(1)
        for held in cls._all:
            held.lock = threading.RLock()


@functools.cache
def _mind_forks() -> None:
    """Prepare forks of this process, from the first checkpoint on."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=Held.after_fork)


def texts(name: str, given: Sequence[str]) -> list[str]:
    """The texts as a tokenizer takes them. TypeError names what is no string."""
    wrong = next((number for number, text in enumerate(given) if not isinstance(text, str)), None)
    if wrong is not None:
        raise TypeError(f"{name}[{wrong}] is {given[wrong]!r}; wanted a string")
    return list(map(whole, given))


def representation(transformer: pt.Transformer, last: Sequence[str] = ()) -> str:
    """The call that rebuilds a transformer: arguments by position, and by name those that are not the default.

    last: arguments that stand behind the others.
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
    """How an argument is shown; of a frame or an array, which no call in a line rebuilds, its kind and shape."""
    return f"<{type(value).__name__} of {value.shape}>" if hasattr(value, "shape") else repr(value)
