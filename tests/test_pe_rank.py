"""PERank: the promises in contract.py, equality with liuqi6777/pe_rank (golden/pe_rank), modes, decodings, errors."""

import copy
from itertools import groupby

import numpy as np
import pandas as pd
import pyterrier as pt
import pytest
import torch
from contract import Contract, assert_same_scores, by_docno, many
from hypothesis import given, settings
from hypothesis import strategies as st
from pe import (
    ARRAYS,
    FOLDER,
    SLIDING,
    WINDOWS,
    Encoder,
    Index,
    assert_golden,
    canonical_final,
    count_forwards,
    final,
    ids_of,
    prompt,
    quietly,
    sliding_frame,
    texts_of,
    vectors_of,
    with_vectors,
)

from pyterrier_lit import PERank
from pyterrier_lit.pe_rank import constrained, first


@pytest.fixture
def make():
    return lambda **arguments: PERank(**{"model": str(FOLDER / "checkpoint"), "device": "cpu"} | arguments)


@pytest.fixture
def reranker(make):
    return make()


@pytest.fixture(scope="module")
def ranker():
    return PERank(str(FOLDER / "checkpoint"), device="cpu").load()


class TestContract(Contract):
    def test_inspection(self, make):
        vector, text = ["qid", "docno", "query", "doc_vec"], ["qid", "docno", "query", "text"]
        both = [*text, "doc_vec"]
        assert pt.inspect.transformer_inputs(make()) == [vector, text]
        assert pt.inspect.transformer_inputs(make(encoder=Encoder())) == [vector, text]
        assert pt.inspect.transformer_inputs(make(vectors=Index({}))) == [vector, ["qid", "docno", "query"]]
        assert pt.inspect.transformer_inputs(make(mode="text+embedding")) == [both, text]
        assert pt.inspect.transformer_inputs(make(mode="text+embedding", vectors=Index({}))) == [both, text]
        columns = ["qid", "query", "docno", "text", "title"]
        assert pt.inspect.transformer_outputs(make(), columns) == [*columns, "score", "rank"]
        assert pt.inspect.transformer_apply_attributes(make(), top_k=3).top_k == 3
        for source in ({}, {"vectors": Index({})}, {"encoder": Encoder()}):
            assert "<div" in pt.schematic.draw(pt.RankCutoff(100) >> make(**source))


@pytest.mark.parametrize("window", WINDOWS, ids=lambda window: str(window["i"]))
class TestGoldenWindows:
    def test_messages_prompt_and_ids_equal_the_reference(self, ranker, window):
        shown = texts_of(window) or [None] * len(window["candidates"])
        assert ranker.prompter.messages(window["query"], shown) == window["messages"]
        assert ranker.prompter.render(window["query"], shown) == window["rendered"]
        assert ids_of(ranker, window) == window["input_ids"] == ARRAYS[f"w{window['i']}.input_ids"].tolist()

    def test_vectors_equal_the_reference(self, ranker, window):
        encoder = ranker.text_encoder()
        pieces = encoder.pieces(window["candidates"])
        expected = ARRAYS[f"w{window['i']}.encoder_input_ids"]
        assert [ids + [0] * (expected.shape[1] - len(ids)) for ids in pieces] == expected.tolist()
        with torch.inference_mode():
            vectors = torch.nn.functional.normalize(encoder.encode(pieces), dim=1)
        assert (vectors - vectors_of(window)).abs().max() < 1e-5

    @torch.inference_mode()
    def test_inputs_and_the_logits_of_every_step_equal_the_reference(self, ranker, window):
        reader = ranker.network.read([ids_of(ranker, window)], [vectors_of(window)])
        i = window["i"]
        assert np.abs(reader.passages[0].numpy() - ARRAYS[f"w{i}.projected"]).max() < 1e-5
        assert np.abs(reader.inputs[0].numpy() - ARRAYS[f"w{i}.inputs_embeds"]).max() < 1e-5
        logits = reader.start()
        for step, picked in enumerate(window["permutation"]):
            assert np.abs(logits[0].numpy() - ARRAYS[f"w{i}.step_logits"][step]).max() < 1e-4
            logits = reader.read(torch.tensor([[picked]]))[:, -1]

    @torch.inference_mode()
    def test_several_passages_in_one_pass_give_the_logits_after_each_of_them(self, ranker, window):
        reader = ranker.network.read([ids_of(ranker, window)], [vectors_of(window)])
        named, expected = window["permutation"], ARRAYS[f"w{window['i']}.step_logits"]
        logits = [reader.start()[:, None]]
        for start in range(0, len(named) - 1, 4):
            logits.append(reader.read(torch.tensor([named[start : min(start + 4, len(named) - 1)]])))
        assert np.abs(torch.cat(logits, 1)[0].numpy() - expected[: len(named)]).max() < 1e-4

    @torch.inference_mode()
    def test_the_permutation_equals_the_reference_in_less_than_n_forward_passes(self, ranker, window, monkeypatch):
        calls = count_forwards(ranker, monkeypatch)
        n = len(window["candidates"])
        order = constrained(ranker, [prompt(ranker, window)])[0][0]
        assert [window["canonical"][j] for j in order] == [window["canonical"][j] for j in window["permutation"][:-1]]
        assert len(calls) < n

    @torch.inference_mode()
    def test_first_is_the_order_of_the_first_logits(self, ranker, window):
        order = first(ranker, [prompt(ranker, window)])[0][0]
        logits = ARRAYS[f"w{window['i']}.step_logits"][0]
        assert [logits[j] for j in order] == pytest.approx(sorted(logits, reverse=True), abs=1e-4)
        assert order[0] == window["permutation"][0]


