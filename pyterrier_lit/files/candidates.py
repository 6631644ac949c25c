"""Reads candidates one query at a time, from a re-ranking file or from a run with topics and documents.

This module does not deal with models. Only one query with its passages is in memory at a time, together with the qids
of the previous queries. An exception is a file with a single JSON array, which is read into memory as a whole.
"""

import json
import math
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from pyterrier_lit.files.lines import numbered_lines


class Candidates(NamedTuple):
    """A query and its passages, best first."""

    qid: str
    query: str
    docnos: list[str]
    texts: list[str]


Lookup = Callable[[Iterable[str]], dict[str, str]]  # ids -> dict from id to text, without unknown ids
LISTS = {"candidates", "hits", "ctxs"}  # fields with a query's passages, in the formats of rank_llm, PE-Rank and LiT5
TEXTS = ("text", "segment", "contents", "content", "body", "passage")  # fields with the text of a document in rank_llm
ID = re.compile(r"[^\s\x00-\x1f\x7f-\x9f\ud800-\udfff]+")


def read_rerank_file(path: Path, depth: int | None = None) -> Iterator[Candidates]:
    """Yield each query of a file with its `depth` best candidates. If `depth` is None, all candidates are read.

    The file has JSON lines or one JSON array. The queries are in the order of the file.

    In TIRA's format (rerank.jsonl), each line is an object with qid, query, docno and text, and optionally rank and
    score. Other fields, such as original_document, are ignored. qid and docno may be numbers. The lines of a query must
    be consecutive.

    If all candidates of a query have a rank (from 0 or from 1), they are ordered by rank, and candidates of equal rank
    by descending score. If some ranks are missing, the candidates are ordered by descending score. If some scores are
    missing, too, the candidates keep the order of the file.

    In the three other formats, an object is a query with the list of its passages, best first:

    - rank_llm: {query: {qid, text}, candidates: [{docid, doc}]}; a doc with a title is read as "Title: ... Content:
      ...";
    - PE-Rank: {query, hits: [{qid, docid, content}]};
    - LiT5: {id, question, ctxs: [{docid, text}]}; a title is put before the text.

    In these three formats, a query without passages is left out.

    Raises OSError if the file cannot be read. Raises ValueError if the file is empty or a pipe, if a field is missing,
    or if the lines of a query are not consecutive. Also raises ValueError if a qid has two queries, or if a query has a
    docno twice. The message names the file and, for a fault in one line, the line. Also raises the errors of
    `numbered_lines`.
    """
    for rows in _queries(path, _rerank_rows(path)):
        differing = next((row for row in rows if row.query != rows[0].query), None)
        if differing is not None:
            raise ValueError(
                f"{differing.where}: qid {differing.qid!r} has two queries, {rows[0].query!r} and {differing.query!r};"
                " give each its own qid"
            )
        best = _best_first(rows)[:depth]
        yield Candidates(best[0].qid, best[0].query, [row.docno for row in best], [row.text for row in best])


def read_run(path: Path, topics: Lookup, documents: Lookup, depth: int | None = None) -> Iterator[Candidates]:
    """Yield each query of a TREC run[.gz] with its `depth` best candidates. The queries are in the order of the run.

    Args:
        path: the file of the run.
        topics: a function that takes qids and returns a dict from qid to query, without unknown qids. This module's
            function `topics` returns such a function.
        documents: a function that takes docnos and returns a dict from docno to text, without unknown docnos. This
            module's function `documents` returns such a function.
        depth: maximum number of candidates per query; None is all.

    The candidates of a query are ordered by rank, and candidates of equal rank by descending score. Raises the same
    errors as `read_rerank_file`, and ValueError if `topics` does not know a qid or `documents` does not know a docno.
    """
    for best in best_first(path, run_rows(path), depth):
        queries, texts = topics([best[0].qid]), documents([row.docno for row in best])
        if best[0].qid not in queries:
            raise ValueError(f"{best[0].where}: qid {best[0].qid!r} is not among the topics")
        unknown = next((row for row in best if row.docno not in texts), None)
        if unknown is not None:
            raise ValueError(f"{unknown.where}: docno {unknown.docno!r} is not among the documents")
        docnos = [row.docno for row in best]
        yield Candidates(best[0].qid, queries[best[0].qid], docnos, [texts[docno] for docno in docnos])


def topics(source: str) -> Lookup:
    """Returns a function that takes qids and returns a dict from qid to query, without unknown qids.

    source: a .jsonl[.gz] file with lines {qid, query}, any other file with lines `qid tab query`, or irds:ID for a data
    set of ir_datasets.
    """
    if source.startswith("irds:"):
        return OnDisk(source, ((query.query_id, query.default_text()) for query in _irds(source).queries_iter()))
    return OnDisk(source, _texts(Path(source), "qid", "query"))


