"""CrossEncoder.quantize: nearly the scores of float32, the same after saving, and clear errors."""

import inspect
import json
import pickle
import shutil
import sys
import threading

import openvino
import pandas as pd
import pytest
import tokenizers
import torch
import transformers
from conftest import GOLDEN, TINY

from pyterrier_lit import CrossEncoder
from pyterrier_lit.models.int8 import Int8Scorer
from pyterrier_lit.training import FineTune

QUERIES = ["remove white space from a string", "sort a list", "look up a key in a dictionary", "split text at a comma"]
KINDS = (str, list, dict, set, bytes, int, float)
FOLDERS = [GOLDEN / "cross_encoder" / "ckpt" / name for name in ("electra_short_nobias_proj", "bert_bias")]


def frame():
    """Each query with the docstrings of methods."""
    texts = {inspect.getdoc(getattr(kind, name)) for kind in KINDS for name in dir(kind) if not name.startswith("_")}
    passages = pd.DataFrame({"text": sorted(texts)}).rename_axis("docno").reset_index()
    queries = pd.DataFrame({"query": QUERIES}).rename_axis("qid").reset_index()
    return queries.merge(passages, how="cross").astype({"qid": str, "docno": str}).assign(score=0.0)


@pytest.fixture(scope="module")
def exact():
    return CrossEncoder(str(TINY / "cross-encoder"), device="cpu")


@pytest.fixture(scope="module")
def int8(exact):
    return exact.quantize(frame())


def scores(reranker, **changes):
    reranker = reranker.apply_attributes(**changes)
    return torch.tensor(reranker.transform(frame())["score"].to_numpy())


def test_the_order_is_nearly_that_of_float32(exact, int8):
    ours, wanted = scores(int8), scores(exact)
    assert isinstance(int8.load().network, Int8Scorer) and not isinstance(exact.load().network, Int8Scorer)
    assert not torch.equal(ours, wanted)  # else the network is not quantised
    for left, right in zip(ours.split(len(ours) // len(QUERIES)), wanted.split(len(ours) // len(QUERIES)), strict=True):
        assert pd.Series(left).corr(pd.Series(right), method="kendall") > 0.9
        assert left.argmax() in right.topk(3).indices


def test_weights_of_7_bits_do_not_overflow_on_a_cpu_without_vnni(int8):
    network = int8.load().network
    graph = openvino.Core().read_model(network.graph, network.weights)
    products = [node for node in graph.get_ops() if node.get_type_name() == "MatMul"]
    weights = [weight for product in products if (weight := constant(product.input_value(1).get_node())) is not None]
    assert len(weights) == 13  # 6 for each of 2 layers, and the head's
    assert all(weight.min() >= -64 and weight.max() <= 64 for weight in weights)


def constant(node):
    """The constant of int8 behind the input of a matrix product, or None if there is none."""
    while node.get_type_name() in ("Convert", "Multiply", "Subtract", "Reshape", "Transpose"):
        node = node.input_value(0).get_node()
    return node.get_data() if node.get_type_name() == "Constant" and node.get_element_type().is_integral() else None


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_checkpoints_of_lightning_ir_keep_their_tokens_and_lengths(folder, tmp_path):
    exact = CrossEncoder(str(folder), device="cpu")
    int8 = exact.quantize(frame(), n_pairs=8)
    int8.save(tmp_path / "saved")
    loaded = CrossEncoder(str(tmp_path / "saved"), device="cpu")
    assert loaded.lengths() == exact.lengths()
    assert loaded.load().reading == exact.load().reading
    texts = [("a [SEP] b", "don't " * 500), ("", "a")]
    assert loaded.pairs(texts)[1] == exact.pairs(texts)[1]
    assert scores(loaded).std() > 0.5 * scores(exact).std()
    assert pd.Series(scores(loaded)).corr(pd.Series(scores(exact)), method="kendall") > 0.6  # random weights


def test_a_classifier_keeps_its_texts_in_lower_case_and_its_prompt(tmp_path):
    """sentence_bert_config.json asks for lower case, and tokenizer_config.json contradicts it. The saved reranker must
    still lower-case."""
    folder = shutil.copytree(TINY / "cross-encoder", tmp_path / "given")
    exact = CrossEncoder(str(folder), device="cpu")
    exact.save(folder, layout="transformers")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "BertTokenizer", "do_lower_case": False}
    files = {
        "tokenizer_config.json": config,
        "modules.json": [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}],
        "config_sentence_transformers.json": {
            "model_type": "CrossEncoder", "prompts": {"query": "q: "}, "default_prompt_name": "query"
        },
        "sentence_bert_config.json": {"do_lower_case": True},
    }  # fmt: skip
    for name, fields in files.items():
        (folder / name).write_text(json.dumps(fields))
    exact = CrossEncoder(str(folder), device="cpu")
    texts = [("SORT a List", "Sort it In PLACE")]
    exact.quantize(frame(), n_pairs=4).save(tmp_path / "saved")
    loaded = CrossEncoder(str(tmp_path / "saved"), device="cpu")
    assert loaded.pairs(texts)[1] == exact.pairs(texts)[1]
    assert exact.pairs(texts)[1] == exact.pairs([(query.lower(), passage.lower()) for query, passage in texts])[1]
    assert loaded.load().files == exact.load().files != {}


