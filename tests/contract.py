"""What every reranker promises. The test class of a reranker inherits these tests from Contract."""

import copy
import pickle
import re
from concurrent.futures import ThreadPoolExecutor

import pandas as pd
import pyterrier as pt
import pytest
import torch
from pyterrier.measures import RR, nDCG

TOLERANCE = 2e-5


def by_docno(result):
    return {(row.qid, row.docno): row.score for row in result.itertuples()}


def assert_same_scores(left, right):
    left, right = by_docno(left), by_docno(right)
    assert left.keys() == right.keys()
    assert max(abs(left[key] - right[key]) for key in left) < TOLERANCE


def many(n, qid="q1"):
    return pd.DataFrame(
        {
            "qid": qid,
            "query": "some words",
            "docno": [f"d{i}" for i in range(n)],
            "text": [f"passage {i} " + "ab" * (i % 40) for i in range(n)],
        }
    )


class Contract:
    """Requires two fixtures. `reranker` is a small working reranker. `make(model=..., ...)` builds such a reranker with
    other arguments."""

    def test_rows_columns_and_the_callers_frame_are_untouched(self, reranker, frame):
        before = frame.copy(deep=True)
        out = reranker(frame)
        pd.testing.assert_frame_equal(frame, before)
        kept = ["qid", "query", "docno", "text", "title", "extra"]
        pd.testing.assert_frame_equal(out[kept], frame[kept].reset_index(drop=True))
        assert sorted(out.columns) == sorted(frame.columns)
        assert by_docno(out) != by_docno(frame)

    def test_any_index_gives_the_same_result(self, reranker, frame):
        expected = reranker(frame)
        for index in (range(7), [0] * 7, pd.MultiIndex.from_tuples([("x", i) for i in range(7)])):
            pd.testing.assert_frame_equal(reranker(frame.set_axis(index)), expected)

    def test_ranks_start_at_0_and_follow_the_score(self, reranker, frame):
        for _, ranking in reranker(frame).groupby("qid"):
            ranking = ranking.sort_values("rank")
            assert ranking["rank"].tolist() == list(range(len(ranking)))
            assert ranking["score"].is_monotonic_decreasing
            assert ranking["score"].dtype == "float64"

    def test_an_empty_frame_keeps_its_columns_and_loads_no_weights(self, make, frame):
        out = make(model="no/such-model")(frame.head(0))
        assert len(out) == 0
        assert list(out.columns) == ["qid", "query", "docno", "text", "score", "title", "extra", "rank"]
        assert (out["score"].dtype, out["rank"].dtype) == ("float64", "int64")
        assert list(make(model="no/such-model")(frame.head(0)[["qid", "query", "docno", "text"]]).columns)[-2:] == [
            "score",
            "rank",
        ]

    def test_one_passage(self, reranker, frame):
        out = reranker(frame.head(1))
        assert out["rank"].tolist() == [0]
        assert out["docno"].tolist() == ["d6"]

    def test_a_thousand_passages(self, reranker):
        assert sorted(reranker(many(1000))["rank"]) == list(range(1000))

    def test_rank_and_score_need_not_be_there(self, reranker, frame):
        bare = frame.sort_values(["qid", "rank"])[["qid", "query", "docno", "text"]]
        assert_same_scores(reranker(bare), reranker(frame))

    def test_the_result_does_not_depend_on_the_batch_size(self, reranker, make, frame):
        for max_tokens in (1, 100, 1_000_000):
            assert_same_scores(make(max_tokens=max_tokens)(frame), reranker(frame))

    def test_the_result_does_not_depend_on_the_order_of_the_rows(self, reranker, frame):
        expected = reranker(frame).set_index(["qid", "docno"])["rank"].to_dict()
        for seed in range(3):
            shuffled = reranker(frame.sample(frac=1, random_state=seed))
            assert shuffled.set_index(["qid", "docno"])["rank"].to_dict() == expected

    def test_the_result_does_not_depend_on_the_other_queries(self, reranker, frame):
        alone = pd.concat([reranker(frame[frame.qid == qid]) for qid in ("q1", "q2")])
        assert_same_scores(alone, reranker(frame))
        assert_same_scores(reranker(pd.concat([frame, many(50, "q3")])).query("qid != 'q3'"), reranker(frame))

    @pytest.mark.parametrize("column", ["qid", "docno", "query", "text"])
    def test_a_missing_column_is_named_before_weights_load(self, make, frame, column):
        with pytest.raises(pt.validate.InputValidationError, match=column):
            make(model="no/such-model")(frame.drop(columns=column))

    def test_another_text_field(self, reranker, make, frame):
        renamed = frame.rename(columns={"text": "body"})
        with pytest.raises(pt.validate.InputValidationError):
            reranker(renamed)
        assert_same_scores(make(text_field="body")(renamed), reranker(frame))

    @pytest.mark.parametrize("column, value", [("text", None), ("text", float("nan")), ("text", 3), ("query", 3)])
    def test_what_is_not_a_string_is_named_with_qid_and_docno(self, make, frame, column, value):
        frame[column] = frame[column].astype(object)
        frame.iloc[3, frame.columns.get_loc(column)] = value
        with pytest.raises(TypeError, match=rf"'{column}'.*q1.*d2"):
            make(model="no/such-model")(frame)

    def test_a_row_without_a_query_has_that_of_its_qid(self, reranker, make, frame):
        first = pt.Transformer.from_df(frame)
        left, right = first % 2, pt.Transformer.from_df(frame[frame["rank"] > 0])
        both = (left + right)(frame[["qid", "query"]].drop_duplicates())
        both["text"] = both["docno"].map(frame.set_index("docno")["text"])
        assert 0 < both["query"].isna().sum() < len(both)
        filled = both.assign(query=both["qid"].map({"q1": "what is a cat?", "q2": "red fox"}))
        assert_same_scores(reranker(both), reranker(filled))
        with pytest.raises(TypeError, match=r"'query' of row .*q2.* is nan"):
            make(model="no/such-model")(both.assign(query=both["query"].where(both["qid"] != "q2")))
        with pytest.raises(ValueError, match="qid 'q1' has two queries"):
            make(model="no/such-model")(both.assign(query=both["query"].where(both["docno"] != "d2", "dogs")))

    def test_whitespace_and_unicode_texts_work(self, reranker, frame):
        texts = ["", "  \n\t", "日本語", "naïve ☃ 🦊", "a\x00b", "\u202eright to left", "ﬁ"]
        assert len(reranker(frame.assign(text=texts))) == 7

    def test_special_tokens_in_a_text_break_nothing(self, reranker, frame):
        texts = [
            "[SEP] [CLS] [PAD] [MASK]",
            "</s>",
            "<PLACEHOLDER> <RANK>",
            "[3]",
            "Relevance Ranking:",
            "<unk><pad>",
            "[PAD]",
        ]
        for _, ranking in reranker(frame.assign(text=texts, query="[SEP] </s> [1]")).groupby("qid"):
            assert sorted(ranking["rank"]) == list(range(len(ranking)))

    def test_nan_from_the_model_raises(self, reranker, frame):
        network = copy.deepcopy(reranker.load().network)
        for parameter in network.parameters():
            torch.nn.init.constant_(parameter, float("nan"))
        broken = copy.copy(reranker)
        held = copy.copy(reranker.load())
        held.network = network
        broken.hold(held)
        with pytest.raises(ValueError, match=r"gave nan for (qid|query) '(q1|q2|what is a cat\?|red fox)'"):
            broken(frame)
        with pytest.raises(ValueError, match="gave nan for query 'a cat', docno '0'"):
            broken.rank("a cat", ["x", "y"])

    def test_autocast_around_a_call_changes_nothing(self, reranker, frame):
        expected = reranker(frame)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            pd.testing.assert_frame_equal(reranker(frame), expected)

    def test_torchs_default_dtype_changes_nothing(self, reranker, frame):
        expected, before = reranker(frame), torch.get_default_dtype()
        try:
            for dtype in (torch.bfloat16, torch.float64):
                torch.set_default_dtype(dtype)
                pd.testing.assert_frame_equal(reranker(frame), expected)
        finally:
            torch.set_default_dtype(before)

    def test_strict_sort_gives_rows_by_rank(self, reranker, frame, monkeypatch):
        expected = reranker(frame).sort_values(["qid", "rank"])["docno"].tolist()
        monkeypatch.setattr(pt.model, "STRICT_SORT", True)
        assert reranker(frame)["docno"].tolist() == expected

    def test_lists_that_are_strings_are_refused(self, reranker):
        for queries, passages in (("a cat", [["x"]]), (["a cat"], ["a passage"])):
            with pytest.raises(TypeError, match=r"(queries|passages\[0\])( is a string|=).*wanted"):
                reranker.score(queries, passages)

    def test_rank_gives_the_passages_as_sentence_transformers_does(self, reranker, frame):
        passages = frame[frame.qid == "q1"].sort_values("rank").text.tolist()
        ranked = reranker.rank("what is a cat?", passages, return_documents=True)
        out = reranker(frame[frame.qid == "q1"]).sort_values("rank")
        assert [row["text"] for row in ranked] == out.text.tolist()
        assert [row["score"] for row in ranked] == pytest.approx(out.score.tolist(), abs=TOLERANCE)
        assert [passages[row["corpus_id"]] for row in ranked] == out.text.tolist()
        shorter = reranker.rank("what is a cat?", passages, top_k=2)
        assert [(row["corpus_id"], set(row)) for row in shorter] == [
            (row["corpus_id"], {"corpus_id", "score"}) for row in ranked[:2]
        ]
        assert reranker.rank("what is a cat?", []) == []

    def test_rank_names_what_is_no_string_and_reads_half_a_surrogate_pair(self, reranker):
        with pytest.raises(TypeError, match=r"passages\[0\]\[1\] is None; wanted a string"):
            reranker.rank("a cat", ["a", None])
        with pytest.raises(TypeError, match=r"queries\[0\] is 3; wanted a string"):
            reranker.rank(3, ["a"])
        with pytest.raises(TypeError, match=r"passages\[0\] is a string"):
            reranker.rank("a cat", "a passage")
        assert len(reranker.rank("a \ud83d cat", ["\udc00", "b"])) == 2

    def test_arguments_of_other_libraries_are_answered_in_words(self, make, frame):
        with pytest.raises(TypeError, match=r"has no batch_size.*32 of 256 are max_tokens=8192"):
            make(batch_size=8)
        with pytest.raises(TypeError, match=r"text_field=\['title', 'text'\]; wanted the name of one column"):
            make(text_field=["title", "text"])(frame)
        assert len(make(dtype="fp32")(frame)) == len(frame)

    def test_a_cutoff_of_zero_compiles(self, reranker, frame):
        pipeline = (pt.Transformer.from_df(frame) >> reranker % 0).compile()
        assert len(pipeline(frame[["qid", "query"]].drop_duplicates())) == 0

    def test_inspection(self, reranker):
        assert pt.inspect.transformer_inputs(reranker) == [["qid", "docno", "query", "text"]]
        columns = ["qid", "query", "docno", "text", "title"]
        assert pt.inspect.transformer_outputs(reranker, columns) == [*columns, "score", "rank"]
        assert pt.inspect.transformer_apply_attributes(reranker, verbose=True).verbose is True
        assert "<div" in pt.schematic.draw(pt.RankCutoff(100) >> reranker)

    def test_every_argument_is_an_attribute(self, reranker):
        assert all(hasattr(reranker, attribute.name) for attribute in pt.inspect.transformer_attributes(reranker))

    def test_repr_rebuilds_it_and_does_not_change_when_weights_load(self, make, frame):
        reranker = make(max_tokens=77, verbose=True)
        before = repr(reranker)
        rebuilt = eval(before, {type(reranker).__name__: type(reranker)})
        values = [
            [attribute.value for attribute in pt.inspect.transformer_attributes(it)] for it in (rebuilt, reranker)
        ]
        assert values[0] == values[1]
        reranker(frame)
        assert repr(reranker) == before

    def test_pipelines(self, reranker, frame):
        first = pt.Transformer.from_df(frame)
        assert len((first >> reranker)(frame[["qid", "query"]].drop_duplicates())) == 7
        assert len((first % 2 >> reranker % 1).search("red fox", qid="q2")) == 1
        assert len((first >> reranker).compile()(frame[["qid", "query"]].drop_duplicates())) == 7
        features = (first >> (reranker**reranker))(frame[["qid", "query"]].drop_duplicates())["features"]
        assert all(len(pair) == 2 and pair[0] == pair[1] for pair in features)

    def test_experiment(self, reranker, frame):
        first = pt.Transformer.from_df(frame)
        qrels = pd.DataFrame({"qid": ["q1", "q2"], "docno": ["d2", "d6"], "label": [1, 1]})
        topics = frame[["qid", "query"]].drop_duplicates()
        table = pt.Experiment(
            [first, first >> reranker],
            topics,
            qrels,
            [nDCG @ 10, RR @ 10, "mrt"],
            names=["first", "reranked"],
            plan="tree",
            verbose=False,
        )
        ranks = reranker(frame).set_index("docno")["rank"]
        assert table["RR@10"].tolist()[1] == pytest.approx(((1 / (1 + ranks["d2"])) + 1 / (1 + ranks["d6"])) / 2)

    def test_copies_and_pickles_score_alike_before_and_after_use(self, make, frame):
        fresh = make()
        early = [copy.copy(fresh), pickle.loads(pickle.dumps(fresh))]
        expected = fresh(frame)
        for it in [*early, copy.copy(fresh), copy.deepcopy(fresh), pickle.loads(pickle.dumps(fresh))]:
            assert_same_scores(it(frame), expected)

    def test_two_threads_may_share_one_reranker(self, make, frame):
        shared = make()
        frames = [frame[frame.qid == "q1"], frame[frame.qid == "q2"]] * 4
        with ThreadPoolExecutor(4) as pool:
            for given, out in zip(frames, pool.map(shared, frames), strict=True):
                assert_same_scores(out, make()(given))

    def test_a_changed_model_is_read_again(self, make, frame):
        reranker = make()
        reranker(frame)
        reranker.model = "no/such-model"
        with pytest.raises(FileNotFoundError, match="no/such-model"):
            reranker(frame)

    @pytest.mark.parametrize("device", ["toaster", "cuda:99"])
    def test_an_unknown_device_is_named(self, make, frame, device):
        with pytest.raises(ValueError, match=device):
            make(device=device)(frame)

    def test_an_unknown_dtype_is_named(self, make, frame):
        with pytest.raises(ValueError, match="int7"):
            make(dtype="int7")(frame)

    def test_progress_is_shown_only_when_asked(self, make, frame, capfd):
        name = type(make()).__name__
        make(verbose=False)(frame)
        assert name not in capfd.readouterr().err
        make(verbose=True)(frame)
        assert re.search(rf"{name}: 100%", capfd.readouterr().err)
