"""reranker: a checkpoint is read on first use, once for all copies. A loaded reranker does not wait while another one
loads."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import RERANKERS


@pytest.fixture
def build():
    """build(name, **arguments): a reranker, a list, and an event. Each read of a checkpoint appends its dtype to the
    list. While the event is cleared, reads wait."""

    def build(name="CrossEncoder", **arguments):
        known = RERANKERS[name]
        reads, go_on = [], threading.Event()
        go_on.set()

        class Watched(known.kind):
            @staticmethod
            def read(folder, device, dtype):
                reads.append(dtype)
                assert go_on.wait(30)
                return known.kind.read(folder, device, dtype)

        return Watched(str(known.random), device="cpu", **arguments), reads, go_on

    return build


def test_a_loaded_reranker_does_not_wait_for_another_that_loads(build, frame):
    ready, _, _ = build()
    ready(frame)
    loading, reads, go_on = build("LiT5Distill")
    go_on.clear()
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(loading.load)
        try:
            assert len(pool.submit(ready, frame).result(timeout=20)) == len(frame)
            assert not waiting.done()
        finally:
            go_on.set()
        assert waiting.result(timeout=20) is loading.load() and len(reads) == 1


def test_copies_that_load_at_once_read_one_checkpoint(build):
    reranker, reads, _ = build()
    copies = [reranker, *(copy.copy(reranker) for _ in range(5))]
    with ThreadPoolExecutor(6) as pool:
        checkpoints = list(pool.map(lambda each: each.load(), copies))
    assert len(reads) == 1 and all(checkpoint is checkpoints[0] for checkpoint in checkpoints)


def test_load_keeps_what_it_read_and_says_whether_there_is_something(build):
    reranker, reads, _ = build()
    assert reranker.in_memory() is None
    assert reranker.load() is reranker.load() is reranker.in_memory() and len(reads) == 1


def test_a_copy_with_another_dtype_reads_for_itself_alone(build):
    reranker, reads, _ = build()
    other = copy.copy(reranker)
    other.dtype = "bfloat16"
    first, second = reranker.load(), other.load()
    assert first is not second and reranker.load() is first and other.load() is second
    assert [str(dtype) for dtype in reads] == ["torch.float32", "torch.bfloat16"]
    reranker.dtype = "float64"
    assert reranker.in_memory() is None and reranker.load() is not first and len(reads) == 3


def test_held_weights_are_this_rerankers_alone(build):
    reranker, reads, _ = build()
    copied = copy.copy(reranker)
    copied.hold("another checkpoint")
    assert copied.load() == "another checkpoint" and reranker.load() != "another checkpoint" and len(reads) == 1