@pytest.mark.parametrize("max_tokens", [1, 1_000, 10**6])
@pytest.mark.parametrize("source", ["vectors", "text"])
def test_every_sliding_run_equals_the_reference_alone_or_together(make, source, max_tokens):
    frame = sliding_frame(SLIDING).drop(columns="doc_vec" if source == "text" else "text")
    assert_golden(quietly(make(max_tokens=max_tokens), frame.sample(frac=1, random_state=1)))


def test_the_list_that_the_reference_leaves_unranked_is_one_window(make):
    runs = [run for run in SLIDING if run["reference_ranks_nothing"]]
    assert [run["n"] for run in runs] == [10]
    out = quietly(make(), sliding_frame(runs))
    assert final(out, "0") == runs[0]["final_one_window"] != runs[0]["candidates"]


def test_a_cutoff_names_window_less_stride_passages_and_keeps_the_top(make, monkeypatch):
    run = SLIDING[0]
    reranker = make(top_k=10)
    calls = count_forwards(reranker.load(), monkeypatch)
    out = quietly(reranker, sliding_frame([run]))
    assert len(calls) <= 9 * 10
    assert canonical_final(run, final(out, "0"))[:10] == canonical_final(run, run["final"])[:10]
    calls.clear()
    assert_golden(quietly(make(top_k=3), sliding_frame(SLIDING)), first=3)
    reranker.top_k = None
    quietly(reranker, sliding_frame([run]))
    assert 9 * 10 < len(calls) <= 9 * 19


@settings(max_examples=15)
@given(
    st.integers(1, 8).flatmap(lambda w: st.tuples(st.just(w), st.integers(1, w))),
    st.integers(1, 12),
    st.integers(1, 2),
    st.integers(1, 30),
)
def test_any_cutoff_leaves_the_first_k_as_they_are(shape, k, passes, n):
    frame = with_vectors(many(n), seed=n)[0]
    size, stride = shape
    arguments = {"window_size": size, "stride": stride, "passes": passes, "device": "cpu"}
    full = PERank(str(FOLDER / "checkpoint"), **arguments)
    full.hold(SHARED.load())
    short = PERank(str(FOLDER / "checkpoint"), **arguments, top_k=k)
    short.hold(SHARED.load())
    everything, some = final(quietly(full, frame), "q1"), final(quietly(short, frame), "q1")
    assert some[:k] == everything[:k]
    assert sorted(some) == sorted(everything) == sorted(frame["docno"])


SHARED = PERank(str(FOLDER / "checkpoint"), device="cpu")


def test_a_compiled_cutoff_is_the_top_of_the_full_order(make, frame):
    first = pt.Transformer.from_df(frame)
    fused = (first >> make() % 2).compile()
    assert "top_k=2" in repr(fused)
    topics = frame[["qid", "query"]].drop_duplicates()
    expected = (first >> make() % 2)(topics)
    assert by_docno(expected).keys() == by_docno(fused(topics)).keys()
    assert make(top_k=2).fuse_rank_cutoff(2) is None


