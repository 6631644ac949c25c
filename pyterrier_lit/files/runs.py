"""Candidates to a TREC run, a chunk of queries at a time, each written when it is done. Knows no model."""

import contextlib
import glob
import gzip
import math
import os
import re
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyterrier as pt
import torch

from pyterrier_lit.batching import counted_tokens
from pyterrier_lit.files.candidates import Candidates

CHUNK = 2_000  # pairs reranked between two writes


class Summary(NamedTuple):
    """What one call of `write_run` did."""

    queries: int
    pairs: int
    found: int  # queries whose ranking was there already
    seconds: float
    real_tokens: int
    padded_tokens: int

    def __str__(self) -> str:
        done = f"{self.queries:,} queries, {self.pairs:,} pairs in {self.seconds:.1f} s with loading"
        if self.pairs:
            done += f", {self.pairs / self.seconds:,.1f} pairs/s"
        if self.real_tokens:
            ratio = self.padded_tokens / self.real_tokens
            done += f"; {self.padded_tokens:,} padded / {self.real_tokens:,} real tokens = {ratio:.3f}"
        return done + (f"; done before: {self.found:,} queries" if self.found else "")


def write_run(
    reranker: pt.Transformer,
    read: Callable[[], Iterable[Candidates]],
    output: Path,
    *,
    system: str,
    chunk: int = CHUNK,
    resume: bool = False,
) -> Summary:
    """Rerank every query of an input into `output`, a TREC run, gzipped if its name ends in .gz.

    reranker: a transformer that keeps every row. read: gives the queries from the start, each time it is called; it is
        called twice, first to see that all of the input is right before hours go into it.
    system: the last column. chunk: whole queries are reranked together up to so many pairs, and written when they are
        done; more packs batches better, fewer loses less.
    resume: go on with what an interrupted call with the same arguments has left, and repeat nothing that it finished.

    Until all is done the run is called {output}.{hash of the arguments}.part, a run file itself, which a later call
    goes on with. Queries stand in the order of the input, passages by rank from 1, with falling scores (see `falling`).

    Raises FileExistsError for an output or part that is there already and not to be resumed, ValueError for one that
    was begun otherwise, OSError when it cannot be written, and what `read` and the reranker raise; a note says what was
    kept.
    """
    if not re.fullmatch(r"[A-Za-z0-9._-]+", system):
        raise ValueError(f"system={system!r}; a run file allows letters, digits, '.', '_' and '-' in it")
    if chunk < 1:
        raise ValueError(f"chunk={chunk}; wanted a number of pairs from 1 on")
    if output.exists():
        raise FileExistsError(f"{output} is there already; move it away to make it anew")
    settings = f"{reranker!r} {system} {chunk}"
    part = output.with_name(f"{output.name}.{zlib.crc32(settings.encode()):08x}.part")
    with Part(part, _unfinished(output, part, resume)) as run:
        total = sum(len(query.docnos) for query in read())
        queries = pairs = found = 0
        start = time.perf_counter()
        with counted_tokens() as tokens, pt.tqdm(total=total, unit="pair", desc=system) as bar:
            for together in _chunks(read(), chunk):
                n = sum(len(query.docnos) for query in together)
                if run.skip(together):
                    found += len(together)
                else:
                    run.append(_lines(reranker, together, system))
                    queries, pairs = queries + len(together), pairs + n
                bar.update(n)
        run.finish(output)
    return Summary(queries, pairs, found, time.perf_counter() - start, tokens.real, tokens.padded)


def falling(scores: Sequence[float]) -> Iterator[float]:
    """Scores of a ranking, best first, as float32 and each below the one before: a tie moves to the next number below.

    Evaluation orders a run by its scores, which trec_eval reads as float32, and breaks ties by docno. So ranks that a
    reranker gives to equal scores (the order in which they came) would be lost in a file; apart from ties nothing
    changes.
    """
    below = torch.tensor(math.inf)
    for score in torch.tensor(scores, dtype=torch.float32):
        below = torch.minimum(score, torch.nextafter(below, torch.tensor(-math.inf)))
        yield below.item()


