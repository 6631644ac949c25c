"""Estimates what reranking costs at scale. It runs each stage of reranking except the network several times, and takes
the shortest time. From these times, it computes how many queries a second several workers rerank, and how many machines
are needed."""

import functools
import math
import pickle
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import corpora
import pandas as pd
import pyterrier as pt
from ir_datasets.formats import GenericDoc
from ir_datasets.indices import PickleLz4FullStore

from pyterrier_lit import CrossEncoder, LiT5Distill, LiT5Score, PERank
from pyterrier_lit.frames import Columns, rerank
from pyterrier_lit.reranker import Reranker
from pyterrier_lit.windows import sliding_windows

DAY = 86_400
NETWORK = 1.25e9  # bytes a second (10 Gbit a second)


@dataclass(frozen=True)
class Stages:
    """The seconds that each stage takes for a query with all its passages, and the bytes that are sent to a worker for
    the query. A driver is a process that sends queries to workers (`pyterrier_lit.scale.Distributed`)."""

    loading: float  # the driver reads the texts of the passages
    frame: float  # the driver checks the frame, and adds scores and ranks
    packing: float  # the driver pickles the texts, and the worker unpickles them
    tokenising: float  # the worker tokenises, on one core
    model: float  # the worker runs the model
    bytes: float  # sent to the worker for a query

    @property
    def driver(self) -> float:
        """The seconds of the driver's own work."""
        return self.loading + self.frame

    def with_model(self, queries_per_second: float) -> "Stages":
        """The same stages with a model of another speed, for example one that was measured on a GPU elsewhere."""
        return replace(self, model=1 / queries_per_second)


def seconds(stages: Stages, workers: int = 1, *, cores: float = 1, network: float = NETWORK) -> dict[str, float]:
    """The seconds that each stage adds to the time of a query, with one driver and this many workers. Loading and frame
    count as one stage, "driver".

    The driver's work comes first. Then packing, sending and computing (tokenising and model) run in parallel, so only
    the slowest of these three adds to the time. Only this one is returned. cores: number of cores on which each worker
    tokenises. network: bytes a second.
    """
    beside: list[dict[str, float]] = [
        {"tokenising": stages.tokenising / cores / workers, "model": stages.model / workers},
        {"packing": stages.packing},
        {"network": stages.bytes / network},
    ]
    return {"driver": stages.driver} | max(beside, key=lambda part: sum(part.values()))


def rate(stages: Stages, workers: int = 1, **machine: float) -> float:
    """The number of queries that one driver with this many workers reranks in a second. machine: `cores` and `network`,
    as in `seconds`."""
    return 1 / sum(seconds(stages, workers, **machine).values())


def bottleneck(stages: Stages, workers: int = 1, **machine: float) -> str:
    """The name of the stage with the largest share of the time, which can be less than half. Stages, `cores` and
    `network` (in machine) are as in `seconds`."""
    parts = seconds(stages, workers, **machine)
    return max(parts, key=parts.__getitem__)


def machines(stages: Stages, queries: int, workers: int, **machine: float) -> int:
    """The number of machines that are needed to rerank this many queries in a day. Each machine has a driver, this many
    workers, and its share of the queries. machine: `cores` and `network`, as in `seconds`."""
    return math.ceil(queries / DAY / rate(stages, workers, **machine))


def turning_point(stages: Stages, workers: int = 1, *, cores: float = 1) -> float:
    """How many times as fast the model must be for tokenising or the driver to take as long as the model. cores: as in
    `seconds`."""
    return stages.model / max(stages.tokenising / cores, workers * stages.driver)


def workers_half_idle(stages: Stages) -> float:
    """The number of workers at which the workers wait for the driver half of the time. With a quarter of this number,
    the workers wait a fifth of the time."""
    return (stages.tokenising + stages.model) / stages.driver


