"""Sequence classifiers in CrossEncoder: the scores of transformers and sentence-transformers, alone and in batches."""

import json
import shutil

import pytest
import safetensors.torch
import sentence_transformers
import tokenizers
import torch
import transformers
from tokenizers import models, pre_tokenizers, processors

from pyterrier_lit import CrossEncoder, PERank
from pyterrier_lit.models.checkpoints import Folder
from pyterrier_lit.models.pair_encoder import read_pairs
from pyterrier_lit.models.pairs import Reading

QUERY = "Is a Cat an animal?"
PASSAGES = ["A cat is an animal", "dogs bark", "the sky, 中 blué", "cats and dogs " * 9, "a"]
BODY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SIZE = BODY | {"num_labels": 1, "initializer_range": 0.5}
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyzACD?é中,:"]
VOCABULARY += [f"##{letter}" for letter in VOCABULARY[5:]]


@pytest.fixture
def put(tmp_path):
    """put(kind, tokenizer, **fields of the config): the folder of a random classifier of transformers."""

    def build(kind, tokenizer, **fields):
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(kind, **{"vocab_size": len(tokenizer)} | fields)
        model = transformers.AutoModelForSequenceClassification.from_config(config)
        model.eval().save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return build


@pytest.fixture
def bert(put):
    """bert(fields of tokenizer_config.json, **fields of the config): the folder of a random BERT classifier."""

    def build(tokenizer_config=None, **fields):
        tokenizer = transformers.BertTokenizer(vocab={piece: id for id, piece in enumerate(VOCABULARY)})
        folder = put("bert", tokenizer, **SIZE | fields)
        edit(folder, "tokenizer_config.json", tokenizer_config or {})
        return folder

    return build


def edit(folder, name, fields):
    """Set fields of a JSON file, which is created if it does not exist."""
    file = folder / name
    old = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(old | fields))


