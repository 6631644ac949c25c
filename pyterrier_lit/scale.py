"""One reranker in several processes, on several GPUs or machines, with Ray. This module does not deal with prompts or
tokenizers."""

import copy
import gc
import os
import sys
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, ClassVar

import pandas as pd
import pyterrier as pt

from pyterrier_lit import signals
from pyterrier_lit.frames import Columns, rerank
from pyterrier_lit.reranker import Reranker

CHARACTERS = 4  # characters per token, on average
READ = 2_048  # maximum number of characters of a text that count in the estimate of its tokens: models truncate texts
# A shard is a list of queries that a worker scores in one call. Its size in tokens should be between SMALLEST, which is
# a few full batches, and LARGEST. Several shards of size LARGEST fit into memory
SMALLEST, LARGEST = 32_768, 1_000_000
IN_FLIGHT = 2  # number of shards that a worker has at a time: it computes one of them, and the other one waits
# If ATTEMPTS workers die over the same shard, an error is raised. While n workers load the model, an error is raised
# after ATTEMPTS * n deaths
ATTEMPTS = 3
PATIENCE = 30  # maximum number of seconds to wait for GPUs and CPU cores that are in use

# Ray reads the variable RAY_DISABLE_FAILURE_SIGNAL_HANDLER when Ray is imported. If the variable is not set at this
# time, ray.shutdown() replaces the signal handlers of a JVM in this process. TAKES_SIGNALS: whether Ray was imported
# before this module and without the variable
TAKES_SIGNALS = "ray" in sys.modules and "RAY_DISABLE_FAILURE_SIGNAL_HANDLER" not in os.environ
os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")


