"""CrossEncoder: the contract, equality with lightning-ir (golden/cross_encoder), every format, every bad checkpoint."""

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import safetensors.torch
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from conftest import GOLDEN
from contract import Contract, assert_same_scores, by_docno

from pyterrier_lit import CrossEncoder
from pyterrier_lit.models.checkpoints import Folder
from pyterrier_lit.models.pair_encoder import read_pairs
from pyterrier_lit.models.pair_networks import LabelScorer, PooledScorer
from pyterrier_lit.models.pooling import POOLING

FOLDER = GOLDEN / "cross_encoder"
NAMES = ["electra_bias", "electra_short_nobias_proj", "electra_default", "bert_bias", "bert_mean_pool"]


@pytest.fixture
def make(cross_encoder_folder):
    return lambda **arguments: CrossEncoder(**{"model": str(cross_encoder_folder), "device": "cpu"} | arguments)


@pytest.fixture
def reranker(make):
    return make()


class TestContract(Contract):
    pass


def golden(name):
    with open(FOLDER / f"scores_{name}.json", encoding="utf-8") as file:
        return json.load(file)


def golden_frame(items):
    return pd.DataFrame(
        [
            (str(i), item["query"], f"{i}-{j}", doc, score)
            for i, item in enumerate(items)
            for j, (doc, score) in enumerate(zip(item["docs"], item["scores"], strict=True))
        ],
        columns=["qid", "query", "docno", "text", "expected"],
    )


@pytest.mark.parametrize("name", NAMES)
def test_ids_types_and_masks_equal_the_reference(name):
    reference = golden(name)
    encoder = read_pairs(Folder(FOLDER / "ckpt" / name), torch.device("cpu"), torch.float32)
    layout = encoder.layout()
    assert encoder.reading.clean_up == reference["clean_up_tokenization_spaces"]
    for item in reference["items"]:
        query = layout.queries([item["query"]], reference["query_length"])[0]
        pairs = [layout.fit(query, passage) for passage in layout.pieces(item["docs"], reference["doc_length"])]
        tensors = {key: tensor.tolist() for key, tensor in layout.tensors(pairs, encoder.pad_id).items()}
        assert tensors == {key: item[key] for key in ("input_ids", "attention_mask", "token_type_ids")}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", ["in one batch", "one by one", "shuffled among other queries"])
def test_scores_equal_the_reference(name, how):
    frame = golden_frame(golden(name)["items"])
    reranker = CrossEncoder(
        str(FOLDER / "ckpt" / name), device="cpu", max_tokens={"in one batch": 10**6, "one by one": 1}.get(how, 2_000)
    )
    if how == "shuffled among other queries":
        others = frame.assign(qid="x" + frame.qid, query="other " + frame["query"], expected=float("nan"))
        frame = pd.concat([frame, others]).sample(frac=1, random_state=7)
    out = reranker(frame).dropna(subset="expected")
    assert len(out) == 25
    assert (out.score - out.expected).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["A_mono-electra", "B_cross-encoder", "C_prefixed"])
def test_older_formats_give_the_same_scores(name):
    out = CrossEncoder(str(FOLDER / "ckpt_legacy" / name), device="cpu")(golden_frame(golden("electra_bias")["items"]))
    assert (out.score - out.expected).abs().max() < 1e-4


def test_a_hub_id_is_read_from_the_cache_without_a_network(tmp_path):
    repository = tmp_path / "hub" / "models--webis--monoelectra-base"
    shutil.copytree(FOLDER / "ckpt" / "electra_bias", repository / "snapshots" / "abc123")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc123")
    code = "from pyterrier_lit import CrossEncoder; print(CrossEncoder(device='cpu').score(['x'], [['y']])[0][0])"
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    printed = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout
    here = CrossEncoder(str(FOLDER / "ckpt" / "electra_bias"), device="cpu").score(["x"], [["y"]])[0][0]
    assert float(printed) == pytest.approx(here, abs=1e-5)


@pytest.mark.parametrize("flag, version, clean", [(False, "4.41.2", False), (True, "4.57", True), (None, "4.44", True)])
def test_contractions_are_glued_only_where_the_checkpoint_cleans_up(copy_of, flag, version, clean):
    model = copy_of(FOLDER / "ckpt" / "electra_bias", {"transformers_version": version})
    with open(f"{model}/tokenizer_config.json", encoding="utf-8") as file:
        settings = json.load(file) | {"clean_up_tokenization_spaces": flag}
    with open(f"{model}/tokenizer_config.json", "w", encoding="utf-8") as file:
        json.dump({name: value for name, value in settings.items() if value is not None}, file)
    apart, glued = CrossEncoder(model, device="cpu").score(["do it"], [["we do n't go", "we don't go"]])[0]
    assert (abs(apart - glued) < 1e-5) == clean


