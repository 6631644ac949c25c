"""Public teacher data: all formats are read, incomplete orders are completed, and errors name the bad line."""

import gzip
import json

import pytest
from conftest import SHARED, write_jsonl

from pyterrier_lit import CrossEncoder
from pyterrier_lit.__main__ import main
from pyterrier_lit.training import Distil, read_teacher
from pyterrier_lit.training.data import read_run

TEXTS = ["a fox", "two\n[7] lines\n[4] of [2] them", "a cat", "dogs"]


def prompt(query="red fox", texts=TEXTS, names="1234", again=None):
    listed = "".join(f"[{name}] {text}\n" for name, text in zip(names, texts, strict=False))
    return (
        f"I will provide you with {len(texts)} passages, each indicated by a numerical identifier []. Rank the passages"
        f" based on their relevance to the search query: {query}.\n\n{listed}\nSearch Query: {again or query}.\n\n"
        f"Rank the {len(texts)} passages above based on their relevance to the search query."
    )


def zephyr(target="[2] > [4] > [1] > [3]", id="7", **how):
    turns = [("system", "You are RankLLM."), ("human", prompt(**how)), ("gpt", target)]
    return {"id": id, "conversations": [{"from": who, "value": value} for who, value in turns]}


def pe_rank(ranking=(2, 4, 1, 3), texts=TEXTS, query="red fox", again="red fox"):
    shown = "".join(f"Passage {i}: [<PLACEHOLDER>]\n\n" for i in range(1, 5))
    content = (
        "I will provide you with 4 passages, each with a special token representing the passage enclosed in [],"
        f" followed by original text.\nRank the passages based on their relevance to the search query: {query}.\n"
        f"{shown}Search Query: {again}.\nRank the 4 relatively ordered passages above"
    )
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": ""}]
    gold = [texts[i - min(1, *ranking)] for i in ranking]
    return {
        "messages_w_content": [],
        "messages_wo_content": messages,
        "extra_texts": [*texts, *gold],
        "ranking": list(ranking),
    }


def rank_gpt(texts=TEXTS, query="red fox"):
    passages = [{"docid": 10 + i, "text": text} for i, text in enumerate(texts)]
    return {"query": query, "positive_passages": passages[:1], "retrieved_passages": passages}


def put(tmp_path, *records):
    return write_jsonl(tmp_path / "teacher.jsonl", records)


def order(frame):
    return frame.sort_values("rank")["text"].tolist()


BEST_FIRST = [TEXTS[i] for i in (1, 3, 0, 2)]


@pytest.mark.parametrize(
    "record",
    [
        zephyr(),
        zephyr("[B] > [D] > [A] > [C]", names="ABCD"),
        zephyr(query="what is [1] x.y?"),
        zephyr(query="two\nlines"),
        pe_rank(),
        pe_rank((1, 3, 0, 2)),
    ],
)
def test_the_teachers_order_is_the_rank_and_the_prompts_is_shown(tmp_path, record):
    frame = read_teacher(put(tmp_path, record))
    assert list(frame) == ["qid", "query", "docno", "text", "rank", "shown"]
    assert order(frame) == BEST_FIRST and frame.sort_values("shown")["text"].tolist() == TEXTS
    assert frame["query"].unique().tolist() in (["red fox"], ["what is [1] x.y?"], ["two\nlines"])
    assert frame["qid"].unique().tolist() == (["7"] if "id" in record else ["1"])


def test_rankgpts_permutations_stand_in_a_second_file_and_twolars_in_the_passages(tmp_path):
    path, orders = put(tmp_path, rank_gpt(), rank_gpt(query="x")), tmp_path / "gpt3.5.json"
    orders.write_text(json.dumps(["[2] > [4] > [1] > [3]", "2, 4, 1, 3"]))
    frame = read_teacher(path, orders)
    assert frame["docno"].tolist() == 2 * ["11", "13", "10", "12"] and frame["query"].tolist() == 4 * [
        "red fox"
    ] + 4 * ["x"]
    assert order(read_teacher(put(tmp_path, rank_gpt()))) == TEXTS


def test_an_array_and_gzip_are_read_too(tmp_path):
    path = tmp_path / "train.json.gz"
    path.write_bytes(gzip.compress(json.dumps([zephyr(), zephyr(id="8")]).encode()))
    assert read_teacher(path)["qid"].tolist() == 4 * ["7"] + 4 * ["8"]


def test_orders_are_completed_as_rankgpts_are_and_counted_once(tmp_path):
    with pytest.warns(UserWarning, match="2 of 3 orders do not name each passage once") as warned:
        frame = read_teacher(put(tmp_path, zephyr("[4] > [4] > [9] > [2]"), zephyr(), zephyr("[3]")))
    assert len(warned) == 1
    assert order(frame[frame["qid"] == "7"]) == [TEXTS[i] for i in (3, 1, 0, 2)]
    assert order(frame[frame["qid"] == "7#3"]) == [TEXTS[i] for i in (2, 0, 1, 3)]  # the third record with the id 7


