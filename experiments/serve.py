"""An HTTP endpoint around a reranker, in FastAPI: requests that wait at the same time are scored together.

python experiments/serve.py cross-encoder webis/monoelectra-base --port 8000 --threads 4
curl localhost:8000/rank --json '{"query": "water power", "passages": ["old mills", "light"], "top_k": 1}'
"""

import asyncio
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

BYTES = 4_000_000  # maximum size of the body of a request
TOGETHER = 32  # maximum number of requests in a batch
WAITING = 256  # maximum number of requests that wait for a batch
Text = Annotated[str, Field(max_length=20_000)]  # characters


class Asked(BaseModel):
    query: Text
    passages: list[Text] = Field(min_length=1, max_length=1_000)
    top_k: int | None = Field(None, ge=1)


def app(reranker):
    async def work():
        while True:
            batch = [await waiting.get()]
            while len(batch) < TOGETHER and not waiting.empty():
                batch.append(waiting.get_nowait())
            await compute(batch)

    async def compute(batch):
        queries = [asked.query for asked, _ in batch]
        passages = [asked.passages for asked, _ in batch]
        try:
            found = await asyncio.to_thread(reranker.score, queries, passages)
            for (_, answer), scores in zip(batch, found, strict=True):
                answer.set_result(scores)
        except Exception as error:
            if len(batch) == 1:
                return batch[0][1].set_exception(error)
            for one in batch:  # one by one, so that only the request at fault fails
                await compute([one])

    @asynccontextmanager
    async def lifespan(api):
        reranker.rank("warm up", ["before the first request"])  # reads the weights
        worker = asyncio.create_task(work())
        yield
        worker.cancel()

    api = FastAPI(lifespan=lifespan)
    waiting = api.state.waiting = asyncio.Queue(WAITING)

    @api.post("/rank")
    async def rank(asked: Asked) -> list[dict[str, int | float]]:
        answer = asyncio.get_running_loop().create_future()
        try:
            waiting.put_nowait((asked, answer))
            scores = await answer
        except asyncio.QueueFull:
            raise HTTPException(503, "busy; try again") from None
        except (ValueError, TypeError) as error:
            raise HTTPException(400, str(error)) from error
        best = sorted(range(len(scores)), key=lambda number: -scores[number])
        best = best[: asked.top_k]
        return [{"corpus_id": number, "score": scores[number]} for number in best]

    @api.middleware("http")
    async def limit(request: Request, answer):
        size = request.headers.get("content-length")
        if request.method == "POST" and (size is None or int(size) > BYTES):
            said = f"{size or 'unknown'} bytes; wanted at most {BYTES}"
            return JSONResponse({"detail": said}, 413)
        return await answer(request)

    @api.exception_handler(RequestValidationError)
    async def refuse(request: Request, error):  # FastAPI's own answer repeats the texts
        places = [".".join(map(str, one["loc"][1:])) for one in error.errors()]
        words = [one["msg"] for one in error.errors()]
        said = [f"{place}: {word}" for place, word in zip(places, words, strict=True)]
        return JSONResponse({"detail": "; ".join(said[:3])}, 422)

    return api


if __name__ == "__main__":
    import argparse

    import torch
    import uvicorn

    from pyterrier_lit.__main__ import RERANKERS

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("reranker", choices=RERANKERS)
    parser.add_argument("model", help="hub id or folder")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads for one batch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    uvicorn.run(app(RERANKERS[arguments.reranker](arguments.model)), port=arguments.port)
