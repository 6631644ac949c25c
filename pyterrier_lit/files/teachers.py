"""Reads public teacher data: queries with the passages that a teacher was shown, and the teacher's order. This module
does not deal with models."""

import hashlib
import json
import re
import string
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from pyterrier_lit.files.candidates import key, objects
from pyterrier_lit.files.lines import numbered_lines
from pyterrier_lit.order import complete

SHAPES = {"conversations", "extra_texts", "retrieved_passages"}  # each format is identified by one of these fields
HEAD = re.compile(r"relevance to (?:the )?(?:search )?query: (.*?)\.?[ \t]*\n\s*(?=\[(?:1|A)\] )", re.DOTALL)
PE_HEAD = re.compile(r"relevance to the search query: (.*?)\.\n(?=Passage 1: )", re.DOTALL)
SAID = re.compile(r"([0-9]+) passages")  # the place in a prompt that says how many passages follow
TAIL = "Search Query: "


class Taught(NamedTuple):
    """A query, its passages in the order in which the teacher was shown them, and the teacher's order."""

    qid: str
    query: str
    docnos: list[str]
    texts: list[str]
    order: list[int]  # positions in docnos and texts, best first
    repaired: bool  # whether the order in the file was incomplete, had repetitions or had invalid numbers


def is_taught(path: Path) -> bool:
    """Return whether a JSON file is teacher data: its first record then has one of the fields in SHAPES."""
    _, first = next(objects(path), ("", {}))
    return bool(SHAPES & first.keys())


def read_taught(path: Path, orders: Path | None = None) -> Iterator[Taught]:
    """Yield the ranked lists in a file of public teacher data, in the order of the file.

    path: a file that has JSON lines or one JSON array. The format of a record is recognised by one of its fields:

    - conversations (RankZephyr and other data of rank_llm): the last two turns are rank_llm's prompt and the
      teacher's order, such as "[2] > [1]", or "[B] > [A]" in FIRST's data;
    - extra_texts (PE-Rank's train.jsonl): the texts of n or 2n passages, of which the teacher was shown the first n.
      The field `ranking` has the numbers of these n passages, best first, and a turn of messages_wo_content contains
      the query;
    - retrieved_passages (RankGPT and TWOLAR): `orders` is a file with a JSON array of texts such as "[2] > [1]". The
      i-th text is the order for the i-th record. If `orders` is None, the passages must already be in the teacher's
      order, as in TWOLAR's data.

    The qid is the field `id` or `qid`, else the record's number. If a qid was used before, the record's number is
    appended to the qid. A passage without docid gets a hash of its text as docno, so that equal texts are one passage.
    An order with missing, invalid or repeated numbers is completed as in RankGPT: the first mention of each passage
    counts, and passages that are not named follow in the order in which they were shown.

    Raises OSError if a file cannot be read. Raises ValueError for any other format, and for an order that names no
    passage. Raises ValueError for a prompt that contains two different queries or states a wrong number of passages.
    These messages name the file, and the line or the item of a JSON array. Also raises ValueError if the file has no
    records, or if `orders` does not have one order for each record.
    """
    given = None if orders is None else _orders(orders)
    seen: set[str] = set()
    number = 0
    for number, (where, record) in enumerate(objects(path), 1):
        if given is not None and number > len(given):
            raise ValueError(f"{where} has no order: {orders} holds {len(given)}; wanted one for each record")
        if given is not None and "retrieved_passages" not in record:
            raise ValueError(f"{where} has no retrieved_passages; {orders} is for RankGPT's records, which have them")
        query, passages, named = _read(where, record, given[number - 1] if given is not None else None)
        everywhere = range(len(passages))
        if not any(position in everywhere for position in named):
            raise ValueError(f"{where}: the teacher's order names none of the {len(passages)} passages")
        name = next((name for name in ("id", "qid") if record.get(name) is not None), None)
        qid = str(number) if name is None else key(record, name, where)
        qid = f"{qid}#{number}" if qid in seen else qid
        seen.add(qid)
        repaired = sorted(named) != list(everywhere)
        yield Taught(qid, query, *_once(passages, complete(named, len(passages))), repaired)
    if not number:
        raise ValueError(f"{path} holds no lists")
    if given is not None and number < len(given):
        raise ValueError(f"{orders} holds {len(given)} orders and {path} {number} records; wanted one for each")


Passage = tuple[str, str]  # docno, text


def _read(where: str, record: dict[str, Any], order: str | None) -> tuple[str, list[Passage], list[int]]:
    """Return the query, the passages in the order in which the teacher was shown them, and the teacher's order.

    The teacher's order is a list of positions of passages, from 0. Positions may be invalid, repeated or missing.

    order: the text of RankGPT's order for this record, or None.
    """
    if "conversations" in record:
        return _conversation(where, record)
    if "extra_texts" in record:
        return _pe_rank(where, record)
    if "retrieved_passages" in record:
        passages = [
            _passage(f"{where}, passage {i}", p) for i, p in enumerate(_list(where, record, "retrieved_passages"), 1)
        ]
        named = list(range(len(passages))) if order is None else _positions(order, r"[0-9]+")
        return _text(where, record, "query"), passages, named
    raise ValueError(
        f"{where} has none of {', '.join(sorted(SHAPES))}; wanted the teacher data that training.rst lists"
    )


