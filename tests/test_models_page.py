"""pt_docs/models.rst: listed classifiers score as in sentence-transformers, and refused checkpoints raise errors. The
sizes on the page are counted, and the code blocks give the shown results."""

import csv
import json
import re
import shutil
import textwrap

import corpora
import counting
import pyterrier as pt
import pytest
import safetensors.torch
import sentence_transformers
import torch
import transformers
from conftest import GOLDEN
from test_classifiers import PASSAGES, SIZE, assert_scores, bert, edit, library, ours, put, sentences  # noqa: F401
from test_docs import PT_DOCS, blocks
from tokenizers import pre_tokenizers, processors

from pyterrier_lit import CrossEncoder
from pyterrier_lit.models.text_encoder import JinaBert

PAGE = PT_DOCS / "models.rst"
LETTERS = "abcdefghijklmnopqrstuvwxyzACD?é中,:"
LONG = ["a cat " * 40, "dogs bark " * 40]
SHORT = SIZE | {"max_position_embeddings": 64}
BEHIND_PADDING = SIZE | {"max_position_embeddings": 66, "type_vocab_size": 1, "pad_token_id": 1}
DECODER = SHORT | {"num_key_value_heads": 2, "head_dim": 16}


# Tokenizers with pieces of one character, of the classes that real checkpoints use


def word_pieces(kind, special=("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"), **settings):
    pieces = [*special, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    return kind(vocab={piece: id for id, piece in enumerate(pieces)}, **settings)


def sentence_pieces(kind, special, **settings):
    pieces = [*special, "▁", *LETTERS, *(f"▁{letter}" for letter in LETTERS)]
    return kind(vocab=[(piece, -1.0 - (len(piece) == 1)) for piece in pieces], **settings)


def bytes_(kind, special, **settings):
    pieces = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    return kind(vocab={piece: id for id, piece in enumerate(pieces)}, merges=[], **settings)


def characters(kind, special, **settings):
    pieces = [*special, "▁", *LETTERS]
    return kind(vocab={piece: id for id, piece in enumerate(pieces)}, merges=[], **settings)


def modernbert():
    """A PreTrainedTokenizerFast, as ModernBERT has no tokenizer class of its own."""
    special = ["[PAD]", "[CLS]", "[SEP]"]
    bare = bytes_(transformers.RobertaTokenizer, [*special, "<s>", "</s>", "<unk>", "<mask>"]).backend_tokenizer
    ids = [(token, id) for id, token in enumerate(special)]
    bare.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", ids)
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    inputs = ["input_ids", "attention_mask"]
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bare, model_input_names=inputs, **names)


