"""models.pe_checkpoint: errors name what is missing, damaged or of another kind; `save` loses nothing."""

import json
import os
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
import safetensors.torch
import torch
from contract import assert_same_scores, many
from pe import FOLDER, WINDOWS, ids_of, quietly, with_vectors

from pyterrier_lit import PERank


@pytest.fixture
def make():
    return lambda **arguments: PERank(**{"model": str(FOLDER / "checkpoint"), "device": "cpu"} | arguments)


@pytest.fixture(scope="module")
def ranker():
    return PERank(str(FOLDER / "checkpoint"), device="cpu").load()


@pytest.fixture
def copy_of(tmp_path):
    """copy_of(fields, weights): the path of a changed copy of the golden checkpoint. `fields` are new fields of the
    config, and `weights` is a function: weights -> changed weights."""

    def change(fields=None, weights=None):
        shutil.copytree(FOLDER, tmp_path / "copy")
        folder = tmp_path / "copy" / "checkpoint"
        config = json.loads((folder / "config.json").read_text()) | (fields or {})
        (folder / "config.json").write_text(json.dumps(config))
        if weights:
            file = folder / "model.safetensors"
            safetensors.torch.save_file(weights(safetensors.torch.load_file(file)), file)
        return str(folder)

    return change


@pytest.mark.parametrize(
    "lost",
    ["model.norm.weight", "model.projector.2.bias", "model.encoder.encoder.encoder.layer.1.output.dense.bias"],
)
def test_a_missing_weight_is_named(copy_of, frame, lost):
    model = copy_of(weights=lambda weights: {name: tensor for name, tensor in weights.items() if name != lost})
    short = lost.removeprefix("model.").removeprefix("projector.").removeprefix("encoder.encoder.")
    with pytest.raises(ValueError, match=f"missing {re.escape(short)}"):
        PERank(model, device="cpu")(frame)


def test_an_unexpected_weight_and_a_wrong_shape_are_named(copy_of, frame):
    change = {"model.extra.weight": torch.zeros(2), "model.norm.weight": torch.zeros(5)}
    with pytest.raises(ValueError, match=r"mismatched norm.weight; unexpected extra.weight"):
        PERank(copy_of(weights=lambda weights: weights | change), device="cpu")(frame)


def test_lm_head_is_not_read(copy_of, make, frame):
    model = copy_of(weights=lambda weights: {name: tensor for name, tensor in weights.items() if "lm_head" not in name})
    assert_same_scores(PERank(model, device="cpu")(frame), make()(frame))


def test_shards_are_one_checkpoint(copy_of, make, frame):
    model = copy_of()
    weights = safetensors.torch.load_file(f"{model}/model.safetensors")
    names, where = sorted(weights), {}
    for part in (0, 1):
        safetensors.torch.save_file(
            {name: weights[name] for name in names[part::2]}, f"{model}/part-{part}.safetensors"
        )
        where |= {name: f"part-{part}.safetensors" for name in names[part::2]}
    with open(f"{model}/model.safetensors.index.json", "w", encoding="utf-8") as file:
        json.dump({"weight_map": where}, file)
    Path(model, "model.safetensors").unlink()
    assert_same_scores(PERank(model, device="cpu")(frame), make()(frame))


