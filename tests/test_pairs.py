"""models.pairs: the token ids of a pair equal those that the tokenizer itself computes, whatever the texts."""

import pytest
import tokenizers
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from pyterrier_lit.models.pairs import PairLayout, Pieces, Reading


@pytest.fixture(scope="module")
def tokenizer(electra):
    return tokenizers.Tokenizer.from_file(str(electra / "tokenizer.json"))


@given(st.lists(st.tuples(st.text(max_size=30), st.text(max_size=30)), min_size=1, max_size=5))
def test_whole_pairs_are_what_the_tokenizer_writes(tokenizer, texts):
    layout = PairLayout(tokenizer)
    queries, passages = (layout.pieces(list(side), 1_000) for side in zip(*texts, strict=True))
    pairs = [layout.fit(query, passage) for query, passage in zip(queries, passages, strict=True)]
    tensors = layout.tensors(pairs, pad_id=0)
    for row, (query, passage) in enumerate(texts):
        expected = tokenizer.encode(query, passage)
        n = len(expected.ids)
        assert tensors["input_ids"][row, :n].tolist() == expected.ids
        assert tensors["token_type_ids"][row, :n].tolist() == expected.type_ids
        assert tensors["attention_mask"][row].tolist() == [1] * n + [0] * (tensors["input_ids"].shape[1] - n)
        assert not tensors["input_ids"][row, n:].any() and not tensors["token_type_ids"][row, n:].any()


@given(st.integers(0, 30), st.integers(0, 30), st.integers(3, 25), st.sampled_from(["right", "left"]))
def test_pairs_are_cut_as_the_tokenizer_itself_cuts_them(tokenizer, queries, passages, limit, side):
    layout = PairLayout(tokenizer, Reading(limit, truncation_side=side))
    query, passage = " ".join("abc"[i % 3] for i in range(queries)), " ".join("xyz"[i % 3] for i in range(passages))
    (first,), (second,) = layout.queries([query]), layout.pieces([passage])
    ids = layout.tensors([layout.fit(first, second)], pad_id=0)["input_ids"][0].tolist()
    own = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    own.enable_truncation(limit, direction=side)
    assert ids == own.encode(query, passage).ids


def test_a_text_that_is_cut_says_so_and_remembers_its_length(tokenizer):
    layout = PairLayout(tokenizer, Reading(limit=9, prompt="q: "))
    assert layout.pieces(["a b c", "a b c d"], 3) == [Pieces(layout.pieces(["a b c"])[0].ids, 3, cut) for cut in (0, 1)]
    (long,) = layout.pieces(["a " * 40])
    assert (len(long.ids), long.total, long.cut) == (9, 40, False)
    assert layout.queries(["a"]) == layout.pieces(["q: a"])


def test_padding_on_the_left_is_that_on_the_right_moved(tokenizer):
    right, left = (PairLayout(tokenizer, Reading(padding_side=side)) for side in ("right", "left"))
    pairs = [([5, 6], [7, 8, 9]), ([5], [7])]
    for name, tensor in right.tensors(pairs, 1).items():
        other = left.tensors(pairs, 1)[name]
        assert torch.equal(other[0], tensor[0]) and torch.equal(other[1], tensor[1].roll(3))


def test_token_types_are_no_higher_than_the_model_knows(tokenizer):
    pair = [([5], [7])]
    assert PairLayout(tokenizer).tensors(pair, 0)["token_type_ids"].tolist() == [[0, 0, 0, 1, 1]]
    assert PairLayout(tokenizer, Reading(types=1)).tensors(pair, 0)["token_type_ids"].tolist() == [[0] * 5]


def test_a_free_standing_contraction_is_glued_only_with_clean_up(tokenizer):
    ids = {
        clean_up: [
            text.ids
            for text in PairLayout(tokenizer, Reading(clean_up=clean_up)).pieces(["do n't", "n't", "on 't"], 20)
        ]
        for clean_up in (True, False)
    }
    words = [[tokenizer.id_to_token(id) for id in text] for text in ids[True]]
    assert words[0] == ["d", "##o", "##n", "'", "t"]
    assert ids[True][0] != ids[False][0]
    assert ids[True][1:] == ids[False][1:]


@given(st.text(alphabet="adnot' .,", max_size=40))
def test_clean_up_is_decoding_and_encoding_again(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False).ids[:20]
    decoded = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).decode(
        ids, clean_up_tokenization_spaces=True
    )
    assert (
        PairLayout(tokenizer, Reading(clean_up=True)).pieces([text], 20)[0].ids
        == tokenizer.encode(decoded, add_special_tokens=False).ids
    )
