"""CrossEncoder.save(layout="transformers"): equal scores in transformers, sentence-transformers and this package."""

import json

import pytest
import sentence_transformers
import torch
import transformers
from conftest import GOLDEN, TINY

from pyterrier_lit import CrossEncoder

CKPT = GOLDEN / "cross_encoder" / "ckpt"
FOLDERS = {  # a checkpoint -> the architecture of its export
    CKPT / "bert_bias": "BertForSequenceClassification",
    CKPT / "electra_bias": "BertForSequenceClassification",
    CKPT / "electra_short_nobias_proj": "ElectraForSequenceClassification",
    TINY / "cross-encoder": "BertForSequenceClassification",
}
QUERY = "a b"
PASSAGES = ["open(file) opens", "a cat", "", "the sky is blue", "length of a list", "closes it", "a b"]


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def exported(request, tmp_path):
    """The reranker, the folder of its export, and the expected architecture."""
    reranker = CrossEncoder(str(request.param), device="cpu")
    reranker.save(tmp_path / "exported", layout="transformers")
    return reranker, tmp_path / "exported", FOLDERS[request.param]


def scores(reranker, passages=PASSAGES):
    return reranker.score([QUERY], [passages])[0]


def sentences(folder, passages=PASSAGES, **arguments):
    model = sentence_transformers.CrossEncoder(str(folder), device="cpu", **arguments)
    return model.predict([(QUERY, passage) for passage in passages]).tolist()


def test_the_scores_are_the_same_in_sentence_transformers_in_transformers_and_here(exported):
    reranker, folder, architecture = exported
    wanted = scores(reranker)
    assert sentences(folder) == pytest.approx(wanted, abs=2e-5)  # without a sigmoid
    assert scores(CrossEncoder(str(folder), device="cpu")) == pytest.approx(wanted, abs=2e-5)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        inputs = tokenizer([QUERY] * len(PASSAGES), PASSAGES, padding=True, truncation=True, return_tensors="pt")
        assert model(**inputs).logits[:, 0].tolist() == pytest.approx(wanted, abs=2e-5)
    assert type(model).__name__ == architecture and model.config.num_labels == 1
    assert max(wanted) - min(wanted) > 0.1


def test_long_passages_are_cut_alike_behind_a_query_of_full_length(exported):
    reranker, folder, _ = exported
    lengths = reranker.lengths()
    room = min(sum(lengths.values()) + 3, reranker.load().reading.limit)
    assert json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"] == room
    query, passage = "a " * lengths["query_length"], "b a cat " * lengths["doc_length"]
    wanted = reranker.score([query], [[passage]])[0]
    other = sentence_transformers.CrossEncoder(str(folder), device="cpu").predict([(query, passage)]).tolist()
    assert other == pytest.approx(wanted, abs=2e-5)
    assert CrossEncoder(str(folder), device="cpu").lengths() == lengths
    assert CrossEncoder(str(folder), device="cpu").score(["a " * 99], [[passage]])[0] == pytest.approx(
        reranker.score(["a " * 99], [[passage]])[0], abs=2e-5
    )


def test_in_half_precision_the_order_of_clear_differences_stays(tmp_path):
    reranker = CrossEncoder(str(TINY / "cross-encoder"), device="cpu")
    reranker.save(tmp_path, layout="transformers")
    wanted = scores(reranker)
    for dtype, gap in (("float16", 0.02), ("bfloat16", 0.1)):
        assert sentences(tmp_path, model_kwargs={"dtype": dtype}) == pytest.approx(wanted, abs=gap), dtype


def test_a_checkpoint_in_bfloat16_is_written_in_it_without_a_loss(tmp_path):
    reranker = CrossEncoder(str(CKPT / "electra_bias"), device="cpu", dtype="bfloat16")
    reranker.save(tmp_path / "own")
    reranker.save(tmp_path / "exported", layout="transformers")
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["dtype"] == "bfloat16"
    own, exported = (scores(CrossEncoder(str(tmp_path / name), device="cpu")) for name in ("own", "exported"))
    assert exported == pytest.approx(own, abs=2e-5)


def test_the_head_is_exact_for_scores_of_any_size(tmp_path):
    reranker = CrossEncoder(str(CKPT / "electra_bias"), device="cpu")
    with torch.no_grad():
        reranker.load().network.linear.weight *= 20 / max(map(abs, scores(reranker)))
    reranker.save(tmp_path, layout="transformers")
    assert max(map(abs, scores(reranker))) > 15
    assert sentences(tmp_path) == pytest.approx(scores(reranker), abs=1e-4)


def test_what_no_classifier_computes_is_refused_before_anything_is_written(tmp_path):
    reranker = CrossEncoder(str(CKPT / "bert_mean_pool"), device="cpu")
    with pytest.raises(ValueError, match=r"pools by 'mean' into 1 numbers.*save it without a layout"):
        reranker.save(tmp_path / "exported", layout="transformers")
    with pytest.raises(ValueError, match="layout='onnx'; wanted None or 'transformers'"):
        reranker.save(tmp_path / "exported", layout="onnx")
    assert not (tmp_path / "exported").exists()


def test_a_classifier_stays_the_one_that_it_is(exported, tmp_path):
    _, folder, _ = exported
    CrossEncoder(str(folder), device="cpu").save(tmp_path / "again", layout="transformers")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert sentences(tmp_path / "again") == sentences(folder)
