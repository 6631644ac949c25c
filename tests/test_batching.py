"""map_batches: one result per item, in the order of the items, within the token budget, also when memory runs out."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyterrier_lit.batching import Budget, Tokens, counted_tokens, like_lengths, map_batches

lengths_lists = st.lists(st.integers(0, 60), max_size=60)


@given(lengths_lists, st.integers(1, 200), st.booleans())
def test_answers_come_in_the_order_of_the_items_and_batches_keep_the_budget(lengths, max_tokens, as_tensor):
    items = list(range(len(lengths)))
    batches = []

    def double(batch):
        batches.append(batch)
        return torch.tensor(batch) * 2 if as_tensor else [item * 2 for item in batch]

    assert map_batches(double, items, lengths, max_tokens) == [item * 2 for item in items]
    assert sorted(item for batch in batches for item in batch) == items
    for batch in batches:
        longest = max(lengths[item] for item in batch)
        assert len(batch) == 1 or len(batch) * longest <= max_tokens
    longest_first = [max(lengths[item] for item in batch) for batch in batches]
    assert longest_first == sorted(longest_first, reverse=True)


def test_batches_are_as_full_as_the_budget_allows():
    sizes = []
    map_batches(lambda batch: sizes.append(len(batch)) or batch, list(range(10)), [10] * 10, 40)
    assert sizes == [4, 4, 2]


def test_sorting_by_length_keeps_padding_under_five_percent():
    lengths = np.random.default_rng(0).integers(20, 160, 4_300).tolist()
    padded = []
    map_batches(lambda batch: padded.append(len(batch) * max(batch)) or batch, lengths, lengths, 16_384)
    assert sum(padded) / sum(lengths) <= 1.05


@given(lengths_lists.filter(len), st.integers(60, 300))
def test_memory_that_runs_out_halves_the_batch_and_loses_nothing(lengths, fits):
    items = list(range(len(lengths)))
    tried = []

    def limited(batch):
        tokens = len(batch) * max(lengths[item] for item in batch)
        tried.append(tokens)
        if tokens > fits:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return batch

    if sum(lengths) == 0 or len(lengths) * max(lengths) <= fits:
        assert map_batches(limited, items, lengths, 10_000) == items
    else:
        with pytest.warns(UserWarning, match=r"max_tokens=\d+ avoids this") as warned:
            assert map_batches(limited, items, lengths, 10_000) == items
        assert len(warned) == 1
        failed = [tokens > fits for tokens in tried]
        assert failed == sorted(failed, reverse=True)  # after the first batch that fits, all batches fit


def test_memory_that_runs_out_leaves_half_of_what_was_tried():
    tried = []

    def limited(batch):
        tried.append(len(batch))
        if len(batch) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return batch

    budget = Budget(100)
    with pytest.warns(
        UserWarning, match=r"in a batch of 100 tokens; continuing with half \(max_tokens=50 avoids this\)"
    ):
        map_batches(limited, list(range(10)), [10] * 10, budget)
    assert tried == [10, 5, 2, 2, 2, 2, 2]
    assert budget.tokens == 20


@given(lengths_lists, st.integers(1, 200))
def test_like_lengths_gives_each_item_once_within_the_budget(lengths, max_tokens):
    batches = list(like_lengths(lengths, max_tokens))
    assert sorted(item for batch in batches for item in batch) == list(range(len(lengths)))
    for number, batch in enumerate(batches, 1):
        longest = max(max(lengths[item] for item in batch), 1)
        assert len(batch) == 1 or len(batch) * longest <= max_tokens
        assert number == len(batches) or (len(batch) + 1) * longest > max_tokens  # one more item would not have fitted


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_one_item_that_does_not_fit_is_an_error_that_says_so(error):
    def never(batch):
        raise error

    with pytest.warns(UserWarning), pytest.raises(MemoryError, match="an input of 7 tokens alone does not fit"):
        map_batches(never, ["a", "b"], [5, 7], 100)


def test_other_errors_pass_through():
    def broken(batch):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        map_batches(broken, ["a"], [1], 100)


def test_an_answer_too_few_is_an_error():
    with pytest.raises(ValueError):
        map_batches(lambda batch: batch[:-1], ["a", "b"], [1, 1], 100)


def test_a_tensor_is_read_one_batch_late():
    events = []

    class Slow(torch.Tensor):
        def tolist(self):
            events.append("read")
            return super().tolist()

    def compute(batch):
        events.append("computed")
        return torch.ones(len(batch)).as_subclass(Slow)

    map_batches(compute, [1, 2, 3], [1, 1, 1], 1)
    assert events == ["computed", "computed", "read", "computed", "read", "read"]


def test_tokens_are_counted_with_and_without_padding_and_once_where_batches_are_computed_in_batches():
    with counted_tokens() as tokens:
        map_batches(lambda batch: batch, ["aaa", "aa", "a"], [3, 2, 1], 6)
    assert tokens == Tokens(real=6, padded=3 * 2 + 1)
    with counted_tokens() as tokens:
        map_batches(
            lambda batch: [sum(map_batches(list, lengths, lengths, 4)) for lengths in batch], [[2, 1], [4]], [3, 4], 7
        )
    assert tokens == Tokens(real=7, padded=2 * 2 + 4)
    map_batches(lambda batch: batch, ["a"], [1], 6)
    assert tokens == Tokens(real=7, padded=8)