def roberta(kind, make=bytes_):
    return make(kind, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"], model_max_length=64)


def qwen():
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    named = {"padding_side": "left", "additional_special_tokens": special[1:]}
    return bytes_(transformers.Qwen2Tokenizer, special, **named)


def sized(fields):
    names = {"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"}
    return {names.get(name, name).replace("intermediate_size", "hidden_dim"): value for name, value in fields.items()}


JINA_V2_BASE = {  # config.json of jinaai/jina-embeddings-v2-base-en
    **{"vocab_size": 30_528, "type_vocab_size": 2, "hidden_size": 768, "intermediate_size": 3_072},
    **{"num_hidden_layers": 12, "num_attention_heads": 12, "layer_norm_eps": 1e-12},
}
LLAMA = ["<unk>", "<s>", "</s>", "<pad>"]
V3 = {  # what DeBERTa-v3 sets
    **{"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False},
    **{"norm_rel_ebd": "layer_norm", "share_att_key": True, "position_buckets": 16, "type_vocab_size": 0},
}
KINDS = {  # architecture in config.json -> model_type, tokenizer, other fields of the config
    "BertForSequenceClassification": ("bert", lambda: word_pieces(transformers.BertTokenizer), SHORT),
    "ElectraForSequenceClassification": (
        "electra",
        lambda: word_pieces(transformers.ElectraTokenizer),
        SHORT | {"embedding_size": 16},
    ),
    "RobertaForSequenceClassification": ("roberta", lambda: roberta(transformers.RobertaTokenizer), BEHIND_PADDING),
    "XLMRobertaForSequenceClassification": (
        "xlm-roberta",
        lambda: roberta(transformers.XLMRobertaTokenizer, sentence_pieces),
        BEHIND_PADDING,
    ),
    "CamembertForSequenceClassification": (
        "camembert",
        lambda: roberta(transformers.CamembertTokenizer, sentence_pieces),
        BEHIND_PADDING,
    ),
    "DistilBertForSequenceClassification": (
        "distilbert",
        lambda: word_pieces(transformers.DistilBertTokenizer),
        sized(SHORT),
    ),
    "AlbertForSequenceClassification": (
        "albert",
        lambda: sentence_pieces(transformers.AlbertTokenizer, ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]),
        SHORT | {"embedding_size": 16},
    ),
    "MPNetForSequenceClassification": (
        "mpnet",
        lambda: word_pieces(
            transformers.MPNetTokenizer, ["<s>", "<pad>", "</s>", "[UNK]", "<mask>"], model_max_length=64
        ),
        BEHIND_PADDING,
    ),
    "DebertaV2ForSequenceClassification": (
        "deberta-v2",
        lambda: sentence_pieces(transformers.DebertaV2Tokenizer, ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]),
        SHORT | V3,
    ),
    "ModernBertForSequenceClassification": (
        "modernbert",
        modernbert,
        SHORT
        | {"classifier_pooling": "mean", "local_attention": 8, "pad_token_id": 0}
        | dict.fromkeys(("cls_token_id", "bos_token_id"), 1)
        | dict.fromkeys(("sep_token_id", "eos_token_id"), 2),
    ),
    "Qwen3ForSequenceClassification": ("qwen3", qwen, DECODER | {"pad_token_id": 0}),
    "Qwen2ForSequenceClassification": (
        "qwen2",
        qwen,
        {name: value for name, value in DECODER.items() if name != "head_dim"} | {"pad_token_id": 0},
    ),
    "LlamaForSequenceClassification": (
        "llama",
        lambda: characters(transformers.LlamaTokenizer, LLAMA, pad_token="<pad>", padding_side="left"),
        DECODER | {"pad_token_id": 3},
    ),
    "MistralForSequenceClassification": (
        "mistral",
        lambda: characters(transformers.LlamaTokenizer, LLAMA, pad_token="<pad>", padding_side="left"),
        DECODER | {"pad_token_id": 3},
    ),
    "GemmaForSequenceClassification": (
        "gemma",
        lambda: characters(
            transformers.GemmaTokenizer, ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"], padding_side="left"
        ),
        DECODER | {"pad_token_id": 0},
    ),
}


def differences(rows):
    """For one label, the logit; for two labels, the second logit minus the first one."""
    return [row if isinstance(row, float) else row[1] - row[0] for row in rows]


@pytest.mark.parametrize("labels", [1, 2])
@pytest.mark.parametrize("architecture", KINDS)
def test_a_classifier_scores_as_sentence_transformers_does(put, architecture, labels):  # noqa: F811
    kind, tokenizer, fields = KINDS[architecture]
    tokenizer = tokenizer()
    folder = put(kind, tokenizer, **fields | {"num_labels": labels})
    assert json.loads((folder / "config.json").read_text())["architectures"] == [architecture]
    written = json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"]
    assert written == type(tokenizer).__name__ or architecture.startswith("ModernBert")
    marked = f"a {tokenizer.eos_token or tokenizer.sep_token} cat"
    for query, passages in (("Is a Cat an animal?", [*PASSAGES, *LONG, marked]), ("cat " * 40, [*PASSAGES, *LONG])):
        wanted = differences(sentences(folder, passages, query))
        assert ours(folder, passages, query) == pytest.approx(wanted, abs=2e-5)
        assert_scores(folder, wanted, passages, query)


def table(title):
    """The rows of the page's table with this title, each as a dict: column -> value."""
    found = re.search(rf"csv-table:: {title}\n((?:   :.*\n)+)\n((?:   .+\n)+)", PAGE.read_text(encoding="utf-8"))
    columns = re.search(r":header: (.*)", found[1])[1].split(", ")
    rows = csv.reader(textwrap.dedent(found[2]).splitlines(), skipinitialspace=True)
    return [dict(zip(columns, row, strict=True)) for row in rows]