def test_bfloat16_stays_close_to_the_reference():
    out = CrossEncoder(str(FOLDER / "ckpt" / "electra_bias"), device="cpu", dtype="bfloat16")(
        golden_frame(golden("electra_bias")["items"])
    )
    assert 0 < (out.score - out.expected).abs().max() < 0.15


@pytest.fixture
def copy_of(tmp_path):
    """copy_of(folder, fields, weights): the path of a copy of a checkpoint. `fields` are set in its config, and the
    function `weights` changes its weights."""

    def change(folder, fields=None, weights=None):
        shutil.copytree(folder, tmp_path / "copy")
        if fields:
            config = json.loads((tmp_path / "copy" / "config.json").read_text())
            (tmp_path / "copy" / "config.json").write_text(
                json.dumps({key: value for key, value in (config | fields).items() if value != "absent"})
            )
        if weights:
            file = tmp_path / "copy" / "model.safetensors"
            safetensors.torch.save_file(weights(safetensors.torch.load_file(file)), file, metadata={"format": "pt"})
        return str(tmp_path / "copy")

    return change


def test_the_port_with_remote_code_loads_without_it(copy_of, frame):
    port = {
        "model_type": "electra",
        "architectures": ["WebisCrossEncoderForSequenceClassification"],
        "auto_map": {"AutoModel": "evil.Model"},
    }
    model = copy_of(
        FOLDER / "ckpt_legacy" / "C_prefixed",
        port | {"backbone_model_type": "absent"},
        lambda w: {k: v for k, v in w.items() if k != "linear.bias"},
    )
    bias = safetensors.torch.load_file(FOLDER / "ckpt" / "electra_bias" / "model.safetensors")["linear.bias"].item()
    expected = CrossEncoder(str(FOLDER / "ckpt" / "electra_bias"), device="cpu")(frame)
    assert_same_scores(CrossEncoder(model, device="cpu")(frame), expected.assign(score=expected.score - bias))


def test_a_trained_bias_counts_even_where_the_config_denies_it(copy_of, frame):
    model = copy_of(FOLDER / "ckpt" / "electra_bias", {"linear_bias": False})
    assert_same_scores(
        CrossEncoder(model, device="cpu")(frame),
        CrossEncoder(str(FOLDER / "ckpt" / "electra_bias"), device="cpu")(frame),
    )


@pytest.mark.parametrize("lost", ["linear.weight", "encoder.layer.1.output.dense.bias"])
@pytest.mark.parametrize("fields", [{}, {"model_type": "mono-electra", "backbone_model_type": "absent"}])
def test_a_missing_weight_is_named(copy_of, frame, lost, fields):
    model = copy_of(
        FOLDER / "ckpt" / "electra_bias",
        fields,
        lambda weights: {name: tensor for name, tensor in weights.items() if name != lost},
    )
    with pytest.raises(ValueError, match=f"missing (body.)?{lost}"):
        CrossEncoder(model)(frame)


def test_an_unexpected_weight_and_a_wrong_shape_are_named(copy_of, frame):
    def change(weights):
        return weights | {"pooler.weight": torch.zeros(2), "linear.weight": torch.zeros(1, 5)}

    with pytest.raises(
        ValueError, match=r"linear.weight has shape \[1, 5\], wanted \[1, 32\].*unexpected body.pooler.weight"
    ):
        CrossEncoder(copy_of(FOLDER / "ckpt" / "electra_bias", weights=change))(frame)


def test_another_architecture_is_refused_in_words(electra, frame):
    with pytest.raises(ValueError, match=r"ElectraModel.*not a cross-encoder.*from_backbone"):
        CrossEncoder(str(electra))(frame)


def test_a_body_or_pooling_that_is_not_known_is_refused(copy_of, frame):
    with pytest.raises(ValueError, match=r"'roberta'; wanted one of electra, bert"):
        CrossEncoder(copy_of(FOLDER / "ckpt" / "electra_bias", {"backbone_model_type": "roberta"}))(frame)


def test_unknown_pooling_is_refused(copy_of, frame):
    with pytest.raises(ValueError, match=r"pooling_strategy='bert_pool'.*wanted first, mean, sum, max"):
        CrossEncoder(copy_of(FOLDER / "ckpt" / "electra_bias", {"pooling_strategy": "bert_pool"}))(frame)


