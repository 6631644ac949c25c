"""Which LiT5 a checkpoint is: by what `save` recorded in its config, else by its names. Knows no network."""

import os.path
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from pyterrier_lit.models.checkpoints import Folder
from pyterrier_lit.models.t5 import T5Checkpoint, read_t5

WINDOWS = {"v1": 20, "v2": 100}  # passages that the families of LiT5-Distill were trained to order
NAME = re.compile(r"lit5[-_. ]?(distill|score)", re.IGNORECASE)  # as in castorini/LiT5-Distill-base-v2
V2 = re.compile(r"(?<![a-z0-9])v2(?![a-z0-9])", re.IGNORECASE)


def reader(kind: str) -> Callable[[Folder, torch.device, torch.dtype], T5Checkpoint]:
    """How the trained checkpoints of LiT5Distill or of LiT5Score are read.

    ValueError for one that `save` recorded as the other's, and a warning where only its name says so.
    """

    def read(folder: Folder, device: torch.device, dtype: torch.dtype) -> T5Checkpoint:
        recorded, path = recorded_kind(folder.config), os.path.realpath(folder.path)
        if recorded not in (None, kind):
            raise ValueError(
                f"{folder} holds a checkpoint of {recorded}, wanted one of {kind}; give it to {recorded}, or train on"
                f" from it by {kind}.from_backbone"
            )
        named = next(filter(None, map(named_kind, (str(folder), path, came_from(folder.config)))), kind)
        if recorded is None and named != kind:
            warnings.warn(
                f"{folder} is by its name a checkpoint of {named}, and is read as one of {kind}: the order that it"
                f" gives has no meaning if that is so; give it to {named}",
                stacklevel=2,
            )
        checkpoint = read_t5(folder, device, dtype)
        checkpoint.path = path
        return checkpoint

    return read


def recorded_kind(config: dict[str, Any]) -> str | None:
    """The reranker that `save` recorded; earlier versions did so by its settings."""
    if isinstance(config.get("reranker"), str):
        return str(config["reranker"])
    lengths = config.get("lengths")
    if isinstance(lengths, dict) and "answer_length" in lengths:
        return "LiT5Score"
    return "LiT5Distill" if "window_size" in config else None


def named_kind(place: str) -> str | None:
    """The reranker that the innermost part of a path or hub id names."""
    found = NAME.findall(place)
    return f"LiT5{found[-1].capitalize()}" if found else None


def came_from(config: dict[str, Any]) -> str:
    """What the library recorded as the place where it had read a checkpoint that it saved again."""
    return str(config.get("_name_or_path", ""))


def family(places: Iterable[str]) -> str | None:
    """ "v1" or "v2", by the first of some paths or hub ids that tells; None where none does.

    A path tells by what follows "LiT5-Distill" in it, which is all of it in the hub's cache (.../snapshots/HASH), or
    by a "v2" in its last part.
    """
    for place in places:
        *_, named = [None, *NAME.finditer(place)]
        if V2.search(place[named.end() :] if named else Path(place).name):
            return "v2"
        if named:
            return "v1"
    return None


def warn_of_full_prompts(checkpoint: T5Checkpoint, queries: Sequence[str], heads: Sequence[str], length: int) -> None:
    """One warning for the queries that leave no room for passages: what stands before a passage fills the prompt."""
    characters = [len(unicodedata.normalize("NFKC", head)) for head in heads]  # a head has one piece more at most
    long = [i for i, number in enumerate(characters) if number >= length - 2]
    taken = map(len, checkpoint.pieces([heads[i] for i in long]))
    full = [(queries[i], tokens) for i, tokens in zip(long, taken, strict=True) if tokens >= length - 1]  # and </s>
    if full:
        query, tokens = full[0]
        others = f", and {len(full) - 1} more queries" if len(full) > 1 else ""
        warnings.warn(
            f"the query {query[:80] + '...' if len(query) > 80 else query!r} ({tokens} tokens with the words"
            f" around it){others} fills the prompts of max_length={length}: nothing of a passage is read, and the"
            " ranking has no meaning; use a larger max_length, or shorten the query",
            stacklevel=2,
        )
