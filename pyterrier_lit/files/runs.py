"""Reranks candidates and writes a TREC run, in chunks of queries. An unfinished run is in a file called a part. This
module does not deal with models."""

import contextlib
import gzip
import hashlib
import json
import math
import os
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import pyterrier as pt
import torch

from pyterrier_lit.batching import counted_tokens
from pyterrier_lit.files.candidates import Candidates
from pyterrier_lit.files.locks import only_writer

CHUNK = 100  # number of query-passage pairs reranked between two writes, such as one query with 100 passages
PARTS = r"\.([0-9a-f]{8}(?:-[0-9a-f]{8}){,2})\.part"  # the end of the name of a part (an unfinished run)
HASHED = (  # for each of the three hashes in the name of a part: what differs if this hash differs
    "another reranker, model, option, chunk or system",
    "other weights or another device",
    "another input, order or depth",
)


class Summary(NamedTuple):
    """What one call of `write_run` did."""

    queries: int  # queries reranked in this call
    pairs: int  # query-passage pairs reranked in this call
    found: int  # queries whose ranking was already in the resumed run
    seconds: float  # for reranking and writing, including the loading of the model
    real_tokens: int  # tokens in all batches, without padding
    padded_tokens: int  # tokens in all batches, with padding

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
    weights: Callable[[], str] | None = None,
) -> Summary:
    """Rerank every query of an input and write a TREC run. Returns a summary of the call.

    The queries of the run are in the order of the input. The passages of a query are ordered by rank, from 1, with
    strictly decreasing scores (see `falling`). A run that is not complete yet is in another file, called a part. A
    later call can resume this part. The name of the part has hashes of arguments, weights and input:
    run.txt.0a1b2c3d-4e5f6a7b-8c9d0e1f.part for the output run.txt.

    Args:
        reranker: a transformer that keeps every row.
        read: a function that yields the queries from the start of the input. The function is called twice. The first
            time, the whole input is checked before any query is reranked.
        output: the file of the run, gzipped if its name ends in .gz.
        system: the name in the last column of the run.
        chunk: maximum number of query-passage pairs that are reranked together and then written. A query is not split:
            if it has more pairs, it is reranked alone. A larger chunk fills the batches better; with a smaller chunk,
            less is lost in a crash.
        resume: resume the part of an interrupted call, without repeating the queries in it. Arguments, weights and
            input must be unchanged.
        weights: a function without arguments, such as `partial(fingerprint, reranker)`. The function returns a text
            that identifies the reranker's weights. The function is called after the input is checked.

    Raises FileExistsError if the output exists, or if a part exists and `resume` is False. Raises BlockingIOError if
    another process writes the output. Raises ValueError if `system` or `chunk` is invalid, if a part was written with
    other arguments, weights or input, or if the input changes during the call. Raises OSError if the run cannot be
    written. Errors of `read` and of the reranker are not caught. If a part is kept after an error, a note on the error
    names the part.
    """
    check_settings(system, chunk)
    output = Path(os.path.realpath(output)) if output.is_symlink() else output
    with only_writer(output):
        check_new(output, resume)
        seen, total = _read_through(read())
        settings = f"{reranker!r} {system} {chunk}"
        part = _part_of(output, settings.encode(), (weights() if weights else "").encode(), b"".join(seen))
        queries = pairs = found = 0
        start = time.perf_counter()
        with Part(part) as run, counted_tokens() as tokens, pt.tqdm(total=total, unit="pair", desc=system) as bar:
            for together in _chunks(_unchanged(read(), seen), chunk):
                n = sum(len(query.docnos) for query in together)
                if run.skip(together, system):
                    found += len(together)
                else:
                    run.append(_ranked(reranker, together, system))
                    queries, pairs = queries + len(together), pairs + n
                bar.update(n)
            run.finish(output)
    return Summary(queries, pairs, found, time.perf_counter() - start, tokens.real, tokens.padded)


def check_settings(system: str, chunk: int) -> None:
    """Raise ValueError if the last column of a run cannot contain the system name, or if the chunk is less than 1."""
    if not re.fullmatch(r"[A-Za-z0-9._-]+", system):
        raise ValueError(f"system={system!r}; a run file allows letters, digits, '.', '_' and '-' in it")
    if chunk < 1:
        raise ValueError(f"chunk={chunk}; wanted a positive number of pairs")


def check_new(output: Path, resume: bool) -> None:
    """Raise FileExistsError if the output exists, or if a part of it exists and `resume` is False."""
    if output.exists():
        raise FileExistsError(f"{output} exists already; move it away to write a new run")
    begun = _parts(output)
    if begun and not resume:
        raise FileExistsError(
            f"{next(iter(begun))} is an unfinished run; resume continues it, or delete it to start again"
        )


def falling(scores: Sequence[float]) -> Iterator[float]:
    """Make the scores of a ranking strictly decreasing as float32 numbers. Yields the scores, best first.

    scores: the scores of the ranking, best first. If a score is not smaller than the last yielded score, the next
    float32 number below the last yielded score is yielded instead. Other scores are only rounded to float32. The reason
    is that trec_eval reads scores as float32, orders a run by these scores, and breaks ties by docno. With equal
    scores, trec_eval would therefore lose the order in which the reranker ranked the passages.
    """
    numbers = torch.tensor([math.inf, -math.inf, *scores], dtype=torch.float32, device="cpu")
    below, lowest, *given = numbers.unbind()
    for score in given:
        below = torch.minimum(score, torch.nextafter(below, lowest))
        yield below.item()


