"""What open_questions.ipynb uses: free_steps.py, noise on vectors, and further collections."""

import encoders
import free_steps
import numpy as np
import pandas as pd
import papers
import pytest
import torch
from conftest import PE_RANK, TINY
from pe import Encoder

from pyterrier_lit import PERank
from pyterrier_lit.batching import Budget


@pytest.fixture(scope="module")
def tiny():
    return PERank(str(TINY / "pe-rank"), device="cpu")


@pytest.fixture(scope="module")
def random():
    """A PE-Rank with random weights. Its most likely passage changes from step to step."""
    return PERank(str(PE_RANK), encoder=Encoder(), device="cpu")


TEXTS = [
    *("a cat is an animal", "dogs bark", "cats and dogs: 2 animals", "the sky is blue", "red foxes run", "x" * 30),
    *("water power", "old mills grind", "light is measured", "fluid dynamics of water", "zebra zoo", "quick jazz"),
]
QUERY = "what is a cat?"
CANDIDATES = pd.DataFrame(
    {"qid": "1", "query": QUERY, "docno": [f"d{i}" for i in range(12)], "text": TEXTS, "rank": range(12)}
)


def likeliest(reranker, order):
    """Return the most likely passage of each step if the passages in `order` are named one after the other. A single
    pass computes all steps."""
    checkpoint = reranker.load()
    with torch.inference_mode():
        columns = {"docno": [CANDIDATES["docno"].tolist()], "text": [TEXTS]}
        vectors, (numbers,) = reranker.vectors_of(checkpoint, columns, Budget(4096))
        reader = checkpoint.network.read(checkpoint.prompts([QUERY], [[]], [12]), [vectors[numbers]])
        steps = [reader.start()[0], *reader.read(torch.tensor([order]))[0]]
        return [int(logits.argmax()) for logits in steps[: len(order)]]


def test_a_repeat_is_a_step_whose_likeliest_passage_was_named_before(random):
    order = [passage["corpus_id"] for passage in random.rank(QUERY, TEXTS)]
    wanted = [passage in order[:step] for step, passage in enumerate(likeliest(random, order))]
    two = pd.concat([CANDIDATES, CANDIDATES.head(2).assign(qid="2")]).sample(frac=1, random_state=0)
    found = free_steps.repeats(random, two).sort_values(["qid", "step"])
    assert found[found["qid"] == "1"]["named"].tolist() == wanted and {True, False} == set(wanted[3:])
    assert found.groupby("qid")["step"].agg(list).to_dict() == {"1": list(range(1, 13)), "2": [1, 2]}


def test_without_the_constraint_the_likeliest_is_read_even_so(random):
    free = free_steps.repeats(random, CANDIDATES, free=True)["named"].tolist()
    order = []
    for _ in TEXTS:
        order.append(likeliest(random, [*order, 0])[-1])
    assert free == [passage in order[:step] for step, passage in enumerate(order)]
    assert free != free_steps.repeats(random, CANDIDATES)["named"].tolist()


def test_only_the_first_window_is_asked():
    short = PERank(str(PE_RANK), window_size=3, stride=2, encoder=Encoder(), device="cpu")
    assert free_steps.repeats(short, CANDIDATES)["step"].tolist() == [1, 2, 3]


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