def test_windows_of_all_queries_advance_in_one_batch(make, monkeypatch):
    reranker = make(max_tokens=10**6)
    calls = count_forwards(reranker.load(), monkeypatch)
    frames = [with_vectors(many(n, qid))[0] for n, qid in ((25, "a"), (8, "b"), (40, "c"))]
    quietly(reranker, pd.concat(frames))
    common = [1]  # one pass reads the common prefix of a round's prompts
    assert [rows for rows, _ in groupby(rows for rows, _ in calls)] == [*common, 3, *common, 2, 1]
    assert sum(width > 4 for _, width in calls) == 3 + 2  # the prompts of three rounds, and two common prefixes


@pytest.mark.parametrize("decoding", ["constrained", "first"])
def test_with_a_cutoff_the_ranks_below_it_do_not_depend_on_other_queries_either(make, decoding):
    frames = [with_vectors(many(n, qid), seed=n)[0] for n, qid in ((18, "a"), (25, "b"), (12, "c"))]
    reranker = make(top_k=4, window_size=9, stride=3, decoding=decoding, max_tokens=10**6)
    together = quietly(reranker, pd.concat(frames))
    assert_same_scores(together, pd.concat([quietly(reranker, frame) for frame in frames]))


def test_a_single_passage_costs_no_forward_pass(make, monkeypatch, frame):
    reranker = make()
    calls = count_forwards(reranker.load(), monkeypatch)
    assert quietly(reranker, with_vectors(frame.head(1))[0])["rank"].tolist() == [0]
    assert calls == []


def test_the_text_is_read_in_its_mode_alone(make, frame):
    column = with_vectors(frame)[0]
    other = column.assign(text=column["text"] + " and more words that were not there")
    assert_same_scores(quietly(make(), column), quietly(make(), other))
    one, two = (quietly(make(mode="text+embedding"), given) for given in (column, other))
    assert by_docno(one) != by_docno(two) or by_docno(one) != by_docno(quietly(make(), column))


def test_decoding_first_takes_one_forward_pass_a_window(make, monkeypatch):
    reranker = make(decoding="first")
    calls = count_forwards(reranker.load(), monkeypatch)
    out = quietly(reranker, with_vectors(many(40))[0])
    assert len(calls) == 3
    assert sorted(out["rank"]) == list(range(40))


def test_an_unknown_mode_or_decoding_is_refused(make, frame):
    with pytest.raises(ValueError, match="mode='text'; wanted one of 'embedding', 'text\\+embedding'"):
        make(mode="text")(frame)
    with pytest.raises(ValueError, match="decoding='free'; wanted one of 'constrained', 'first'"):
        make(decoding="free")(frame)


def test_texts_may_be_read_with_either_decoding(make, frame):
    column = with_vectors(frame)[0]
    both = make(mode="text+embedding", decoding="first")
    assert by_docno(quietly(both, column)) != by_docno(quietly(make(decoding="first"), column))
    top = quietly(both, column).query("rank == 0").docno.tolist()
    assert top == quietly(make(mode="text+embedding"), column).query("rank == 0").docno.tolist()


@pytest.mark.parametrize("arguments", [{"window_size": 5, "stride": 6}, {"stride": 0}, {"top_k": 0}, {"passes": 0}])
def test_windows_that_make_no_sense_are_refused(make, frame, arguments):
    with pytest.raises(ValueError, match=next(reversed(arguments))):
        make(**arguments)(frame)


@pytest.mark.parametrize("decoding", ["constrained", "first"])
def test_nan_logits_are_named(make, frame, decoding):
    reranker = make(decoding=decoding)
    held = copy.copy(reranker.load())
    held.network = copy.deepcopy(held.network)
    torch.nn.init.constant_(held.network.body.norm.weight, float("nan"))
    reranker.hold(held)
    with pytest.raises(ValueError, match=r"gave nan for query 'red fox', docno 'd6' and 1 more of its passages"):
        reranker(frame)


def test_out_of_memory_halves_the_batches_of_all_rounds_with_one_warning(make, monkeypatch):
    frame = pd.concat([many(30, qid) for qid in "abcd"])
    expected, reranker = make()(frame), make()
    forward = reranker.load().network.body.forward

    def small_memory(inputs_embeds, **rest):
        if len(inputs_embeds) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return forward(inputs_embeds=inputs_embeds, **rest)

    monkeypatch.setattr(reranker.load().network.body, "forward", small_memory)
    with pytest.warns(UserWarning, match="out of memory") as warned:
        assert_same_scores(reranker(frame), expected)
    assert [warning.category for warning in warned].count(UserWarning) == 1
