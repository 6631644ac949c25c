"""experiments: what the open questions are asked with: repeats of PE-Rank's steps, noise, further collections."""

import encoders
import free_steps
import numpy as np
import papers
import pytest
import torch
from conftest import TINY

from pyterrier_lit import PERank
from pyterrier_lit.batching import Budget


@pytest.fixture(scope="module")
def tiny():
    return PERank(str(TINY / "pe-rank"), device="cpu")


def test_a_repeat_is_a_step_whose_likeliest_passage_was_named_before(tiny, frame):
    rows = frame[frame["qid"] == "q1"].sort_values("rank")
    order = [passage["corpus_id"] for passage in tiny.rank("what is a cat?", rows["text"].tolist())]
    checkpoint = tiny.load()
    columns = {"docno": [rows["docno"].tolist()], "text": [rows["text"].tolist()]}
    with torch.inference_mode():  # all steps in one pass
        vectors, (numbers,) = tiny.vectors_of(checkpoint, columns, Budget(4096))
        reader = checkpoint.network.read(checkpoint.prompts(["what is a cat?"], [[]], [5]), [vectors[numbers]])
        logits = [reader.start()[0], *reader.read(torch.tensor([order[:-1]]))[0]]
    wanted = [int(step.argmax()) in order[:number] for number, step in enumerate(logits)]
    found = free_steps.repeats(tiny, frame)
    assert found[found["qid"] == "q1"]["named"].tolist() == wanted and True in wanted
    assert found.groupby("qid")["step"].agg(list).to_dict() == {"q1": [1, 2, 3, 4, 5], "q2": [1, 2]}


def test_without_the_constraint_a_named_passage_is_read_again(tiny, frame):
    kept, free = (
        free_steps.repeats(tiny, frame, free=free).query("qid == 'q1'")["named"].tolist() for free in (False, True)
    )
    until = kept.index(True) + 1
    assert free[:until] == kept[:until] and kept[0] is False
    tiny.window_size = 2
    try:
        assert free_steps.repeats(tiny, frame).groupby("qid").size().tolist() == [2, 2]
    finally:
        tiny.window_size = 20


def test_noise_is_of_the_length_it_says_and_the_same_for_the_same_text(tiny):
    texts = [f"passage {number} of many" for number in range(200)]
    vectors = encoders.Noisy(tiny, 0).encode_docs(texts)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(200), abs=1e-5)
    noisy = encoders.Noisy(tiny, 0.5).encode_docs(texts)
    assert np.linalg.norm(noisy - vectors, axis=1).mean() == pytest.approx(0.5, abs=0.02)
    assert encoders.Noisy(tiny, 0.5).encode_docs(texts[7:9]) == pytest.approx(noisy[7:9], abs=1e-5)
    assert repr(encoders.Noisy(tiny, 0.5)) == f"Noisy({tiny!r}, 0.5)"


def test_without_noise_the_order_is_that_of_its_own_encoder(tiny, frame):
    same, other = (PERank(tiny.model, encoder=encoders.Noisy(tiny, noise), device="cpu") for noise in (0, 100))
    columns = ["qid", "docno", "rank"]
    assert same(frame)[columns].equals(tiny(frame)[columns]) and not other(frame)[columns].equals(tiny(frame)[columns])


def test_every_further_collection_is_known_to_ir_datasets():
    from ir_datasets import registry

    collections = papers.further()
    assert len(collections) == 14
    for where in collections.values():
        assert where.source.removeprefix("irds:") in registry, where.source