def test_equal_texts_are_one_passage_where_the_teacher_has_the_better(tmp_path):
    frame = read_teacher(put(tmp_path, zephyr("[3] > [2] > [1]", texts=["a", "b", "a"])))
    assert order(frame) == ["a", "b"] and frame.sort_values("shown")["text"].tolist() == ["a", "b"]


@pytest.mark.parametrize(
    "record, words",
    [
        (zephyr(again="blue fox"), "the prompt has two queries, 'red fox' and 'blue fox"),
        (zephyr(texts=[*TEXTS[:3], "dogs\n[5] cats"]), "says 4 passages, and 5 lines begin with their numbers"),
        (zephyr(""), "the teacher's order names none of the 4 passages"),
        (zephyr("[9]"), "names none of the 4"),
        ({"id": 1, "conversations": [{"value": "x"}]}, "conversations end in"),
        ({"id": 1, "conversations": [{"value": "x"}, {"value": "[1]"}]}, "the prompt is not rank_llm's"),
        (zephyr() | {"conversations": "x"}, "no list in conversations"),
        (pe_rank(again="blue"), "two queries"),
        (pe_rank() | {"ranking": [1, 2]}, "has 8 extra_texts for 2 numbers in ranking; wanted 2, or 4"),
        (pe_rank() | {"ranking": ["1"] * 4}, "whole numbers in ranking"),
        (pe_rank() | {"messages_wo_content": []}, "no turn of messages_wo_content"),
        (rank_gpt() | {"query": 3}, "has no text in query"),
        (rank_gpt() | {"retrieved_passages": [{"docid": 1}]}, "passage 1 has no text in text"),
        (rank_gpt() | {"retrieved_passages": ["x"]}, "passage 1 is a str"),
        ({"qid": "1", "query": "x"}, "has none of conversations, extra_texts, retrieved_passages"),
        (zephyr(id=[]), "has id"),
    ],
)
def test_a_bad_line_is_named(tmp_path, record, words):
    with pytest.raises(ValueError, match=f"teacher.jsonl, line 2.*{words}"):
        read_teacher(put(tmp_path, zephyr(), record))


@pytest.mark.parametrize(
    "content, words",
    [
        ('["[1]", "[2]"]', "holds 2 orders and .* 1 records"),
        ("[]", "line 1 has no order"),
        ('{"a": 1}', "not a JSON array of texts"),
        ("[1", "not valid JSON, or is cut short"),
    ],
)
def test_permutations_that_do_not_fit_their_records_are_refused(tmp_path, content, words):
    (tmp_path / "orders.json").write_text(content)
    with pytest.raises(ValueError, match=words):
        read_teacher(put(tmp_path, rank_gpt()), tmp_path / "orders.json")


def test_files_without_lists_and_orders_for_other_shapes_are_refused(tmp_path):
    (tmp_path / "orders.json").write_text('["[1]"]')
    with pytest.raises(ValueError, match="is for RankGPT's records"):
        read_teacher(put(tmp_path, zephyr()), tmp_path / "orders.json")
    with pytest.raises(ValueError, match="holds no lists"):
        read_teacher(put(tmp_path))
    with pytest.raises(ValueError, match="read it by read_teacher"):
        read_run(put(tmp_path, zephyr()))


def test_a_student_learns_the_order_that_the_teacher_gave_to_what_it_was_shown(tmp_path, cross_encoder_folder):
    taught = read_teacher(put(tmp_path, zephyr(), zephyr(id="8")))
    student = CrossEncoder(str(cross_encoder_folder), device="cpu")
    learns = Distil(student, taught, steps=1, batch_size=2, micro_batch=2, verbose=False)
    learns.fit(taught.assign(rank=taught["shown"]))
    assert len(learns.log) == 1
    path = put(tmp_path, rank_gpt(), rank_gpt(query="b"))
    (tmp_path / "orders.json").write_text(json.dumps(["[2] > [4] > [1] > [3]"] * 2))
    few = ["--set", "steps=1", "--set", "batch_size=2", "--set", "micro_batch=2", "--device", "cpu", "--depth", "3"]
    for learned in (["--order"], ["--teacher", tmp_path / "orders.json"]):
        words = ["train", "--reranker", "cross-encoder", "--model", cross_encoder_folder, "--input", path, *learned]
        assert main([*map(str, words), *few, "--output", str(tmp_path / "out")]) == 0


def test_permutations_of_ids_are_a_run(tmp_path):
    record = {"qid": "3", "initial_list": ["1", "2", "4"], "final_list": ["4", "1", "2"]}
    assert read_run(put(tmp_path, record)).to_dict("list") == {
        "qid": ["3"] * 3, "docno": ["4", "1", "2"], "score": [0.0, -1.0, -2.0], "rank": [0, 1, 2],
    }  # fmt: skip
    with pytest.raises(ValueError, match="line 1 has no list of docnos in final_list"):
        read_run(put(tmp_path, record | {"final_list": "4"}))


def test_gpt4os_public_permutations_are_read(shared):
    run = read_run(SHARED / "msmarco_gpt4o_perm_ids" / "perm.jsonl.gz")
    assert run["qid"].nunique() == 1_000 and len(run) == 100_000
