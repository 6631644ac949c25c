"""pairs: the layout is the tokenizer's own, whatever the texts."""

import pytest
import tokenizers
import transformers
from hypothesis import given
from hypothesis import strategies as st

from pyterrier_lit.models.pairs import PairLayout

pieces = st.lists(st.integers(5, 90), max_size=12)


@pytest.fixture(scope="module")
def tokenizer(electra):
    return tokenizers.Tokenizer.from_file(str(electra / "tokenizer.json"))


@pytest.fixture(scope="module")
def layout(tokenizer):
    return PairLayout(tokenizer, limit=12)


@given(st.lists(st.tuples(st.text(max_size=30), st.text(max_size=30)), min_size=1, max_size=5))
def test_whole_pairs_are_what_the_tokenizer_writes(tokenizer, texts):
    layout = PairLayout(tokenizer)
    queries, passages = (layout.pieces(list(side), 1_000) for side in zip(*texts, strict=True))
    tensors = layout.tensors(list(zip(queries, passages, strict=True)), pad_id=0)
    for row, (query, passage) in enumerate(texts):
        expected = tokenizer.encode(query, passage)
        n = len(expected.ids)
        assert tensors["input_ids"][row, :n].tolist() == expected.ids
        assert tensors["token_type_ids"][row, :n].tolist() == expected.type_ids
        assert tensors["attention_mask"][row].tolist() == [1] * n + [0] * (tensors["input_ids"].shape[1] - n)
        assert not tensors["input_ids"][row, n:].any() and not tensors["token_type_ids"][row, n:].any()


@given(pieces, pieces)
def test_fit_drops_from_the_longer_side_and_from_the_passage_on_a_tie(layout, query, passage):
    shorter = layout.fit(query, passage)
    assert layout.length(shorter) == min(layout.length((query, passage)), 12)
    assert shorter == (query[: len(shorter[0])], passage[: len(shorter[1])])
    queries, passages = len(shorter[0]), len(shorter[1])
    if queries < len(query):
        assert queries >= passages
    if passages < len(passage):
        assert passages >= queries - 1


def test_a_free_standing_contraction_is_glued_only_with_clean_up(tokenizer):
    ids = {
        clean_up: PairLayout(tokenizer, clean_up=clean_up).pieces(["do n't", "n't", "on 't"], 20)
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
        PairLayout(tokenizer, clean_up=True).pieces([text], 20)[0]
        == tokenizer.encode(decoded, add_special_tokens=False).ids
    )


def test_a_tokenizer_without_special_tokens_is_refused(tokenizer):
    bare = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    with pytest.raises(ValueError, match="no special tokens between two texts"):
        PairLayout(bare)
