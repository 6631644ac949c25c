"""training.data: targets from labels and teachers, samples, and files with runs, qrels and questions."""

import gzip
import json
import random
from collections import Counter

import pandas as pd
import pyterrier as pt
import pytest
from conftest import GOLDEN, write_jsonl

from pyterrier_lit.frames import rankings
from pyterrier_lit.training import data

COLUMN_SETS = [{"text": str, "target": float}]


@pytest.fixture
def candidates():
    return pd.DataFrame(
        [("q1", "a", f"d{i}", f"text {i}", 9.0 - i, i) for i in range(5)] + [("q2", "b", "d1", "text 1", 1.0, 0)],
        columns=["qid", "query", "docno", "text", "score", "rank"],
    )


def targets(frame):
    return dict(zip(frame.docno, frame.target, strict=True))


def test_labels_are_targets_and_what_is_not_judged_is_worth_nothing(candidates):
    qrels = pd.DataFrame({"qid": ["q1", "q1", "q9"], "docno": ["d3", "d4", "d1"], "label": [2, -1, 3]})
    labelled = data.with_labels(candidates, qrels)
    assert targets(labelled[labelled.qid == "q1"]) == {"d0": 0, "d1": 0, "d2": 0, "d3": 2, "d4": -1}
    assert "target" not in candidates
    integers = candidates.assign(qid=candidates.qid.str[1:].astype(int))
    judged = qrels.assign(qid=qrels.qid.str[1:])
    assert data.with_labels(integers, judged).target.tolist() == labelled.target.tolist()


@pytest.mark.parametrize(
    "qrels, words",
    [(None, "no labels"), (pd.DataFrame({"qid": ["x"], "docno": ["d1"], "label": [1]}), "none of the 6 passages")],
)
def test_without_labels_the_error_says_so(candidates, qrels, words):
    with pytest.raises(ValueError, match=words):
        data.with_labels(candidates, qrels)


def test_a_teacher_is_a_transformer_a_run_a_file_or_the_order_that_comes(candidates, tmp_path):
    longest_last = pt.apply.doc_score(lambda row: int(row["docno"][1:]))
    expected = {"d0": 0.0, "d1": 1.0, "d2": 2.0, "d3": 3.0, "d4": 4.0}
    one = candidates[candidates.qid == "q1"]
    assert targets(data.with_teacher(one, longest_last)) == expected
    run = longest_last(one)
    assert targets(data.with_teacher(one, run)) == expected
    ranks = targets(data.with_teacher(one, run.drop(columns="score")))
    assert sorted(ranks, key=ranks.get) == sorted(expected, key=expected.get)
    pt.io.write_results(run, str(tmp_path / "teacher.run"), format="trec")
    assert targets(data.with_teacher(one, tmp_path / "teacher.run")) == expected
    incoming = targets(data.with_teacher(one, None))
    assert sorted(incoming, key=incoming.get) == ["d4", "d3", "d2", "d1", "d0"]
    incoming = targets(data.with_teacher(one.drop(columns="rank").assign(score=[1, 5, 2, 4, 3]), None))
    assert sorted(incoming, key=incoming.get) == ["d0", "d2", "d4", "d3", "d1"]


@pytest.mark.parametrize(
    "change, last",
    [
        (lambda frame: frame.astype({"rank": "str"}), 11),
        (lambda frame: frame.assign(rank=frame["rank"].astype(float).where(frame.docno != "d4")), 4),
        (lambda frame: frame.drop(columns="rank"), 11),
        (lambda frame: frame.drop(columns="rank").astype({"score": "str"}), 11),
        (lambda frame: frame.drop(columns=["rank", "score"]), 11),
        (lambda frame: frame.assign(rank=frame["rank"] * 3 + 1).sample(frac=1, random_state=0), 11),
        (lambda frame: frame.assign(rank=0), 11),
    ],
    ids=["text", "one missing", "scores", "scores as text", "neither", "rows shuffled", "all equal"],
)
def test_the_order_that_comes_is_that_which_a_reranker_reads(change, last):
    rows = [(qid, "a", f"d{i}", 12.0 - i, i) for qid in ("q1", "q2") for i in range(12)]
    frame = pd.DataFrame(rows, columns=["qid", "query", "docno", "score", "rank"])
    expected = [i for i in range(12) if i != last] + [last]
    for _, ranking in data.with_teacher(change(frame), None).groupby("qid"):
        assert targets(ranking) == {f"d{i}": -float(place) for place, i in enumerate(expected)}


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), None])
def test_a_target_that_is_not_finite_is_named(candidates, value):
    given = candidates[["qid", "docno", "score"]].astype({"score": object})
    given.loc[2, "score"] = value
    with pytest.raises(
        ValueError, match=r"no number for qid 'q1', docno 'd2' in the teacher's ranking, but (nan|-?inf)"
    ):
        data.with_teacher(candidates, given)
    with pytest.raises(ValueError, match=r"no number for qid 'q1', docno 'd2' in the qrels, but (nan|-?inf)"):
        data.with_labels(candidates, given.rename(columns={"score": "label"}))
    ranks = given.rename(columns={"score": "rank"})
    with pytest.raises(ValueError, match=r"no number for qid 'q1', docno 'd2' in the teacher's ranking"):
        data.with_teacher(candidates, ranks)