def measure(rerankers: Mapping[str, Reranker], candidates: pd.DataFrame, loader: pt.Transformer) -> dict[str, Stages]:
    """Measure the stages of reranking these candidates (qid, query, docno, text) with each reranker. Loading, frame,
    packing and bytes do not depend on the reranker, so they are measured once. All rerankers must read the texts.

    Seconds are the CPU seconds of this process, summed over its threads, so that other jobs on the machine hardly
    matter. If the model runs on a GPU, the seconds of the stage `model` are wall-clock seconds instead. The weights are
    loaded before. Each stage is run several times, and the fastest run counts. So `loader` is timed on texts that it
    has read before.
    """
    asked: list[Any] = []

    def nothing(queries: list[str], columns: Columns) -> dict[str, list[list[float]]]:
        asked[:] = queries, columns
        return {"score": [[0.0] * len(docnos) for docnos in columns["docno"]]}

    without = candidates.drop(columns="text")
    shared = {
        "loading": best_of(lambda: loader(without), 10),
        "frame": best_of(lambda: rerank(candidates, nothing, [{"text": str}]), 10),
        "packing": best_of(lambda: pickle.loads(pickle.dumps(asked)), 10),
        "bytes": len(pickle.dumps(asked)),
    }
    n = candidates["qid"].nunique()
    stages = {}
    for name, reranker in rerankers.items():
        taken = shared | computing(reranker, *asked)
        stages[name] = Stages(**{stage: value / n for stage, value in taken.items()})
    return stages


def computing(reranker: Reranker, queries: list[str], columns: Columns) -> dict[str, float]:
    """The seconds that tokenising and the model take for these queries, measured as in `measure`."""
    on_cpu = next(reranker.load().network.parameters()).device.type == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    results = best_of(lambda: reranker.results(queries, columns), 2, clock)
    return {
        "tokenising": best_of(lambda: tokenise(reranker, queries, columns)),
        "model": results - best_of(lambda: tokenise(reranker, queries, columns), 2, clock),
    }


@functools.singledispatch
def tokenise(reranker: Reranker, queries: list[str], columns: Columns) -> None:
    """Tokenise the texts as often as one call of `reranker.results` does. Raises TypeError if there is no rule for the
    reranker's class in this module."""
    raise TypeError(
        f"cost_model cannot tell how {type(reranker).__name__} tokenises; wanted a reranker with a rule here"
    )


@tokenise.register
def _(reranker: CrossEncoder, queries: list[str], columns: Columns) -> None:
    passages = columns[reranker.text_field]
    reranker.pairs([(query, passage) for query, ranking in zip(queries, passages, strict=True) for passage in ranking])


@tokenise.register
def _(reranker: LiT5Distill, queries: list[str], columns: Columns) -> None:
    for query, ranking in zip(queries, columns[reranker.text_field], strict=True):
        for window in sliding_windows(len(ranking), *reranker.window()):
            reranker.prompts(query, ranking[window.start : window.stop])


@tokenise.register
def _(reranker: LiT5Score, queries: list[str], columns: Columns) -> None:
    for query, ranking in zip(queries, columns[reranker.text_field], strict=True):
        reranker.prompts(query, ranking)


@tokenise.register
def _(reranker: PERank, queries: list[str], columns: Columns) -> None:
    ranker = reranker.load()
    for query, ranking in zip(queries, columns[reranker.text_field], strict=True):
        ranker.text_encoder().pieces(ranking)
        windows = sliding_windows(len(ranking), reranker.window_size, reranker.stride)
        sizes = [window.stop - window.start for window in windows]
        ranker.prompts([query] * len(sizes), [[]] * len(sizes), sizes)


def stored(passages: pd.DataFrame, folder: Path) -> pt.Transformer:
    """Write these passages (docno, text) to a file in `folder`, in the format of ir_datasets. Returns a loader that
    reads them."""
    docs = [GenericDoc(*row) for row in passages[["docno", "text"]].drop_duplicates("docno").itertuples(index=False)]
    store = PickleLz4FullStore(str(folder / "passages.pklz4"), lambda: docs, GenericDoc, "doc_id", ["doc_id"])
    nothing = pd.DataFrame()

    def texts(docnos: Any) -> dict[str, str]:
        return {doc.doc_id: doc.text for doc in store.get_many_iter(docnos)}

    return corpora.Collection(store.path, lambda: iter(()), texts, nothing, nothing).text_loader()


def best_of(function: Callable[[], Any], times: int = 3, clock: Callable[[], float] = time.process_time) -> float:
    taken = []
    for _ in range(times):
        start = clock()
        function()
        taken.append(clock() - start)
    return min(taken)
