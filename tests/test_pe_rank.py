"""PERank: the contract, equality with liuqi6777/pe_rank (golden/pe_rank), sources of vectors, modes, every bad input."""

import copy
import json
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pyterrier as pt
import pytest
import safetensors.torch
import torch
from conftest import GOLDEN
from contract import Contract, assert_same_scores, by_docno, many
from hypothesis import given, settings
from hypothesis import strategies as st

from pyterrier_lit import PERank
from pyterrier_lit.models.pe_prompts import read_prompter
from pyterrier_lit.pe_rank import Window, name_at_once, name_in_turn

FOLDER = GOLDEN / "pe_rank"
ARRAYS = np.load(FOLDER / "arrays.npz")
WINDOWS = json.loads((FOLDER / "windows.json").read_text(encoding="utf-8"))
SLIDING = json.loads((FOLDER / "sliding.json").read_text(encoding="utf-8"))
DOCNOS = json.loads((FOLDER / "sliding_docnos.json").read_text(encoding="utf-8"))


@pytest.fixture
def make():
    return lambda **arguments: PERank(**{"model": str(FOLDER / "checkpoint"), "device": "cpu"} | arguments)


@pytest.fixture
def reranker(make):
    return make()


@pytest.fixture(scope="module")
def ranker():
    return PERank(str(FOLDER / "checkpoint"), device="cpu").loaded()


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


class Index:
    """A dense index as pyterrier_dr.FlexIndex is one; an unknown docno gets -1, as there."""

    def __init__(self, vectors):
        self.docnos = list(vectors)
        self.vectors = np.array(list(vectors.values()), dtype="float32")

    def payload(self):
        held = type("Lookup", (), {})()
        held.fwd = type("Fwd", (), {"__getitem__": lambda _, numbers: [self.docnos[n] for n in numbers]})()
        held.inv = type(
            "Inv",
            (),
            {"__getitem__": lambda _, names: [self.docnos.index(n) if n in self.docnos else -1 for n in names]},
        )()
        return held, self.vectors, {}

    def __repr__(self):
        return "Index()"


class Encoder:
    """A bi-encoder as pyterrier_dr.BiEncoder is one: vectors from the letters of a text."""

    def __init__(self, width=24):
        self.width = width
        self.calls = []

    def encode_docs(self, texts):
        self.calls.append(list(texts))
        return np.array([[text.count(chr(97 + i)) + 0.1 * i for i in range(self.width)] for text in texts])

    def __repr__(self):
        return "Encoder()"


def with_vectors(frame, seed=0, width=24):
    rng = np.random.default_rng(seed)
    vector_of = {docno: rng.normal(size=width).astype("float32") for docno in sorted(set(frame["docno"]))}
    return frame.assign(doc_vec=[vector_of[docno] for docno in frame["docno"]]), vector_of


def quietly(function, *arguments):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "neither a 'doc_vec' column nor an index")
        return function(*arguments)


def texts_of(window):
    return window["candidates"] if window["mode"] == "listwise-text-embedding" else []


def ids_of(ranker, window):
    return ranker.prompter.ids([window["query"]], [texts_of(window)], [len(window["candidates"])])[0]