def test_the_classifiers_of_the_page_are_those_that_are_tested():
    assert [row["architecture"].strip("`") for row in table("Classifiers")] == list(KINDS)


# What is refused


def renamed(folder, names):
    """Rename the weights in a folder, as in checkpoints that bring their own code for the network."""
    file = folder / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    for old, new in names.items():
        weights = {name.replace(old, new): tensor for name, tensor in weights.items()}
    safetensors.torch.save_file(weights, file, metadata={"format": "pt"})
    return folder


def ettin(folder):
    """List four modules in modules.json, as sentence-transformers does for a cross-encoder with a head of its own."""
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense"), ("3_LayerNorm", "LayerNorm")]
    listed = [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(modules)]
    (folder / "modules.json").write_text(json.dumps(listed))
    edit(folder, "config_sentence_transformers.json", {"model_type": "CrossEncoder"})
    return folder


def set_encoder(folder):
    shutil.copytree(GOLDEN / "cross_encoder" / "ckpt" / "electra_bias", folder, dirs_exist_ok=True)
    edit(folder, "config.json", {"model_type": "set-encoder", "backbone_model_type": "electra"})
    return folder


def adapted(folder):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    return folder


def changed(folder, **fields):
    edit(folder, "config.json", fields)
    return folder


TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }} {{ m['content'] }}<|im_end|>{% endfor %}"
WITHOUT = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
JINA_V1 = {"intermediate.dense": "mlp.gated_layers", "output.dense": "mlp.wo"}
JINA_V2 = {"encoder.layer.": "encoder.layers.", "attention.self.query": "mixer.Wqkv"}
REFUSED = {  # row of the page -> functions that make a folder such a checkpoint, each with the expected error
    "a language model": [
        (
            lambda folder: changed(folder, architectures=["Qwen3ForCausalLM"], model_type="qwen3"),
            "is not a cross-encoder",
        ),
        (
            lambda folder: changed(folder, architectures=["T5ForConditionalGeneration"], model_type="t5"),
            "is not a cross-encoder",
        ),
    ],
    "code of its own": [
        (
            lambda folder: changed(folder, architectures=["NewForSequenceClassification"], model_type="new"),
            "cannot be loaded as a sequence classifier without code of its own",
        ),
        (lambda folder: renamed(folder, JINA_V1), "does not hold the weights of this model"),
        (lambda folder: renamed(folder, JINA_V2), "does not hold the weights of this model"),
    ],
    "a head in modules": [(ettin, "puts the cross-encoder of sentence-transformers together from modules")],
    "a chat template": [
        (
            lambda folder: (folder / "chat_template.jinja").write_text(TEMPLATE) and folder,
            "has a chat template for a query and a document.*chat_template.jinja",
        ),
    ],
    "an adapter": [(adapted, "holds an adapter")],
    "a Set-Encoder": [(set_encoder, "is of model_type 'set-encoder', whose score depends on more than its pair")],
}


@pytest.mark.parametrize(
    "change, words", [pytest.param(*case, id=what) for what, cases in REFUSED.items() for case in cases]
)
def test_what_the_page_calls_refused_is_refused_in_words(bert, change, words):  # noqa: F811
    with pytest.raises(ValueError, match=words):
        ours(change(bert()))


def test_the_refusals_of_the_page_are_those_that_are_tested():
    assert [row["what"] for row in table("Refused")] == list(REFUSED)


@pytest.mark.parametrize("form", ["flat", "structured"])
def test_a_chat_template_counts_where_sentence_transformers_writes_pairs_by_it(bert, tmp_path, form):  # noqa: F811
    content = "m['content']" if form == "flat" else "m.content[0].text"
    folder = bert({"chat_template": TEMPLATE.replace("m['content']", content)})
    with pytest.raises(ValueError, match="has a chat template"):
        ours(folder)
    assert sentences(folder) != pytest.approx(library(folder), abs=1e-3)
    # A folder of sentence-transformers lists the template as `message` in modality_config, or does not use it
    model = sentence_transformers.CrossEncoder(str(folder), device="cpu")
    model.save_pretrained(str(tmp_path / "own"))
    edit(tmp_path / "own", "sentence_bert_config.json", {"modality_config": model[0].modality_config | {"message": {}}})
    with pytest.raises(ValueError, match=r"message \(a chat template\)"):
        ours(tmp_path / "own")
    only_texts = {"text": model[0].modality_config["text"]}
    edit(tmp_path / "own", "sentence_bert_config.json", {"modality_config": only_texts})
    assert_scores(tmp_path / "own", sentences(tmp_path / "own"))