def documents(source: str) -> Lookup:
    """Returns a function that takes docnos and returns a dict from docno to text, without unknown docnos.

    source: a .jsonl[.gz] file with lines {docno, text}, any other file with lines `docno tab text`, or irds:ID for a
    data set of ir_datasets.
    """
    if source.startswith("irds:"):
        store = _irds(source).docs_store()
        return lambda docnos: {doc.doc_id: _whole(doc.default_text()) for doc in store.get_many_iter(docnos)}
    return OnDisk(source, _texts(Path(source), "docno", "text"))


class OnDisk:
    """Texts and their ids in a temporary database, which is deleted when the process ends. Calling the object with ids
    returns a dict from id to text, without unknown ids.

    The texts are stored as UTF-8. A lone surrogate becomes U+FFFD, as in `frames.rerank`.

    Args:
        source: the name of the texts' source, for error messages.
        texts: (id, text) tuples.

    Raises ValueError if an id is repeated, and OSError if the database cannot be written.
    """

    def __init__(self, source: str, texts: Iterable[tuple[str, str]]):
        self.table = sqlite3.connect("")
        self.table.execute("create table texts (id text primary key, text text)")
        for id, text in texts:
            try:
                self.table.execute("insert into texts values (?, ?)", (id, _whole(text)))
            except sqlite3.IntegrityError:
                raise ValueError(f"{source} has {id!r} twice; keep one of them") from None
            except (sqlite3.Error, OverflowError) as error:
                raise OSError(f"the temporary index of {source} cannot be written ({error})") from error

    def __call__(self, ids: Iterable[str]) -> dict[str, str]:
        found = ((id, self.table.execute("select text from texts where id = ?", (id,)).fetchone()) for id in ids)
        return {id: row[0] for id, row in found if row}


class Row(NamedTuple):
    """A candidate in a file. `query` and `text` are empty if they are in other files."""

    where: str  # the name of the file and the number of the line, for error messages
    qid: str
    docno: str
    rank: float | None
    score: float | None
    query: str = ""
    text: str = ""


def best_first(path: Path, rows: Iterable[Row], depth: int | None = None) -> Iterator[list[Row]]:
    """Yield the first `depth` rows of each query of a file, best first. The rows are ordered as in `read_rerank_file`.

    path: the file, for error messages. rows: the rows of the file. Raises ValueError if the file is empty or a pipe, if
    the rows of a query are not consecutive, or if a query has a docno twice.
    """
    return (_best_first(group)[:depth] for group in _queries(path, rows))


def _queries(path: Path, rows: Iterable[Row]) -> Iterator[list[Row]]:
    if path.is_fifo() or path.is_char_device():
        raise ValueError(f"{path} is a pipe or a terminal; candidates are read twice, so write them into a file")
    finished: set[str] = set()
    for qid, group in groupby(rows, key=lambda row: row.qid):
        listed, docnos = [], set()
        for row in group:
            if qid in finished:
                raise ValueError(f"{row.where}: qid {qid!r} came before, with others in between; sort the file by qid")
            if row.docno in docnos:
                raise ValueError(f"{row.where}: qid {qid!r} has docno {row.docno!r} twice; keep one of them")
            docnos.add(row.docno)
            listed.append(row)
        finished.add(qid)
        yield listed
    if not finished:
        raise ValueError(f"{path} holds no candidates")


def _best_first(rows: list[Row]) -> list[Row]:
    if all(row.rank is not None for row in rows):
        return sorted(rows, key=lambda row: (row.rank, math.inf if row.score is None else -row.score))
    if all(row.score is not None for row in rows):
        return sorted(rows, key=attrgetter("score"), reverse=True)
    return rows


def _rerank_rows(path: Path) -> Iterator[Row]:
    for where, record in objects(path):
        name = next((name for name in LISTS if name in record), None)
        if name is None:
            yield _rerank_row(where, record)
        else:
            yield from _listed(where, record, name)


def _listed(where: str, record: dict[str, Any], name: str) -> Iterator[Row]:
    """The rows of a record with a query and all its passages. name: the field with the list of the passages."""
    passages = record[name]
    if not isinstance(passages, list) or not all(isinstance(passage, dict) for passage in passages):
        raise ValueError(f"{where} has no list of passages under {name}; wanted an object for each")
    if not passages:
        return
    if name == "candidates":
        head = record["query"] if isinstance(record.get("query"), dict) else {}
        qid, query = key(head, "qid", f"{where}, query"), _text(head, "text", f"{where}, query")
    elif name == "hits":
        qid, query = key(passages[0], "qid", f"{where}, {name} 1"), _text(record, "query", where)
    else:
        qid, query = key(record, "id", where), _text(record, "question", where)
    qid = _id(qid, "qid", where)
    for position, passage in enumerate(passages, 1):
        place = f"{where}, {name} {position}"
        docno = _id(key(passage, "docid", place), "docid", place)
        yield Row(place, qid, docno, position, None, query, _composed(passage, name, place))