def vectors_of(window):
    return torch.tensor(ARRAYS[f"w{window['i']}.doc_vec"])


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
        reading = ranker.network.read([ids_of(ranker, window)], [vectors_of(window)])
        i = window["i"]
        assert np.abs(reading.passages[0].numpy() - ARRAYS[f"w{i}.projected"]).max() < 1e-5
        assert np.abs(reading.inputs[0].numpy() - ARRAYS[f"w{i}.inputs_embeds"]).max() < 1e-5
        for step, picked in enumerate(window["permutation"]):
            assert np.abs(reading.logits()[0].numpy() - ARRAYS[f"w{i}.step_logits"][step]).max() < 1e-4
            reading.name(torch.tensor([picked]))

    @torch.inference_mode()
    def test_the_permutation_equals_the_reference_in_n_less_one_forward_passes(self, ranker, window, monkeypatch):
        calls = count_forwards(ranker, monkeypatch)
        n = len(window["candidates"])
        order = name_in_turn(ranker.network, [Window(ids_of(ranker, window), vectors_of(window), n)])[0].tolist()
        assert [window["canonical"][j] for j in order] == [window["canonical"][j] for j in window["permutation"][:-1]]
        assert len(calls) == n - 1

    @torch.inference_mode()
    def test_at_once_is_the_order_of_the_first_logits(self, ranker, window):
        order = name_at_once(ranker.network, [Window(ids_of(ranker, window), vectors_of(window), 1)])[0].tolist()
        logits = ARRAYS[f"w{window['i']}.step_logits"][0]
        assert [logits[j] for j in order] == pytest.approx(sorted(logits, reverse=True), abs=1e-4)
        assert order[0] == window["permutation"][0]


def count_forwards(ranker, monkeypatch):
    """The widths of the inputs of every forward pass of the language model, as they happen."""
    calls, forward = [], ranker.network.body.forward
    monkeypatch.setattr(
        ranker.network.body,
        "forward",
        lambda **inputs: calls.append(tuple(inputs["inputs_embeds"].shape[:2])) or forward(**inputs),
    )
    return calls


@torch.inference_mode()
def test_all_golden_windows_in_one_padded_batch_give_the_same_logits_and_orders(ranker):
    read = ranker.network.read(
        [ids_of(ranker, window) for window in WINDOWS], [vectors_of(window) for window in WINDOWS]
    )
    for step in range(5):
        logits = read.logits()
        for row, window in enumerate(WINDOWS):
            expected = ARRAYS[f"w{window['i']}.step_logits"][step]
            assert np.abs(logits[row, : len(expected)].numpy() - expected).max() < 1e-4
        read.name(torch.tensor([window["permutation"][step] for window in WINDOWS]))
    batch = [Window(ids_of(ranker, window), vectors_of(window), 20) for window in WINDOWS]
    for order, window in zip(name_in_turn(ranker.network, batch).tolist(), WINDOWS, strict=True):
        canonical, n = window["canonical"], len(window["candidates"])
        assert [canonical[j] for j in order[: n - 1]] == [canonical[j] for j in window["permutation"][:-1]]


def test_rope_keeps_its_base_and_its_precision():
    for dtype in ("float32", "bfloat16", "float16"):
        body = PERank(str(FOLDER / "checkpoint"), device="cpu", dtype=dtype).loaded().network.body
        frequencies = body.rotary_emb.inv_freq
        assert frequencies.dtype == torch.float32
        assert frequencies.tolist() == pytest.approx([1e6 ** (-2 * i / 8) for i in range(4)], rel=1e-6)
        assert {parameter.dtype for parameter in body.parameters()} == {getattr(torch, dtype)}


@pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 0.2), ("float16", 0.05)])
@torch.inference_mode()
def test_half_precision_stays_close_when_fed_the_picks_of_the_reference(dtype, tolerance):
    ranker = PERank(str(FOLDER / "checkpoint"), device="cpu", dtype=dtype).loaded()
    for window in WINDOWS:
        reading = ranker.network.read([ids_of(ranker, window)], [vectors_of(window)])
        for step, picked in enumerate(window["permutation"]):
            difference = np.abs(reading.logits()[0].numpy() - ARRAYS[f"w{window['i']}.step_logits"][step]).max()
            assert 0 < difference < tolerance
            reading.name(torch.tensor([picked]))


def sliding_frame(runs, **columns):
    """One query per golden run; `doc_vec` of the reference, and the text."""
    rows = [
        (str(i), run["query"], docno, text, rank)
        for i, run in enumerate(runs)
        for rank, (docno, text) in enumerate(zip(run["candidates"], run["contents"], strict=True))
    ]
    frame = pd.DataFrame(rows, columns=["qid", "query", "docno", "text", "rank"])
    vectors = dict(zip(DOCNOS, ARRAYS["sliding.doc_vec"], strict=True))
    return frame.assign(doc_vec=[vectors[docno] for docno in frame["docno"]], **columns)


