"""Identifies LiT5 checkpoints: by what `save` recorded in the config, else by their names.

This module does not deal with networks.
"""

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

WINDOWS = {"v1": 20, "v2": 100}  # family of LiT5-Distill -> the window size that it was trained with
NAME = re.compile(r"lit5[-_. ]?(distill|score)", re.IGNORECASE)  # as in castorini/LiT5-Distill-base-v2
V2 = re.compile(r"(?<![a-z0-9])v2(?![a-z0-9])", re.IGNORECASE)


def reader(kind: str) -> Callable[[Folder, torch.device, torch.dtype], T5Checkpoint]:
    """The function that loads trained checkpoints of one reranker. kind: "LiT5Distill" or "LiT5Score".

    The returned function raises ValueError if `save` recorded that the checkpoint is of the other reranker. It warns if
    nothing is recorded but the checkpoint has the name of the other reranker.
    """

    def read(folder: Folder, device: torch.device, dtype: torch.dtype) -> T5Checkpoint:
        recorded, path = recorded_kind(folder.config), os.path.realpath(folder.path)
        if recorded not in (None, kind):
            raise ValueError(
                f"{folder} holds a checkpoint of {recorded}, wanted one of {kind}; load it with {recorded}, or start"
                f" training from it with {kind}.from_backbone"
            )
        named = next(filter(None, map(named_kind, (str(folder), path, came_from(folder.config)))), kind)
        if recorded is None and named != kind:
            warnings.warn(
                f"{folder} is a checkpoint of {named} by its name, but is loaded as {kind}, whose ranking would be"
                f" meaningless; load it with {named}",
                stacklevel=2,
            )
        checkpoint = read_t5(folder, device, dtype)
        checkpoint.path = path
        return checkpoint

    return read


def recorded_kind(config: dict[str, Any]) -> str | None:
    """The name of the reranker that `save` recorded, or None. Earlier versions of `save` recorded only the reranker's
    settings, from which its name is derived."""
    if isinstance(config.get("reranker"), str):
        return str(config["reranker"])
    lengths = config.get("lengths")
    if isinstance(lengths, dict) and "answer_length" in lengths:
        return "LiT5Score"
    return "LiT5Distill" if "window_size" in config else None


def named_kind(place: str) -> str | None:
    """The reranker that a path or hub id names, or None. If it names several, the last one counts."""
    found = NAME.findall(place)
    return f"LiT5{found[-1].capitalize()}" if found else None


def came_from(config: dict[str, Any]) -> str:
    """The path or hub id from which transformers had loaded a checkpoint when it saved the checkpoint. Returns "" if it
    is unknown."""
    return str(config.get("_name_or_path", ""))


def family(places: Iterable[str]) -> str | None:
    """The family of a LiT5-Distill checkpoint, "v1" or "v2". It is derived from the first of the given paths and hub
    ids that shows a family. Returns None if none of them does.

    A path with "LiT5-Distill" shows "v2" if "v2" follows this name (also in the hub's cache, .../snapshots/HASH), else
    "v1". A path without "LiT5-Distill" shows "v2" if "v2" is in its last part, else no family.
    """
    for place in places:
        *_, named = [None, *NAME.finditer(place)]
        if V2.search(place[named.end() :] if named else Path(place).name):
            return "v2"
        if named:
            return "v1"
    return None


def warn_of_full_prompts(checkpoint: T5Checkpoint, queries: Sequence[str], heads: Sequence[str], length: int) -> None:
    """Warn about queries that leave no room for passages, because the text before the passage fills the prompt. There
    is one warning for all of these queries.

    heads: for each query, the text of its prompt before the passage. length: the maximum length of a prompt in tokens.
    """
    characters = [len(unicodedata.normalize("NFKC", head)) for head in heads]  # a head has at most one token more
    long = [i for i, number in enumerate(characters) if number >= length - 2]
    taken = map(len, checkpoint.pieces([heads[i] for i in long]))
    full = [(queries[i], tokens) for i, tokens in zip(long, taken, strict=True) if tokens >= length - 1]  # and </s>
    if full:
        query, tokens = full[0]
        others = f", and {len(full) - 1} more queries" if len(full) > 1 else ""
        warnings.warn(
            f"the query {query[:80] + '...' if len(query) > 80 else query!r} ({tokens} tokens with the words"
            f" around it){others} fills the prompts of max_length={length}: nothing of a passage is read, and the"
            " ranking is meaningless; use a larger max_length, or shorten the query",
            stacklevel=2,
        )