def _composed(passage: dict[str, Any], name: str, where: str) -> str:
    """The text of a passage. If the passage has a title, the title is added to the text as in the code of the format's
    authors."""
    doc = passage.get("doc", passage) if name == "candidates" else passage
    if not isinstance(doc, dict):
        return _text(passage, "doc", where)
    text = _text(doc, next((field for field in TEXTS if field in doc), TEXTS[0]), where)
    if not doc.get("title"):
        return text
    title = _text(doc, "title", where)
    return f"Title: {title} Content: {text}" if name == "candidates" else f"{title} {text}"


def _rerank_row(where: str, record: dict[str, Any]) -> Row:
    return Row(
        where,
        _id(key(record, "qid", where), "qid", where),
        _id(key(record, "docno", where), "docno", where),
        number(record, "rank", where),
        number(record, "score", where),
        _text(record, "query", where),
        _text(record, "text", where),
    )


def run_rows(path: Path) -> Iterator[Row]:
    """Yield a `Row` for each line of a TREC run[.gz]. Raises ValueError if a line is malformed; the message names the
    file and the line."""
    for where, line in numbered_lines(path):
        columns = line.split()
        if len(columns) != 6:
            raise ValueError(f"{where} has {len(columns)} columns; wanted six: qid Q0 docno rank score system")
        qid, _, docno, rank, score, _ = columns
        numbers = {"rank": rank, "score": score}
        yield Row(
            where,
            _id(qid, "qid", where),
            _id(docno, "docno", where),
            number(numbers, "rank", where),
            number(numbers, "score", where),
        )


def _texts(path: Path, name: str, field: str) -> Iterator[tuple[str, str]]:
    if ".jsonl" in path.suffixes:
        for where, record in objects(path):
            yield _id(key(record, name, where), name, where), _text(record, field, where)
        return
    for where, line in numbered_lines(path):
        id, tab, text = line.rstrip("\r\n").partition("\t")
        if not tab:
            raise ValueError(
                f"{where} has no tab; wanted {name} and {field} with a tab between, or a file named .jsonl"
            )
        yield id.strip(), text


def objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (place, object) for each object in a file that has JSON lines or one JSON array. The place, for error
    messages, is a text with the name of the file and the number of the line or array item."""
    lines = numbered_lines(path)
    first = next(lines, None)
    if first is None:
        return
    if first[1].lstrip().startswith("["):
        items = _json(str(path), "".join([first[1], *(line for _, line in lines)]))
        records = ((f"{path}, item {number}", item) for number, item in enumerate(items, 1))
    else:
        records = ((where, _json(where, line)) for where, line in chain([first], lines))
    for where, record in records:
        if not isinstance(record, dict):
            raise ValueError(f"{where} holds a {type(record).__name__}, wanted an object of named fields")
        yield where, record


def _json(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON, or is cut short ({error})") from error


def key(record: dict[str, Any], name: str, where: str) -> str:
    """The id in the field `name` of a record, as text. Raises ValueError if the field has no string or whole number.

    where: the place of the record, for the error message.
    """
    value = record.get(name)
    if value is None or isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"{where} {_given(record, name)}; wanted a string or a whole number")
    return str(value)


def _id(value: str, name: str, where: str) -> str:
    """The given qid or docno. Raises ValueError if a run file cannot contain such an id."""
    if not ID.fullmatch(value):
        raise ValueError(
            f"{where} has {name} {value!r}; it may not be empty or contain white space, control characters or a"
            " lone surrogate"
        )
    return value


def _text(record: dict[str, Any], name: str, where: str) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{where} {_given(record, name)}; wanted a string")
    return value


def _whole(text: str) -> str:
    """The text without surrogates: a surrogate pair becomes the character that it encodes, and a lone surrogate becomes
    U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def number(record: dict[str, Any], name: str, where: str) -> float | None:
    """The number in the field `name` of a record, or None if the field is absent or null. Raises ValueError if the
    field contains anything other than a finite number.

    where: the place of the record, for the error message.
    """
    if record.get(name) is None:
        return None
    try:
        value = float(record[name])
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{where} {_given(record, name)}; wanted a number")
    return value


def _given(record: dict[str, Any], name: str) -> str:
    return f"has {name} {record[name]!r}" if name in record else f"has no {name}"


def _irds(source: str) -> Any:
    import ir_datasets

    try:
        return ir_datasets.load(source.removeprefix("irds:"))
    except KeyError as error:
        raise ValueError(f"{source} is not known to ir_datasets ({error})") from error