def library(folder, passages=PASSAGES, query=QUERY, **how):
    """Score each pair alone with transformers."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        pairs = [tokenizer(query, passage, return_tensors="pt", truncation=True, **how) for passage in passages]
        logits = [model(**pair).logits[0].tolist() for pair in pairs]
    return [row[0] if len(row) == 1 else row[1] - row[0] for row in logits]


def sentences(folder, passages=PASSAGES, query=QUERY):
    """Score the pairs with sentence-transformers."""
    model = sentence_transformers.CrossEncoder(str(folder), device="cpu")
    return model.predict([(query, passage) for passage in passages], activation_fn=torch.nn.Identity()).tolist()


def ours(folder, passages=PASSAGES, query=QUERY, **arguments):
    return CrossEncoder(str(folder), device="cpu", **arguments).score([query], [passages])[0]


def assert_scores(folder, wanted, passages=PASSAGES, query=QUERY):
    """Compare the scores with `wanted`: in one call, one by one, and after saving."""
    reranker = CrossEncoder(str(folder), device="cpu")
    assert reranker.score([query], [passages])[0] == pytest.approx(wanted, abs=2e-4)
    assert [reranker.score([query], [[text]])[0][0] for text in passages] == pytest.approx(wanted, abs=2e-4)
    reranker.save(folder.parent / "saved")
    assert ours(folder.parent / "saved", passages, query) == pytest.approx(wanted, abs=2e-4)
    assert max(wanted) - min(wanted) > 1e-2


# Tokenizers


@pytest.mark.parametrize(
    "settings",
    [
        {"do_lower_case": False},
        {"strip_accents": False},
        {"tokenize_chinese_chars": False},
        {"tokenizer_class": "PreTrainedTokenizerFast"},
        {"cls_token": "[MASK]"},
        {"split_special_tokens": True},
        {"truncation_side": "left", "model_max_length": 20},
        {"model_input_names": ["input_ids", "attention_mask"]},
        {"padding_side": "left"},
    ],
    ids=str,
)
def test_settings_beside_a_tokenizer_win_as_in_transformers(bert, settings):
    folder = bert(settings)
    passages = [*PASSAGES, "[SEP] a [CLS]"]
    assert_scores(folder, library(folder, passages), passages)


def test_a_cased_tokenizer_file_is_lowered_by_its_settings(bert):
    folder = bert()
    wanted = library(folder)
    file = json.loads((folder / "tokenizer.json").read_text())
    file["normalizer"]["lowercase"] = False
    (folder / "tokenizer.json").write_text(json.dumps(file))
    assert library(folder) == wanted  # transformers lowercases, too
    assert_scores(folder, wanted)


def test_lightning_irs_checkpoints_obey_the_settings_too(cross_encoder_folder, tmp_path):
    shutil.copytree(cross_encoder_folder, tmp_path / "model")
    edit(
        tmp_path / "model", "tokenizer_config.json", {"do_lower_case": False, "tokenizer_class": "MonoElectraTokenizer"}
    )
    assert ours(tmp_path / "model", ["a CAT"]) == pytest.approx(
        ours(cross_encoder_folder, ["a [UNK]"], "[UNK] a [UNK] an animal?")
    )


@pytest.mark.parametrize("settings", [{}, {"do_lower_case": False}])
def test_a_vocabulary_of_words_is_read_with_the_settings(bert, settings):
    folder = bert(settings)
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY), encoding="utf-8")
    assert_scores(folder, library(folder))


def test_a_vocabulary_of_words_under_another_class_is_read_by_that_class(put):
    words = ["<s>", "<pad>", "</s>", "[UNK]", *VOCABULARY[5:], "<mask>"]
    tokenizer = transformers.MPNetTokenizer(vocab={piece: id for id, piece in enumerate(words)})
    folder = put("mpnet", tokenizer, **SIZE, pad_token_id=1)
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    assert_scores(folder, library(folder))


@pytest.mark.parametrize(
    "name, words",
    [("BertJapaneseTokenizer", "does not run in"), ("RobertaTokenizer", "vocab.json"), ("Mine", "")],
)
def test_a_tokenizer_class_that_is_not_to_be_had_is_named(bert, name, words):
    folder = bert({"tokenizer_class": name})
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"{name} of tokenizer_config.json.*{words}"):
        ours(folder)


def test_ids_beyond_the_vocabulary_are_refused_wherever_they_stand(bert):
    folder = bert({"tokenizer_class": "PreTrainedTokenizerFast"})
    file = json.loads((folder / "tokenizer.json").read_text())
    template = json.loads(json.dumps(file))
    template["post_processor"]["special_tokens"]["[SEP]"]["ids"] = [10**6]
    file["model"]["vocab"]["zebra"] = 999
    for changed, known in ((template, 10**6 + 1), (file, 1_000)):
        (folder / "tokenizer.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=f"tokenizer has {known} tokens and the model {len(VOCABULARY)}"):
            ours(folder)


def test_a_panic_of_the_tokenizer_has_a_sentence(bert, capfd):
    folder = bert({"tokenizer_class": "PreTrainedTokenizerFast"})
    file = json.loads((folder / "tokenizer.json").read_text())
    pattern = {"Regex": "^(a+)+$"}
    file["pre_tokenizer"] = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    (folder / "tokenizer.json").write_text(json.dumps(file))
    with pytest.raises(ValueError, match=r"the tokenizer cannot read the text 'aaaaa.*it failed"):
        ours(folder, ["a" * 40 + "!"])
    capfd.readouterr()  # drop the tokenizer's own message


# Token types, lengths, labels


def test_token_types_that_the_model_does_not_have_are_left_out(bert):
    folder = bert(type_vocab_size=1)
    assert_scores(folder, library(folder, return_token_type_ids=False))


@pytest.mark.parametrize("query, times", [(QUERY, 1), (QUERY * 9, 1), (QUERY, 60), (QUERY * 9, 60), (QUERY * 90, 60)])
def test_a_pair_is_cut_as_a_whole_at_the_checkpoints_own_length(bert, query, times):
    folder = bert(max_position_embeddings=71)
    passages = ["a cat " * times, "dogs bark " * times]
    assert_scores(folder, sentences(folder, passages, query), passages, query)


def test_lengths_that_are_given_cut_each_side_and_are_saved(bert):
    folder, long = bert(), "a cat " * 50
    assert ours(folder, [long], long) != pytest.approx(ours(folder, [long], long, query_length=7, doc_length=9))
    cut = ours(folder, ["a cat " * 2 + "a"], "a c", query_length=7, doc_length=9)
    assert ours(folder, [long], long, query_length=2, doc_length=9) == pytest.approx(cut, abs=2e-5)
    reranker = CrossEncoder(str(folder), device="cpu", doc_length=9)
    reranker.save(folder.parent / "saved")
    assert CrossEncoder(str(folder.parent / "saved")).lengths() == {"query_length": None, "doc_length": 9}


def test_roberta_counts_its_positions_from_behind_the_padding(put):
    tokenizer = words(["<unk>", "<s>", "<pad>", "</s>"], "<s> $A </s>", "<s> $A </s> </s> $B </s>", pad_token="<pad>")
    folder = put("roberta", tokenizer, **SIZE, max_position_embeddings=23, type_vocab_size=1, pad_token_id=2)
    long = ["a cat " * 20, "dogs bark " * 20]
    assert read_pairs(Folder(folder), torch.device("cpu"), torch.float32).reading == Reading(limit=20, types=1)
    assert_scores(folder, library(folder, long, max_length=20), long)
    assert ours(folder, long) != pytest.approx(library(folder, long, max_length=19), abs=1e-4)


@pytest.mark.parametrize("dtype, gap", [("float32", 1e-5), ("bfloat16", 0.3)])
def test_of_two_labels_the_difference_counts(bert, dtype, gap):
    folder = bert(num_labels=2)
    file = folder / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    weights["classifier.weight"][0] = weights["classifier.weight"][1] - 0.1 * weights["classifier.weight"][0]
    safetensors.torch.save_file(weights, file, metadata={"format": "pt"})
    assert ours(folder, dtype=dtype) == pytest.approx(library(folder), abs=gap)


def test_passages_that_are_cut_are_counted_and_a_warning_comes_when_they_are_many(bert, recwarn, capsys):
    folder = bert({"model_max_length": 30})
    ours(folder, ["a", "b", "c " * 60, "d " * 60])
    assert not [warning for warning in recwarn if "were truncated" in str(warning.message)]
    with pytest.warns(UserWarning, match="more than half of the passages were truncated"):
        ours(folder, ["a", "b " * 60, "c " * 60], verbose=True)
    assert "truncated=2" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="more than half"):
        ours(folder, ["a b c"], doc_length=2)


# sentence-transformers' folders


def test_the_default_prompt_stands_before_each_query(bert, tmp_path):
    own = sentence_transformers.CrossEncoder(str(bert()), device="cpu", prompts={"p": "ask: "}, default_prompt_name="p")
    own.save_pretrained(str(tmp_path / "own"))
    wanted = ours(tmp_path / "model", query=f"ask: {QUERY}")
    assert sentences(tmp_path / "own") == pytest.approx(wanted, abs=2e-4)
    assert_scores(tmp_path / "own", wanted)
    edit(tmp_path / "own", "config_sentence_transformers.json", {"default_prompt_name": None})
    assert ours(tmp_path / "own") == pytest.approx(ours(tmp_path / "model"), abs=2e-4)
    edit(tmp_path / "own", "config_sentence_transformers.json", {"default_prompt_name": "web"})
    with pytest.raises(ValueError, match="default_prompt_name='web' is not among p"):
        ours(tmp_path / "own")


@pytest.mark.parametrize(
    "settings",
    [{"max_seq_length": 19}, {"do_lower_case": True}, {"processing_kwargs": {"text": {"max_length": 21}}}],
    ids=str,
)
def test_how_sentence_transformers_reads_its_texts_is_obeyed(bert, tmp_path, settings):
    folder = bert({"do_lower_case": False})
    sentence_transformers.CrossEncoder(str(folder), device="cpu").save_pretrained(str(tmp_path / "own"))
    edit(tmp_path / "own", "sentence_bert_config.json", settings)
    assert_scores(tmp_path / "own", sentences(tmp_path / "own"))


def test_a_setting_of_sentence_transformers_that_is_not_known_is_named(bert, tmp_path):
    sentence_transformers.CrossEncoder(str(bert()), device="cpu").save_pretrained(str(tmp_path / "own"))
    for settings, words in (
        ({"query_length": 8}, "sets query_length"),
        ({"processing_kwargs": {"text": {"padding_side": "left"}}}, "sets processing_kwargs: padding_side"),
        ({"modality_config": {"message": {}}}, "a chat template"),
    ):
        shutil.copytree(tmp_path / "own", tmp_path / "other", dirs_exist_ok=True)
        edit(tmp_path / "other", "sentence_bert_config.json", settings)
        with pytest.raises(ValueError, match=words):
            ours(tmp_path / "other")


def test_a_head_in_a_module_is_named_with_its_place(bert):
    folder = bert()
    parts = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense")]
    modules = [{"idx": i, "name": str(i), "path": path, "type": f"a.b.{kind}"} for i, (path, kind) in enumerate(parts)]
    (folder / "modules.json").write_text(json.dumps(modules))
    edit(folder, "config_sentence_transformers.json", {"model_type": "CrossEncoder"})
    with pytest.raises(ValueError, match=r"modules.json puts .*1_Pooling \(Pooling\), 2_Dense \(Dense\)"):
        ours(folder)


# Adapters, and old names


@pytest.mark.parametrize("whole", [True, False])
def test_an_adapter_is_refused_in_words_beside_weights_or_without(bert, tmp_path, whole):
    folder = bert() if whole else tmp_path
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    for load in (CrossEncoder, CrossEncoder.from_backbone, PERank, PERank.from_backbone):
        with pytest.raises(ValueError, match=r"adapter_config.json.*not applied. Merge it .*merge_and_unload"):
            load(str(folder)).load()


def old_names(folder):
    """Rename the weights of layer norms to gamma and beta, as before 2019."""
    file = folder / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    for name in [name for name in weights if "LayerNorm." in name]:
        old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        weights[old] = weights.pop(name)
    safetensors.torch.save_file(weights, file, metadata={"format": "pt"})


def test_old_names_of_layer_norms_are_read_in_classifiers_and_in_bodies(bert, cross_encoder_folder, tmp_path):
    folder = bert()
    shutil.copytree(cross_encoder_folder, tmp_path / "lightning")
    for place, begin in (
        (folder, CrossEncoder),
        (folder, CrossEncoder.from_backbone),
        (tmp_path / "lightning", CrossEncoder),
    ):
        torch.manual_seed(1)
        wanted = begin(str(place), device="cpu").score([QUERY], [PASSAGES])[0]
        shutil.copytree(place, tmp_path / "old", dirs_exist_ok=True)
        old_names(tmp_path / "old")
        torch.manual_seed(1)
        assert begin(str(tmp_path / "old"), device="cpu").score([QUERY], [PASSAGES])[0] == pytest.approx(
            wanted, abs=1e-5
        )


# Models that need more than padding on the right


def words(special, single, pair, **names):
    """Return a tokenizer of whole words. Unknown words become its first special token. `single` and `pair` are the
    templates for one and two texts."""
    known = [*special, *WORDS]
    tokenizer = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token=special[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(special)
    ids = [(word, i) for i, word in enumerate(special)]
    if pair:
        tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=special[0], **names)


WORDS = ["a", "b", "c", "cat", "cats", "dogs", "bark", "is", "an", "animal", "and", "the", "sky"]
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
DECODER = SIZE | {"bos_token_id": 1, "eos_token_id": 2}
BEGUN = ("<s> $A", "<s> $A <s> $B")
ENDED = ("<s> $A </s>", "<s> $A </s> $B </s>")
BART = {
    **{"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "init_std": 0.5},
    **{"decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_labels": 1, "pad_token_id": 3},
    **{"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "max_position_embeddings": 64},
}
XLNET = {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64, "num_labels": 1, "initializer_range": 0.5}
LEFT = {"padding_side": "left", "model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}


@pytest.mark.parametrize(
    "kind, template, names, fields",
    [
        ("llama", BEGUN, {"pad_token": "<pad>"}, DECODER),
        ("llama", BEGUN, {}, DECODER),
        ("llama", BEGUN, {"pad_token": "<pad>"}, DECODER | {"pad_token_id": -1}),
        ("llama", BEGUN, {"pad_token": "<pad>", "padding_side": "left"}, DECODER | {"pad_token_id": 3}),
        ("llama", ENDED, {"pad_token": "</s>"}, DECODER | {"pad_token_id": 2}),
        ("llama", ENDED, {"pad_token": "</s>"}, DECODER),
        ("qwen3", ("", ""), {}, DECODER | {"num_key_value_heads": 2, "head_dim": 16, "num_labels": 2}),
        ("mistral", BEGUN, {}, DECODER | {"num_key_value_heads": 2, "sliding_window": 4}),
        ("gpt2", ("", ""), {}, {"n_embd": 32, "n_layer": 2, "n_head": 2, "num_labels": 1, "initializer_range": 0.5}),
        ("bart", ENDED, {"pad_token": "<pad>"}, BART),
        ("xlnet", ("$A <s> </s>:2", "$A <s> $B:1 <s>:1 </s>:2"), LEFT | {"pad_token": "<pad>"}, XLNET),
        ("xlnet", ("$A <s>", "$A <s> $B:1 <s>:1"), LEFT | {"pad_token": "<pad>"}, XLNET | {"summary_type": "mean"}),
        ("convbert", ENDED, {"pad_token": "<pad>"}, SIZE | {"embedding_size": 16, "pad_token_id": 3}),
        ("fnet", ENDED, {"pad_token": "<pad>"}, SIZE | {"pad_token_id": 3}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_score_is_the_pairs_own_in_any_batch(put, kind, template, names, fields):
    folder = put(kind, words(SPECIAL, *template, **names), **fields)
    passages = ["a cat is an animal", "dogs bark", "the sky", "cats and dogs " * 9, "a </s> b", "cat <pad>"]
    assert_scores(folder, library(folder, passages), passages)


def test_a_model_that_takes_one_input_at_a_time_is_refused_by_name(put):
    fields = {"n_embd": 32, "dff": 64, "n_layer": 2, "n_head": 2, "num_labels": 1}
    folder = put("ctrl", words(SPECIAL, *BEGUN), **fields)
    with pytest.raises(ValueError, match=r"CTRLForSequenceClassification, whose score .* not supported"):
        ours(folder)


def test_an_encoder_whose_tokenizer_separates_nothing_is_refused(put):
    folder = put("bert", words(SPECIAL, "", "", pad_token="<pad>"), **SIZE)
    with pytest.raises(ValueError, match="puts no special tokens between two texts"):
        ours(folder)