def test_two_rows_in_the_head_score_by_the_log_probability_of_the_second(copy_of, frame):
    model = copy_of(
        FOLDER / "ckpt" / "electra_bias",
        {"scoring_strategy": "mono"},
        lambda weights: (
            weights
            | {
                "linear.weight": torch.cat([torch.zeros(1, 32), weights["linear.weight"]]),
                "linear.bias": torch.tensor([0.0, 0.0]),
            }
        ),
    )
    plain = CrossEncoder(str(FOLDER / "ckpt" / "electra_bias"), device="cpu")(frame)
    bias = safetensors.torch.load_file(FOLDER / "ckpt" / "electra_bias" / "model.safetensors")["linear.bias"].item()
    expected = torch.nn.functional.logsigmoid(torch.tensor(plain.score.to_numpy() - bias))
    assert_same_scores(CrossEncoder(model, device="cpu")(frame), plain.assign(score=expected.numpy()))


@pytest.fixture(params=["electra-1", "electra-2", "roberta-1", "modernbert-1"])
def labelled(request, electra, tmp_path):
    """The folder of a sequence classifier, its model and its tokenizer."""
    kind, labels = request.param.split("-")
    torch.manual_seed(3)
    inputs = ["input_ids", "attention_mask", *(["token_type_ids"] if kind == "electra" else [])]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(electra / "tokenizer.json"), pad_token="[PAD]", model_input_names=inputs
    )
    size = {
        "vocab_size": 100,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "num_labels": int(labels),
        "initializer_range": 0.5,
    }
    if kind == "electra":
        model = transformers.ElectraForSequenceClassification(transformers.ElectraConfig(**size, embedding_size=16))
    elif kind == "roberta":
        model = transformers.RobertaForSequenceClassification(
            transformers.RobertaConfig(**size, type_vocab_size=1, pad_token_id=0, max_position_embeddings=65)
        )
        tokenizer.backend_tokenizer.post_processor = tokenizers.processors.RobertaProcessing(("[SEP]", 3), ("[CLS]", 2))
    else:
        model = transformers.ModernBertForSequenceClassification(
            transformers.ModernBertConfig(**size, pad_token_id=0, cls_token_id=2, sep_token_id=3)
        )
    model.eval().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path, model, tokenizer.backend_tokenizer


def test_ordinary_sequence_classifiers_score_by_their_logit_or_the_difference_of_two(labelled, frame):
    folder, model, tokenizer = labelled
    short = frame[frame.text.str.len() < 30]
    expected = {}
    with torch.inference_mode():
        for row in short.itertuples():
            pair = tokenizer.encode(row.query, row.text)
            types = {"token_type_ids": torch.tensor([pair.type_ids])} if model.config.model_type == "electra" else {}
            logits = model(input_ids=torch.tensor([pair.ids]), **types).logits[0].tolist()
            expected[row.qid, row.docno] = logits[-1] - (logits[0] if len(logits) == 2 else 0)
    scores = by_docno(CrossEncoder(str(folder), device="cpu")(short))
    assert scores == pytest.approx(expected, abs=2e-5)
    assert max(scores.values()) - min(scores.values()) > 1e-3


def test_ordinary_sequence_classifiers_survive_save_and_long_texts(labelled, frame, tmp_path):
    folder, _, _ = labelled
    reranker = CrossEncoder(str(folder), device="cpu", doc_length=200)
    reranker.save(tmp_path / "saved")
    assert_same_scores(CrossEncoder(str(tmp_path / "saved"), device="cpu")(frame), reranker(frame))


def test_a_classifier_without_its_head_or_with_three_labels_is_refused(electra, frame, tmp_path):
    config = transformers.ElectraConfig.from_pretrained(electra)
    transformers.ElectraModel(config).save_pretrained(tmp_path)
    shutil.copy(electra / "tokenizer.json", tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text()) | {
        "architectures": ["ElectraForSequenceClassification"]
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="missing classifier"):
        CrossEncoder(str(tmp_path))(frame)
    config.num_labels = 3
    transformers.ElectraForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="3 labels"):
        CrossEncoder(str(tmp_path))(frame)


def test_a_tokenizer_of_another_checkpoint_is_refused(copy_of, electra, frame):
    model = copy_of(FOLDER / "ckpt" / "electra_bias")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=f"{model}/tokenizer.json")
    tokenizer.add_tokens(["extra"])
    tokenizer.backend_tokenizer.save(f"{model}/tokenizer.json")
    with pytest.raises(ValueError, match=r"tokenizer has 193 tokens and the model 192"):
        CrossEncoder(model)(frame)


