"""LiT5Score: the promises in contract.py, equality with castorini/LiT5 (golden/lit5), aggregations by brute force."""

import functools
import gzip
import json

import pytest
import torch
from conftest import GOLDEN
from contract import Contract, by_docno, many
from transformers.modeling_outputs import BaseModelOutput

from pyterrier_lit import LiT5Score
from pyterrier_lit import lit5_score as module

FOLDER = GOLDEN / "lit5"
INDEX = [case for case in json.loads((FOLDER / "expected" / "INDEX.json").read_text()) if case["kind"] == "score"]
ids = functools.partial(pytest.mark.parametrize, "case", ids=lambda case: case["case"])


@pytest.fixture
def make():
    return lambda **arguments: LiT5Score(**{"model": str(FOLDER / "tiny-random"), "device": "cpu"} | arguments)


@pytest.fixture
def reranker(make):
    return make()


class TestContract(Contract):
    pass


def reference_of(case):
    with gzip.open(FOLDER / "expected" / f"{case['case']}.json.gz") as file:
        return json.load(file)


def same_up_to_ties(order, wanted, score):
    return all(abs(score[a] - score[b]) <= 1e-4 * score[b] for a, b in zip(order, wanted, strict=True))


@ids([case for case in INDEX if not case["uses_dummies"]])
@pytest.mark.parametrize("max_tokens", [1, 10**6])
def test_scores_and_answers_equal_the_reference(case, max_tokens):
    reference = reference_of(case)
    params = reference["params"]
    lines = map(json.loads, (FOLDER / reference["data"]).read_text(encoding="utf-8").splitlines())
    queries = {line["qid"]: line for line in lines}
    reranker = LiT5Score(
        str(FOLDER / case["model"]),
        n_passages=params["n_passages"],
        max_length=params["text_maxlength"],
        answer_length=params["max_length"],
        answer_field="answer",
        max_tokens=max_tokens,
        device="cpu",
    )
    texts = {qid: {doc["docno"]: doc["text"] for doc in queries[qid]["docs"]} for qid in reference["candidates"]}
    asked = [answer["qid"] for answer in reference["answers"]]
    passages = [[texts[qid][docno] for docno in reference["candidates"][qid]] for qid in asked]
    found = reranker.results([queries[qid]["query"] for qid in asked], reranker.columns(passages))
    for answer, got, text, ranking in zip(reference["answers"], found["score"], found["answer"], passages, strict=True):
        read = reranker.prompts(queries[answer["qid"]]["query"], ranking)
        assert read.ids == answer["input_ids"]
        assert read.question == answer["query_pieces"]
        assert text == answer["text"]
        assert got == pytest.approx(answer["scores"], rel=1e-4)
        docnos = reference["candidates"][answer["qid"]]
        order = [docnos[i] for i in sorted(range(len(got)), key=lambda i: -got[i])]
        assert same_up_to_ties(
            order, reference["ranking"][answer["qid"]], dict(zip(docnos, answer["scores"], strict=True))
        )


@ids([case for case in INDEX if case["uses_dummies"]])
def test_calls_with_dummy_passages_score_the_same_from_their_ids(case):
    reference = reference_of(case)
    reranker = LiT5Score(str(FOLDER / case["model"]), device="cpu")
    for answer in reference["answers"]:
        asked = module.Prompts(answer["input_ids"], answer["query_pieces"])
        with torch.inference_mode():
            found = module.attend(
                reranker.load(), [asked], module.AGGREGATIONS["mean"], reference["params"]["max_length"]
            )[0]
        assert found.scores[: answer["n_real"]] == pytest.approx(answer["scores"], rel=1e-4)


@pytest.mark.parametrize("aggregation", module.AGGREGATIONS)
def test_aggregations_are_their_formulas(make, aggregation):
    """Brute force: the attention weights that transformers computes in one forward pass over the whole answer."""
    reranker = make(aggregation=aggregation)
    t5, passages = reranker.load(), ["a b c", "some longer passage here", "x", "a b c"]
    read = reranker.prompts("what is it", passages)
    network, n_layers = t5.network, t5.network.config.num_decoder_layers
    network.set_attn_implementation("eager")
    with torch.inference_mode():
        found = module.attend(t5, [read], module.AGGREGATIONS[aggregation], 20)[0]
        answer = [0, *found.answer, 1][:19]
        states = torch.cat(
            [network.encoder(input_ids=torch.tensor([prompt])).last_hidden_state[0] for prompt in read.ids]
        )[None]
        out = network(
            encoder_outputs=BaseModelOutput(states),
            decoder_input_ids=torch.tensor([answer[:-1] if answer[-1] == 1 else answer]),
            output_attentions=True,
        )
        mass = []
        for layer, attention in enumerate(out.cross_attentions):
            cross = network.decoder.block[layer].layer[1].EncDecAttention
            norms = cross.v(states).view(states.shape[1], cross.n_heads, -1).norm(dim=-1)
            weight = {"mean": 1, "max": 1, "late": 2 * (layer + 1) / (n_layers + 1)}[aggregation]
            mass.append(weight * torch.einsum("hts,sh->ts", attention[0], norms) / cross.n_heads)
        summed, expected, start = torch.stack(mass).sum(0), [], 0
        for prompt in read.ids:
            own = summed[:, start + read.question : start + len(prompt)]
            expected.append((own.amax(1) if aggregation == "max" else own.sum(1)).sum().item() / (256 * n_layers))
            start += len(prompt)
    assert found.scores == pytest.approx(expected, rel=1e-4)