class Distributed(pt.Transformer):
    """Rerank with Ray: `num_workers` processes, each with a copy of the model, on this machine or on a cluster.

    Args:
        reranker: any reranker of this package. If this process has loaded or trained the weights already, the weights
            are sent to the workers. Otherwise each worker loads the checkpoint of the reranker; on a cluster, the
            reranker's `model` must then be a hub id, or a folder that all machines can read.
        num_workers: number of worker processes, each with a copy of the model.
        num_gpus: number of GPUs per worker. Leave the reranker's argument `device` at None, so that each worker uses
            its own GPU.
        num_cpus: number of CPU cores per worker. A worker computes with `num_cpus` threads.
        verbose: show a progress bar.

    Ray must be installed (`pip install 'pyterrier-lit[ray]'`). Ray is started on this machine, unless `ray.init` was
    called before or the environment variable RAY_ADDRESS names a cluster. The queries are split into shards. A shard is
    one or more queries with their passages. The shards with the most tokens, by an estimate, are sent first. A worker
    has at most two shards at a time. If a worker dies, a new worker replaces it, and the unfinished shards of the dead
    worker are computed again.

    The workers only compute scores: this process reads and checks the frame, and computes the ranks. The result is
    therefore the same as with the reranker alone, except that scores may differ in the last bits of a float, since the
    batches differ. A rank cutoff (`% k`) is compiled into `Distributed` as into the reranker itself.

    Workers start on first use. They stop when `close` is called, or when this object and all its copies are deleted.
    Copies of this object share workers as long as they have the same reranker and weights. If the weights are trained
    further, new workers start.
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
            raise ValueError(f"num_workers={num_workers!r}; wanted a positive whole number")
        self.reranker = reranker
        self.num_workers = num_workers
        self.num_gpus = num_gpus
        self.num_cpus = num_cpus
        self.verbose = verbose
        self.pool = Pool()

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Rerank a result frame on the workers. Returns the same frame as `transform` of the reranker, and raises the
        same errors.

        In addition, raises ImportError if Ray is not installed, and ValueError if no machine has the GPUs and CPU cores
        for a worker. Raises RuntimeError if these resources are still in use after 30 seconds, if workers die
        repeatedly, or if `close` is called during the reranking.
        """
        reranker = self.reranker
        return rerank(inp, self.results, reranker.column_sets(), reranker.query_columns(), context=reranker)

    def fuse_rank_cutoff(self, k: int) -> pt.Transformer | None:
        """The pipeline that `compile` puts in place of `self >> RankCutoff(k)`: a copy of this object that uses the
        same workers and computes only the first k ranks, followed by RankCutoff(k).

        Returns None if the reranker has no method `fuse_rank_cutoff`, or if this method returns None.
        """
        fused = self.reranker.fuse_rank_cutoff(k) if hasattr(self.reranker, "fuse_rank_cutoff") else None
        if fused is None:
            return None
        shorter = copy.copy(self)
        shorter.reranker = fused[0]
        return shorter >> pt.RankCutoff(k)

    def close(self) -> None:
        """Stop the workers. The next call of `transform` starts new workers."""
        self.pool.stop()

    def results(self, queries: list[str], columns: Columns) -> dict[str, list[Any]]:
        """Score the passages of Q queries on the workers. Returns the same dict as the reranker's method `results`.

        columns: column name -> a list per query, with one value per passage, such as {"docno": [["d1", "d2"], ["d7"]]}.
        """
        shards = shards_of(costs(queries, columns), self.num_workers)
        calls = [
            lambda shard=shard: (_light(self.reranker), [queries[i] for i in shard], _of(columns, shard))
            for shard in shards
        ]
        results: dict[str, list[Any]] = {}
        pool, wanted = self.started()
        with pt.tqdm(total=len(queries), unit="query", desc="Distributed", disable=not self.verbose) as bar:
            for number, found in pool.run(calls, wanted):
                for column, values in found.items():
                    whole = results.setdefault(column, [None] * len(queries))
                    for i, value in zip(shards[number], values, strict=True):
                        whole[i] = value
                bar.update(len(shards[number]))
        return results

    def started(self) -> tuple["Pool", "Wanted"]:
        """Return the pool with the workers for the current reranker, and the description (`Wanted`) with which the
        workers were started. The workers are started if necessary."""
        job = _ray_started().get_runtime_context().get_job_id()
        wanted = Wanted(self.reranker, self.num_workers, self.num_gpus, self.num_cpus, job)
        while True:
            pool = self.pool
            with pool.lock:
                if pool.wanted is None:
                    pool.start(wanted)
                if pool.wanted == wanted:
                    return pool, pool.wanted
                if self.pool is pool:
                    self.pool = Pool()  # copies of this object keep the old pool

    def __repr__(self) -> str:
        reranker, *others = pt.inspect.transformer_attributes(self)
        shown = [f"{one.name}={one.value!r}" for one in others if one.value != one.init_default_value]
        return f"Distributed({', '.join([repr(reranker.value), *shown])})"


def costs(queries: Sequence[str], columns: Columns) -> list[int]:
    """For each query, the number of tokens of its query-passage pairs, estimated from their number of characters."""
    return [
        sum(
            1 + (len(query) + sum(min(len(value), READ) for value in cells if isinstance(value, str))) // CHARACTERS
            for cells in zip(*lists, strict=True)
        )
        for query, *lists in zip(queries, *columns.values(), strict=True)
    ]


def shards_of(costs: Sequence[int], workers: int) -> list[list[int]]:
    """Split queries into shards. A shard is a list of queries, given by their indices in `costs`.

    costs: the cost of each query in tokens. workers: the number of workers.

    The most expensive queries come first. If the queries that are not yet in a shard cost C tokens in total, the next
    shard costs about C / (2 * workers) tokens. The last shards are therefore small, and all workers end at about the
    same time. If there are at least SMALLEST tokens per worker, each shard except the last costs about SMALLEST tokens
    or more. A shard costs at most LARGEST tokens, unless it is a single query that costs more.
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
    """A worker process (an actor of Ray) with one reranker and its weights."""

    def __init__(self, reranker: Reranker):
        self.reranker = reranker

    def load(self) -> None:
        self.reranker.load()

    def call(self, arguments: dict[str, Any], queries: list[str], columns: Columns) -> dict[str, list[Any]]:
        """Set the given arguments of the reranker, and return the result of the reranker's method `results`."""
        vars(self.reranker).update(arguments)
        return self.reranker.results(queries, columns)


