"""Checks a reranker's arguments, identifies its weights, and chooses how many pairs to rerank between two writes."""

import contextlib
import dataclasses
import hashlib
import json
import re
from pathlib import Path

from pyterrier_lit.models.devices import choose_device, choose_dtype
from pyterrier_lit.reranker import Reranker

# Type of device -> number of query-passage pairs that take a few seconds to rerank
CHUNKS = {"cpu": 100, "cuda": 1_000}
READ = ("*.json", "vocab.*", "merges.txt", "*.model", "*.jinja", "*.safetensors", "*.bin")  # the files of a checkpoint
BLOB = r"[0-9a-f]{40}|[0-9a-f]{64}"  # the name of a file in the hub's cache is a hash of its content


class _Loads(Exception):
    """Raised in `check_values` at the point where the reranker would load its model."""


def check_values(reranker: Reranker) -> None:
    """Raise ValueError if an argument of the reranker is invalid.

    Only errors that can be detected without loading the model are raised.
    """
    device = choose_device(reranker.device)
    choose_dtype(reranker.dtype, device)
    given = vars(reranker)
    wrong = [name for name, value in given.items() if type(value) is int and value < 1]
    if wrong:
        raise ValueError(f"{wrong[0]}={given[wrong[0]]}; wanted a positive whole number")
    size, stride = given.get("window_size"), given.get("stride")
    if size is not None and stride is not None and stride > size:
        raise ValueError(f"window_size={size} with stride={stride}; wanted 1 <= stride <= window_size")
    rehearsed = dataclasses.replace(reranker)
    rehearsed.load = _loads  # type: ignore[method-assign]
    with contextlib.suppress(_Loads):
        rehearsed.score(["query"], [["passage"]])


def fingerprint(reranker: Reranker) -> str:
    """A text that identifies the device, the dtype and the content of the checkpoint's files.

    This text and the reranker's arguments determine the scores.

    A file in the hub's cache is not read, since its name is a hash of its content. Other files are read, at about 1 GB
    per second.
    """
    device = choose_device(reranker.device)
    folder = reranker.folder().path
    files = sorted({file for pattern in READ for file in folder.rglob(pattern) if file.is_file()})
    contents = {file.relative_to(folder).as_posix(): _content(file) for file in files}
    return json.dumps([device.type, str(choose_dtype(reranker.dtype, device)), contents])


def chunk_for(reranker: Reranker) -> int:
    """The number of query-passage pairs to rerank between two writes of a run. Reranking this number of pairs takes a
    few seconds on the reranker's device."""
    return CHUNKS.get(choose_device(reranker.device).type, CHUNKS["cpu"])


def _content(file: Path) -> str:
    if file.is_symlink() and re.fullmatch(BLOB, file.resolve().name):
        return file.resolve().name
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _loads() -> None:
    raise _Loads