def test_numbers_as_text_are_numbers_and_words_are_named(candidates):
    run = candidates[["qid", "docno", "score"]].assign(score=[str(10 + i) for i in range(6)])
    assert targets(data.with_teacher(candidates.head(5), run)) == {f"d{i}": 10.0 + i for i in range(5)}
    with pytest.raises(ValueError, match=r"'score' of row 1 .qid 'q1', docno 'd1'. is 'high', not a number"):
        data.with_teacher(candidates, run.assign(score=["1", "high", "2", "3", "4", "5"]))


@pytest.mark.parametrize("column", ["qid", "docno", "label"])
def test_a_column_or_an_id_that_is_missing_is_named(candidates, column):
    qrels = pd.DataFrame({"qid": "q1", "docno": ["d1", "d2"], "label": 1})
    with pytest.raises(ValueError, match=f"no column '{column}' in the qrels, which has"):
        data.with_labels(candidates, qrels.drop(columns=column))
    if column != "label":
        with pytest.raises(
            ValueError, match=r"a row of the qrels has qid .*; wanted both. An id such as NA is kept by"
        ):
            data.with_labels(candidates, qrels.assign(**{column: [None, "d2"]}))


IDS = ["NA", "nan", "null", "None", '"x', "007", "7", "1e3", "True", "#1", "a,b"]


@pytest.mark.parametrize("name", ["run.txt", "run.jsonl", "run.json", "run.parquet"])
def test_ids_are_text_in_every_file(tmp_path, name):
    path, rows = tmp_path / name, [(qid, docno, 20 - i) for qid in IDS[:4] for i, docno in enumerate(IDS)]
    records = [{"qid": qid, "docno": docno, "score": score} for qid, docno, score in rows]
    if name.endswith("parquet"):
        pd.DataFrame(records).to_parquet(path)
    elif name.endswith("txt"):
        path.write_text("".join(f"{qid} Q0 {docno} 1 {score} x\n" for qid, docno, score in rows))
    elif name.endswith("json"):
        path.write_text(json.dumps(records, indent=1))
    else:
        write_jsonl(path, records)
    run = data.read_run(path)
    assert {(r.qid, r.docno, r.score) for r in run.itertuples()} == set(rows) and len(run) == len(rows)
    frame = run.assign(query="q", text="t")
    assert data.with_teacher(frame, path).target.tolist() == run.score.tolist()


def test_ids_of_labels_and_questions_are_text(tmp_path):
    (tmp_path / "qrels").write_text("\ufeff" + "".join(f"{qid}\t0\t{qid}  {i}\r\n" for i, qid in enumerate(IDS)))
    qrels = data.read_qrels(tmp_path / "qrels")
    assert qrels.to_dict("list") == {"qid": IDS, "docno": IDS, "label": list(range(len(IDS)))}
    record = {"id": "NA", "question": "q", "answers": ["a"], "ctxs": [{"id": i, "text": "t"} for i in [*IDS, 5, None]]}
    questions = data.read_qa(write_jsonl(tmp_path / "qa.jsonl.gz", [record]))
    assert questions.docno.tolist() == [*IDS, "5", "0-12"] and set(questions.qid) == {"NA"}


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("run.txt", "1 Q0 d 1 2\n", r"run.txt, line 1 has 5 columns; wanted six"),
        ("run.txt", "1 Q0 d 1 2 x\n1 Q0 e 2 inf x\n", r"run.txt, line 2 has score 'inf'; wanted a number"),
        ("run.jsonl", '{"qid": null, "docno": "d", "score": 1}\n', r"run.jsonl, line 1 has qid None; wanted a string"),
        ("run.jsonl", '{"qid": 1.5, "docno": "d", "score": 1}\n', r"run.jsonl, line 1 has qid 1.5; wanted a string"),
        ("run.jsonl", '{"qid": 1, "docno": "d", "score": NaN}\n', r"run.jsonl, line 1 has score nan; wanted a number"),
        ("run.jsonl", '{"qid": 1, "docno": "d", "score": 1}\n{"qid": 1, "docno": "e"}', "line 1 has no score or rank"),
        ("run.json", '[{"qid": 1, "docno": "d", "score": 1}, 7]', r"run.json, item 2 holds a int, wanted an object"),
        ("run.json", '[{"qid": 1', r"run.json is not valid JSON, or is cut short"),
        ("run.txt", "", r"run.txt has no score or rank"),
        ("run.jsonl", "", r"run.jsonl has no score or rank"),
    ],
)  # fmt: skip
def test_what_is_no_run_is_named_with_its_line(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=words):
        data.read_run(tmp_path / name)


