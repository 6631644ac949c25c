"""scale: Ray's workers give the results of a single process, even if a worker dies; shards keep all workers busy."""

import copy
import dataclasses
import os
import pickle
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pyterrier as pt
import pytest
import torch
from conftest import RERANKERS
from contract import assert_same_scores, many
from hypothesis import given
from hypothesis import strategies as st
from pyterrier.measures import RR

from pyterrier_lit import scale, signals
from pyterrier_lit.reranker import Reranker
from pyterrier_lit.scale import Distributed, costs, shards_of

pytestmark = pytest.mark.filterwarnings("ignore:num_workers=")


@given(st.lists(st.integers(0, 3_000_000), max_size=60), st.integers(1, 9))
def test_every_query_is_in_one_shard_the_dearest_first(costs, workers):
    shards = shards_of(costs, workers)
    assert sorted(i for shard in shards for i in shard) == list(range(len(costs)))
    flat = [costs[i] for shard in shards for i in shard]
    assert flat == sorted(flat, reverse=True)
    assert all(len(shard) == 1 or sum(costs[i] for i in shard) <= scale.LARGEST for shard in shards)


@given(st.lists(st.integers(1_000, 40_000), min_size=200, max_size=400), st.integers(2, 8))
def test_workers_that_take_the_next_shard_when_free_end_together(costs, workers):
    busy = [0] * workers
    for shard in shards_of(costs, workers):
        busy[busy.index(min(busy))] += sum(costs[i] for i in shard)
    assert max(busy) - min(busy) <= max(scale.SMALLEST, max(costs))


def test_costs_follow_the_lengths_of_texts_up_to_what_is_read():
    short, long, longer = costs(["q" * 40] * 3, {"text": [["a"], ["a" * 2_000], ["a" * 9_000_000]]})
    assert short < 20 and 500 < long < longer < 600
    assert costs(["q"], {"docno": [["d1", "d2"]], "doc_vec": [[None, None]]}) == [2]


