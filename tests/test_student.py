"""experiments/student.py: what a student that begins as a bi-encoder learns from."""

import pandas as pd
import pytest
from conftest import SHARED

if not (SHARED / "load.py").exists():
    pytest.skip("needs the reference data in ../shared/data (MS MARCO licence)", allow_module_level=True)

import student


def test_a_teachers_scores_have_mean_0_and_deviation_1_in_each_query():
    scores = student.standard(pd.Series([1.0, 3.0, 10.0, 10.0, 40.0]), pd.Series(list("aabbb")))
    assert scores.groupby(list("aabbb")).mean().tolist() == pytest.approx([0, 0])
    assert scores.groupby(list("aabbb")).std().tolist() == pytest.approx([1, 1])
    assert scores.tolist()[:2] == pytest.approx([-(0.5**0.5), 0.5**0.5])


def test_a_query_is_there_as_often_as_its_collection_says():
    lists = pd.DataFrame(
        {"qid": ["1", "1", "2", "3"], "docno": list("abab"), "of": ["dl22", "dl22", "dl19", "questions"]}
    )
    counts = student.repeated(lists).qid.str.partition("#")[0].value_counts()
    assert counts.to_dict() == {"1": 2 * student.TIMES["dl22"], "2": student.TIMES["dl19"], "3": 1}
    assert not student.repeated(lists).duplicated(["qid", "docno"]).any()


def test_the_orders_of_language_models_agree_with_judgements_and_hold_no_text_of_the_test(shared):
    import ir_measures

    lists = student.of_language_models()
    assert not set(lists.text) & set(shared.docs("dl21").text)
    qrels = shared.qrels("dl19").rename(columns={"qid": "query_id", "docno": "doc_id", "label": "relevance"})
    run = lists.rename(columns={"qid": "query_id", "docno": "doc_id"})
    assert ir_measures.calc_aggregate([ir_measures.nDCG @ 10], qrels, run)[ir_measures.nDCG @ 10] > 0.7