@pytest.mark.parametrize("line", ["1 0 d", "1 0 d x", "1 0 d 0.5", "1 0 d 1 2", "query-id corpus-id score"])
def test_what_is_no_judgement_is_named_with_its_line(tmp_path, line):
    (tmp_path / "qrels").write_text(f"1 0 d 1\n{line}\n")
    with pytest.raises(ValueError, match=r"qrels, line 2 is not a judgement; wanted four columns"):
        data.read_qrels(tmp_path / "qrels")


@pytest.mark.parametrize("ctxs", [["text"], [{"title": "t"}], [{"text": None}]])
def test_a_passage_of_a_question_without_a_text_is_named(tmp_path, ctxs):
    write_jsonl(tmp_path / "qa.jsonl", [{"question": "q", "answers": ["a"], "ctxs": ctxs}])
    with pytest.raises(ValueError, match=r"qa.jsonl, line 1: passage 0 of ctxs has no text"):
        data.read_qa(tmp_path / "qa.jsonl")


def test_passages_that_the_teacher_does_not_rank_are_left_out_aloud(candidates):
    run = candidates[candidates.docno != "d2"]
    with pytest.warns(UserWarning, match="1 of 6 passages are not in the teacher's ranking"):
        assert "d2" not in set(data.with_teacher(candidates, run).docno)
    with pytest.raises(ValueError, match="ranks none of the 6 passages"):
        data.with_teacher(candidates, run.assign(qid="other"))
    with pytest.raises(ValueError, match="no number for qid 'q1', docno 'd0'"):
        data.with_teacher(candidates, run.assign(score=float("nan")))


@pytest.mark.parametrize("case", json.loads((GOLDEN / "cross_encoder" / "rundataset.json").read_text()), ids=str)
def test_a_run_is_read_as_the_reference_reads_it(case):
    asked = case["arguments"]
    run = data.read_run(GOLDEN / "cross_encoder" / "toy.jsonl")
    run = run[run["rank"] < asked["depth"]]
    teacher = run if asked["targets"] == "score" else run.assign(score=asked["depth"] - run["rank"])
    found = rankings(data.with_teacher(run, teacher), COLUMN_SETS)
    assert len(found) == len(case["samples"])
    for sample, ranking in zip(case["samples"], found, strict=True):
        n = asked["sample_size"] if asked["sample_size"] > 0 else None
        picked = data.sample(ranking.columns["target"], n, asked["sampling_strategy"], random.Random(0))
        assert (ranking.qid, ranking.query) == (sample["query_id"], sample["query"])
        assert [ranking.columns["docno"][i] for i in picked] == sample["doc_ids"]
        assert [ranking.columns["text"][i] for i in picked] == sample["docs"]
        assert [ranking.columns["target"][i] for i in picked] == [value for (value,) in sample["targets"]]


@pytest.mark.parametrize("name", ["run.txt", "run.txt.gz", "run.jsonl", "run.jsonl.gz", "run.parquet"])
def test_runs_of_all_formats_are_one_run(tmp_path, name):
    rows = [
        ("7", "d1", 101 - 3, 3),
        ("7", "d2", 101 - 1, 1),
        ("7", "d3", 101 - 2, 2),
        ("10", "d1", 100, 1),
        ("7", "d2", 5, 9),
    ]
    path = tmp_path / name
    if name.endswith("parquet"):
        pd.DataFrame(rows, columns=["query_id", "docno", "score", "rank"]).to_parquet(path)
    else:
        lines = [json.dumps({"qid": int(q), "docno": d, "score": s, "rank": r}) for q, d, s, r in rows]
        if "txt" in name:
            lines = [f"{q} Q0 {d} {r} {s} rankzephyr" for q, d, s, r in rows]
        with (gzip.open if name.endswith("gz") else open)(path, "wt") as file:
            file.write("\n".join(lines) + "\n")
    assert data.read_run(path).to_dict("list") == {
        "qid": ["10", "7", "7", "7"],
        "docno": ["d1", "d2", "d3", "d1"],
        "score": [100.0, 100.0, 99.0, 98.0],
        "rank": [0, 0, 1, 2],
    }


