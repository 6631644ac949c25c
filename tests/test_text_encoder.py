"""models.text_encoder: Jina v2's encoder equals its formulas. Encoders that would be loaded wrongly are refused."""

import math
import pickle

import pytest
import tokenizers
import torch
import transformers
from conftest import GOLDEN

from pyterrier_lit.models.checkpoints import Folder
from pyterrier_lit.models.library import load_strictly
from pyterrier_lit.models.pooling import POOLING
from pyterrier_lit.models.text_encoder import JinaBert, TextEncoder, alibi, bare, empty_encoder, slopes

JINA = {
    "architectures": ["JinaBertForMaskedLM"],
    "auto_map": {"AutoModel": "jinaai/jina-bert-implementation--modeling_bert.JinaBertModel"},
    "model_type": "bert",
    "position_embedding_type": "alibi",
    "feed_forward_type": "geglu",
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "intermediate_size": 20,
    "vocab_size": 30,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}


@pytest.fixture
def jina():
    torch.manual_seed(0)
    network = empty_encoder(JINA).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return network


def test_slopes_are_those_of_alibi():
    assert slopes(8) == [2.0**-i for i in range(1, 9)]
    assert slopes(12) == pytest.approx([2.0**-i for i in range(1, 9)] + [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5])


def by_loops(weights, ids, heads=6, eps=1e-12):
    """The hidden states of one text by the formulas of the paper, one position and one head at a time, in float64."""
    weights = {name: tensor.double() for name, tensor in weights.items()}

    def linear(name, x):
        return weights[f"{name}.weight"] @ x + weights.get(f"{name}.bias", 0.0)

    def norm(name, x):
        centred = x - x.mean()
        return weights[f"{name}.weight"] * centred / (centred.pow(2).mean() + eps).sqrt() + weights[f"{name}.bias"]

    def gelu(x):
        return torch.stack([value * 0.5 * (1 + math.erf(value / math.sqrt(2))) for value in x])

    words, types = "embeddings.word_embeddings.weight", "embeddings.token_type_embeddings.weight"
    states = [norm("embeddings.LayerNorm", weights[words][i] + weights[types][0]) for i in ids]
    for layer in range(2):
        at = f"encoder.layer.{layer}"
        query, key, value = (
            [linear(f"{at}.attention.self.{name}", state) for state in states] for name in ("query", "key", "value")
        )
        width = len(states[0]) // heads
        after = []
        for i in range(len(states)):
            mixed = []
            for head in range(heads):
                part = slice(head * width, (head + 1) * width)
                logits = torch.stack(
                    [
                        query[i][part] @ key[j][part] / math.sqrt(width) - slopes(heads)[head] * abs(i - j)
                        for j in range(len(states))
                    ]
                )
                mixed.append(sum(p * value[j][part] for j, p in enumerate(logits.softmax(0))))
            out = linear(f"{at}.attention.output.dense", torch.cat(mixed)) + states[i]
            after.append(norm(f"{at}.attention.output.LayerNorm", out))
        states = []
        for state in after:
            both = linear(f"{at}.mlp.gated_layers", state)
            half = len(both) // 2
            inner = linear(f"{at}.mlp.wo", gelu(both[:half]) * both[half:])
            states.append(norm(f"{at}.mlp.layernorm", inner + state))
    return torch.stack(states)


@torch.inference_mode()
def test_jina_equals_its_formulas_with_padding_or_without(jina):
    texts = [[2, 7, 9, 11, 5, 3], [2, 4, 3], [2, 3]]
    ids = torch.tensor([text + [0] * (6 - len(text)) for text in texts])
    states = jina(input_ids=ids, attention_mask=(ids != 0).long())
    for row, text in zip(states, texts, strict=True):
        assert (row[: len(text)] - by_loops(jina.state_dict(), text)).abs().max() < 1e-5


def test_jina_loads_strictly_by_the_names_of_its_checkpoint(jina):
    names = set(jina.state_dict())
    for part in (
        "attention.self.query.bias",
        "attention.output.LayerNorm.weight",
        "mlp.gated_layers.weight",
        "mlp.wo.bias",
    ):
        assert f"encoder.layer.1.{part}" in names
    assert "encoder.layer.0.mlp.gated_layers.bias" not in names
    other = {**jina.state_dict(), "pooler.dense.weight": torch.zeros(1)}
    load_strictly(empty_encoder(JINA), bare(other), "here")
    with pytest.raises(ValueError, match=r"unexpected encoder.layer.0.attention.self.layer_norm_q.weight"):
        load_strictly(
            empty_encoder(JINA),
            other | {"encoder.layer.0.attention.self.layer_norm_q.weight": other["embeddings.LayerNorm.weight"]},
            "here",
        )