def test_arguments_that_do_not_fit_are_refused_and_lengths_are_those_of_the_checkpoint(exact, int8):
    for changes in ({"device": "meta"}, {"dtype": "bfloat16"}):
        with pytest.raises(ValueError, match="the reranker is in int8 and runs only on a CPU, not on device="):
            scores(int8, **changes)
    short = exact.apply_attributes(doc_length=10).quantize(frame(), n_pairs=2)
    assert short.lengths()["doc_length"] == 10
    assert short.apply_attributes(doc_length=None).lengths() == exact.lengths()


def test_a_score_hardly_depends_on_the_batch(int8):
    """Rounding in float32 can move an activation to the next int8 value."""
    alone, batched = scores(int8, max_tokens=1), scores(int8, max_tokens=20_000)
    assert (alone - batched).abs().max() < 0.02 * alone.std()
    assert torch.equal(batched, scores(int8, max_tokens=20_000))


def test_saved_pickled_and_copied_it_gives_the_same_scores(int8, tmp_path):
    wanted = scores(int8)
    int8.save(tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("*.safetensors"))
    for other in (CrossEncoder(str(tmp_path / "saved"), device="cpu"), pickle.loads(pickle.dumps(int8))):
        assert torch.equal(scores(other), wanted)
    assert "calibrated on 64 query-passage pairs" in (tmp_path / "saved" / "README.md").read_text()
    assert "<in int8, saved as " in repr(int8)
    assert 'CrossEncoder("saved", device="cpu")' in (tmp_path / "saved" / "README.md").read_text()


def test_float_weights_replace_it_in_the_same_folder(exact, int8, tmp_path):
    int8.save(tmp_path)
    (tmp_path / "int8.onnx").touch()
    exact.save(tmp_path)
    assert [path.name for path in tmp_path.glob("int8.*")] == ["int8.onnx"]
    assert torch.equal(scores(CrossEncoder(str(tmp_path), device="cpu")), scores(exact))


def test_threads_share_it(int8):
    wanted, found = scores(int8), {}
    threads = [threading.Thread(target=lambda n=n: found.update({n: scores(int8)})) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and all(torch.equal(each, wanted) for each in found.values())


def test_it_cannot_be_quantised_again_trained_or_written_as_a_classifier(int8, tmp_path):
    with pytest.raises(ValueError, match="in int8 already"):
        int8.quantize(frame())
    with pytest.raises(ValueError, match="in int8 cannot be trained"):
        FineTune(int8, steps=1).fit(frame().head(8), pd.DataFrame({"qid": ["0"], "docno": ["0"], "label": [1]}))
    with pytest.raises(ValueError, match="is in int8; save it without"):
        int8.save(tmp_path, layout="transformers")


@pytest.mark.parametrize("given", [frame()[["qid", "query"]], frame().head(0)], ids=["no text", "no rows"])
def test_a_frame_that_cannot_calibrate(exact, given):
    with pytest.raises(
        ValueError, match=f"a frame of {len(given)} rows with the columns qid, .* wanted candidates with"
    ):
        exact.quantize(given)


def test_a_roberta_which_has_no_token_types(tmp_path):
    pieces = tokenizers.ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    pieces.train_from_iterator(frame()["text"].unique(), vocab_size=600, special_tokens=special)
    pieces.save_model(str(tmp_path))
    transformers.RobertaTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")).save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=600, num_labels=1,
        max_position_embeddings=130, initializer_range=0.3, pad_token_id=1, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    transformers.RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    exact = CrossEncoder(str(tmp_path), device="cpu")
    int8 = exact.quantize(frame())
    assert pd.Series(scores(int8)).corr(pd.Series(scores(exact)), method="kendall") > 0.8


def test_other_architectures_are_refused(tmp_path):
    config = transformers.DistilBertConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=16, vocab_size=6_000, num_labels=1)
    transformers.DistilBertForSequenceClassification(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / "cross-encoder" / name, tmp_path)
    with pytest.raises(ValueError, match="a network of type 'distilbert' cannot be quantised; wanted one of bert, "):
        CrossEncoder(str(tmp_path), device="cpu").quantize(frame())


def test_errors_of_a_saved_one(int8, tmp_path):
    int8.save(tmp_path)
    with pytest.raises(ValueError, match="not on device='cpu' with dtype='bfloat16'; wanted device='cpu'"):
        CrossEncoder(str(tmp_path), device="cpu", dtype="bfloat16").load()
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 5}))
    with pytest.raises(ValueError, match="the tokenizer has 6000 tokens and the model 5"):
        CrossEncoder(str(tmp_path), device="cpu").load()
    (tmp_path / "config.json").write_text(json.dumps(config))
    whole = (tmp_path / "int8.xml").read_bytes()
    (tmp_path / "int8.xml").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"int8.xml or int8.bin cannot be read: it is cut short or damaged"):
        CrossEncoder(str(tmp_path), device="cpu").load()
    (tmp_path / "int8.xml").write_bytes(whole)
    (tmp_path / "int8.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no int8.bin"):
        CrossEncoder(str(tmp_path), device="cpu").load()
    assert config["int8"]["types"] == 2


@pytest.mark.parametrize("package", ["openvino", "nncf"])
def test_a_missing_package_is_named(exact, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"int8 needs {package}: pip install 'pyterrier-lit\[int8\]'"):
        exact.quantize(frame())