def test_without_ray_it_says_what_to_install():
    code = (
        "import sys; sys.modules['ray'] = None\n"
        "from pyterrier_lit import CrossEncoder\nfrom pyterrier_lit.scale import Distributed\n"
        "import pandas as pd\n"
        "Distributed(CrossEncoder())(pd.DataFrame({'qid': ['1'], 'query': 'q', 'docno': 'd', 'text': 't'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: Distributed needs Ray: pip install 'pyterrier-lit[ray]'" in done.stderr


def test_arguments_that_make_no_sense_are_refused(small):
    with pytest.raises(TypeError, match="wanted a reranker"):
        Distributed(pt.Transformer.identity())
    with pytest.raises(ValueError, match="num_workers=0"):
        Distributed(small(), num_workers=0)


@pytest.fixture(scope="module")
def ray():
    ray = pytest.importorskip("ray", reason="needs the extra ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100_000_000, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.fixture
def shards_of_one_query(monkeypatch):
    monkeypatch.setattr(scale, "SMALLEST", 1)
    monkeypatch.setattr(scale, "LARGEST", 1)


@pytest.fixture
def one():
    kind, folder, *_ = RERANKERS["CrossEncoder"]
    return lambda **arguments: kind(**{"model": str(folder), "device": "cpu"} | arguments)


def queries(n, passages=4):
    lists = [many(passages + i % 3, f"q{i}").assign(query=f"words {i}", rank=range(passages + i % 3)) for i in range(n)]
    return pd.concat(lists, ignore_index=True)


@dataclasses.dataclass(eq=False, repr=False)
class Mortal(Reranker):
    """A reranker whose scores follow from the letters of query and text. The first process that scores the query
    `fatal` dies."""

    fatal: str = ""
    died: str = ""  # the file that this process writes before it dies
    weight: float = 1.0

    def load(self):
        return None

    def results(self, queries, columns):
        if self.fatal in queries and not Path(self.died).exists():
            Path(self.died).touch()
            os._exit(1)
        letters = zip(queries, columns["text"], strict=True)
        return {"score": [[self.weight * hash_of(query + text) for text in texts] for query, texts in letters]}


def hash_of(text):
    return sum(i * ord(letter) for i, letter in enumerate(text, 1))


def test_two_workers_return_what_one_process_does_though_one_dies(ray, shards_of_one_query, tmp_path):
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    reranker = Mortal("none", fatal="words 7", died=str(tmp_path / "died"))
    frame, distributed = queries(12), Distributed(reranker)
    out = distributed(frame)
    assert Path(reranker.died).exists() and out["score"].nunique() > 12
    pd.testing.assert_frame_equal(out, reranker(frame))
    workers = list(distributed.pool.workers)
    reranker.weight = -2.0
    pd.testing.assert_frame_equal(distributed(frame), reranker(frame))
    assert all(a is b for a, b in zip(distributed.pool.workers, workers, strict=True))


@pytest.fixture
def unstarted(monkeypatch):
    """Make pools start no workers, and only keep `wanted`."""
    job = SimpleNamespace(get_job_id=lambda: "job")
    monkeypatch.setattr(scale, "_ray_started", lambda: SimpleNamespace(get_runtime_context=lambda: job))
    monkeypatch.setattr(scale.Pool, "start", lambda pool, wanted: setattr(pool, "wanted", wanted))


def test_workers_belong_to_one_reranker_and_its_weights(unstarted, one):
    distributed = Distributed(one())
    shorter, other = copy.copy(distributed), copy.copy(distributed)
    shorter.reranker, other.reranker = one(doc_length=3), one(model=str(RERANKERS["CrossEncoder"].tiny))
    pool = distributed.started()[0]
    assert shorter.started()[0] is pool is distributed.started()[0]
    assert other.started()[0] is not pool and other.started()[0] is other.pool
    assert distributed.started()[0] is pool
    distributed.reranker.dtype = "bfloat16"
    assert distributed.started()[0] is not pool is shorter.started()[0]
    assert pickle.loads(pickle.dumps(distributed)).started()[0] is not distributed.pool


def test_weights_that_were_trained_further_get_new_workers(unstarted, small):
    reranker = small(dtype="float32")
    network = reranker.load().network
    distributed = Distributed(reranker)
    pool = distributed.started()[0]
    reranker(queries(2))
    assert distributed.started()[0] is pool
    weight = next(network.parameters()).requires_grad_()
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight]).step()
    assert distributed.started()[0] is not pool


def machines(*resources, free=None):
    """A stand-in for Ray, with one machine for each of `resources`. free: what is not in use; None is everything."""
    total = dict(sum(map(Counter, resources), Counter()))
    nodes = [{"Alive": True, "Resources": there} for there in resources]
    return SimpleNamespace(
        nodes=lambda: nodes,
        cluster_resources=lambda: total,
        available_resources=lambda: total if free is None else free,
    )


def test_what_cannot_be_placed_is_refused_with_what_there_is(unstarted, one, monkeypatch):
    def placed(ray, **arguments):
        return scale._placeable(ray, Distributed(one(), **arguments).started()[1])

    two = machines({"CPU": 2.0}, {"CPU": 4.0, "GPU": 1.0})
    wants = "a worker needs 2 GPU and 1 CPU, and Ray's machines have 0 GPU and 2 CPU; 1 GPU and 4 CPU; reduce"
    with pytest.raises(ValueError, match=wants):
        placed(two, num_gpus=2)
    with pytest.raises(ValueError, match="a worker needs 5 CPU"):
        placed(two, num_cpus=5)  # the two machines have six together
    assert placed(two, num_workers=3) == 3
    assert placed(two, num_workers=9, num_cpus=0) == 9
    assert placed(two, num_workers=10, num_gpus=0.1) == 4  # the machine with the GPU has four cores
    with pytest.warns(
        UserWarning, match="num_workers=9 need 3 CPU each, and Ray has room for 1: continuing with these"
    ):
        assert placed(two, num_workers=9, num_cpus=3) == 1
    monkeypatch.setattr(scale, "PATIENCE", 0.2)
    with pytest.raises(RuntimeError, match="a worker needs 1 CPU, and all that Ray has is in use: 6 CPU; close"):
        placed(machines({"CPU": 2.0}, {"CPU": 4.0}, free={"memory": 1.0}))