def test_save_writes_what_the_constructor_loads(cross_encoder_folder, frame, tmp_path):
    reranker = CrossEncoder(str(cross_encoder_folder), query_length=4, doc_length=5, device="cpu")
    reranker.save(tmp_path / "saved")
    assert_same_scores(CrossEncoder(str(tmp_path / "saved"), device="cpu")(frame), reranker(frame))
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_save_keeps_the_reference_scores_and_its_clean_up(name, tmp_path):
    CrossEncoder(str(FOLDER / "ckpt" / name), device="cpu").save(tmp_path)
    out = CrossEncoder(str(tmp_path), device="cpu")(golden_frame(golden(name)["items"]))
    assert (out.score - out.expected).abs().max() < 1e-4


def test_from_backbone_is_the_backbone_under_a_new_head(electra):
    torch.manual_seed(5)
    reranker = CrossEncoder.from_backbone(str(electra), doc_length=9)
    body = transformers.ElectraModel.from_pretrained(electra).state_dict()
    network = reranker.load().network
    assert all(torch.equal(tensor.cpu(), body[name]) for name, tensor in network.body.state_dict().items())
    assert network.linear.weight.std().item() == pytest.approx(0.3, rel=0.5)
    assert repr(reranker) == f"CrossEncoder({str(electra)!r}, doc_length=9)"


@pytest.mark.parametrize(
    "lengths", [{}, {"query_length": 3, "doc_length": 7}, {"query_length": 600, "doc_length": 600}]
)
def test_lengths_cut_each_side_and_positions_cap_both(cross_encoder_folder, lengths):
    reranker = CrossEncoder(str(cross_encoder_folder), device="cpu", **lengths)
    query, passage = lengths.get("query_length", 32), lengths.get("doc_length", 256)
    if query + passage + 3 > 512:
        query, passage = 254, 255
    long_query, long_passage = " ".join("ab" * 400), " ".join("cd" * 400)
    cut = reranker.score([" ".join(long_query.split()[:query])], [[" ".join(long_passage.split()[:passage])]])
    assert reranker.score([long_query], [[long_passage]])[0][0] == pytest.approx(cut[0][0], abs=2e-5)
    shorter = reranker.score([" ".join(long_query.split()[:query])], [[" ".join(long_passage.split()[: passage - 1])]])
    assert abs(cut[0][0] - shorter[0][0]) > 1e-4


