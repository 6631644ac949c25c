"""experiments/bi_encoder.py: a bi-encoder learns the order of a teacher."""

from pathlib import Path

import bi_encoder
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
import transformers

WORDS = [f"word{i}" for i in range(40)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=45, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64
    )
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


def lists():
    """For each word as a query, ten passages. The teacher's score is the number of the passage's word."""
    rows = [(str(q), WORDS[q], WORDS[d], float(d)) for q in range(12) for d in range(20, 30)]
    return pd.DataFrame(rows, columns=["qid", "query", "text", "score"])


def loss(model, folder):
    rankings = [rows for _, rows in lists().groupby("qid")]
    with torch.no_grad():
        return float(bi_encoder.loss_of(model, folder, rankings))


def test_training_lowers_the_loss_and_leaves_the_first_layers_alone(folder, monkeypatch):
    monkeypatch.setattr(bi_encoder, "RATE", 2e-3)
    untrained = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    trained = bi_encoder.train(str(folder), lists(), steps=60, seed=1)
    assert loss(trained, folder) < 0.8 * loss(untrained, folder)
    before, after = untrained.state_dict(), trained.state_dict()
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed == {name for name in before if name.startswith("encoder.layer.3.")}
    again = bi_encoder.train(str(folder), lists(), steps=60, seed=1).state_dict()
    assert all(again[name].equal(after[name]) for name in after)


def test_the_loss_is_the_divergence_from_the_scaled_scores(folder):
    model = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    rows = lists().head(10)
    vectors = bi_encoder.vectors(model, folder, [rows["query"].iloc[0], *rows["text"]], 64).detach()
    student = (bi_encoder.SHARP * vectors[1:] @ vectors[0]).log_softmax(0)
    scores = torch.arange(10.0)
    teacher = (bi_encoder.SPREAD * (scores - scores.mean()) / scores.std()).log_softmax(0)
    expected = F.kl_div(student, teacher, log_target=True, reduction="sum")
    with torch.no_grad():
        assert float(bi_encoder.loss_of(model, folder, [rows])) == pytest.approx(float(expected), rel=1e-4)


def test_a_vector_is_the_mean_of_the_states_in_any_batch(folder):
    model = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["word1", "word2 word3 word4 word5", " ".join(WORDS), "word1"]
    with torch.no_grad():
        ours = bi_encoder.vectors(model, Path(folder), texts, 16)
        for text, vector in zip(texts, ours, strict=True):
            inputs = tokenizer(text, truncation=True, max_length=16, return_tensors="pt")
            expected = F.normalize(model(**inputs).last_hidden_state[0].mean(0), dim=0)
            assert torch.allclose(vector, expected, atol=1e-5)


def test_high_ranks_are_sampled_more_often():
    random = torch.Generator().manual_seed(0)
    ranking = pd.DataFrame({"docno": range(100)})
    counts = pd.concat([bi_encoder.sampled(ranking, random) for _ in range(200)]).docno.value_counts()
    assert (bi_encoder.sampled(ranking, random).docno.value_counts() == 1).all()
    assert counts[0] > 150 > 60 > counts.reindex(range(50, 100)).fillna(0).mean()
    assert len(bi_encoder.sampled(ranking.head(5), random)) == 5