def test_another_architecture_is_refused_in_words(electra, frame):
    with pytest.raises(ValueError, match=r"ElectraModel.*not a PE-Rank checkpoint.*from_backbone"):
        PERank(str(electra))(frame)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"model_type": "embed_nonsense"}, "'nonsense', which transformers does not know"),
        ({"projector_type": "conv"}, "projector_type='conv'"),
        ({"projector_type": "identity"}, "projector_type='identity' from 24 to 32"),
        ({"encoder_pooling": "max"}, "encoder_pooling='max'; wanted one of 'mean', 'cls', 'last_token'"),
        ({"encoder_name": "no/such-encoder"}, "no/such-encoder"),
    ],
)
def test_a_config_that_cannot_be_right_is_refused(copy_of, frame, fields, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        PERank(copy_of(fields), device="cpu")(frame)


def test_an_encoder_is_a_hub_id_or_lies_in_the_folder_or_beside_it(copy_of, frame, monkeypatch, tmp_path):
    model = Path(copy_of())
    elsewhere, beside = tmp_path / "elsewhere", model.parent / "encoder"
    for place in (elsewhere, model.parent / "None", model / "inside", tmp_path / "somebody" / "else"):
        shutil.copytree(beside, place, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)  # a folder here must not be read in place of a hub id
    up = os.path.relpath(elsewhere, model)

    def named(name):
        config = json.loads((model / "config.json").read_text()) | {"encoder_name": name}
        (model / "config.json").write_text(json.dumps(config))
        return PERank(str(model), device="cpu")(frame)

    expected = named("encoder")
    for name in ("./encoder", "../encoder", "inside", "inside/../inside"):
        assert_same_scores(named(name), expected)
    for name in (
        up,
        f"x/../{up}",
        str(beside),
        str(elsewhere),
        "~/encoder",
        "",
        ".",
        "..",
        None,
        3,
        ["encoder"],
        "a b",
    ):
        with pytest.raises(ValueError, match=r"names its encoder .*; wanted a hub id, or a folder in .* or beside it"):
            named(name)
    for name in ("somebody/else", "elsewhere"):
        with pytest.raises(FileNotFoundError, match="the hub did not provide that checkpoint"):
            named(name)


def test_ids_beyond_the_vocabulary_are_refused(copy_of, frame):
    model = Path(copy_of())
    file = model / "tokenizer_config.json"
    fields = json.loads(file.read_text())
    token = {"content": "<far>", "special": True, "lstrip": False, "rstrip": False, "normalized": False}
    fields["added_tokens_decoder"] = fields["added_tokens_decoder"] | {"70000": token | {"single_word": False}}
    file.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"the tokenizer has \d+ tokens and the model 702; they are from different"):
        PERank(str(model), device="cpu").load()


def test_a_padding_id_beyond_the_encoders_vocabulary_is_refused(copy_of, frame):
    model = Path(copy_of())
    file = model.parent / "encoder" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token_id": 10**6}))
    with pytest.raises(ValueError, match=r"the tokenizer has 1000001 tokens and the encoder 233"):
        PERank(str(model), device="cpu")(frame)


def test_a_class_that_is_no_tokenizer_is_not_asked_for_one(copy_of, frame, make):
    model = Path(copy_of())
    file = model / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "AutoModelForCausalLM"}))
    with pytest.raises(ValueError, match="has no tokenizer that can be read"):
        PERank(str(model), device="cpu").load()


def test_positions_that_change_with_the_longest_prompt_of_a_batch_are_a_limit(make, monkeypatch):
    checkpoint = make().load()
    assert checkpoint.limit() == 4096
    config = checkpoint.network.body.config
    for kind, limit in (("longrope", 200), ("dynamic", 200), ("yarn", 4096)):
        rope = {"rope_type": kind, "original_max_position_embeddings": 200}
        for fields in (rope, {"full_attention": rope}):
            monkeypatch.setattr(config, "rope_parameters", fields)
            assert checkpoint.limit() == limit
    monkeypatch.setattr(config, "rope_parameters", {"rope_type": "longrope", "original_max_position_embeddings": 200})
    with pytest.raises(ValueError, match="tokens and the model 200 positions"):
        checkpoint.prompts(["words " * 200], [[]], [3])


def test_the_encoder_is_not_looked_for_until_a_text_is_encoded(copy_of, make, frame):
    column = with_vectors(frame)[0]
    absent = PERank(copy_of({"encoder_name": "no/such-encoder"}), device="cpu")
    assert_same_scores(quietly(absent, column), quietly(make(), column))


def test_a_checkpoint_without_an_encoder_says_what_to_give(copy_of, frame):
    model = copy_of(weights=lambda weights: {n: t for n, t in weights.items() if ".encoder." not in n})
    with pytest.raises(ValueError, match=r"holds no encoder; give .*vectors=.*'doc_vec'.*encoder="):
        PERank(model, device="cpu")(frame)


