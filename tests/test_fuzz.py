"""Random inputs: frames, the JSON files of checkpoints, and texts for each parser. `make fuzz` runs 15,000 per test.

Each input must give a valid result or a documented error.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyterrier as pt
import pytest
from conftest import RERANKERS
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pyterrier_lit.frames import rerank
from pyterrier_lit.order import complete, parse, scores

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))

import corpora

each = pytest.mark.parametrize("cases", [40, pytest.param(15_000, marks=pytest.mark.slow)])
text = st.text(st.characters(codec="utf-8"), max_size=20)
any_text = st.one_of(text, st.text(st.characters(), max_size=5))  # the second one also gives halves of surrogate pairs


def fuzz(cases, strategy, check):
    """Call check(example) for this many random examples."""
    quick = {"database": None, "phases": [Phase.generate], "suppress_health_check": list(HealthCheck)}  # no shrinking
    settings(max_examples=cases, **quick)(given(strategy)(check))()


# Frames

odd = st.one_of(any_text, st.none(), st.floats(), st.integers(), st.booleans(), st.binary(max_size=3), st.just(pd.NA))
number = st.one_of(st.floats(), st.integers(-5, 5), st.integers(), st.none(), st.sampled_from(["1", "x", "-2.5", ""]))
rows = st.fixed_dictionaries(
    {
        "qid": st.one_of(st.sampled_from(["1", "2"]), st.sampled_from(["1", "2", None, 1, 2.5])),
        "query": st.one_of(st.just("same"), st.just("same"), st.just("same"), odd),
        "docno": st.one_of(text, text, text, odd),
        "text": st.one_of(any_text, any_text, any_text, odd),
        "rank": number,
        "score": number,
        "other": odd,
    }
)
frames = st.tuples(
    st.lists(rows, max_size=6),
    st.sets(st.sampled_from(["qid", "query", "docno", "text", "rank", "score", "other"]), max_size=2),
    st.sampled_from(["object", "inferred"]),
)


@each
def test_any_frame_is_ranked_or_refused_in_words(cases):
    def check(drawn):
        records, dropped, dtype = drawn
        columns = [column for column in rows_columns if column not in dropped]
        frame = pd.DataFrame(
            [[record[column] for column in columns] for record in records], columns=columns, dtype=object
        )
        frame = frame if dtype == "object" else frame.infer_objects()
        before = frame.copy(deep=True)
        try:
            out = rerank(
                frame,
                lambda queries, columns: {"score": [[float(len(text)) for text in texts] for texts in columns["text"]]},
                [{"text": str}],
            )
        except pt.validate.InputValidationError as error:
            assert any(column in str(error) for column in dropped)
            return
        except (TypeError, ValueError) as error:
            assert "row " in str(error) or "has two queries" in str(error), error
            return
        pd.testing.assert_frame_equal(frame, before)
        assert len(out) == len(frame)
        for _, ranking in out.groupby("qid"):
            best_first = ranking.sort_values("rank")
            assert best_first["rank"].tolist() == list(range(len(ranking)))
            assert best_first["score"].is_monotonic_decreasing
            assert np.isfinite(ranking["score"]).all()

    rows_columns = ["qid", "query", "docno", "text", "rank", "score", "other"]
    fuzz(cases, frames, check)


# Text that a model wrote, and orders


@each
def test_any_text_parses_to_a_permutation_that_its_scores_give_back(cases):
    written = st.one_of(
        any_text, st.lists(st.sampled_from([*"0123456789[]> ,", "[1] > ", "٣", "²"]), max_size=30).map("".join)
    )

    def check(drawn):
        answer, n = drawn
        order = parse(answer, n)
        assert sorted(order) == list(range(n))
        values = scores(order)
        assert sorted(range(n), key=lambda position: -values[position]) == order
        assert complete(order, n) == order

    fuzz(cases, st.tuples(written, st.integers(0, 30)), check)


# PE-Rank's prompts


@each
def test_any_texts_make_a_prompt_with_one_placeholder_a_passage(cases):
    prompter = RERANKERS["PERank"][0](str(RERANKERS["PERank"][1]), device="cpu").load().prompter
    special = sorted(prompter.tokenizer.get_added_vocab())
    hostile = st.lists(st.one_of(st.sampled_from([*special, *"<>/[]", "[1]", "{query}", "%s"]), text), max_size=5).map(
        "".join
    )

    def check(drawn):
        query, texts = drawn
        for shown in (texts, []):
            ids = prompter.ids([query], [shown], [len(texts)])[0]
            assert ids.count(prompter.placeholder) == len(texts)

    fuzz(cases, st.tuples(hostile, st.lists(hostile, min_size=1, max_size=3)), check)


# Files of a collection

MISSING = (
    "NULL",
    "null",
    "None",
    "NA",
    "<NA>",
    "N/A",
    "n/a",
    "#N/A",
    "NaN",
    "nan",
    "-NaN",
    "-nan",
)  # pt.io reads these docnos as missing values


@each
def test_runs_and_topics_are_read_as_they_were_written(cases, tmp_path):
    name = st.text(st.characters(codec="utf-8", exclude_categories=["Z", "C"]), min_size=1, max_size=8).filter(
        lambda name: name.strip('"#') == name and name not in MISSING
    )
    run = st.dictionaries(st.tuples(name, name), st.floats(-1e6, 1e6).map(lambda score: round(score, 3)), max_size=5)
    query = st.text(st.characters(codec="utf-8", exclude_characters="\n\r\t"), max_size=10)

    def check(drawn):
        ranked, topics = drawn
        lines = [f"{qid} Q0 {docno} 1 {score} tag\n" for (qid, docno), score in ranked.items()]
        (tmp_path / "run.txt").write_text("".join(lines), encoding="utf-8")
        (tmp_path / "queries.tsv").write_text("".join(f"{qid}\t{q}\n" for qid, q in topics.items()), encoding="utf-8")
        read = pt.io.read_results(str(tmp_path / "run.txt"))
        assert {(row.qid, row.docno): row.score for row in read.itertuples()} == ranked
        assert corpora.read_topics(tmp_path).values.tolist() == [list(topic) for topic in topics.items()]

    fuzz(cases, st.tuples(run, st.dictionaries(name, query, max_size=4)), check)


# Checkpoints

leaf = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 40), st.sampled_from([200, 300]), st.floats(), text,
    st.sampled_from(["bert", "t5", "electra", "mono", "embed_llama", "gelu", "linear", "sum", "absolute", "alibi"]),
)  # fmt: skip
junk = st.recursive(
    leaf, lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(text, inner, max_size=2))
)
REMOVED = "\0removed"


@each
@pytest.mark.parametrize("name", RERANKERS)
def test_any_config_loads_or_is_refused_in_words(cases, name, tmp_path):
    kind, folder, *_ = RERANKERS[name]
    copy = shutil.copytree(folder.parent, tmp_path / "copy") / folder.name
    files = {file: json.loads((copy / file).read_text()) for file in JSON if (copy / file).exists()}
    changes = st.sampled_from(sorted(files)).flatmap(
        lambda file: st.tuples(
            st.just(file),
            st.dictionaries(
                st.sampled_from(sorted(files[file])), st.one_of(junk, st.just(REMOVED)), min_size=1, max_size=3
            ),
        )
    )
    texts = ["a cat", "is an animal"]
    passages = {"docno": [["a", "b"]], "text": [texts]} if name == "PERank" else [texts]

    def check(drawn):
        file, change = drawn
        fields = {key: value for key, value in (files[file] | change).items() if value != REMOVED}
        (copy / file).write_text(json.dumps(fields))
        try:
            found = kind(str(copy), device="cpu").score(["what is a cat"], passages)
        except (ValueError, FileNotFoundError) as error:
            assert len(str(error)) > 20, error
        else:
            assert len(found[0]) == 2
        finally:
            (copy / file).write_text(json.dumps(files[file]))

    fuzz(cases, changes, check)


JSON = ("config.json", "tokenizer_config.json", "tokenizer.json")
