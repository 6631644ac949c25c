"""experiments/student.py: the training data of a student that begins as a bi-encoder."""

import pandas as pd
import pytest
from conftest import SHARED

if not (SHARED / "load.py").exists():
    pytest.skip("needs the reference data in ../shared/data (MS MARCO licence)", allow_module_level=True)

import student
import torch
import transformers


def test_a_teachers_scores_have_mean_0_and_deviation_1_in_each_query():
    scores = student.standard(pd.Series([1.0, 3.0, 10.0, 10.0, 40.0]), pd.Series(list("aabbb")))
    assert scores.groupby(list("aabbb")).mean().tolist() == pytest.approx([0, 0])
    assert scores.groupby(list("aabbb")).std().tolist() == pytest.approx([1, 1])
    assert scores.tolist()[:2] == pytest.approx([-(0.5**0.5), 0.5**0.5])


def test_lists_hold_no_passage_of_the_test(shared, tmp_path, monkeypatch):
    passages = pd.concat([shared.docs("dl21").head(3), shared.docs("dl19").head(3)], ignore_index=True)
    lists = passages.assign(qid="1", query="what", rank=range(6), score=0.5)
    monkeypatch.setattr(student, "of_language_models", lambda: lists)
    monkeypatch.setattr(student, "of_encoders", lambda: lists.head(0))
    kept = student.taught(tmp_path)
    assert kept.docno.tolist() == shared.docs("dl19").head(3).docno.tolist()
    assert student.taught(tmp_path).equals(kept)


def test_a_query_is_there_several_times_under_other_qids():
    lists = student.repeated(pd.DataFrame({"qid": ["1", "1", "2"], "docno": list("aba")}), 3)
    assert lists.groupby("qid").docno.apply("".join).to_dict() == {
        f"{q}#{i}": d for q, d in (("1", "ab"), ("2", "a")) for i in range(3)
    }


def test_the_lists_of_language_models_are_ranked_by_their_fused_score(shared):
    lists = student.of_language_models()
    for _, rows in lists.groupby("qid"):
        assert sorted(rows["rank"]) == list(range(len(rows)))
        assert rows.sort_values("rank").score.is_monotonic_decreasing
    assert not {qid.partition("#")[0] for qid in lists.qid} & set(student.held_out("dl19"))


def test_the_lists_of_encoders_hold_no_held_out_query_and_relevant_passages_come_first(shared, monkeypatch):
    columns = ["qid", "docno", "score", "rank", "query", "text"]
    monkeypatch.setattr(student, "retrieved", lambda asked, passages: pd.DataFrame(columns=columns))
    monkeypatch.setattr(student, "similarity", lambda queries, texts: [0.0] * len(texts))
    monkeypatch.setattr(student, "products", lambda frame: [0.0] * len(frame))
    lists = student.of_encoders()
    assert set(lists.qid.str.extract("#(.*)")[0]) == {"0", "1", "2"}
    cranfield = lists[lists.qid.str.startswith("cranfield")]
    qids = cranfield.qid.str.extract("cranfield(.*)#")[0]
    assert set(qids) == set(shared.topics("cranfield").qid) - set(student.held_out("cranfield"))
    judged = shared.qrels("cranfield").query("label > 0")
    relevant = pd.MultiIndex.from_frame(judged[["qid", "docno"]])
    found = pd.MultiIndex.from_arrays([qids, cranfield.docno]).isin(relevant)
    assert set(cranfield.score[found]) == {student.LABEL} and set(cranfield.score[~found]) == {0.0}


NAMES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "tree", "##s", ",", "river", "rivers", "s"]


@pytest.fixture
def tokenizer(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(NAMES) + "\n")
    return transformers.BertTokenizerFast(vocab=str(tmp_path / "vocab.txt"))


def test_words_with_the_same_stem_are_equal_and_other_pieces_are_not_words(tokenizer):
    found = [NAMES[i] for i in student.stems(tokenizer).tolist()]
    assert found == [*NAMES[:10], "river", "s"]


def test_rare_stems_are_important_and_punctuation_is_not(tokenizer):
    texts = ["the tree, the trees", "the tree", "the river and rivers", "the rivers", "the"]
    found = dict(zip(NAMES, student.idf(texts, student.stems(tokenizer), tokenizer).tolist(), strict=True))
    assert [found[name] for name in ("[CLS]", "[SEP]", ",")] == [0, 0, 0]
    assert 0 < found["the"] < found["tree"] == found["river"] == found["rivers"] < found["##s"]
    assert found["tree"] == pytest.approx(float(torch.log(torch.tensor(1 + 3.5 / 2.5))))
