"""The same reranker on many processes, GPUs or machines, by Ray. Knows queries and columns of passages: no model."""

import copy
import threading
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import pandas as pd
import pyterrier as pt

from pyterrier_lit.frames import Columns, rerank
from pyterrier_lit.reranker import Reranker

CHARACTERS = 4  # of a text to a token, about
READ = 2_048  # characters of a passage that count: models read no more than its beginning
SMALLEST, LARGEST = 32_768, 1_000_000  # tokens of a shard: some full batches, and what fits into memory several times
IN_FLIGHT = 2  # shards that a worker has: one in work, one waiting
ATTEMPTS = 3  # workers that may die over one shard, or while they load


class Distributed(pt.Transformer):
    """Rerank on Ray: `num_workers` processes with a copy of the model each, on this machine or on a cluster.

    Args:
        reranker: any reranker of this package. The workers load its checkpoint themselves (on a cluster: a hub id, or a
            folder that all machines see); weights that are loaded or trained here go along. After more training call
            `close`.
        num_workers: copies of the model.
        num_gpus: GPUs of each; leave the reranker's device=None, which is the worker's own.
        num_cpus: cores of each, and threads.
        verbose: show a progress bar.

    Ray (extra `ray`) starts on this machine unless `ray.init` was called or RAY_ADDRESS names a cluster. Queries go out
    in shards, by estimated tokens and the largest first, to whichever worker is free, two to each at most; scores come
    back as they are done. The queries of a worker that dies go to another, and a new one starts in its place.

    Results are those of the reranker: its own `transform` reads, checks and ranks the frame here, and only its scoring
    runs elsewhere. Float scores may differ in the last bits, as between other batches. `% k` fuses as into the
    reranker. Workers start on first use and stay until `close`, or until this object and its copies are gone.
    """

    schematic: ClassVar[dict[str, str]] = {"label": "Distributed"}

    def __init__(
        self,
        reranker: Reranker,
        *,
        num_workers: int = 2,
        num_gpus: float = 0,
        num_cpus: float = 1,
        verbose: bool = False,
    ):
        if not isinstance(reranker, Reranker):
            raise TypeError(f"reranker={reranker!r}; wanted a reranker of this package")
        if not isinstance(num_workers, int) or num_workers < 1:
            raise ValueError(f"num_workers={num_workers!r}; wanted a whole number from 1 on")
        self.reranker = reranker
        self.num_workers = num_workers
        self.num_gpus = num_gpus
        self.num_cpus = num_cpus
        self.verbose = verbose
        self.pool = Pool()

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """What the reranker returns. ImportError without Ray; RuntimeError where workers keep dying."""
        reranker = self.reranker
        return rerank(inp, self.results, reranker.column_sets(), reranker.query_columns(), context=reranker)

    def fuse_rank_cutoff(self, k: int) -> pt.Transformer | None:
        """The reranker with its cutoff, on the same workers."""
        fused = self.reranker.fuse_rank_cutoff(k) if hasattr(self.reranker, "fuse_rank_cutoff") else None
        if fused is None:
            return None
        shorter = copy.copy(self)
        shorter.reranker = fused[0]
        return shorter >> pt.RankCutoff(k)

    def close(self) -> None:
        """Stop the workers; the next call starts new ones."""
        self.pool.stop()

    def results(self, queries: list[str], columns: Columns) -> dict[str, list[Any]]:
        """The reranker's results for Q queries and the columns of their passages, computed by the workers."""
        shards = shards_of(costs(queries, columns), self.num_workers)
        calls = [
            lambda shard=shard: (_light(self.reranker), [queries[i] for i in shard], _of(columns, shard))
            for shard in shards
        ]
        results: dict[str, list[Any]] = {}
        workers = (self.num_workers, self.num_gpus, self.num_cpus)
        with pt.tqdm(total=len(queries), unit="query", desc="Distributed", disable=not self.verbose) as bar:
            for number, found in self.pool.run(self.reranker, workers, calls):
                for column, values in found.items():
                    whole = results.setdefault(column, [None] * len(queries))
                    for i, value in zip(shards[number], values, strict=True):
                        whole[i] = value
                bar.update(len(shards[number]))
        return results

    def __repr__(self) -> str:
        reranker, *others = pt.inspect.transformer_attributes(self)
        shown = [f"{one.name}={one.value!r}" for one in others if one.value != one.init_default_value]
        return f"Distributed({', '.join([repr(reranker.value), *shown])})"


def costs(queries: Sequence[str], columns: Columns) -> list[int]:
    """About how many tokens a model reads for each query, from the lengths of the texts."""
    return [
        sum(
            1 + (len(query) + sum(min(len(value), READ) for value in cells if isinstance(value, str))) // CHARACTERS
            for cells in zip(*lists, strict=True)
        )
        for query, *lists in zip(queries, *columns.values(), strict=True)
    ]


