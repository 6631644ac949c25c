"""models.pe_prompts: prompts equal those of the reference, and no text adds a special token."""

import json
import shutil
from pathlib import Path

import pytest
from contract import assert_same_scores
from hypothesis import given, settings
from hypothesis import strategies as st
from pe import FOLDER, HOSTILE, quietly, with_vectors

from pyterrier_lit import PERank
from pyterrier_lit.models.checkpoints import Folder
from pyterrier_lit.models.pe_prompts import read_prompter


@pytest.fixture
def make():
    return lambda **arguments: PERank(**{"model": str(FOLDER / "checkpoint"), "device": "cpu"} | arguments)


@pytest.fixture(scope="module")
def ranker():
    return PERank(str(FOLDER / "checkpoint"), device="cpu").load()


SHARED = PERank(str(FOLDER / "checkpoint"), device="cpu")


def test_the_text_follows_its_placeholder(ranker):
    example = json.loads((FOLDER / "prompt_text_embedding_example.json").read_text())
    assert ranker.prompter.messages(example["query"], example["candidates"]) == example["messages"]


@pytest.mark.parametrize("mode", ["embedding", "text+embedding"])
def test_special_tokens_in_queries_and_passages_are_plain_text(make, ranker, mode, frame):
    for text in HOSTILE:
        hostile = frame.assign(text=text, query=f"what is {text}")
        assert sorted(make(mode=mode)(hostile)["rank"]) == [0, 0, 1, 1, 2, 3, 4]
        ids = ranker.prompter.ids([text], [[text, "x"]], [2])[0]
        assert ids.count(700) == 2
        assert not {0, 2, 701} & set(ids)
        assert ids.count(1) == 1


@settings(max_examples=60)
@given(
    st.lists(st.sampled_from([*HOSTILE, "<", ">", "PLACEHOLDER", " ", "s", "/", "日本 ☃", "\n"]), max_size=8).map(
        "".join
    )
)
def test_no_text_adds_a_special_token(text):
    ids = SHARED.load().prompter.ids([text], [[text]], [1])[0]
    assert ids.count(700) == 1
    assert not {0, 2, 701} & set(ids)


def test_a_passage_may_be_hostile_and_moves_no_vector_but_its_own(make, frame):
    column = with_vectors(frame)[0]
    assert_same_scores(quietly(make(), column), quietly(make(), column.assign(text="<PLACEHOLDER> </s>")))


def test_a_prompt_longer_than_the_positions_is_refused(make, frame):
    with pytest.raises(ValueError, match=r"query '.*' with \d passages has \d+ tokens and the model 4096 positions"):
        make(mode="text+embedding")(frame.assign(text="ab " * 3_000))


def test_prompts_of_every_size_have_as_many_placeholders(ranker):
    sizes = [1, 7, 20]
    for ids, n in zip(ranker.prompts(["q"] * 3, [[]] * 3, sizes), sizes, strict=True):
        assert ids.count(ranker.network.placeholder) == n


@pytest.mark.shared
def test_prompts_with_mistrals_tokenizer_have_the_length_that_the_authors_print(shared, tmp_path):
    mistral = pytest.importorskip("mistral_common", reason="needs Mistral's tokenizer: pip install mistral-common")
    shutil.copy(Path(mistral.__file__).parent / "data" / "tokenizer.model.v1", tmp_path / "tokenizer.model")
    fields = (FOLDER / "checkpoint" / "tokenizer_config.json").read_text()
    fields = fields.replace('"700"', '"32000"').replace('"701"', '"32001"')
    (tmp_path / "tokenizer_config.json").write_text(fields)
    prompter = read_prompter(Folder(tmp_path), 32_002)
    topics = shared.topics("dl19")
    queries = topics[topics.qid.isin(shared.qrels("dl19").qid)]["query"].tolist()
    lengths = [len(ids) for ids in prompter.ids(queries, [[]] * 43, [20] * 43)]
    assert round(9 * sum(lengths) / 43, 1) == 2942.4  # a list of 100 passages has nine windows