class Wanted:
    """The description of a set of workers: a reranker with its weights, the number of workers, the number of GPUs and
    of CPU cores per worker, and the id of the Ray job.

    Some arguments of the reranker (see `_is_light`) are sent to the workers with each call. Two descriptions that
    differ only in such arguments are equal.
    """

    def __init__(self, reranker: Reranker, workers: int, num_gpus: float, num_cpus: float, job: str):
        self.reranker, self.workers = reranker, workers
        self.each = {kind: n for kind, n in (("GPU", num_gpus), ("CPU", num_cpus)) if n}
        heavy = [value for name, value in _arguments(reranker).items() if not _is_light(reranker, name, value)]
        self.key = [job, workers, num_gpus, num_cpus, type(reranker), *heavy, *_weights(reranker)]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Wanted) and len(self.key) == len(other.key) and all(map(_same, self.key, other.key))


class Pool:
    """The workers that a `Distributed` and its copies share, for one reranker with its weights."""

    _make: Callable[[], Any]  # starts a worker

    def __init__(self) -> None:
        self.workers: list[Any] = []
        self.wanted: Wanted | None = None  # what the workers were started with, or None if there are no workers
        self.lock = threading.RLock()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Pool, ()  # an unpickled pool has no workers yet

    def start(self, wanted: Wanted) -> None:
        """Start the workers that `wanted` describes, or as many of them as the resources allow. Raises ValueError or
        RuntimeError if the resources do not allow any worker."""
        ray = _ray()
        n = _placeable(ray, wanted)
        quiet = copy.copy(wanted.reranker)
        quiet.verbose = False
        held = ray.put(quiet)
        actor = ray.remote(Worker).options(num_gpus=wanted.each.get("GPU", 0), num_cpus=wanted.each.get("CPU", 0))
        self._make = lambda: actor.remote(held)
        self.workers, self.wanted = [self._make() for _ in range(n)], wanted

    def run(self, asked: Sequence[Callable[[], tuple[Any, ...]]], wanted: Wanted) -> Iterator[tuple[int, Any]]:
        """Let the workers compute several calls of `Worker.call`. Yields (index in `asked`, result) for each call, as
        soon as the call has finished.

        asked: one function per call. The function takes no arguments and returns the arguments of `Worker.call`. The
        function is called when a worker is free. wanted: the description with which the workers were started.
        """
        ray = _ray()
        waiting = deque(range(len(asked)))
        # Ray's reference to an unfinished call -> the worker and the index of the call in `asked`. For a call of
        # `Worker.load`, the index is None
        pending: dict[Any, tuple[Any, int | None]] = {}
        deaths: Counter[int | None] = Counter()
        known: list[Any] = []

        def admit() -> None:
            for worker in self._living(wanted):
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
                    if number is None:
                        self.stop()  # free the GPUs and CPU cores: the model cannot be loaded
                    raise error.cause from error
                except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError) as error:
                    deaths[number] += 1
                    if deaths[number] == ATTEMPTS * (1 if number is not None else len(self._living(wanted))):
                        raise RuntimeError(
                            f"{deaths[number]} workers of Ray died"
                            f" {'as they loaded the model' if number is None else 'over the same queries'}; Ray says:"
                            f" {str(error).strip().splitlines()[-1]}"
                        ) from error
                    if number is not None:
                        waiting.appendleft(number)
                    self._replace(worker, wanted)
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
        with self.lock:
            workers, self.workers, self.wanted = self.workers, [], None
        for worker in workers:
            _ray().kill(worker)

    def _living(self, wanted: Wanted) -> list[Any]:
        with self.lock:
            if self.wanted is not wanted:
                raise RuntimeError("the workers were closed while they ranked; call again")
            return self.workers

    def _replace(self, dead: Any, wanted: Wanted) -> None:
        with self.lock:
            self.workers = [self._make() if worker is dead else worker for worker in self._living(wanted)]
        _ray().kill(dead)


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ImportError("Distributed needs Ray: pip install 'pyterrier-lit[ray]'") from error
    return ray


