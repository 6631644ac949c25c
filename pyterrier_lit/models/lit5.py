"""Tells LiT5-Distill from LiT5-Score checkpoints: by what `save` recorded in the config, else by their names.

In this module, `save` is the method of a reranker that writes its checkpoint and its settings. This module does not
deal with networks.
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

WINDOWS = {"v1": 20, "v2": 100}  # family of LiT5-Distill checkpoints -> window size in training
NAME = re.compile(r"lit5[-_. ]?(distill|score)", re.IGNORECASE)  # as in castorini/LiT5-Distill-base-v2
V2 = re.compile(r"(?<![a-z0-9])v2(?![a-z0-9])", re.IGNORECASE)


def reader(kind: str) -> Callable[[Folder, torch.device, torch.dtype], T5Checkpoint]:
    """Return the function that loads trained checkpoints of one reranker: folder, device, dtype -> checkpoint.

    The returned function raises ValueError if `save` recorded that the checkpoint belongs to another reranker. Without
    such a record, the function warns if the checkpoint's path or hub id names the other LiT5 reranker.

    Args:
        kind: "LiT5Distill" or "LiT5Score".
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
    """Return the name of the reranker that `save` recorded, or None. Earlier versions of `save` recorded only the
    reranker's settings. For a checkpoint from such a version, the name is derived from the settings.

    Args:
        config: the fields of config.json.
    """
    if isinstance(config.get("reranker"), str):
        return str(config["reranker"])
    lengths = config.get("lengths")
    if isinstance(lengths, dict) and "answer_length" in lengths:
        return "LiT5Score"
    return "LiT5Distill" if "window_size" in config else None


def named_kind(place: str) -> str | None:
    """Return the reranker that a path or hub id names: "LiT5Distill", "LiT5Score" or None. If a path names several
    rerankers, the last name counts."""
    found = NAME.findall(place)
    return f"LiT5{found[-1].capitalize()}" if found else None


def came_from(config: dict[str, Any]) -> str:
    """Return the path or hub id that transformers recorded as the origin of a checkpoint, or "" if the config records
    none."""
    return str(config.get("_name_or_path", ""))


def family(places: Iterable[str]) -> str | None:
    """Return the family of a LiT5-Distill checkpoint, "v1" or "v2". `places` are the checkpoint's paths and hub ids.
    The first place that shows a family decides. Returns None if no place shows a family.

    A place that contains "LiT5-Distill" shows "v2" if "v2" follows, else "v1": "castorini/LiT5-Distill-base-v2" shows
    "v2", "castorini/LiT5-Distill-base" shows "v1". In any other place, only the name of the last file or folder counts.
    This name shows "v2" if it contains "v2", else no family.
    """
    for place in places:
        *_, named = [None, *NAME.finditer(place)]
        if V2.search(place[named.end() :] if named else Path(place).name):
            return "v2"
        if named:
            return "v1"
    return None


def warn_of_full_prompts(checkpoint: T5Checkpoint, queries: Sequence[str], heads: Sequence[str], length: int) -> None:
    """Warn if the text before the passage fills the prompts of a query, so that a passage has no room. All such queries
    together cause a single warning.

    Args:
        checkpoint: the checkpoint, whose tokenizer counts the tokens.
        queries: the queries.
        heads: for each query, the text that precedes the passage in its prompts.
        length: the maximum length of a prompt in tokens.
    """
    # A text of n characters has at most n + 1 tokens
    characters = [len(unicodedata.normalize("NFKC", head)) for head in heads]
    long = [i for i, number in enumerate(characters) if number >= length - 2]
    taken = map(len, checkpoint.pieces([heads[i] for i in long]))
    full = [(queries[i], tokens) for i, tokens in zip(long, taken, strict=True) if tokens >= length - 1]  # 1 for </s>
    if full:
        query, tokens = full[0]
        others = f", and {len(full) - 1} more queries" if len(full) > 1 else ""
        warnings.warn(
            f"the query {query[:80] + '...' if len(query) > 80 else query!r} ({tokens} tokens with the words"
            f" around it){others} fills the prompts of max_length={length}: nothing of a passage is read, and the"
            " ranking is meaningless; use a larger max_length, or shorten the query",
            stacklevel=2,
        )
