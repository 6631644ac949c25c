"""experiments/serve.py: many requests at once, each with its own answer, and clear errors for bad requests."""

import json
import re
import subprocess
import sys
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import serve
from conftest import ROOT, TINY
from fastapi.testclient import TestClient
from test_docs import PT_DOCS, blocks

from pyterrier_lit import CrossEncoder

PASSAGES = ["Copy a file and its metadata.", "The length of a list.", "Remove an empty folder."]


@pytest.fixture
def reranker():
    return CrossEncoder(str(TINY / "cross-encoder"), device="cpu")


@pytest.fixture
def client(reranker):
    with TestClient(serve.app(reranker)) as client:
        yield client


def ask(client, query="how to copy a file", **others):
    answer = client.post("/rank", json={"query": query, "passages": PASSAGES} | others)
    return answer.status_code, answer.json()


def together(reranker, client, monkeypatch, queries, **others):
    """Send all other queries while the first query is being scored. Returns the answers, and the scored batches of
    queries."""
    batches, begun, enough, count = [], threading.Event(), threading.Event(), 0
    score, put = reranker.score, client.app.state.waiting.put_nowait

    def put_and_count(one):
        nonlocal count
        put(one)
        count += 1
        if count == len(queries):
            enough.set()

    def score_later(asked, passages):
        batches.append(asked)
        begun.set()
        assert enough.wait(60)
        return score(asked, passages)

    monkeypatch.setattr(client.app.state.waiting, "put_nowait", put_and_count)
    monkeypatch.setattr(reranker, "score", score_later)
    with ThreadPoolExecutor(len(queries)) as pool:
        answers = [pool.submit(ask, client, queries[0], **others)]
        assert begun.wait(60)
        answers += [pool.submit(ask, client, query, **others) for query in queries[1:]]
    return [answer.result() for answer in answers], batches


def test_the_weights_are_read_before_the_first_request(reranker):
    assert reranker.in_memory() is None
    with TestClient(serve.app(reranker)):
        assert reranker.in_memory() is not None


def test_requests_that_come_together_share_batches_and_get_their_own_answers(reranker, client, monkeypatch):
    queries = [f"how to copy a file, number {i}" for i in range(40)]
    wanted = [reranker.rank(query, PASSAGES, top_k=2) for query in queries]
    answers, batches = together(reranker, client, monkeypatch, queries, top_k=2)
    assert [len(asked) for asked in batches] == [1, serve.TOGETHER, 7]
    for (status, answer), ranking in zip(answers, wanted, strict=True):
        assert (status, [row["corpus_id"] for row in answer]) == (200, [row["corpus_id"] for row in ranking])
        assert [row["score"] for row in answer] == pytest.approx([row["score"] for row in ranking], abs=2e-5)


def test_a_request_that_fails_does_not_fail_those_of_its_batch(reranker, client, monkeypatch):
    score = reranker.score

    def refuse_one(queries, passages):
        if "bad" in queries:
            raise ValueError("the query 'bad' is refused")
        return score(queries, passages)

    monkeypatch.setattr(reranker, "score", refuse_one)
    answers, batches = together(reranker, client, monkeypatch, ["one", "bad", "two", "three"])
    assert [len(asked) for asked in batches] == [1, 3, 1, 1, 1]
    assert [status for status, _ in answers] == [200, 400, 200, 200]
    assert answers[1] == (400, {"detail": "the query 'bad' is refused"})


def test_a_full_queue_answers_at_once(reranker, monkeypatch):
    monkeypatch.setattr(serve, "WAITING", 1)
    score, computing, go_on = reranker.score, threading.Event(), threading.Event()
    with TestClient(serve.app(reranker)) as client, ThreadPoolExecutor(2) as pool:
        queued, put = threading.Event(), client.app.state.waiting.put_nowait
        monkeypatch.setattr(reranker, "score", lambda *asked: (computing.set(), go_on.wait(60), score(*asked))[-1])
        first = pool.submit(ask, client)
        assert computing.wait(60)
        monkeypatch.setattr(client.app.state.waiting, "put_nowait", lambda one: (put(one), queued.set()))
        second = pool.submit(ask, client)
        assert queued.wait(60)
        assert ask(client) == (503, {"detail": "busy; try again"})
        go_on.set()
        assert first.result()[0] == second.result()[0] == 200