@pytest.mark.parametrize(
    "change",
    [
        {"position_embedding_type": "rotary"},
        {"position_embedding_type": "relative_key"},
        {"position_embedding_type": "absolute"},  # as in BERT, but JINA's `auto_map` names code of its own
        {"feed_forward_type": "reglu"},
    ],
)
def test_an_encoder_with_code_of_its_own_is_refused_in_words(change):
    with pytest.raises(ValueError, match=r"JinaBertForMaskedLM.*code of its own.*vectors=.*'doc_vec'.*encoder="):
        empty_encoder(JINA | change)


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra", "distilbert"])
def test_encoders_of_the_library_are_their_own_model_without_pooler(kind):
    torch.manual_seed(0)
    size = {
        "vocab_size": 30,
        "hidden_size": 12,
        "dim": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "n_heads": 2,
    }
    model = transformers.AutoModel.from_config(
        transformers.AutoConfig.for_model(kind, **size, intermediate_size=8)
    ).eval()
    encoder = empty_encoder(model.config.to_dict()).eval()
    load_strictly(encoder, bare(model.state_dict()), "here")
    ids = torch.tensor([[5, 6, 7]])
    mask = torch.ones_like(ids)
    with torch.inference_mode():
        expected = model(input_ids=ids, attention_mask=mask).last_hidden_state
        assert torch.equal(encoder(input_ids=ids, attention_mask=mask).last_hidden_state, expected)


def test_pooling_reads_real_tokens_alone():
    states, mask = torch.tensor([[[1.0], [3.0], [100.0]]]), torch.tensor([[1, 1, 0]])
    assert {name: pool(states, mask).tolist() for name, pool in POOLING.items()} == {
        "first": [[1.0]],
        "cls": [[1.0]],
        "mean": [[2.0]],
        "sum": [[4.0]],
        "max": [[3.0]],
        "last_token": [[3.0]],
    }


def test_texts_are_cut_at_512_pieces_with_the_special_tokens_kept(electra):
    tokenizer = tokenizers.Tokenizer.from_file(str(electra / "tokenizer.json"))
    encoder = TextEncoder(JinaBert(JINA), tokenizer, JINA, "mean")
    long, short, empty = encoder.pieces(["a b " * 500, " a\n\n b\t", ""])
    assert (len(long), long[-1]) == (512, tokenizer.token_to_id("[SEP]"))
    assert short == tokenizer.encode("a b").ids
    assert empty == [tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")]


def test_control_tokens_in_a_passage_are_text_also_after_a_pickle():
    folder = Folder(GOLDEN / "pe_rank" / "encoder")
    encoder = TextEncoder(torch.nn.Identity(), folder.tokenizer(), folder.config, "mean")
    control = {folder.tokenizer().token_to_id(token) for token in ("[PAD]", "[CLS]", "[SEP]", "[MASK]")}
    texts = ["a [SEP] b", "[PAD] [PAD] a", "[CLS]", "a [MASK]"]
    for each in (encoder, pickle.loads(pickle.dumps(encoder))):
        for ids in each.pieces(texts):
            assert len(control & set(ids[1:-1])) == 0 and len(ids) > 3


def test_the_padding_is_what_was_added_and_no_id():
    """If an encoder has no padding token, a text may contain the id that is used as padding."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    network = torch.nn.Embedding(2, 3)
    network.forward = lambda input_ids, attention_mask: network.weight[input_ids]
    encoder = TextEncoder(network, tokenizer, {}, "mean")
    alone, company = encoder.encode([[0, 1]]), encoder.encode([[0, 1], [1, 1, 1]])
    torch.testing.assert_close(alone[0], network.weight.mean(0))
    torch.testing.assert_close(company[0], alone[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_bias_of_distance_does_not_depend_on_torchs_default(dtype):
    expected = alibi(12, 9)
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(alibi(12, 9), expected)
    finally:
        torch.set_default_dtype(torch.float32)