def test_a_tokenizer_without_template_or_placeholder_is_refused(copy_of, frame):
    model = copy_of()
    file = f"{model}/tokenizer_config.json"
    with open(file, encoding="utf-8") as opened:
        fields = json.load(opened)
    with open(file, "w", encoding="utf-8") as opened:
        json.dump({key: value for key, value in fields.items() if key != "chat_template"}, opened)
    with pytest.raises(ValueError, match="no chat template"):
        PERank(model, device="cpu")(frame)


@pytest.mark.parametrize("template", [-0.5, "{{ messages", "{{ nothing.at.all }}", "{{ raise_exception('no user') }}"])
def test_a_chat_template_that_cannot_be_used_is_refused(copy_of, frame, template):
    model = copy_of()
    file = Path(model) / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
    with pytest.raises(ValueError, match=rf"the chat template of {model} cannot be used \(\w+Error: "):
        PERank(model, device="cpu")(frame)


def test_an_encoder_whose_tokenizer_knows_more_pieces_is_refused(copy_of, frame):
    model = copy_of()
    vocabulary = Path(model).parent / "encoder" / "vocab.txt"
    vocabulary.write_text(vocabulary.read_text(encoding="utf-8") + "one\nmore\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"the tokenizer has \d+ tokens and the encoder \d+; they are from different"):
        PERank(model, device="cpu")(frame)


def test_save_writes_what_the_constructor_loads(make, ranker, frame, tmp_path):
    reranker = make()
    expected = reranker(frame)
    reranker.save(tmp_path / "saved")
    saved = PERank(str(tmp_path / "saved"), device="cpu")
    assert_same_scores(saved(frame), expected)
    for window in WINDOWS:
        assert ids_of(saved.load(), window) == window["input_ids"]
    assert not [path for path in (tmp_path / "saved").iterdir() if path.is_dir()]


def test_save_before_the_encoder_was_needed_keeps_its_weights(make, frame, tmp_path):
    make().save(tmp_path / "saved")
    shutil.copytree(FOLDER / "encoder", tmp_path / "encoder")
    assert_same_scores(PERank(str(tmp_path / "saved"), device="cpu")(frame), make()(frame))


@pytest.mark.parametrize("kind", ["mistral", "llama", "qwen2", "gemma"])
def test_from_backbone_works_over_any_language_model_and_survives_save(backbone, frame, kind, tmp_path):
    torch.manual_seed(0)
    reranker = PERank.from_backbone(backbone(kind), encoder_name=str(FOLDER / "encoder"), device="cpu")
    expected = reranker(frame)
    reranker.save(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert (config["model_type"], config["embedding_size"], config["vocab_size"]) == (f"embed_{kind}", 24, 702)
    saved = PERank(str(tmp_path / "saved"), device="cpu")
    assert_same_scores(saved(frame), expected)
    together = saved(pd.concat([frame, many(30, "z")]))
    assert_same_scores(together[together.qid != "z"], expected)


@pytest.mark.parametrize("kind, layers", [("linear", 1), ("mlp2x_gelu", 2), ("mlp3x_gelu", 3), ("identity", 0)])
def test_every_projector_survives_save(backbone, frame, kind, layers, tmp_path):
    width = 32 if kind == "identity" else 9
    reranker = PERank.from_backbone(backbone("mistral"), embedding_size=width, projector_type=kind, device="cpu")
    assert len(list(reranker.load().network.projector.parameters())) == 2 * layers
    column = with_vectors(frame, width=width)[0]
    reranker.save(tmp_path / "saved")
    assert_same_scores(PERank(str(tmp_path / "saved"), device="cpu")(column), reranker(column))


def test_from_backbone_needs_the_length_of_the_vectors(backbone):
    with pytest.raises(ValueError, match="embedding_size=None without encoder_name="):
        PERank.from_backbone(backbone("mistral"), device="cpu")


def test_a_saved_student_names_no_folder_of_the_machine_it_began_from(backbone, tmp_path):
    folder = backbone("mistral")
    PERank.from_backbone(folder, embedding_size=8, device="cpu").save(tmp_path)
    assert folder not in (tmp_path / "config.json").read_text()