def test_a_chat_template_without_places_for_pairs_is_left_out(bert):  # noqa: F811
    folder = bert({"chat_template": WITHOUT})
    assert_scores(folder, library(folder))
    with pytest.raises(ValueError, match="'query' and 'document' content does not reach"):
        sentences(folder)
    saved = folder.parent / "saved"  # assert_scores has written it
    assert sentences(saved) == pytest.approx(library(folder), abs=2e-4)


def test_a_student_over_a_model_that_chats_is_read_again(put, tmp_path):  # noqa: F811
    tokenizer = qwen()
    tokenizer.chat_template = TEMPLATE
    folder = put("qwen3", tokenizer, **DECODER | {"pad_token_id": 0})
    student = CrossEncoder.from_backbone(str(folder), device="cpu")
    wanted = student.rank("a cat", PASSAGES)
    student.save(tmp_path / "student")
    assert CrossEncoder(str(tmp_path / "student"), device="cpu").rank("a cat", PASSAGES) == wanted
    other = sentence_transformers.CrossEncoder(str(tmp_path / "student"), device="cpu").rank("a cat", PASSAGES)
    assert [row["corpus_id"] for row in other] == [row["corpus_id"] for row in wanted]


# Sizes, prompts, and passages with titles


def sizes():
    """The number of parameters of each checkpoint of the page. The keys are hub ids without the owner."""
    with torch.device("meta"):
        vectors = torch.nn.Sequential(torch.nn.Linear(768, 4096), torch.nn.Linear(4096, 4096))
        jina = JinaBert(JINA_V2_BASE)
    mistral, electra = counting.mistral(), [(size, counting.electra(size).electra) for size in counting.ELECTRA]
    of_t5 = {size: counting.parameters(counting.t5(size)) for size in counting.T5}
    return {
        **{f"monoelectra-{size}": counting.parameters(body) + body.config.hidden_size + 1 for size, body in electra},
        **{f"LiT5-{kind}-{size}": count for kind in ("Distill", "Score") for size, count in of_t5.items()},
        "pe-rank-mistral-jina": sum(map(counting.parameters, (mistral.model, vectors, jina))) + 2 * 4096,
        "rank_mistral": counting.parameters(mistral),
    }


def test_sizes_are_counted():
    counted = sizes()
    rows = {row.pop("checkpoint").partition("/")[2]: row for row in table("Sizes")}
    assert rows.keys() == counted.keys()
    for name, row in rows.items():
        n = counted[name]
        assert (row["parameters"], row["weights in float32"], row["weights in 16 bits"]) == (
            f"{n / 1e6:.0f} M",
            f"{4 * n / 1e9:.2f} GB",
            f"{2 * n / 1e9:.2f} GB",
        ), name


def test_the_prompt_of_qwen3_surrounds_query_and_passage_and_the_query_comes_back():
    scope = {}
    for block in blocks(PAGE):
        if "CrossEncoder(" not in block.text:  # test_docs.py runs the other blocks
            exec(compile(block.text, str(block), "exec"), scope)
    asked, found = scope["asked"], scope["found"]
    query, text = asked(found)["query"][0], scope["shown"](found)["text"][1]
    assert query.startswith("<|im_start|>system\nJudge whether") and query.endswith("<Query>: water power\n")
    assert 'only be "yes" or "no".<|im_end|>\n<|im_start|>user\n<Instruct>: Given a web search query, retrieve' in query
    assert text.endswith("lumen.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert (asked >> pt.rewrite.reset())(found)["query"].tolist() == ["water power"] * 2


def test_the_lines_are_those_that_the_experiments_read():
    doc = {"title": "Old mills", "text": "They stand [1]\nby the water."}
    page = PAGE.read_text(encoding="utf-8")
    assert repr(corpora.titled_text(doc)) in page
    assert repr([corpora.title_and_text(doc), "Light is measured in lumen."]) in page
