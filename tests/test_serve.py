"""experiments/serve.py: many requests at once, each with its own answer, and bad ones in words."""

import http.client
import json
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import serve
from conftest import TINY

from pyterrier_lit import CrossEncoder

PASSAGES = ["Copy a file and its metadata.", "The length of a list.", "Remove an empty folder."]


@pytest.fixture(scope="module")
def served():
    """(the reranker, the sizes of its batches, ask(body) -> status, answer, the port)"""
    reranker, sizes = CrossEncoder(str(TINY / "cross-encoder"), device="cpu"), []
    score = reranker.score
    reranker.score = lambda queries, lists: sizes.append(len(queries)) or score(queries, lists)
    server = serve.server(reranker, 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def ask(body):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{server.server_port}/rank", data)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    yield reranker, sizes, ask, server.server_port
    server.shutdown()
    server.server_close()


def test_requests_that_come_together_share_batches_and_get_their_own_answers(served):
    reranker, sizes, ask, _ = served
    sizes.clear()
    queries = [f"how to copy a file, number {i}" for i in range(24)]
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda query: ask({"query": query, "passages": PASSAGES, "top_k": 2}), queries))
    assert sum(sizes) == 24 and len(sizes) < 24
    for query, (status, answer) in zip(queries, answers, strict=True):
        wanted = reranker.rank(query, PASSAGES, top_k=2)
        assert (status, [row["corpus_id"] for row in answer]) == (200, [row["corpus_id"] for row in wanted])
        assert [row["score"] for row in answer] == pytest.approx([row["score"] for row in wanted], abs=2e-5)


@pytest.mark.parametrize(
    "body, words",
    [
        (b"no json", "Expecting value"),
        ({"query": "x"}, "passages"),
        ({"query": "x", "passages": "text"}, "a list of strings"),
        ({"query": None, "passages": ["x"]}, "wanted a string as query"),
        ({"query": "x", "passages": []}, "0 passages; wanted 1 to 1000"),
        ({"query": "x", "passages": [""] * 1_001}, "1001 passages; wanted 1 to 1000"),
    ],
)
def test_what_is_wrong_with_a_request_is_said_and_the_server_goes_on(served, body, words):
    status, answer = served[2](body)
    assert status == 400 and words in answer["error"]
    assert served[2]({"query": "half \ud83d", "passages": PASSAGES})[0] == 200


def test_a_body_that_is_too_large_is_not_read(served):
    connection = http.client.HTTPConnection("127.0.0.1", served[3], timeout=30)
    connection.putrequest("POST", "/rank")
    connection.putheader("Content-Length", "4000001")
    connection.endheaders()
    assert b"4000001 bytes; wanted at most" in connection.getresponse().read()


def test_a_full_queue_answers_at_once(served, monkeypatch):
    monkeypatch.setattr(serve.Batches, "scores", lambda *_: (_ for _ in ()).throw(serve.queue.Full))
    assert served[2]({"query": "x", "passages": PASSAGES}) == (503, {"error": "busy; try again"})