class Part:
    """A run that is being written. It always ends with a whole chunk, unless the process was killed."""

    def __init__(self, path: Path, resume: bool):
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(path, "r+b" if resume else "w+b")  # noqa: SIM115 - closed by __exit__
        except OSError as error:
            raise OSError(f"{path.parent} cannot be written to ({error}); give another output") from error
        self.end = path.stat().st_size  # of what is to be kept

    def skip(self, queries: list[Candidates]) -> bool:
        """Go past the rankings of these queries, if they come next and are whole. Returns whether they did."""
        wanted = {(query.qid, docno) for query in queries for docno in query.docnos}
        start = self.file.tell()
        lines = list(islice(self.file, len(wanted)))
        if len(lines) < len(wanted) or not lines[-1].endswith(b"\n"):
            self.end = self.file.seek(start)
            return False
        columns = [line.decode().split() for line in lines]
        if {(qid, docno) for qid, _, docno, *_ in columns} != wanted:
            raise ValueError(f"{self.path} was begun with another input; give that again, or delete it")
        return True

    def append(self, lines: str) -> None:
        """Write the next rankings, in place of what is left of a chunk that was not finished."""
        try:
            self.file.truncate()
            self.file.write(lines.encode())
            self.file.flush()
        except OSError as error:
            raise OSError(f"{self.path} cannot be written on ({error})") from error
        self.end = self.file.tell()

    def finish(self, output: Path) -> None:
        """Give the run its name, gzipped if that ends in .gz."""
        if self.file.read(1):
            raise ValueError(f"{self.path} was begun with a longer input; give that again, or delete it")
        os.fsync(self.file.fileno())
        if output.suffix == ".gz":
            self.file.seek(0)
            with tempfile.TemporaryDirectory(dir=output.parent, prefix=".packing-") as folder:
                packed = Path(folder) / output.name
                with open(packed, "wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as file:
                    shutil.copyfileobj(self.file, file)
                packed.replace(output)
            self.path.unlink()
        else:
            self.path.replace(output)

    def __enter__(self) -> "Part":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        with contextlib.suppress(OSError):  # a disk that is full refuses what is still in the buffer once more
            self.file.close()
        if error is None:
            return
        if self.end:
            os.truncate(self.path, self.end)
            error.add_note(f"what was finished is in {self.path}, a run file; resume goes on with it")
        else:
            self.path.unlink()


def _unfinished(output: Path, part: Path, resume: bool) -> bool:
    """Whether there is a part to go on with. Any other part with something in it is an error."""
    parts = [Path(name) for name in glob.glob(f"{glob.escape(str(output))}.*.part")]
    for other in parts:
        if other.stat().st_size and not resume:
            raise FileExistsError(
                f"{other} holds an unfinished run; resume goes on with it, or delete it to begin anew"
            )
        if other.stat().st_size and other != part:
            raise ValueError(
                f"{other} was begun with another reranker, model, option, chunk or system; give the same again, or"
                " delete it"
            )
    return resume and part in parts


def _chunks(queries: Iterable[Candidates], pairs: int) -> Iterator[list[Candidates]]:
    """Whole queries in lists of at most so many pairs; a longer query is a list of its own."""
    together: list[Candidates] = []
    n = 0
    for query in queries:
        if together and n + len(query.docnos) > pairs:
            yield together
            together, n = [], 0
        together.append(query)
        n += len(query.docnos)
    if together:
        yield together


def _lines(reranker: pt.Transformer, queries: list[Candidates], system: str) -> str:
    rows: list[dict[str, Any]] = [
        {"qid": query.qid, "query": query.query, "docno": docno, "text": text, "rank": rank}
        for query in queries
        for rank, (docno, text) in enumerate(zip(query.docnos, query.texts, strict=True))
    ]
    rankings: dict[str, list[dict[str, Any]]] = {query.qid: [] for query in queries}
    for row in sorted(reranker.transform_iter(rows), key=lambda row: row["rank"]):
        rankings[row["qid"]].append(row)
    return "".join(
        f"{qid} Q0 {row['docno']} {rank} {score:.9g} {system}\n"  # nine digits tell all float32 apart
        for qid, ranking in rankings.items()
        for rank, (row, score) in enumerate(zip(ranking, falling([row["score"] for row in ranking]), strict=True), 1)
    )