def test_the_handler_of_a_signal_and_its_library_are_found():
    known = signals.library(signals.handler(signal.SIGINT))  # conftest.py has set Python's handler
    assert "python" in known
    before = signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    assert signals.library(signals.handler(signal.SIGUSR1)) == ""
    signal.signal(signal.SIGUSR1, lambda *_: None)
    assert signals.library(signals.handler(signal.SIGUSR1)) == known
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.slow
def test_a_copy_with_another_model_ranks_beside_the_call_of_the_first(ray, one, after_ten, monkeypatch):
    frame, distributed, found = queries(60), Distributed(one(), num_workers=1), []
    distributed(queries(1))
    other = copy.copy(distributed)
    other.reranker = one(model=str(RERANKERS["CrossEncoder"].tiny))
    monkeypatch.setattr(scale, "LARGEST", 1)
    after_ten(distributed, lambda: found.append(other(frame)))
    assert_same_scores(distributed(frame), one()(frame))
    assert_same_scores(found[0], other.reranker(frame))


@pytest.mark.slow
def test_workers_that_are_closed_while_they_rank_are_an_error(ray, one, after_ten, monkeypatch):
    frame, distributed = queries(60), Distributed(one())
    distributed(queries(1))
    monkeypatch.setattr(scale, "LARGEST", 1)
    after_ten(distributed, distributed.close)
    with pytest.raises(RuntimeError, match="the workers were closed while they ranked; call again"):
        distributed(frame)
    assert_same_scores(distributed(frame), one()(frame))


@pytest.mark.slow
def test_results_are_those_of_a_single_process(ray, small, shards_of_one_query):
    frame = queries(12)
    distributed = Distributed(small())
    out, expected = distributed(frame), small()(frame)
    assert_same_scores(out, expected)
    pd.testing.assert_frame_equal(out.drop(columns="score"), expected.drop(columns="score"))
    distributed.close()
    assert_same_scores(distributed(frame.sample(frac=1, random_state=0)), expected)


@pytest.mark.slow
def test_inspection_copies_and_errors_are_those_of_the_reranker(ray, small, frame):
    distributed = Distributed(small(), num_workers=1, verbose=True)
    assert pt.inspect.transformer_inputs(distributed) == pt.inspect.transformer_inputs(small())
    columns = ["qid", "query", "docno", "text", "title"]
    assert pt.inspect.transformer_outputs(distributed, columns) == [*columns, "score", "rank"]
    assert pt.inspect.subtransformers(distributed) == {"reranker": distributed.reranker}
    assert "<div" in pt.schematic.draw(pt.RankCutoff(100) >> distributed)
    rebuilt = eval(repr(distributed), {"Distributed": Distributed, type(small()).__name__: type(small())})
    assert repr(rebuilt) == repr(distributed)
    with pytest.raises(pt.validate.InputValidationError, match="text"):
        distributed(frame.drop(columns="text"))
    with pytest.raises(TypeError, match=r"row 3 \(qid 'q1', docno 'd2'\)"):
        distributed(frame.assign(text=[*"abc", None, *"efg"]))
    assert not distributed.pool.workers
    with pytest.raises(FileNotFoundError, match="no/such-model"):
        Distributed(small(model="no/such-model"), num_workers=1)(frame)
    expected = small()(frame)
    for it in (distributed, pickle.loads(pickle.dumps(distributed)), copy.copy(distributed)):
        assert_same_scores(it(frame), expected)