def _ray_started() -> Any:
    """Start Ray if necessary, and return its module. If a JVM runs in this process, the JVM's signal handlers are
    restored."""
    ray = _ray()
    if not ray.is_initialized():
        ray.init()
    if signals.jvm() and (not signals.back_to_java() or TAKES_SIGNALS):
        warnings.warn(
            "Java and Ray run in one process, and Ray replaces signal handlers that Java needs, in ray.shutdown() at"
            " the latest: the process may die. Import pyterrier_lit.scale before ray, and let Distributed start it",
            stacklevel=2,
        )
    return ray


def _placeable(ray: Any, wanted: Wanted) -> int:
    """Return how many of the wanted workers the GPUs and CPU cores of Ray's machines allow.

    Waits up to PATIENCE seconds for GPUs and CPU cores that are in use. Raises ValueError if no machine has the GPUs
    and CPU cores for a worker, and RuntimeError if they are still in use after PATIENCE seconds.
    """
    machines = [machine["Resources"] for machine in ray.nodes() if machine["Alive"]]
    each = _words(wanted.each)
    room = [
        min((int(there.get(kind, 0) / n + 1e-6) for kind, n in wanted.each.items()), default=wanted.workers)
        for there in machines
    ]
    if not any(room):
        there = "; ".join(_words({kind: machine.get(kind, 0) for kind in wanted.each}) for machine in machines)
        raise ValueError(f"a worker needs {each}, and Ray's machines have {there}; reduce num_gpus or num_cpus")
    until = time.monotonic() + PATIENCE
    while any(ray.available_resources().get(kind, 0) < n for kind, n in wanted.each.items()):
        gc.collect()  # stops the workers of Distributed objects that are no longer referenced
        if time.monotonic() > until:
            raise RuntimeError(
                f"a worker needs {each}, and all that Ray has is in use: {_words(ray.cluster_resources())}; close"
                " another Distributed, or reduce num_workers, num_gpus or num_cpus"
            )
        time.sleep(0.5)
    if sum(room) < wanted.workers:
        warnings.warn(
            f"num_workers={wanted.workers} need {each} each, and Ray has room for {sum(room)}: continuing with these",
            stacklevel=2,
        )
    return min(sum(room), wanted.workers)


def _words(resources: dict[str, float]) -> str:
    return " and ".join(f"{resources[kind]:g} {kind}" for kind in ("GPU", "CPU") if kind in resources)


def _weights(reranker: Reranker) -> tuple[Any, int]:
    """Return (checkpoint, n). The checkpoint is None if it is not in memory. The number n grows each time that training
    changes the weights of the checkpoint."""
    checkpoint = reranker.in_memory()
    network = getattr(checkpoint, "__dict__", {}).get("network")
    tensors = [] if network is None else network.parameters()
    return checkpoint, sum(tensor._version for tensor in tensors if not tensor.is_inference())


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, Hashable) and bool(a == b))


def _of(columns: Columns, shard: list[int]) -> Columns:
    return {column: [lists[i] for i in shard] for column, lists in columns.items()}


def _arguments(reranker: Reranker) -> dict[str, Any]:
    return {argument.name: argument.value for argument in pt.inspect.transformer_attributes(reranker)}


def _is_light(reranker: Reranker, name: str, value: Any) -> bool:
    """Whether an argument of the reranker can be sent to the workers with each call. The argument's value must be a
    text, a number or None. The argument must not be one on which the loaded weights depend."""
    return name not in reranker.loads_from and isinstance(value, str | int | float | None)


def _light(reranker: Reranker) -> dict[str, Any]:
    own = {name: value for name, value in _arguments(reranker).items() if _is_light(reranker, name, value)}
    return own | {"verbose": False}