def final(out, qid):
    return out[out.qid == qid].sort_values("rank")["docno"].tolist()


def canonical_final(run, docnos):
    names = dict(zip(run["candidates"], run["canonical"], strict=True))
    return [names[docno] for docno in docnos]


def assert_golden(out, first=None):
    for i, run in enumerate(SLIDING):
        expected = run["final_one_window"] if run["reference_ranks_nothing"] else run["final"]
        assert canonical_final(run, final(out, str(i)))[:first] == canonical_final(run, expected)[:first]


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


def test_the_length_of_the_vectors_does_not_count(make):
    frame = sliding_frame(SLIDING)
    assert_golden(quietly(make(), frame.assign(doc_vec=[3.7 * vector for vector in frame["doc_vec"]])))


def test_a_cutoff_names_window_less_stride_passages_and_keeps_the_top(make, monkeypatch):
    run = SLIDING[0]
    reranker = make(top_k=10)
    calls = count_forwards(reranker.loaded(), monkeypatch)
    out = quietly(reranker, sliding_frame([run]))
    assert len(calls) == 9 * 10
    assert canonical_final(run, final(out, "0"))[:10] == canonical_final(run, run["final"])[:10]
    calls.clear()
    assert_golden(quietly(make(top_k=3), sliding_frame(SLIDING)), first=3)
    reranker.top_k = None
    quietly(reranker, sliding_frame([run]))
    assert len(calls) == 9 * 19


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
    full.hold(SHARED.loaded())
    short = PERank(str(FOLDER / "checkpoint"), **arguments, top_k=k)
    short.hold(SHARED.loaded())
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
    calls = count_forwards(reranker.loaded(), monkeypatch)
    frames = [with_vectors(many(n, qid))[0] for n, qid in ((25, "a"), (8, "b"), (40, "c"))]
    quietly(reranker, pd.concat(frames))
    common = [1]  # what the prompts of a round begin with is read once, for all of them
    assert [rows for rows, _ in calls] == common + [3] * 19 + common + [2] * 19 + [1] * 19
    assert [width for _, width in calls].count(1) == 18 * 3


def test_positions_are_counted_from_the_first_real_token(ranker):
    short, long = WINDOWS[2], WINDOWS[1]
    reading = ranker.network.read([ids_of(ranker, short), ids_of(ranker, long)], [vectors_of(short), vectors_of(long)])
    common = reading.cache.get_seq_length()
    padding = len(long["input_ids"]) - len(short["input_ids"])
    assert common > 5
    assert reading.mask[0].tolist() == [1] * common + [0] * padding + [1] * (len(short["input_ids"]) - common)
    first, last = short["positions"][0]
    assert reading.positions[0, padding:].tolist() == list(range(first + common, last + 1))
    for step in (1, 2):
        reading.name(torch.tensor([0, 0]))
        assert reading.positions.tolist() == [[short["positions"][step]], [long["positions"][step]]]


@pytest.mark.parametrize("mode", ["embedding", "first"])
def test_with_a_cutoff_the_ranks_below_it_do_not_depend_on_other_queries_either(make, mode):
    frames = [with_vectors(many(n, qid), seed=n)[0] for n, qid in ((18, "a"), (25, "b"), (12, "c"))]
    reranker = make(top_k=4, window_size=9, stride=3, mode=mode, max_tokens=10**6)
    together = quietly(reranker, pd.concat(frames))
    assert_same_scores(together, pd.concat([quietly(reranker, frame) for frame in frames]))


def test_a_single_passage_costs_no_forward_pass(make, monkeypatch, frame):
    reranker = make()
    calls = count_forwards(reranker.loaded(), monkeypatch)
    assert quietly(reranker, with_vectors(frame.head(1))[0])["rank"].tolist() == [0]
    assert calls == []