def test_a_run_without_scores_has_those_of_its_ranks(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text('{"qid": "1", "docno": "b", "rank": 2}\n{"qid": "1", "docno": "a", "rank": 1}\n')
    assert data.read_run(path).docno.tolist() == ["a", "b"]
    path.write_text('{"qid": "1", "docno": "b"}\n')
    with pytest.raises(ValueError, match=r"run\.jsonl, line 1 has no score or rank"):
        data.read_run(path)
    path.write_text('{"qid": "1", "docno": "b"\n')
    with pytest.raises(ValueError, match=r"run\.jsonl, line 1 is not valid JSON, or is cut short"):
        data.read_run(path)


def test_a_ranking_of_rank_llm_is_a_teacher(tmp_path):
    candidates = [{"docid": docid, "score": 1.0, "doc": {"text": "x"}} for docid in ("b", "a")]
    path = tmp_path / "rank_zephyr.json"
    path.write_text(json.dumps([{"query": {"qid": "1", "text": "who?"}, "candidates": candidates}], indent=2))
    run = data.read_run(path)
    assert run[["qid", "query", "docno", "text", "rank"]].values.tolist() == [
        ["1", "who?", "b", "x", 0],
        ["1", "who?", "a", "x", 1],
    ]


def test_questions_are_read_with_their_answers(tmp_path):
    record = {
        "question": "who?",
        "answers": ["he", "she"],
        "ctxs": [{"id": 5, "title": "T", "text": "x"}, {"text": "y"}, {"docid": "d", "text": "z"}],
    }
    (tmp_path / "qa.jsonl").write_text(json.dumps(record) + "\n")
    frame = data.read_qa(tmp_path / "qa.jsonl")
    assert frame.to_dict("records") == [
        {"qid": "0", "query": "who?", "docno": "5", "text": "T x", "answers": ["he", "she"], "rank": 0},
        {"qid": "0", "query": "who?", "docno": "0-1", "text": "y", "answers": ["he", "she"], "rank": 1},
        {"qid": "0", "query": "who?", "docno": "d", "text": "z", "answers": ["he", "she"], "rank": 2},
    ]
    (tmp_path / "qa.json").write_text(json.dumps([record, record | {"answers": []}]))
    with pytest.raises(ValueError, match=r"qa\.json, item 2: it has no answers"):
        data.read_qa(tmp_path / "qa.json")


def samples(how, n, values, times=400):
    return [data.sample(values, n, how, random.Random(i)) for i in range(times)]


def test_samples_are_what_their_names_say():
    values = [0, 1, 0, 0, 2, 0, 0, 0, 0, 0]
    assert samples("top", 3, values, 1) == [[0, 1, 2]]
    assert all(sampled[:2] == [0, 1] and len(set(sampled)) == 5 for sampled in samples("top_and_random", 5, values))
    uniform = Counter(i for sampled in samples("random", 3, values) for i in sampled)
    assert max(uniform.values()) < 1.5 * min(uniform.values())
    weighted = Counter(i for sampled in samples("log_random", 3, values) for i in sampled)
    assert weighted[0] > 1.5 * weighted[9]
    for sampled in samples("single_relevant", 4, values):
        assert sampled[0] in (1, 4) and not {1, 4} & set(sampled[1:]) and len(sampled) == 4
    assert {sampled[0] for sampled in samples("single_relevant", 4, values)} == {1, 4}
    with pytest.raises(ValueError, match=r"single_relevant.*positive target.*highest of these 2 targets is -1\.0"):
        samples("single_relevant", 4, [-1.0, -2.0])


@pytest.mark.parametrize("how", data.SAMPLERS)
def test_a_short_list_is_taken_whole(how):
    assert sorted(data.sample([1, 0, 0], 8, how, random.Random(0))) == [0, 1, 2]
    assert sorted(data.sample([1, 0, 0], None, how, random.Random(0))) == [0, 1, 2]


def test_an_unknown_sampling_is_named():
    with pytest.raises(ValueError, match="sampling='best'; wanted one of 'top', 'random'"):
        data.sample([1, 0], 1, "best", random.Random(0))


def test_a_window_is_shown_in_order_or_shuffled_and_ranked_by_targets():
    values = [3.0, 9.0, 1.0, 9.0, 5.0]
    for seed in range(50):
        shown, order = data.window(values, 2, 4, 0.0, random.Random(seed))
        assert shown == sorted(set(shown)) and 2 <= len(shown) <= 4
        best = [shown[position] for position in order]
        assert best == sorted(shown, key=lambda i: (-values[i], i))
    shuffled = [data.window(values, 5, 5, 1.0, random.Random(seed))[0] for seed in range(20)]
    assert len({tuple(shown) for shown in shuffled}) > 10
    assert {len(data.window(values, 2, 4, 0.5, random.Random(seed))[0]) for seed in range(50)} == {2, 3, 4}