class Part:
    """The file of an unfinished run, which is new or resumed.

    The file always ends with a complete chunk, unless the process was killed.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self.file = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115 - closed by __exit__
        except OSError as error:
            raise OSError(f"{path.parent} cannot be written to ({error}); give another output") from error
        self.end = path.stat().st_size  # after an error, the file is cut to this number of bytes

    def skip(self, queries: list[Candidates], system: str) -> bool:
        """Skip the rankings of the given queries if these rankings come next in the file and are complete. Returns
        whether the rankings were skipped."""
        start = self.file.tell()
        if all(_is_ranking(list(islice(self.file, len(query.docnos))), query, system) for query in queries):
            return True
        self.end = self.file.seek(start)  # an unfinished or damaged chunk begins here
        return False

    def append(self, lines: str) -> None:
        """Write the next rankings, as lines of a run. If an unfinished chunk follows in the file, it is removed
        first."""
        try:
            self.file.truncate()
            self.file.write(lines.encode())
            self.file.flush()
            self.path.stat()  # fails if the file was removed meanwhile
        except OSError as error:
            raise OSError(f"{self.path} cannot be extended ({error})") from error
        self.end = self.file.tell()

    def finish(self, output: Path) -> None:
        """Write the run to disk completely and rename it to `output`. The file is gzipped if the name of the output
        ends in .gz."""
        try:
            self.file.truncate()
            if output.suffix == ".gz":
                self._pack(output)
                self.path.unlink()
            else:
                os.fsync(self.file.fileno())
                self.path.replace(output)
        except OSError as error:
            raise OSError(f"{self.path} cannot become {output.name} ({error})") from error

    def _pack(self, output: Path) -> None:
        packed = output.with_name(f".{output.name}.packing")
        try:
            self.file.seek(0)
            with open(packed, "wb") as raw:
                with gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as file:
                    shutil.copyfileobj(self.file, file)
                raw.flush()
                os.fsync(raw.fileno())
            packed.replace(output)
        finally:
            packed.unlink(missing_ok=True)

    def __enter__(self) -> "Part":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        with contextlib.suppress(OSError):  # on a full disk, closing cannot write the buffer either
            self.file.close()
        if error is None or not self.path.exists():
            return
        if self.end:
            with contextlib.suppress(OSError):  # if truncating fails, resuming removes the unfinished chunk
                os.truncate(self.path, self.end)
            error.add_note(f"what was finished is in {self.path}, a run file; resume continues it")
        else:
            self.path.unlink()


def _parts(output: Path) -> dict[Path, list[str]]:
    """The unfinished runs of an output, as path of the part -> the hashes in the name of the part. Empty files are left
    out."""
    found = {
        part: re.fullmatch(re.escape(output.name) + PARTS, part.name) for part in sorted(output.parent.glob("*.part"))
    }
    return {part: match[1].split("-") for part, match in found.items() if match and part.stat().st_size}


def _part_of(output: Path, *made_of: bytes) -> Path:
    """The path of the part of an output. The name of the part has a hash of each element of `made_of`.

    made_of: the arguments, the weights and the input of the run, in this order.

    Raises ValueError if a part with other hashes exists.
    """
    hashes = [f"{zlib.crc32(each):08x}" for each in made_of]
    for other, begun in _parts(output).items():
        differing = [what for what, own, its in zip_longest(HASHED, hashes, begun) if own != its]
        if differing:
            raise ValueError(f"{other} was started with {' and '.join(differing)}; use the same again, or delete it")
    return output.with_name(f"{output.name}.{'-'.join(hashes)}.part")


def _read_through(queries: Iterable[Candidates]) -> tuple[list[bytes], int]:
    digests, pairs = [], 0
    for query in queries:
        digests.append(_digest(query))
        pairs += len(query.docnos)
    return digests, pairs


def _digest(query: Candidates) -> bytes:
    return hashlib.blake2b(json.dumps(query).encode(), digest_size=8).digest()


def _unchanged(queries: Iterable[Candidates], seen: Sequence[bytes]) -> Iterator[Candidates]:
    for number, (query, digest) in enumerate(zip_longest(queries, seen), 1):
        if query is None or digest is None or _digest(query) != digest:
            raise ValueError(
                f"the input changed while it was read: query {number} is not what it was at the start; run again when"
                " it is complete"
            )
        yield query


def _chunks(queries: Iterable[Candidates], pairs: int) -> Iterator[list[Candidates]]:
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


def _is_ranking(lines: list[bytes], query: Candidates, system: str) -> bool:
    columns = [line.decode(errors="replace").split(" ") for line in lines]
    fixed = [[*given[:2], *given[3:4], *given[5:]] for given in columns]
    wanted = [[query.qid, "Q0", str(rank), f"{system}\n"] for rank in range(1, len(query.docnos) + 1)]
    return (
        fixed == wanted
        and {given[2] for given in columns} == set(query.docnos)
        and all(re.fullmatch(r"-?(\d[\d.]*(e[+-]\d+)?|inf)|nan", given[4]) for given in columns)
    )


def _ranked(reranker: pt.Transformer, queries: list[Candidates], system: str) -> str:
    rows: list[dict[str, Any]] = [
        {"qid": query.qid, "query": query.query, "docno": docno, "text": text, "rank": rank}
        for query in queries
        for rank, (docno, text) in enumerate(zip(query.docnos, query.texts, strict=True))
    ]
    rankings: dict[str, list[dict[str, Any]]] = {query.qid: [] for query in queries}
    for row in sorted(reranker.transform_iter(rows), key=lambda row: row["rank"]):
        rankings[row["qid"]].append(row)
    return "".join(
        f"{qid} Q0 {row['docno']} {rank} {score:.9g} {system}\n"  # nine digits distinguish all float32 values
        for qid, ranking in rankings.items()
        for rank, (row, score) in enumerate(zip(ranking, falling([row["score"] for row in ranking]), strict=True), 1)
    )