def shards_of(costs: Sequence[int], workers: int) -> list[list[int]]:
    """All numbers of `costs` in shards, the dearest first. A shard is half of what is left to each worker, so that the
    last ones are small and all workers end together; none is beyond LARGEST, but for a single query that is.
    """
    order = deque(sorted(range(len(costs)), key=lambda i: -costs[i]))
    left = sum(costs)
    least = min(SMALLEST, left // workers)
    shards = []
    while order:
        target = min(max(left // (2 * workers), least), LARGEST)
        shard, size = [order[0]], costs[order.popleft()]
        while order and size + costs[order[0]] <= target:
            size += costs[order[0]]
            shard.append(order.popleft())
        shards.append(shard)
        left -= size
    return shards


class Worker:
    """What runs on Ray: one reranker with its weights."""

    def __init__(self, reranker: Reranker):
        self.reranker = reranker

    def load(self) -> None:
        self.reranker.load()

    def call(self, arguments: dict[str, Any], queries: list[str], columns: Columns) -> dict[str, list[Any]]:
        vars(self.reranker).update(arguments)
        return self.reranker.results(queries, columns)


class Pool:
    """The workers of a `Distributed` and its copies. They are replaced when they die and when the reranker changed."""

    _make: Callable[[], Any]  # starts a worker

    def __init__(self) -> None:
        self.workers: list[Any] = []
        self._lock = threading.RLock()
        self._made_for: tuple[Any, ...] | None = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Pool, ()  # a pickle starts workers of its own

    def run(
        self, reranker: Reranker, workers: tuple[int, float, float], asked: Sequence[Callable[[], tuple[Any, ...]]]
    ) -> Iterator[tuple[int, Any]]:
        """Yield (number, answer) of each call as it is done. The arguments of a call are made when a worker is free."""
        ray = _ray()
        self._start(reranker, workers)
        waiting = deque(range(len(asked)))
        # Of each call its worker, and the number of what was asked: None while it loads the model
        pending: dict[Any, tuple[Any, int | None]] = {}
        deaths: Counter[int | None] = Counter()
        known: list[Any] = []

        def admit() -> None:
            for worker in self.workers:
                if not any(worker is other for other in known):
                    known.append(worker)
                    pending[worker.load.remote()] = worker, None

        admit()
        try:
            while waiting or any(number is not None for _, number in pending.values()):
                done = ray.wait(list(pending), num_returns=1)[0][0]
                worker, number = pending.pop(done)
                try:
                    answer = ray.get(done)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from error
                except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError) as error:
                    deaths[number] += 1
                    if deaths[number] == ATTEMPTS * (1 if number is not None else len(self.workers)):
                        raise RuntimeError(
                            f"{deaths[number]} workers of Ray died"
                            f" {'as they loaded the model' if number is None else 'over the same queries'}; Ray says:"
                            f" {str(error).strip().splitlines()[-1]}"
                        ) from error
                    if number is not None:
                        waiting.appendleft(number)
                    self._replace(worker)
                    admit()
                    continue
                while waiting and sum(worker is other for other, _ in pending.values()) < IN_FLIGHT:
                    following = waiting.popleft()
                    pending[worker.call.remote(*asked[following]())] = worker, following
                if number is not None:
                    yield number, answer
        finally:
            for call, (_, number) in pending.items():
                if number is not None:
                    ray.cancel(call)

    def stop(self) -> None:
        """Kill all workers."""
        with self._lock:
            for worker in self.workers:
                _ray().kill(worker)
            self.workers, self._made_for = [], None

    def _start(self, reranker: Reranker, workers: tuple[int, float, float]) -> None:
        ray = _ray()
        if not ray.is_initialized():
            ray.init()
        n, num_gpus, num_cpus = workers
        heavy = tuple(value for name, value in _arguments(reranker).items() if not _is_light(reranker, name, value))
        wanted = ray.get_runtime_context().get_job_id(), workers, type(reranker), heavy, reranker.in_memory()
        with self._lock:
            if self._made_for is not None and all(
                a is b or a == b for a, b in zip(wanted, self._made_for, strict=True)
            ):
                return
            if self._made_for is not None and self._made_for[0] == wanted[0]:
                self.stop()
            there = ray.cluster_resources()
            for kind, each in (("CPU", num_cpus), ("GPU", num_gpus)):
                if n * each > there.get(kind, 0):
                    warnings.warn(
                        f"num_workers={n} want {n * each:g} {kind}s and Ray has {there.get(kind, 0):g}: some will not"
                        " start",
                        stacklevel=2,
                    )
            quiet = copy.copy(reranker)
            quiet.verbose = False
            held = ray.put(quiet)
            actor = ray.remote(Worker).options(num_gpus=num_gpus, num_cpus=num_cpus)
            self._make = lambda: actor.remote(held)
            self.workers, self._made_for = [self._make() for _ in range(n)], wanted

    def _replace(self, dead: Any) -> None:
        with self._lock:
            self.workers = [self._make() if worker is dead else worker for worker in self.workers]
        _ray().kill(dead)


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ImportError("Distributed needs Ray: pip install 'pyterrier-lit[ray]'") from error
    return ray


def _of(columns: Columns, shard: list[int]) -> Columns:
    return {column: [lists[i] for i in shard] for column, lists in columns.items()}


def _arguments(reranker: Reranker) -> dict[str, Any]:
    return {argument.name: argument.value for argument in pt.inspect.transformer_attributes(reranker)}


def _is_light(reranker: Reranker, name: str, value: Any) -> bool:
    """Whether an argument can change without other weights, and goes along with each call."""
    return name not in reranker.loads_from and isinstance(value, str | int | float | None)


def _light(reranker: Reranker) -> dict[str, Any]:
    own = {name: value for name, value in _arguments(reranker).items() if _is_light(reranker, name, value)}
    return own | {"verbose": False}
