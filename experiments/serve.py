"""An HTTP endpoint around a reranker, by the standard library alone: requests that wait together are scored together.

python experiments/serve.py cross-encoder webis/monoelectra-base --port 8000
curl localhost:8000/rank -d '{"query": "water power", "passages": ["old mills", "light"], "top_k": 1}'
"""

import argparse
import json
import queue
import threading
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from pyterrier_lit.__main__ import RERANKERS

BYTES, PASSAGES, TOGETHER, WAITING = 4_000_000, 1_000, 32, 256  # limits: a body, its list, a batch, the queue


class Batches:
    """One thread that computes: what the others ask meanwhile is its next batch."""

    def __init__(self, reranker):
        self.reranker, self.waiting = reranker, queue.Queue(WAITING)
        reranker.rank("warm up", ["before the first request"])  # reads the weights
        threading.Thread(target=self.work, daemon=True).start()

    def scores(self, query, passages):
        asked = Future()
        self.waiting.put_nowait((query, passages, asked))
        return asked.result()

    def work(self):
        while True:
            batch = [self.waiting.get()]
            while len(batch) < TOGETHER and not self.waiting.empty():
                batch.append(self.waiting.get())
            try:
                found = self.reranker.score([query for query, _, _ in batch], [texts for _, texts, _ in batch])
                for (_, _, asked), scores in zip(batch, found, strict=True):
                    asked.set_result(scores)
            except Exception as error:
                for _, _, asked in batch:
                    asked.set_exception(error)


def handler(batches):
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            try:
                self.answer(200, self.ranked())
            except queue.Full:
                self.answer(503, {"error": "busy; try again"})
            except (ValueError, TypeError, KeyError) as error:
                self.answer(400, {"error": str(error)})
            except Exception as error:
                self.answer(500, {"error": type(error).__name__})

        def ranked(self):
            size = int(self.headers["Content-Length"] or 0)
            if size > BYTES:
                raise ValueError(f"{size} bytes; wanted at most {BYTES}")
            asked = json.loads(self.rfile.read(size))
            query, passages, top_k = asked["query"], asked["passages"], asked.get("top_k")
            if not isinstance(passages, list) or not all(isinstance(text, str) for text in [query, *passages]):
                raise TypeError("wanted a string as query and a list of strings as passages")
            if not 0 < len(passages) <= PASSAGES:
                raise ValueError(f"{len(passages)} passages; wanted 1 to {PASSAGES}")
            scores = batches.scores(query, passages)
            best = sorted(range(len(scores)), key=lambda i: -scores[i])[:top_k]
            return [{"corpus_id": i, "score": scores[i]} for i in best]

        def answer(self, status, value):
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    return Handler


class Server(ThreadingHTTPServer):
    request_queue_size = WAITING  # the library's five would reset connections that come together


def server(reranker, port):
    """A server that listens; `serve_forever` answers."""
    return Server(("127.0.0.1", port), handler(Batches(reranker)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("reranker", choices=RERANKERS)
    parser.add_argument("model", help="hub id or folder")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    server(RERANKERS[arguments.reranker](arguments.model), arguments.port).serve_forever()
