"""TIRA's conventions: what a system finds in its input directory and writes to its output directory.

Sources: tira 0.0.207, which checks the output, and tirex-tracker 0.2.24, which measures the hardware. This module does
not deal with models.
"""

import contextlib
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pyterrier as pt

from pyterrier_lit.files.candidates import Candidates, documents, read_rerank_file, read_run, topics
from pyterrier_lit.files.runs import Summary, write_run
from pyterrier_lit.models.devices import choose_device, choose_dtype
from pyterrier_lit.reranker import Reranker

METADATA = "ir-metadata.yml"
FORMATS = ("run.txt", "ir_metadata", "run-with-metadata")


def candidates_in(
    folder: Path, first_stage: Path | None = None, depth: int | None = None
) -> Callable[[], Iterator[Candidates]]:
    """Returns a function that reads the candidates in TIRA's input directory, from rerank.jsonl[.gz] or else from a
    run.

    Args:
        folder: the input directory.
        first_stage: a directory with the run.txt[.gz] of a first stage. This run is used only if the input directory
            has no rerank.jsonl[.gz]. The input directory must then have queries.jsonl[.gz] and documents.jsonl[.gz].
        depth: maximum number of candidates per query; None is all.

    Raises FileNotFoundError if there is neither a rerank.jsonl[.gz] nor a run with its queries and documents.
    """
    if (file := _either(folder, "rerank.jsonl")) is not None:
        return partial(read_rerank_file, file, depth)
    run = first_stage and _either(first_stage, "run.txt")
    queries, docs = _either(folder, "queries.jsonl"), _either(folder, "documents.jsonl")
    if run and queries and docs:
        lookups = cache(lambda: (topics(str(queries)), documents(str(docs))))
        return lambda: read_run(run, *lookups(), depth)
    raise FileNotFoundError(
        f"{folder} holds no rerank.jsonl[.gz], and there is no first stage's run to go with queries.jsonl and"
        " documents.jsonl; a reranker requires a data set for re-ranking, or an input run"
    )


class About(NamedTuple):
    """The metadata of a run."""

    system: str  # name of the method
    description: str  # what is needed to repeat the run
    dataset: str  # TIRA's id of the data set
    team: str  # name of the team in TIRA
    repository: str  # URL of the code


def write_submission(
    reranker: Reranker,
    read: Callable[[], Iterator[Candidates]],
    folder: Path,
    about: About,
    *,
    compress: bool = False,
    **settings: Any,
) -> Summary:
    """Rerank all candidates into run.txt (or run.txt.gz), write ir-metadata.yml, and check both files with TIRA's
    checker. Returns the summary of `write_run`.

    Each file is written under another name, and renamed when it is complete.

    Args:
        reranker: the reranker.
        read: a function that yields the queries with their candidates, from the start of the input.
        folder: the output directory, which is created if necessary.
        about: the metadata of the run.
        compress: write run.txt.gz instead of run.txt.
        settings: further keyword arguments of `write_run`.

    Raises the same errors as `write_run`. Raises ImportError if the extra `tirex` of this package is not installed, and
    ValueError with the checker's message if the output is invalid.
    """
    absent = [name for name in ("tira", "tirex_tracker") if importlib.util.find_spec(name) is None]
    if absent:
        raise ImportError(f"{' and '.join(absent)} cannot be imported; pip install 'pyterrier-lit[tirex]'")
    metadata: dict[str, Any] = {
        "actor": {"team": about.team},
        "tag": about.system,
        "method": {"name": about.system, "description": about.description},
        "implementation": {"source": {"repository": about.repository}},
        "data": {"test collection": {"name": about.dataset}},
    }
    with measured(folder / METADATA, metadata):
        summary = write_run(reranker, read, run_in(folder, compress), system=about.system, **settings)
        if summary.found:
            metadata["method"]["description"] += "; resumed: runtime and resources are those of the last part"
    check(folder)
    return summary


def run_in(folder: Path, compress: bool) -> Path:
    """The path of the run in an output directory: run.txt.gz if `compress` is True, else run.txt."""
    return folder / ("run.txt.gz" if compress else "run.txt")


def describe(reranker: Reranker, depth: int | None) -> str:
    """What is needed to repeat a run, as one line of text: the reranker's arguments, the revision of its model, the
    device, the dtype and the number of candidates per query."""
    values = {argument.name: argument.value for argument in pt.inspect.transformer_attributes(reranker)}
    device = choose_device(reranker.device)
    values |= {"device": device.type, "dtype": str(choose_dtype(reranker.dtype, device)).removeprefix("torch.")}
    folder = reranker.folder().path
    revision = f"revision {folder.name}" if folder.parent.name == "snapshots" else "a local folder"
    listed = ", ".join(f"{name}={value!r}" for name, value in values.items() if name != "verbose")
    over = "all candidates" if depth is None else f"the first {depth} candidates"
    return f"{type(reranker).__name__}({listed}); model: {revision}; over {over} of each query"


@contextlib.contextmanager
def measured(path: Path, metadata: dict[str, Any]) -> Iterator[None]:
    """A context manager that records the hardware, the software versions and the energy use while its `with` block
    runs. At the end of the block, this record and the given metadata of the run are written to `path`."""
    import yaml
    from tirex_tracker import ALL_MEASURES, Measure, tracking

    with tempfile.TemporaryDirectory() as temporary:
        # The tracker also writes an archive of all files of the git work tree that are not ignored, including data and
        # keys. The tracker therefore writes into a temporary directory
        file = Path(temporary) / METADATA
        with tracking(ALL_MEASURES - {Measure.GIT_ROOT}, 1_000, export_file_path=file):
            yield
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    for archive in ("archive", "archive path"):
        found["implementation"].get("source", {}).pop(archive, None)
    new = path.with_name(f".{path.name}.part")
    new.write_text(yaml.safe_dump(_merged(found, metadata), allow_unicode=True), encoding="utf-8")
    new.replace(path)


def check(folder: Path) -> None:
    """Check the run and the metadata in an output directory with TIRA's checker. Raises ValueError with the checker's
    message if one of them is invalid."""
    from tira.check_format import check_format

    for wanted in FORMATS:
        status, message = check_format(folder, wanted)
        if status.name != "OK":
            raise ValueError(f"TIRA's checker refuses {folder} as {wanted}: {message}")


def _either(folder: Path, name: str) -> Path | None:
    return next((file for file in (folder / f"{name}.gz", folder / name) if file.is_file()), None)


def _merged(found: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Merge two nested mappings. If both mappings have a value for a key, the value of `own` is taken."""
    both = {key: _merged(found[key], own[key]) for key in found.keys() & own.keys() if isinstance(own[key], dict)}
    return found | own | both