# Sources of vectors


def test_a_column_goes_before_an_index_and_an_index_before_an_encoder(make, frame):
    column, vector_of = with_vectors(frame)
    encoder, other = Encoder(), Index(with_vectors(frame, seed=9)[1])
    expected = by_docno(quietly(make(), column))
    bare = frame.drop(columns="text")
    assert by_docno(quietly(make(vectors=Index(vector_of), encoder=encoder), bare)) == expected
    assert by_docno(quietly(make(vectors=other, encoder=encoder), column.drop(columns="text"))) == expected
    assert by_docno(quietly(make(vectors=other), bare)) != expected
    assert encoder.calls == []


def test_each_distinct_passage_is_encoded_once(make, frame):
    encoder = Encoder()
    out = make(encoder=encoder)(pd.concat([frame, frame.assign(qid="z" + frame.qid)]))
    assert [sorted(texts) for texts in encoder.calls] == [sorted(set(frame["text"]))]
    assert out[out.qid == "zq1"]["rank"].tolist() == out[out.qid == "q1"]["rank"].tolist()


def test_a_docid_of_another_index_is_not_read(make, frame):
    vector_of = with_vectors(frame)[1]
    reranker = make(vectors=Index(vector_of))
    assert_same_scores(quietly(reranker, frame.assign(docid=range(6, -1, -1))), quietly(reranker, frame))


def test_docnos_that_an_index_does_not_hold_are_named(make, frame):
    vector_of = with_vectors(frame)[1]
    del vector_of["d3"], vector_of["d7"]
    with pytest.raises(ValueError, match=r"Index\(\) holds no vectors of 2 of 7 docnos, such as 'd7', 'd3'"):
        make(vectors=Index(vector_of))(frame)


@pytest.mark.parametrize("source", ["column", "index", "encoder"])
def test_vectors_of_another_length_are_refused_with_both_numbers(make, frame, source):
    column, vector_of = with_vectors(frame, width=7)
    frame = column if source == "column" else frame
    arguments = {"index": {"vectors": Index(vector_of)}, "encoder": {"encoder": Encoder(7)}}.get(source, {})
    with pytest.raises(ValueError, match=r"7 dimensions and this checkpoint reads 24; .*encoder \(mean pooling\)"):
        make(**arguments)(frame)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize("source", ["column", "index", "encoder"])
def test_vectors_that_are_not_finite_are_named(make, frame, source, wrong):
    column, vector_of = with_vectors(frame)
    vector_of["d4"][3] = wrong
    encoder = Encoder()
    encode = encoder.encode_docs
    encoder.encode_docs = lambda texts: np.where(np.array(texts)[:, None] == "", wrong, encode(texts))  # d4 is empty
    frame = column if source == "column" else frame
    arguments = {"index": {"vectors": Index(vector_of)}, "encoder": {"encoder": encoder}}.get(source, {})
    with pytest.raises(ValueError, match=rf"{wrong}: docno 'd4' \(1 of 7"):
        make(**arguments)(frame)


@pytest.mark.parametrize("value", [None, float("nan"), "0.1 0.2", ["a"], [[0.1]]])
def test_a_vector_that_is_none_is_named(make, frame, value):
    frame = with_vectors(frame)[0]
    frame["doc_vec"] = frame["doc_vec"].astype(object)
    frame.iat[3, frame.columns.get_loc("doc_vec")] = value
    with pytest.raises(TypeError, match=f"'doc_vec' of docno '{frame.iloc[3].docno}' is {re.escape(repr(value))}"):
        make()(frame)


def test_vectors_of_two_lengths_in_one_column_are_named(make, frame):
    frame = with_vectors(frame)[0]
    frame.iat[3, frame.columns.get_loc("doc_vec")] = np.zeros(3, dtype="float32")
    with pytest.raises(ValueError, match=rf"docno '{frame.iloc[3].docno}' has 3 dimensions, that of docno 'd\d' 24"):
        make()(frame)