@pytest.mark.parametrize("name", ["query_length", "doc_length"])
@pytest.mark.parametrize("value", [0, -1, "many"])
def test_a_length_that_is_none_is_refused(make, frame, name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        make(**{name: value})(frame)


def test_special_tokens_are_read_as_the_reference_does_or_as_text(make, frame):
    injected = ["a [SEP] b", "[PAD]", "[CLS]", "[MASK] c", "[UNK]", "[SEP]", "d"]
    assert by_docno(make(special_tokens="text")(frame.assign(text=injected))) != by_docno(
        make()(frame.assign(text=injected))
    )
    reranker = make(special_tokens="text")
    encoder = reranker.load()
    layout, _ = reranker.pairs([])
    control = {encoder.tokenizer.token_to_id(token) for token in ("[PAD]", "[CLS]", "[SEP]", "[MASK]")}
    assert all(control.isdisjoint(pieces.ids) for pieces in layout.pieces(injected, 50))
    with pytest.raises(ValueError, match="special_tokens='none'"):
        make(special_tokens="none")(frame)


def test_copies_and_new_backbones_keep_reading_special_tokens_as_text(make, electra, frame):
    reranker = make(special_tokens="text")
    hostile = frame.assign(text="a [SEP] b [CLS]")
    expected = by_docno(reranker(hostile))
    assert expected != by_docno(make()(hostile))
    for other in (copy.deepcopy(reranker), pickle.loads(pickle.dumps(reranker))):
        assert by_docno(other(hostile)) == pytest.approx(expected)
    torch.manual_seed(1)
    parsed = CrossEncoder.from_backbone(str(electra), device="cpu")
    torch.manual_seed(1)
    as_text = CrossEncoder.from_backbone(str(electra), device="cpu", special_tokens="text")
    assert by_docno(as_text(hostile)) != by_docno(parsed(hostile))


def test_close_scores_do_not_tie_in_bfloat16(make):
    scores = make(dtype="bfloat16").score(
        ["query"], [[f"{letter} passage" for letter in "abcdefghijklmnopqrstuvwxyz"]]
    )[0]
    assert len(set(scores)) == 26


def test_a_passage_with_special_tokens_moves_no_other_passage(make, frame):
    hostile = frame.assign(
        text=[
            "[SEP] red fox [SEP]" if docno == "d3" else text
            for docno, text in zip(frame.docno, frame.text, strict=True)
        ]
    )
    left, right = by_docno(make()(frame)), by_docno(make()(hostile))
    del left["q1", "d3"], right["q1", "d3"]
    assert left == pytest.approx(right, abs=2e-5)


def test_equal_pairs_are_scored_once_and_tie_in_incoming_order(make, monkeypatch):
    frame = pd.DataFrame({"qid": "q", "query": "x", "docno": list("cab"), "text": "same", "rank": [2, 0, 1]})
    reranker = make()
    rows = []
    forward = reranker.load().network.forward
    monkeypatch.setattr(
        reranker.load().network,
        "forward",
        lambda input_ids, **rest: rows.append(len(input_ids)) or forward(input_ids, **rest),
    )
    out = reranker(frame)
    assert rows == [1]
    assert out.score.nunique() == 1
    assert out["rank"].tolist() == [2, 0, 1]


def test_out_of_memory_halves_the_batch_and_the_scores_stay(make, frame, monkeypatch):
    expected, reranker = make()(frame), make()
    forward, sizes = reranker.load().network.forward, []

    def small_memory(input_ids, **rest):
        sizes.append(input_ids.numel())
        if input_ids.numel() > 60:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return forward(input_ids, **rest)

    monkeypatch.setattr(reranker.load().network, "forward", small_memory)
    with pytest.warns(UserWarning, match="out of memory") as warned:
        assert_same_scores(reranker(frame), expected)
    assert len([warning for warning in warned if warning.category is UserWarning]) == 1
    assert sizes[0] > 60 >= sizes[-1]


def test_a_new_head_on_the_body_of_a_cross_encoder():
    trained = CrossEncoder(str(FOLDER / "ckpt" / "electra_bias"), device="cpu")
    new = CrossEncoder.from_backbone(str(FOLDER / "ckpt" / "electra_bias"), device="cpu")
    ours, theirs = (encoder.load().network.state_dict() for encoder in (new, trained))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items() if name.startswith("body."))
    assert not torch.equal(ours["linear.weight"], theirs["linear.weight"])


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_the_last_layer_computes_the_first_token_alone_where_it_alone_is_read(pooling):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    body = transformers.BertModel(config, add_pooling_layer=False).eval()
    ids, mask = torch.randint(30, (3, 9)), (torch.arange(9) < torch.tensor([[9], [4], [6]])).long()
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    whole = body(**inputs).last_hidden_state
    network = PooledScorer(body, pooling=pooling)
    expected = F.linear(POOLING[pooling](whole, mask), network.linear.weight, network.linear.bias)[:, 0]
    for copied in (network, pickle.loads(pickle.dumps(network)), copy.deepcopy(network)):
        rows = []
        copied.body.encoder.layer[-1].output.register_forward_hook(lambda *given, to=rows: to.append(given[-1].shape))
        assert (copied(**inputs) - expected).abs().max() < 1e-6
        copied.train()(**inputs)  # in training mode, the last layer computes all tokens
        assert rows == [(3, 1 if pooling == "first" else 9, 16), (3, 9, 16)]


@pytest.mark.parametrize("kind", ["Bert", "Camembert", "Electra", "Roberta", "XLMRoberta", "DistilBert"])
@torch.inference_mode()
def test_classifiers_that_read_the_first_token_compute_no_other_in_their_last_layer(kind):
    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "num_labels": 1, "pad_token_id": 0}
    sizes |= (
        {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}
        if kind == "DistilBert"
        else {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    )
    config = getattr(transformers, f"{kind}Config")(**sizes)
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()
    ids, mask = torch.randint(1, 30, (3, 9)), (torch.arange(9) < torch.tensor([[9], [4], [6]])).long()
    expected = model(input_ids=ids, attention_mask=mask).logits[:, 0]
    network = LabelScorer(model)
    assert (network(ids, mask, torch.zeros_like(ids)) - expected).abs().max() < 1e-6
    states = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
    assert states.shape[1] == (9 if kind == "DistilBert" else 1)


def test_predict_gives_what_sentence_transformers_gives(make):
    pairs = [("a cat", "cats"), ("red fox", "a fox is red"), ("a cat", "dogs bark")]
    reranker = make()
    scores = reranker.predict(pairs)
    assert (type(scores).__name__, scores.dtype, scores.shape) == ("ndarray", "float32", (3,))
    assert scores.tolist() == pytest.approx(
        [reranker.score([query], [[text]])[0][0] for query, text in pairs], abs=2e-5
    )
    assert float(reranker.predict(pairs[1])) == pytest.approx(float(scores[1]), abs=2e-5)
    assert reranker.predict([]).shape == (0,)
