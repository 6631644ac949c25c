"""What a run depends on in its reranker: which values are right, which weights these are, how much at a time."""

import contextlib
import dataclasses
import hashlib
import json
import re
from pathlib import Path

from pyterrier_lit.models.devices import choose_device, choose_dtype
from pyterrier_lit.reranker import Reranker

CHUNKS = {"cpu": 100, "cuda": 1_000}  # pairs in some seconds: on a CPU one query of the usual depth
READ = ("*.json", "vocab.*", "merges.txt", "*.model", "*.jinja", "*.safetensors", "*.bin")  # the files of a checkpoint
BLOB = r"[0-9a-f]{40}|[0-9a-f]{64}"  # how the hub's cache calls a file, by its content


class _Loads(Exception):
    """The model would be loaded now."""


def check_values(reranker: Reranker) -> None:
    """ValueError for arguments that cannot be, as far as that shows without the model."""
    device = choose_device(reranker.device)
    choose_dtype(reranker.dtype, device)
    given = vars(reranker)
    wrong = [name for name, value in given.items() if type(value) is int and value < 1]
    if wrong:
        raise ValueError(f"{wrong[0]}={given[wrong[0]]}; wanted a whole number from 1 on")
    size, stride = given.get("window_size"), given.get("stride")
    if size is not None and stride is not None and stride > size:
        raise ValueError(f"window_size={size} with stride={stride}; wanted 1 <= stride <= window_size")
    rehearsed = dataclasses.replace(reranker)
    rehearsed.load = _loads  # type: ignore[method-assign]
    with contextlib.suppress(_Loads):
        rehearsed.score(["query"], [["passage"]])


def fingerprint(reranker: Reranker) -> str:
    """What the scores depend on beside the arguments: device, dtype, and every byte of the checkpoint's files.

    A file in the hub's cache is called by its content; others are read, at about a gigabyte a second.
    """
    device = choose_device(reranker.device)
    folder = reranker.folder().path
    files = sorted({file for pattern in READ for file in folder.rglob(pattern) if file.is_file()})
    contents = {file.relative_to(folder).as_posix(): _content(file) for file in files}
    return json.dumps([device.type, str(choose_dtype(reranker.dtype, device)), contents])


def chunk_for(reranker: Reranker) -> int:
    """How many pairs its device reranks in some seconds."""
    return CHUNKS.get(choose_device(reranker.device).type, CHUNKS["cpu"])


def _content(file: Path) -> str:
    if file.is_symlink() and re.fullmatch(BLOB, file.resolve().name):
        return file.resolve().name
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _loads() -> None:
    raise _Loads