@pytest.mark.parametrize(
    "others, words",
    [
        ({"passages": None}, "passages: Input should be a valid list"),
        ({"passages": "text"}, "passages: Input should be a valid list"),
        ({"passages": ["x", 3]}, "passages.1: Input should be a valid string"),
        ({"query": None}, "query: Input should be a valid string"),
        ({"query": "x" * 20_001}, "query: String should have at most 20000 characters"),
        ({"passages": []}, "passages: List should have at least 1 item after validation, not 0"),
        ({"passages": [""] * 1_001}, "passages: List should have at most 1000 items after validation, not 1001"),
        ({"top_k": 0}, "top_k: Input should be greater than or equal to 1"),
    ],
    ids=str,
)
def test_what_is_wrong_with_a_request_is_said_without_its_texts_and_the_server_goes_on(client, others, words):
    assert ask(client, **{"query": "x"} | others) == (422, {"detail": words})
    assert ask(client)[0] == 200


@pytest.mark.parametrize("body", [b"no json", b'{"query": "half \\ud83d", "passages": ["x"]}', b"[]", b"\xff"])
def test_a_body_that_is_no_request_is_refused_in_words(client, body):
    answer = client.post("/rank", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422) and isinstance(answer.json()["detail"], str)
    assert ask(client)[0] == 200


def test_a_body_that_is_too_large_or_of_unknown_size_is_not_read(client):
    answer = client.post("/rank", content=b"x" * (serve.BYTES + 1))
    assert (answer.status_code, answer.json()) == (413, {"detail": "4000001 bytes; wanted at most 4000000"})
    answer = client.post("/rank", content=iter([b"x"]))
    assert (answer.status_code, answer.json()) == (413, {"detail": "unknown bytes; wanted at most 4000000"})
    assert client.get("/openapi.json").status_code == 200


@pytest.mark.slow
def test_run_as_a_script_it_answers_on_its_port():
    command = [sys.executable, str(ROOT / "experiments" / "serve.py"), "cross-encoder", str(TINY / "cross-encoder")]
    server = subprocess.Popen([*command, "--port", "0", "--threads", "1"], stderr=subprocess.PIPE, text=True)
    try:
        (address,) = next(filter(None, (re.findall(r"running on (http://\S+)", line) for line in server.stderr)))
        body = json.dumps({"query": "how to copy a file", "passages": PASSAGES}).encode()
        request = urllib.request.Request(f"{address}/rank", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert sorted(row["corpus_id"] for row in json.load(answer)) == [0, 1, 2]
    finally:
        server.terminate()
        server.wait(60)


def test_the_page_shows_the_code_of_the_file_and_its_answer(client):
    page = PT_DOCS / "serve.rst"
    (shown,) = [block.text for block in blocks(page) if "FastAPI(" in block.text]
    assert shown.strip() in (ROOT / "experiments" / "serve.py").read_text(encoding="utf-8")
    asked = {"query": "water power", "passages": ["old mills", "light"], "top_k": 1}
    (answer,) = client.post("/rank", json=asked).json()
    printed = re.search(r'^ +\[{"corpus_id": (\d), "score": ([\d.]+)}\]$', page.read_text(encoding="utf-8"), re.M)
    assert (str(answer["corpus_id"]), f"{answer['score']:.2f}") == printed.groups()


def test_the_seconds_of_the_page_are_those_that_were_measured():
    page = (PT_DOCS / "serve.rst").read_text(encoding="utf-8")
    # Some of the seconds are in measured.csv, and some only in the notes of RESULTS.md
    written = [(ROOT / "experiments" / name).read_text(encoding="utf-8") for name in ("RESULTS.md", "measured.csv")]
    rows = re.search(r"csv-table:: Seconds per query\n(?:   :.*\n)+\n((?:   .+\n)+)", page)[1].splitlines()
    seconds = [cell.strip() for row in rows for cell in row.split(",")[-2:] if cell.strip()]
    assert len(rows) == 9 and len(seconds) == 12
    assert [n for n in seconds if not re.search(rf"(?<![\d.]){re.escape(n)}(?![\d.])", "\n".join(written))] == []