def _conversation(where: str, record: dict[str, Any]) -> tuple[str, list[Passage], list[int]]:
    turns = _list(where, record, "conversations")
    values = [turn.get("value") if isinstance(turn, dict) else None for turn in turns[-2:]]
    if len(values) < 2 or not all(isinstance(value, str) for value in values):
        raise ValueError(
            f"{where}: conversations end in {turns[-2:]!r:.80}; wanted a prompt and an order, each a value"
        )
    prompt, target = map(str, values)
    head, end = HEAD.search(prompt), prompt.rfind(f"\n{TAIL}")
    if head is None or end < head.end():
        raise ValueError(
            f"{where}: the prompt is not rank_llm's; wanted '... search query: QUERY.', '[1] ...', '{TAIL}QUERY.'"
        )
    _agree(where, head[1], prompt[end + 1 :])
    in_letters = prompt.startswith("[A] ", head.end())
    texts = _parted(prompt[head.end() : end], string.ascii_uppercase if in_letters else map(str, count(1)))
    said = SAID.search(prompt)
    if said and said[1] != str(len(texts)):
        raise ValueError(
            f"{where}: the prompt says {said[1]} passages, and {len(texts)} lines begin with their numbers"
        )
    return head[1], [(_docno(text), text) for text in texts], _positions(target, r"[A-Z]" if in_letters else r"[0-9]+")


def _parted(text: str, names: Any) -> list[str]:
    """Split the passages of a prompt into one text per passage.

    names: the identifiers of the passages, such as "1", "2". A passage begins at the line that starts with its
    identifier in brackets.
    """
    names, passages = iter(names), list[list[str]]()
    following = f"[{next(names)}] "
    for line in text.split("\n"):
        if line.startswith(following) or line == following.rstrip():
            passages.append([line[len(following) :]])
            following = f"[{next(names, '')}] "
        else:
            passages[-1].append(line)
    return ["\n".join(lines).strip() for lines in passages]


def _pe_rank(where: str, record: dict[str, Any]) -> tuple[str, list[Passage], list[int]]:
    texts, ranking = _list(where, record, "extra_texts"), _list(where, record, "ranking")
    if not all(isinstance(text, str) for text in texts) or not all(type(rank) is int for rank in ranking):
        raise ValueError(f"{where}: wanted texts in extra_texts and whole numbers in ranking")
    n = len(ranking)
    if len(texts) not in (n, 2 * n):
        raise ValueError(f"{where} has {len(texts)} extra_texts for {n} numbers in ranking; wanted {n}, or {2 * n}")
    turns = [turn.get("content") for turn in _list(where, record, "messages_wo_content") if isinstance(turn, dict)]
    head = next((found for turn in turns if isinstance(turn, str) and (found := PE_HEAD.search(turn))), None)
    if head is None:
        raise ValueError(f"{where}: no turn of messages_wo_content is PE-Rank's prompt, '... search query: QUERY.'")
    _agree(where, head[1], head.string[head.string.rfind(TAIL) :])
    first = min(ranking, default=0)  # the numbers start at 0 if one of them is 0, else at 1
    return head[1], [(_docno(text), text) for text in texts[:n]], [number - min(first, 1) for number in ranking]


def _agree(where: str, query: str, tail: str) -> None:
    if not re.match(re.escape(f"{TAIL}{query}") + r"\.?[ \t]*(\n|$)", tail):
        again = tail.removeprefix(TAIL).partition("\n")[0]
        raise ValueError(f"{where}: the prompt has two queries, {query!r:.80} and {again!r:.80}; wanted one twice")


def _passage(where: str, passage: Any) -> Passage:
    if not isinstance(passage, dict):
        raise ValueError(f"{where} is a {type(passage).__name__}; wanted an object with docid and text")
    text = _text(where, passage, "text")
    text = f"{passage['title']} {text}" if passage.get("title") else text
    return (key(passage, "docid", where) if passage.get("docid") is not None else _docno(text)), text


def _once(passages: Sequence[Passage], order: Sequence[int]) -> tuple[list[str], list[str], list[int]]:
    """The docnos, the texts and the order of the passages, without repeated docnos. Of passages with the same docno,
    only the first one is kept."""
    docnos = list(dict.fromkeys(docno for docno, _ in passages))
    text_of = dict(reversed(passages))
    place = {docno: position for position, docno in enumerate(docnos)}
    return docnos, [text_of[docno] for docno in docnos], list(dict.fromkeys(place[passages[i][0]] for i in order))


def _orders(path: Path) -> list[str]:
    text = "".join(line for _, line in numbered_lines(path))
    try:
        orders = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON, or is cut short ({error})") from error
    if not isinstance(orders, list) or not all(isinstance(order, str) for order in orders):
        raise ValueError(f"{path} is not a JSON array of texts such as '[2] > [1]'; wanted RankGPT's permutations")
    return orders


def _positions(text: str, name: str) -> list[int]:
    """The positions (from 0) that the text of an order names: "[3] > [1]" or "[C] > [A]" -> [2, 0]. They may be invalid
    or repeated.

    name: a regular expression that matches an identifier.
    """
    found = [name for name in re.findall(name, text) if len(name) < 19]  # Python's int refuses thousands of digits
    return [int(name) - 1 if name.isdecimal() else ord(name) - ord("A") for name in found]


def _docno(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


def _list(where: str, record: dict[str, Any], name: str) -> list[Any]:
    if not isinstance(record.get(name), list):
        raise ValueError(f"{where} has no list in {name}")
    return list(record[name])


def _text(where: str, record: dict[str, Any], name: str) -> str:
    if not isinstance(record.get(name), str):
        raise ValueError(f"{where} has no text in {name}")
    return str(record[name])