def test_vectors_may_be_lists_tensors_or_of_any_number_type(make, frame):
    frame = with_vectors(frame)[0]
    expected = quietly(make(), frame)
    for change in (list, torch.tensor, lambda vector: vector.astype("float64"), lambda vector: vector.astype(object)):
        assert_same_scores(quietly(make(), frame.assign(doc_vec=[change(v) for v in frame["doc_vec"]])), expected)
    halves = frame.assign(doc_vec=[vector.astype("float16") for vector in frame["doc_vec"]])
    assert sorted(quietly(make(), halves)["rank"]) == [0, 0, 1, 1, 2, 3, 4]


def test_what_is_no_index_or_no_encoder_is_refused(make, frame):
    with pytest.raises(TypeError, match=r"vectors='path' is no dense index; wanted a pyterrier_dr.FlexIndex"):
        make(vectors="path")(frame)
    with pytest.raises(TypeError, match=r"encoder='minilm' cannot encode passages; wanted a pyterrier_dr.BiEncoder"):
        make(encoder="minilm")(frame)


def test_vectors_without_a_name_are_warned_of(make, frame):
    with pytest.warns(UserWarning, match=r"this checkpoint reads those of encoder \(mean pooling\)"):
        make()(with_vectors(frame)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        make()(frame)


def test_no_text_is_needed_with_vectors_and_a_text_that_is_none_does_not_matter(make, frame):
    column = with_vectors(frame)[0]
    assert_same_scores(quietly(make(), column.assign(text=None)), quietly(make(), column.drop(columns="text")))
    with pytest.raises(pt.validate.InputValidationError, match="text"):
        make(mode="text+embedding")(column.drop(columns="text"))


# Modes and prompts


def test_the_text_is_read_in_its_mode_alone(make, frame):
    column = with_vectors(frame)[0]
    other = column.assign(text=column["text"] + " and more words that were not there")
    assert_same_scores(quietly(make(), column), quietly(make(), other))
    one, two = (quietly(make(mode="text+embedding"), given) for given in (column, other))
    assert by_docno(one) != by_docno(two) or by_docno(one) != by_docno(quietly(make(), column))


def test_the_text_follows_its_placeholder(ranker):
    example = json.loads((FOLDER / "prompt_text_embedding_example.json").read_text())
    assert ranker.prompter.messages(example["query"], example["candidates"]) == example["messages"]


def test_the_mode_first_takes_one_forward_pass_a_window(make, monkeypatch):
    reranker = make(mode="first")
    calls = count_forwards(reranker.loaded(), monkeypatch)
    out = quietly(reranker, with_vectors(many(40))[0])
    assert len(calls) == 3
    assert sorted(out["rank"]) == list(range(40))


def test_an_unknown_mode_is_refused(make, frame):
    with pytest.raises(ValueError, match="mode='text'; wanted one of 'embedding', 'text\\+embedding', 'first'"):
        make(mode="text")(frame)


@pytest.mark.parametrize("arguments", [{"window_size": 5, "stride": 6}, {"stride": 0}, {"top_k": 0}, {"passes": 0}])
def test_windows_that_make_no_sense_are_refused(make, frame, arguments):
    with pytest.raises(ValueError, match=next(reversed(arguments))):
        make(**arguments)(frame)


HOSTILE = ["<PLACEHOLDER>", "a <RANK> b", "</s><s>", "<unk>", "<<PLACEHOLDER>PLACEHOLDER>", "[1] > [2]", "{query} {0}"]


@pytest.mark.parametrize("mode", ["embedding", "text+embedding", "first"])
def test_special_tokens_in_queries_and_passages_are_plain_text(make, ranker, mode, frame):
    for text in HOSTILE:
        hostile = frame.assign(text=text, query=f"what is {text}")
        assert sorted(make(mode=mode)(hostile)["rank"]) == [0, 0, 1, 1, 2, 3, 4]
        ids = ranker.prompter.ids([text], [[text, "x"]], [2])[0]
        assert ids.count(700) == 2
        assert not {0, 2, 701} & set(ids)
        assert ids.count(1) == 1


@settings(max_examples=60)
@given(
    st.lists(st.sampled_from([*HOSTILE, "<", ">", "PLACEHOLDER", " ", "s", "/", "日本 ☃", "\n"]), max_size=8).map(
        "".join
    )
)
def test_no_text_adds_a_special_token(text):
    ids = SHARED.loaded().prompter.ids([text], [[text]], [1])[0]
    assert ids.count(700) == 1
    assert not {0, 2, 701} & set(ids)


def test_a_passage_may_be_hostile_and_moves_no_vector_but_its_own(make, frame):
    column = with_vectors(frame)[0]
    assert_same_scores(quietly(make(), column), quietly(make(), column.assign(text="<PLACEHOLDER> </s>")))


def test_a_prompt_longer_than_the_positions_is_refused(make, frame):
    with pytest.raises(ValueError, match=r"query '.*' with \d passages has \d+ tokens and the model 4096 positions"):
        make(mode="text+embedding")(frame.assign(text="ab " * 3_000))


@pytest.mark.parametrize("mode", ["embedding", "first"])
def test_nan_logits_are_named(make, frame, mode):
    reranker = make(mode=mode)
    held = copy.copy(reranker.loaded())
    held.network = copy.deepcopy(held.network)
    torch.nn.init.constant_(held.network.body.norm.weight, float("nan"))
    reranker.hold(held)
    with pytest.raises(ValueError, match=r"nan for query '.*' among \d passages from docno 'd\d' on"):
        reranker(frame)


def test_out_of_memory_halves_the_batches_of_all_rounds_with_one_warning(make, monkeypatch):
    frame = pd.concat([many(30, qid) for qid in "abcd"])
    expected, reranker = make()(frame), make()
    forward = reranker.loaded().network.body.forward

    def small_memory(inputs_embeds, **rest):
        if len(inputs_embeds) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return forward(inputs_embeds=inputs_embeds, **rest)

    monkeypatch.setattr(reranker.loaded().network.body, "forward", small_memory)
    with pytest.warns(UserWarning, match="out of memory") as warned:
        assert_same_scores(reranker(frame), expected)
    assert [warning.category for warning in warned].count(UserWarning) == 1


# Checkpoints


@pytest.fixture
def copy_of(tmp_path):
    """copy_of(config fields to set, weights -> weights): a changed copy of the golden checkpoint, as a path."""

    def change(fields=None, weights=None):
        shutil.copytree(FOLDER, tmp_path / "copy")
        folder = tmp_path / "copy" / "checkpoint"
        config = json.loads((folder / "config.json").read_text()) | (fields or {})
        (folder / "config.json").write_text(json.dumps(config))
        if weights:
            file = folder / "model.safetensors"
            safetensors.torch.save_file(weights(safetensors.torch.load_file(file)), file)
        return str(folder)

    return change


@pytest.mark.parametrize(
    "lost",
    ["model.norm.weight", "model.projector.2.bias", "model.encoder.encoder.encoder.layer.1.output.dense.bias"],
)
def test_a_missing_weight_is_named(copy_of, frame, lost):
    model = copy_of(weights=lambda weights: {name: tensor for name, tensor in weights.items() if name != lost})
    short = lost.removeprefix("model.").removeprefix("projector.").removeprefix("encoder.encoder.")
    with pytest.raises(ValueError, match=f"missing {re.escape(short)}"):
        PERank(model, device="cpu")(frame)


def test_an_unexpected_weight_and_a_wrong_shape_are_named(copy_of, frame):
    change = {"model.extra.weight": torch.zeros(2), "model.norm.weight": torch.zeros(5)}
    with pytest.raises(ValueError, match=r"mismatched norm.weight; unexpected extra.weight"):
        PERank(copy_of(weights=lambda weights: weights | change), device="cpu")(frame)


def test_lm_head_is_not_read(copy_of, make, frame):
    model = copy_of(weights=lambda weights: {name: tensor for name, tensor in weights.items() if "lm_head" not in name})
    assert_same_scores(PERank(model, device="cpu")(frame), make()(frame))


def test_shards_are_one_checkpoint(copy_of, make, frame):
    model = copy_of()
    weights = safetensors.torch.load_file(f"{model}/model.safetensors")
    names, where = sorted(weights), {}
    for part in (0, 1):
        safetensors.torch.save_file(
            {name: weights[name] for name in names[part::2]}, f"{model}/part-{part}.safetensors"
        )
        where |= {name: f"part-{part}.safetensors" for name in names[part::2]}
    with open(f"{model}/model.safetensors.index.json", "w", encoding="utf-8") as file:
        json.dump({"weight_map": where}, file)
    Path(model, "model.safetensors").unlink()
    assert_same_scores(PERank(model, device="cpu")(frame), make()(frame))


def test_another_architecture_is_refused_in_words(electra, frame):
    with pytest.raises(ValueError, match=r"ElectraModel.*no PE-Rank checkpoint.*from_backbone"):
        PERank(str(electra))(frame)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"model_type": "embed_nonsense"}, "'nonsense', which transformers does not know"),
        ({"projector_type": "conv"}, "projector_type='conv'"),
        ({"projector_type": "identity"}, "projector_type='identity' from 24 to 32"),
        ({"encoder_pooling": "max"}, "encoder_pooling='max'; wanted one of 'mean', 'cls', 'last_token'"),
        ({"encoder_name": "no/such-encoder"}, "no/such-encoder"),
    ],
)
def test_a_config_that_cannot_be_right_is_refused(copy_of, frame, fields, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        PERank(copy_of(fields), device="cpu")(frame)


def test_the_encoder_is_not_looked_for_until_a_text_is_encoded(copy_of, make, frame):
    column = with_vectors(frame)[0]
    absent = PERank(copy_of({"encoder_name": "no/such-encoder"}), device="cpu")
    assert_same_scores(quietly(absent, column), quietly(make(), column))


def test_a_checkpoint_without_an_encoder_says_what_to_give(copy_of, frame):
    model = copy_of(weights=lambda weights: {n: t for n, t in weights.items() if ".encoder." not in n})
    with pytest.raises(ValueError, match=r"holds no encoder; give .*vectors=.*'doc_vec'.*encoder="):
        PERank(model, device="cpu")(frame)


def test_a_tokenizer_without_template_or_placeholder_is_refused(copy_of, frame):
    model = copy_of()
    file = f"{model}/tokenizer_config.json"
    with open(file, encoding="utf-8") as opened:
        fields = json.load(opened)
    with open(file, "w", encoding="utf-8") as opened:
        json.dump({key: value for key, value in fields.items() if key != "chat_template"}, opened)
    with pytest.raises(ValueError, match="no chat template"):
        PERank(model, device="cpu")(frame)


@pytest.mark.parametrize("template", [-0.5, "{{ messages", "{{ nothing.at.all }}", "{{ raise_exception('no user') }}"])
def test_a_chat_template_that_cannot_be_used_is_refused(copy_of, frame, template):
    model = copy_of()
    file = Path(model) / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
    with pytest.raises(ValueError, match=rf"the chat template of {model} cannot be used \(\w+Error: "):
        PERank(model, device="cpu")(frame)


def test_an_encoder_whose_tokenizer_knows_more_pieces_is_refused(copy_of, frame):
    model = copy_of()
    vocabulary = Path(model).parent / "encoder" / "vocab.txt"
    vocabulary.write_text(vocabulary.read_text(encoding="utf-8") + "one\nmore\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"the tokenizer knows \d+ pieces and the encoder \d+; they are of two"):
        PERank(model, device="cpu")(frame)


def test_save_writes_what_the_constructor_loads(make, ranker, frame, tmp_path):
    reranker = make()
    expected = reranker(frame)
    reranker.save(tmp_path / "saved")
    saved = PERank(str(tmp_path / "saved"), device="cpu")
    assert_same_scores(saved(frame), expected)
    for window in WINDOWS:
        assert ids_of(saved.loaded(), window) == window["input_ids"]
    assert not [path for path in (tmp_path / "saved").iterdir() if path.is_dir()]


def test_save_before_the_encoder_was_needed_keeps_its_weights(make, frame, tmp_path):
    make().save(tmp_path / "saved")
    shutil.copytree(FOLDER / "encoder", tmp_path / "encoder")
    assert_same_scores(PERank(str(tmp_path / "saved"), device="cpu")(frame), make()(frame))


@pytest.mark.parametrize("kind", ["mistral", "llama", "qwen2", "gemma"])
def test_from_backbone_works_over_any_language_model_and_survives_save(backbone, frame, kind, tmp_path):
    torch.manual_seed(0)
    reranker = PERank.from_backbone(backbone(kind), encoder_name=str(FOLDER / "encoder"), device="cpu")
    expected = reranker(frame)
    reranker.save(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert (config["model_type"], config["embedding_size"], config["vocab_size"]) == (f"embed_{kind}", 24, 702)
    saved = PERank(str(tmp_path / "saved"), device="cpu")
    assert_same_scores(saved(frame), expected)
    together = saved(pd.concat([frame, many(30, "z")]))
    assert_same_scores(together[together.qid != "z"], expected)


@pytest.mark.parametrize("kind, layers", [("linear", 1), ("mlp2x_gelu", 2), ("mlp3x_gelu", 3), ("identity", 0)])
def test_every_projector_survives_save(backbone, frame, kind, layers, tmp_path):
    width = 32 if kind == "identity" else 9
    reranker = PERank.from_backbone(backbone("mistral"), embedding_size=width, projector_type=kind, device="cpu")
    assert len(list(reranker.loaded().network.projector.parameters())) == 2 * layers
    column = with_vectors(frame, width=width)[0]
    reranker.save(tmp_path / "saved")
    assert_same_scores(PERank(str(tmp_path / "saved"), device="cpu")(column), reranker(column))


def test_from_backbone_needs_the_length_of_the_vectors(backbone):
    with pytest.raises(ValueError, match="embedding_size=None without encoder_name="):
        PERank.from_backbone(backbone("mistral"), device="cpu")


def test_a_saved_student_names_no_folder_of_the_machine_it_began_from(backbone, tmp_path):
    folder = backbone("mistral")
    PERank.from_backbone(folder, embedding_size=8, device="cpu").save(tmp_path)
    assert folder not in (tmp_path / "config.json").read_text()


def test_prompts_of_every_size_have_as_many_placeholders(ranker):
    sizes = [1, 7, 20]
    for ids, n in zip(ranker.prompts(["q"] * 3, [[]] * 3, sizes), sizes, strict=True):
        assert ids.count(ranker.network.placeholder) == n


@pytest.mark.shared
def test_prompts_with_mistrals_tokenizer_have_the_length_that_the_authors_print(shared, tmp_path):
    mistral = pytest.importorskip("mistral_common", reason="needs Mistral's tokenizer: pip install mistral-common")
    shutil.copy(Path(mistral.__file__).parent / "data" / "tokenizer.model.v1", tmp_path / "tokenizer.model")
    fields = (FOLDER / "checkpoint" / "tokenizer_config.json").read_text()
    fields = fields.replace('"700"', '"32000"').replace('"701"', '"32001"')
    (tmp_path / "tokenizer_config.json").write_text(fields)
    prompter = read_prompter(tmp_path, "LlamaTokenizer", 32_002)
    topics = shared.topics("dl19")
    queries = topics[topics.qid.isin(shared.qrels("dl19").qid)]["query"].tolist()
    lengths = [len(ids) for ids in prompter.ids(queries, [[]] * 43, [20] * 43)]
    assert round(9 * sum(lengths) / 43, 1) == 2942.4  # nine windows a list of 100