@pytest.mark.slow
def test_it_works_in_an_experiment_and_fuses_cutoffs(ray, small, frame):
    distributed = Distributed(small(), num_workers=1)
    first = pt.Transformer.from_df(frame)
    qrels = pd.DataFrame({"qid": ["q1", "q2"], "docno": ["d2", "d6"], "label": [1, 1]})
    topics = frame[["qid", "query"]].drop_duplicates()
    pipelines = [first >> small(), first >> distributed, ((first >> distributed) % 2).compile()]
    table = pt.Experiment(pipelines, topics, qrels, [RR @ 10], names=["alone", "ray", "top 2"], verbose=False)
    assert table["RR@10"][0] == table["RR@10"][1]
    fused = repr(pipelines[2])
    assert ("top_k=2" in fused) == hasattr(small(), "top_k")
    top, full = pipelines[2](topics), pipelines[0](topics)
    expected = full[full["rank"] < 2]
    key = ["qid", "rank"]
    assert top.sort_values(key).docno.tolist() == expected.sort_values(key).docno.tolist()
    assert len(distributed.pool.workers) == 1


def pids(distributed, ray):
    here = [worker.__ray_call__.remote(lambda worker: os.getpid()) for worker in distributed.pool.workers]
    return ray.get(here)


@pytest.fixture
def after_ten(monkeypatch):
    """after_ten(distributed, action): call `action` during the next call of `distributed`, after ten shards."""

    def arrange(distributed, action):
        run = distributed.pool.run

        def watched(*arguments):
            for done, found in enumerate(run(*arguments)):
                if done == 10:
                    monkeypatch.undo()
                    action()
                yield found

        monkeypatch.setattr(distributed.pool, "run", watched)

    return arrange


@pytest.mark.slow
def test_the_queries_of_a_killed_worker_go_to_another(ray, one, monkeypatch, after_ten):
    frame, distributed = queries(60), Distributed(one())
    expected = one()(frame)
    distributed(frame)
    before = pids(distributed, ray)
    monkeypatch.setattr(scale, "LARGEST", 1)
    after_ten(distributed, lambda: os.kill(before[0], signal.SIGKILL))  # this worker has two shards
    out = distributed(frame)
    assert_same_scores(out, expected)
    assert out.docno.tolist() == frame.docno.tolist()
    after = pids(distributed, ray)
    assert before[0] not in after and before[1] in after and len(after) == 2


@pytest.mark.slow
def test_queries_that_kill_every_worker_are_an_error(ray, one, shards_of_one_query, frame):
    reranker = one()
    reranker.hold(Fatal())
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with pytest.raises(RuntimeError, match="3 workers of Ray died over the same queries; Ray says: "):
        Distributed(reranker, num_workers=1)(frame)


class Fatal:
    """Weights that kill the process that uses them."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        os._exit(1)


@pytest.mark.slow
def test_no_more_shards_are_under_way_than_two_a_worker(ray, one, shards_of_one_query, monkeypatch):
    distributed, made, done = Distributed(one()), [], []
    pick, run = scale._of, distributed.pool.run

    def counted(*arguments):
        made.append(1)
        assert len(made) - len(done) <= 2 * scale.IN_FLIGHT + 1  # + 1: the shard that is being sent
        return pick(*arguments)

    def watched(*arguments):
        for found in run(*arguments):
            done.append(1)
            yield found

    monkeypatch.setattr(scale, "_of", counted)
    monkeypatch.setattr(distributed.pool, "run", watched)
    distributed(queries(20))
    assert len(made) == len(done) == 20


@pytest.mark.slow
def test_changed_arguments_reach_the_workers(ray, one, frame):
    reranker = one()
    distributed = Distributed(reranker, num_workers=1)
    distributed(frame)
    workers = list(distributed.pool.workers)
    reranker.doc_length = 3
    assert_same_scores(distributed(frame), one(doc_length=3)(frame))
    assert distributed.pool.workers[0] is workers[0]
    reranker.dtype = "bfloat16"
    assert_same_scores(distributed(frame), one(doc_length=3, dtype=torch.bfloat16)(frame))
    assert distributed.pool.workers[0] is not workers[0]


@pytest.mark.slow
def test_ctrl_c_leaves_it_usable(ray, one, monkeypatch, after_ten):
    frame, distributed = queries(60), Distributed(one())
    monkeypatch.setattr(scale, "LARGEST", 1)
    after_ten(distributed, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        distributed(frame)
    assert_same_scores(distributed(frame), one()(frame))
