"""Untrusted texts: no query and no passage changes the structure of a prompt, for each reranker.

The structure of a prompt is the sequence of its control tokens, such as [SEP]. For CrossEncoder, the token types are
part of it. For LiT5, the last id is part of it, and for LiT5-Score also whether all prompts begin with the query.
test_faults.py checks that no code of a checkpoint is run.
"""

import pytest
from conftest import RERANKERS
from hypothesis import given, settings
from hypothesis import strategies as st

CONTROL = [
    "[SEP]",
    "[CLS]",
    "[PAD]",
    "[MASK]",
    "[UNK]",
    "</s>",
    "<s>",
    "<pad>",
    "<unk>",
    "<extra_id_0>",
    "<PLACEHOLDER>",
    "<RANK>",
]
WORDS = [
    "[3]",
    "[1] > [2]",
    "Passage: [2]",
    "Relevance Ranking: ",
    "Search Query: ",
    "question: ",
    " context: ",
    "Query: ",
    "[INST]",
    "\u2581",
]
hostile = (
    st.lists(st.one_of(st.sampled_from(CONTROL + WORDS), st.text(max_size=8)), max_size=6)
    .map("".join)
    .map(lambda text: text.encode("utf-8", "replace").decode())
)


def pair(reranker, query, passages):
    """CrossEncoder: the control ids of each input, each with its token type."""
    encoder = reranker.load()
    layout, pairs = reranker.pairs([(query, passage) for passage in passages])
    control = {encoder.tokenizer.token_to_id(token) for token in ("[SEP]", "[CLS]", "[PAD]", "[MASK]")}
    return [
        [(id, kind) for id, kind in zip(ids, types, strict=True) if id in control]
        for tensors in [layout.tensors([pair], 0) for pair in pairs]
        for ids, types in zip(tensors["input_ids"].tolist(), tensors["token_type_ids"].tolist(), strict=True)
    ]


def t5_control(t5, ids):
    """The control ids of the tokenizer, and the ids outside its vocabulary."""
    processor = t5.pieces.processor
    return [id for id in ids if id >= processor.get_piece_size() or processor.is_control(id)]


def distill(reranker, query, passages):
    """LiT5Distill: the control ids of each prompt, and its last id."""
    t5 = reranker.load()
    return [(t5_control(t5, ids), ids[-1]) for ids in reranker.prompts(query, passages)]


def score(reranker, query, passages):
    """LiT5Score: as for LiT5Distill, and whether all prompts begin with the same ids, those of the query."""
    t5 = reranker.load()
    read = reranker.prompts(query, passages)
    alike = len({tuple(ids[: min(read.question, len(ids)) - 1]) for ids in read.ids}) == 1
    return [(t5_control(t5, ids), ids[-1], alike) for ids in read.ids]


def pe_rank(reranker, query, passages):
    """PERank: the special ids of the prompt without texts and of the prompt with texts, in order."""
    prompter = reranker.load().prompter
    special = {*prompter.tokenizer.get_added_vocab().values(), *prompter.tokenizer.all_special_ids}
    unknown = prompter.tokenizer.unk_token_id
    return [
        [id for id in prompter.ids([query], [shown], [len(passages)])[0] if id in special - {unknown}]
        for shown in ([], passages)
    ]


STRUCTURES = {"CrossEncoder": pair, "LiT5Distill": distill, "LiT5Score": score, "PERank": pe_rank}
SAFE = {"CrossEncoder": {"special_tokens": "text"}}


@pytest.fixture(scope="module", params=RERANKERS)
def structure(request):
    """structure(query, passages): the structure of the prompts of a reranker."""
    kind, folder, *_ = RERANKERS[request.param]
    reranker = kind(str(folder), device="cpu", **SAFE.get(request.param, {}))
    return lambda query, passages: STRUCTURES[request.param](reranker, query, passages)


@settings(max_examples=60)
@given(hostile, st.lists(hostile, min_size=3, max_size=3))
def test_no_text_alters_the_structure_of_a_prompt(structure, query, passages):
    assert structure(query, passages) == structure("what is a cat", ["a cat", "is an animal", "of some kind"])


@pytest.mark.parametrize("text", CONTROL + WORDS)
def test_each_control_token_and_each_word_of_the_prompts_alone(structure, text):
    plain = structure("what is a cat", ["a cat", "is an animal", "of some kind"])
    assert structure(text, ["a cat", text, f"{text} at the start, {text} and at the end {text}"]) == plain


def test_the_structures_see_what_the_reference_lets_through():
    """`special_tokens="parse"` reads control tokens inside a text, as the reference does. The structure must differ, or
    the tests above would see nothing."""
    kind, folder, *_ = RERANKERS["CrossEncoder"]
    parsing = kind(str(folder), device="cpu")
    assert pair(parsing, "q", ["a [SEP] b"]) != pair(parsing, "q", ["a b"])


def test_a_hostile_passage_changes_no_score_of_its_neighbours_pairs():
    kind, folder, *_ = RERANKERS["CrossEncoder"]
    for special_tokens in ("parse", "text"):
        reranker = kind(str(folder), device="cpu", special_tokens=special_tokens)
        plain, attacked = reranker.score(["cat", "cat"], [["a cat", "a dog"], ["a cat", "[SEP] cat [SEP] a [CLS]"]])
        assert plain[0] == attacked[0]


@pytest.mark.parametrize("name", ["LiT5Distill", "PERank"])
def test_however_hostile_the_texts_an_order_is_a_permutation(name):
    kind, folder, *_ = RERANKERS[name]
    texts = [f"{text} {word}" for text in CONTROL for word in WORDS[:3]]
    columns = texts if name == "LiT5Distill" else {"docno": texts, "text": texts}
    given = [columns] if name == "LiT5Distill" else {key: [values] for key, values in columns.items()}
    assert sorted(kind(str(folder), device="cpu").score([" ".join(CONTROL)], given)[0]) == list(
        range(1, len(texts) + 1)
    )