def test_a_query_that_fills_the_prompt_scores_0_and_keeps_the_order(make, frame):
    out = make(max_length=5)(frame.assign(query="a very long query " * 20))
    assert set(out.score) == {0.0}
    assert out["rank"].tolist() == frame["rank"].tolist()


def test_passages_below_n_passages_stay_there_in_their_order(make):
    out = make(n_passages=6)(many(9)).sort_values("rank")
    assert out.docno.tolist()[6:] == ["d6", "d7", "d8"]
    assert out.score.tolist()[6:] == [-1.0, -2.0, -3.0]
    first = make()(many(6)).set_index("docno").score
    assert by_docno(out[:6]) == pytest.approx({("q1", docno): score for docno, score in first.items()}, rel=1e-5)


def test_the_answer_is_a_column_for_whoever_wants_it(make, frame):
    out = make(answer_field="answer")(frame)
    assert out.groupby("qid").answer.nunique().tolist() == [1, 1]
    assert all(isinstance(answer, str) and answer for answer in out.answer)
    queries = frame.drop_duplicates("qid").set_index("qid")["query"]
    for qid, query in queries.items():
        passages = frame[frame.qid == qid].sort_values("rank").text.tolist()
        alone = make(answer_field="answer")
        assert set(out[out.qid == qid].answer) == set(alone.results([query], alone.columns([passages]))["answer"])
    assert "answer" in make(answer_field="answer")(frame.head(0)).columns


@pytest.mark.parametrize("arguments, words", [
    ({"aggregation": "median"}, "aggregation='median'; wanted one of 'mean', 'max', 'late'"),
    ({"n_passages": 0}, "n_passages=0"),
    ({"answer_length": 1}, "answer_length=1"),
    ({"max_length": "long"}, "max_length='long'"),
])  # fmt: skip
def test_arguments_that_make_no_sense_are_refused(make, frame, arguments, words):
    with pytest.raises(ValueError, match=words):
        make(**arguments)(frame)


def test_an_error_in_a_batch_reaches_the_user(make, frame, monkeypatch):
    def broken(*arguments):
        raise IndexError("inside the decoder")

    monkeypatch.setattr(module.FiD, "read", broken)
    with pytest.raises(IndexError, match="inside the decoder"):
        make()(frame)


def test_save_writes_what_the_constructor_loads(make, frame, tmp_path):
    make(max_length=9, answer_length=4).save(tmp_path)
    loaded = make(model=str(tmp_path))
    assert loaded.lengths() == {"max_length": 9, "answer_length": 4}
    assert by_docno(loaded(frame)) == pytest.approx(by_docno(make(max_length=9, answer_length=4)(frame)))
    assert make().lengths() == {"max_length": 150, "answer_length": 20}


def test_recorded_lengths_that_make_no_sense_are_refused(make, tmp_path):
    make().save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for lengths in ([96], {"max_length": -1}, {"max_length": True}):
        (tmp_path / "config.json").write_text(json.dumps(config | {"lengths": lengths}))
        with pytest.raises(ValueError, match=r"max_length=.*; wanted a whole number of tokens, at least 1"):
            make(model=str(tmp_path)).score(["q"], [["a", "b"]])


def test_out_of_memory_halves_the_queries_and_the_scores_stay(make, monkeypatch):
    queries, passages = ["a", "b", "c", "d"], [[f"passage {i}" for i in range(n)] for n in (9, 8, 3, 1)]
    full = make().score(queries, passages)
    memory = module.FiD.memory

    def small_memory(self, windows, steps, mass=False):
        if len(windows) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return memory(self, windows, steps, mass)

    monkeypatch.setattr(module.FiD, "memory", small_memory)
    with pytest.warns(UserWarning, match="out of memory") as warned:
        assert make().score(queries, passages) == [pytest.approx(scores, rel=1e-5) for scores in full]
    assert len(warned) == 1
