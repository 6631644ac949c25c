"""training.stored: a student learns the same from a run in a file as from a frame; texts are looked up when needed."""

import gzip
import json
import pickle
import tracemalloc
import warnings
from collections.abc import Mapping
from functools import partial

import pandas as pd
import pyterrier as pt
import pytest
from conftest import RERANKERS, write_jsonl
from hypothesis import given as cases
from hypothesis import settings
from hypothesis import strategies as some
from pe import Encoder, Index, quietly
from test_training_states import Killed, equal, killed, learning, new, weights  # noqa: F401 - killed is a fixture

from pyterrier_lit import CrossEncoder
from pyterrier_lit.__main__ import main
from pyterrier_lit.frames import rankings
from pyterrier_lit.training import Distil, FineTune, StoredRun, data
from pyterrier_lit.training.pe_rank import RECIPES
from pyterrier_lit.training.trainer import Samples

COLUMN_SETS = [{"text": str, "target": float}]
LEARN_TEXTS = [name for name in RERANKERS if name != "LiT5Score"]  # LiT5Score learns from answers


@pytest.fixture
def rows():
    """Three queries with five passages each. The qids are not sorted."""
    return pd.DataFrame(
        [
            (qid, f"query {word}", f"d{word}{i}", f"text {word} {i}", 9.0 - i, i + 1)
            for qid, word in [("q2", "b"), ("q10", "ä"), ("q1", "c")]
            for i in range(5)
        ],
        columns=["qid", "query", "docno", "text", "score", "rank"],
    )


@pytest.fixture
def qrels():
    return pd.DataFrame({"qid": ["q2", "q10", "q1"], "docno": ["db3", "dä4", "dc2"], "label": [1, 2, 1]})


def written(frame, path):
    ranks = frame["rank"] if "rank" in frame else [1] * len(frame)
    lines = [f"{r.qid} Q0 {r.docno} {rank} {r.score} x\n" for r, rank in zip(frame.itertuples(), ranks, strict=True)]
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8") as file:
        file.writelines(lines)
    return path


def texts_of(frame):
    return dict(zip(frame.docno, frame.text, strict=True))


def run_of(frame, path, texts=None, **options):
    asked = frame[["qid", "query"]].drop_duplicates()
    return StoredRun(written(frame, path), asked, texts_of(frame) if texts is None else texts, **options)


def read(lists):
    return [(one.qid, one.query, {name: list(column) for name, column in one.columns.items()}) for one in lists]


# A stored run gives the same as a frame


@some.composite
def runs(draw):
    """Draw a frame and a teacher's run. The passages of a query may have any order in the frame. The teacher's run may
    lack rows of the frame, repeat rows, and have ties."""
    words = some.text("abäNA07\"#'", min_size=1, max_size=4)
    rows = []
    for qid in draw(some.lists(words, min_size=1, max_size=5, unique=True)):
        docnos = draw(some.lists(words, min_size=1, max_size=6, unique=True))
        ranks = draw(some.permutations(range(len(docnos))))
        rows += [(qid, f"q {qid}", d, f"t {d}", -float(r), r) for d, r in zip(docnos, ranks, strict=True)]
    frame = pd.DataFrame(rows, columns=["qid", "query", "docno", "text", "score", "rank"])
    again = pd.DataFrame(draw(some.lists(some.sampled_from(rows), min_size=1, max_size=40)), columns=frame.columns)
    scores = draw(some.lists(some.sampled_from([0.0, 1.0, 0.5]), min_size=len(again), max_size=len(again)))
    return frame, again.assign(score=scores)[["qid", "docno", "score"]]


def drawn(how, given, rng):
    """A training example from a list: the query, and three sampled texts with their targets."""
    positions = data.sample(given.columns["target"], 3, how, rng)
    return given.query, data.take(given.columns["text"], positions), [given.columns["target"][i] for i in positions]


@settings(max_examples=30, deadline=None)
@cases(case=runs(), seed=some.integers(0, 99), how=some.sampled_from(sorted({*data.SAMPLERS} - {"single_relevant"})))
def test_what_is_drawn_from_a_run_is_what_is_drawn_from_its_frame(tmp_path_factory, case, seed, how):
    frame, teacher = case
    folder = tmp_path_factory.mktemp("run")
    run = run_of(frame, folder / "run.txt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the warning that passages are left out
        pairs = [
            (data.with_teacher(frame, teaches), run.taught(teaches, "text"))
            for teaches in (None, teacher, written(teacher, folder / "teacher.gz"))
        ]
    if (teacher.drop_duplicates(["qid", "docno"]).score > 0).any():
        labels = teacher.rename(columns={"score": "label"})
        pairs.append((data.with_labels(frame, labels), run.labelled(labels)))
    for expected, found in pairs:
        expected, found = rankings(expected, COLUMN_SETS), found.lists(COLUMN_SETS, "text")
        assert read(found) == read(expected)
        kept, same = data.uneven(expected), data.uneven(found)
        assert read(same) == read(kept)
        if len(kept):
            samples = Samples(partial(drawn, how), kept, 12, seed)
            others = pickle.loads(pickle.dumps(Samples(partial(drawn, how), same, 12, seed)))
            assert [others[i] for i in range(12)] == [samples[i] for i in range(12)]


@pytest.mark.parametrize("name", LEARN_TEXTS)
def test_each_student_learns_the_same_from_a_run(name, rows, qrels, tmp_path):
    known, run = RERANKERS[name], run_of(rows, tmp_path / "run.txt")
    left, right = new(known), new(known)
    for student, given in ((left, rows), (right, run)):
        learning(student, FineTune).fit(given, qrels)
        learning(student, Distil, teacher=written(rows, tmp_path / "t.gz"), steps=1).fit(given)
    assert equal(weights(left), weights(right)) and not equal(weights(left), weights(new(known)))


@pytest.fixture
def same_passages(rows):
    """All queries have the same passages, each query in another order."""
    return (
        rows.assign(docno="d" + rows.docno.str[-1], text="passage " + rows.docno.str[-1])
        .iloc[[*range(5), 7, 5, 9, 8, 6, *range(14, 9, -1)]]
        .assign(rank=[1, 2, 3, 4, 5] * 3)
    )


WIDTH = 24  # the dimension of golden/pe_rank's vectors
SOURCES = {
    "encoder inside": lambda docnos: {},
    "encoder": lambda docnos: {"encoder": Encoder(WIDTH)},
    "index": lambda docnos: {"vectors": Index({d: [i == j for j in range(WIDTH)] for i, d in enumerate(docnos)})},
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"text_weight": 0.0, "batch_size": 4, "micro_batch": 2},
        {"lora": 2},
        {"recipe": "pe-rank-alignment", "batch_size": 4, "micro_batch": 2},
    ],
    ids=["text and vectors", "vectors", "lora", "alignment"],
)
def test_a_pe_rank_learns_the_same_from_a_run_by_each_recipe(source, settings, same_passages, tmp_path):
    if "lora" in settings:
        pytest.importorskip("peft", reason="needs peft, of the extra lora")
    aligns = "recipe" in settings
    own = {"learning_rate": 1e-2, "steps": 3, "warmup": 0, "verbose": False, "batch_size": 1}
    own |= settings if aligns else {"largest": 4} | settings
    logs, found = [], []
    for given in (same_passages, run_of(same_passages, tmp_path / "run.txt")):
        student = new(RERANKERS["PERank"], **SOURCES[source](sorted(set(same_passages.docno))))
        training = FineTune(student, **own) if aligns else Distil(student, **own)
        quietly(training.fit, given)
        logs.append(training.log["loss"].tolist())
        found.append(weights(student))
    assert logs[0] == logs[1] and equal(*found) and not equal(found[0], weights(new(RERANKERS["PERank"])))


def test_a_pe_rank_embeds_what_is_drawn_and_no_more(rows, tmp_path):
    texts, encoder = Counted(texts_of(rows)), Encoder(WIDTH)
    objective = (
        RECIPES["pe-rank-ranking"]
        .replace(largest=3, text_weight=0)
        .objective(new(RERANKERS["PERank"], encoder=encoder))
    )
    run = run_of(rows, tmp_path / "run.txt", texts).taught(None, "text")
    lists = objective.prepare(run.lists(objective.column_sets, "text"))
    assert [len(call) for call in encoder.calls] == [5] and len(texts.asked) == 5  # `prepare` embeds the first list
    samples = Samples(objective.sample, lists, 4, 0)
    batch = objective.collate([samples[i] for i in range(2)])
    assert len(encoder.calls) == 1 and len(texts.asked) == 11
    objective.loss(batch)
    assert encoder.calls[1:] == [[texts.texts[docno] for docno in texts.asked[5:]]]


def test_a_pe_rank_is_aligned_on_each_text_once(same_passages, tmp_path):
    frame = same_passages.assign(text=same_passages.text.replace({"passage 1": "  ", "passage 4": "passage 3"}))
    encoder = Encoder(WIDTH)
    objective = RECIPES["pe-rank-alignment"].objective(new(RERANKERS["PERank"], encoder=encoder))
    passages = objective.prepare(run_of(frame, tmp_path / "run.txt").lists(objective.column_sets, "text"))
    assert [list(one.columns["text"]) for one in passages] == [["passage 0"], ["passage 2"], ["passage 3"]]
    assert encoder.calls == [["passage 0"]]


def test_a_transformer_teaches_all_passages_of_a_run_some_at_a_time(rows, tmp_path, monkeypatch):
    monkeypatch.setattr("pyterrier_lit.training.stored.SHOWN", 6)
    shown = []

    def score(frame):
        shown.append(len(frame))
        return frame.text.str.len() + frame.groupby("qid").cumcount() / 10

    teacher = pt.apply.doc_score(score, batch_size=1_000)
    run = run_of(rows, tmp_path / "run.txt").taught(teacher, "text")
    assert shown == [10, 5]
    assert list(run.targets) == data.with_teacher(rows, teacher).target.tolist()


def test_a_run_is_cut_at_a_depth_and_read_from_every_format(rows, tmp_path):
    names, frame = ["qid", "docno", "score", "rank"], rows[rows["rank"] <= 3]
    rows[names].rename(columns={"qid": "query_id", "docno": "doc_id"}).to_parquet(tmp_path / "run.parquet")
    write_jsonl(tmp_path / "run.jsonl", rows[names].to_dict("records"))
    written(rows, tmp_path / "run.txt.gz")
    expected = read(rankings(data.with_teacher(frame, None), COLUMN_SETS))
    for name in ("run.parquet", "run.jsonl", "run.txt.gz"):
        run = StoredRun(tmp_path / name, rows, texts_of(rows), depth=3)
        assert read(run.taught(None, "text").lists(COLUMN_SETS, "text")) == expected, name
        assert len(run) == len(frame) and repr(run).endswith(f"{name}': 3 queries, 9 passages)")


def test_a_teachers_file_without_scores_counts_by_its_ranks(rows, tmp_path):
    (tmp_path / "teacher.jsonl").write_text(
        "".join(json.dumps({"qid": r.qid, "docno": r.docno, "rank": 7 - r.rank}) + "\n" for r in rows.itertuples())
    )
    run = run_of(rows, tmp_path / "run.txt").taught(tmp_path / "teacher.jsonl", "text")
    assert (
        list(run.targets)
        == data.with_teacher(rows, tmp_path / "teacher.jsonl").target.tolist()
        == [-6, -5, -4, -3, -2] * 3
    )


# Texts


class Counted(Mapping):
    """A mapping that records the docnos that were looked up."""

    def __init__(self, texts):
        self.texts, self.asked = texts, []

    def __getitem__(self, docno):
        self.asked.append(docno)
        return self.texts[docno]

    def __contains__(self, docno):
        return docno in self.texts

    def __iter__(self):
        return iter(self.texts)

    def __len__(self):
        return len(self.texts)


def test_only_the_texts_of_what_is_drawn_are_looked_up(rows, tmp_path):
    texts = Counted(texts_of(rows))
    lists = data.uneven(run_of(rows, tmp_path / "run.txt", texts).taught(None, "text").lists(COLUMN_SETS, "text"))
    assert texts.asked == []
    query, passages, _ = Samples(partial(drawn, "top"), lists, 3, 0)[0]
    assert len(passages) == len(texts.asked) == 3 and {docno[1] for docno in texts.asked} == {query[-1]}


@pytest.fixture
def dataset(rows, tmp_path, monkeypatch):
    from ir_datasets import registry
    from ir_datasets.datasets.base import Dataset
    from ir_datasets.formats import TsvDocs
    from ir_datasets.util import LocalDownload

    (tmp_path / "docs.tsv").write_text("".join(f"{docno}\t{text}\n" for docno, text in texts_of(rows).items()))
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    registry.register("stored", Dataset(TsvDocs(LocalDownload(tmp_path / "docs.tsv"), namespace="stored", lang="en")))
    return "irds:stored"


def test_texts_may_come_from_whatever_pyterrier_has_them_in(rows, dataset, tmp_path):
    import ir_datasets

    known, loader = pt.get_dataset(dataset), pt.text.get_text(pt.get_dataset(dataset), "text")
    write_jsonl(tmp_path / "docs.jsonl.gz", rows[["docno", "text"]].to_dict("records"))
    expected = read(rankings(data.with_teacher(rows, None), COLUMN_SETS))
    for texts in (
        texts_of(rows),
        known,
        loader,
        loader >> pt.apply.text(lambda row: row["text"]),
        ir_datasets.load("stored"),
        ir_datasets.load("stored").docs_store(),
        tmp_path / "docs.tsv",
        str(tmp_path / "docs.jsonl.gz"),
        dataset,
    ):
        run = run_of(rows, tmp_path / "run.txt", texts).taught(None, "text")
        assert read(run.lists(COLUMN_SETS, "text")) == expected, texts
    with pytest.raises(
        TypeError, match=r"adds no column 'body', which the student reads; it gives qid, query, docno, t"
    ):
        list(run_of(rows, tmp_path / "run.txt", loader).lists([{"body": str}], "body")[0].columns["body"])
    for texts in (known, loader, ir_datasets.load("stored"), texts_of(rows), tmp_path / "docs.tsv"):
        run = StoredRun(written(rows.replace("db3", "other"), tmp_path / "run.txt"), rows, texts)
        with pytest.raises(ValueError, match=r"^qid 'q2' has docno 'other' in .*run.txt, and its text is None; wanted"):
            run.lists([{"text": str}], "text").some_texts()


def test_topics_are_a_frame_a_mapping_or_a_file(rows, tmp_path):
    asked = dict(zip(rows["qid"], rows["query"], strict=True))
    (tmp_path / "topics.tsv").write_text("".join(f"{qid}\t{query}\n" for qid, query in asked.items()))
    path = written(rows, tmp_path / "run.txt")
    for source in (rows, asked, tmp_path / "topics.tsv"):
        assert list(StoredRun(path, source, {}).queries) == list(asked.values())


# Memory


def test_a_row_takes_its_docno_and_nine_bytes(tmp_path):
    n, size = 100, 50
    frame = pd.DataFrame(
        {"qid": [str(i // size) for i in range(n * size)], "docno": [f"{i:07}" for i in range(n * size)]}
    )
    frame = frame.assign(rank=frame.groupby("qid").cumcount(), score=1.0, query="a query", text="")
    path = written(frame, tmp_path / "run.txt")
    tracemalloc.start()
    try:
        run = StoredRun(path, dict(zip(frame["qid"], frame["query"], strict=True)), {})
        run = run.taught(path, "text")
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # 7 bytes for the docno, 1 for the space after it, 8 for the target; arrays reserve about an eighth more
    assert held / len(run) < 1.25 * 16 + 4


@pytest.mark.parametrize("stage, most, at_the_peak", [("ranking", 0, 0), ("alignment", 20, 200)])
def test_what_a_pe_rank_holds_of_a_row_is_its_place(stage, most, at_the_peak, tmp_path):
    n, size = 100, 50
    frame = pd.DataFrame(
        [(str(i), "q", f"{i}-{j}", "", j) for i in range(n) for j in range(size)],
        columns=["qid", "query", "docno", "text", "rank"],
    )

    class Long(dict):
        def __missing__(self, docno):
            return f"{docno} " * 100

        def __contains__(self, docno):
            return True

    run = run_of(frame.assign(score=1.0), tmp_path / "run.txt", Long()).taught(None, "text")
    objective = RECIPES[f"pe-rank-{stage}"].objective(new(RERANKERS["PERank"], encoder=Encoder(WIDTH)))
    lists = run.lists(objective.column_sets, "text")
    tracemalloc.start()
    try:
        prepared = objective.prepare(lists)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(prepared) == {"ranking": n, "alignment": n * size}[stage]
    first_list = 150_000  # bytes of the texts and vectors of the first list; all texts take 3 MB
    assert held < len(run) * most + first_list and peak < len(run) * at_the_peak + first_list


# Resuming after a kill; the command line


@pytest.mark.parametrize(
    "name, own",
    [
        ("CrossEncoder", {"n_passages": 3}),
        ("PERank", {"largest": 3, "batch_size": 4, "micro_batch": 2}),
        ("PERank", {"recipe": "pe-rank-alignment", "batch_size": 4, "micro_batch": 2}),
    ],
)
def test_a_killed_training_on_a_run_goes_on_to_the_same_end(name, own, rows, killed, tmp_path):  # noqa: F811
    def begun(**options):
        few = {"steps": 4, "every": 1, "batch_size": 1, "learning_rate": 1e-2, "warmup": 0, "verbose": False}
        teaches = FineTune if "recipe" in own else Distil
        return teaches(new(RERANKERS[name]), **few | own | options)

    run, whole = run_of(rows, tmp_path / "run.txt"), begun()
    whole.fit(rows)
    killed(begun(folder=tmp_path / "state"), 2, run)
    again = begun(folder=tmp_path / "state")
    again.fit(StoredRun(run.path, rows, texts_of(rows)))
    assert equal(weights(again.student), weights(whole.student))
    assert again.log["loss"].tolist() == whole.log["loss"].tolist()
    for change in ({"text": rows.text + "."}, {"query": rows["query"] + "."}, {"rank": 9 - rows["rank"]}):
        other = run_of(rows.assign(**change), tmp_path / "run.txt")
        with pytest.raises(ValueError, match="has checkpoints of training with another digest of lists and targets"):
            begun(folder=tmp_path / "state").fit(other)


def test_from_the_command_line_it_is_the_training_on_the_frame(
    rows, qrels, cross_encoder_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(data, "as_frame", lambda _: pytest.fail("a frame was made"))
    write_jsonl(tmp_path / "docs.jsonl", rows[["docno", "text"]].to_dict("records"))
    write_jsonl(tmp_path / "topics.jsonl", rows[["qid", "query"]].drop_duplicates().to_dict("records"))
    (tmp_path / "qrels").write_text("".join(f"{r.qid} 0 {r.docno} {r.label}\n" for r in qrels.itertuples()))
    rows[["qid", "docno", "score", "rank"]].to_parquet(tmp_path / "run.parquet")
    few = ["steps=2", "batch_size=1", "learning_rate=1e-2", "warmup=0"]
    where = ["--topics", tmp_path / "topics.jsonl", "--documents", tmp_path / "docs.jsonl", "--depth", 4]
    for number, (run, taught, teaches) in enumerate(
        [
            (written(rows, tmp_path / "run.txt.gz"), ["--teacher", written(rows, tmp_path / "teacher")], Distil),
            (tmp_path / "run.parquet", ["--labels", tmp_path / "qrels"], FineTune),
        ]
    ):
        output = tmp_path / str(number)
        words = ["train", "--reranker", "cross-encoder", "--model", cross_encoder_folder, "--device", "cpu", *where]
        words += ["--input", run, *taught, "--output", output, *(word for few in few for word in ("--set", few))]
        assert main([str(word) for word in words]) == 0
        student = CrossEncoder(str(cross_encoder_folder), device="cpu")
        learning(student, teaches).fit(rows[rows["rank"] <= 4], qrels)
        assert equal(weights(CrossEncoder(str(output), device="cpu")), weights(student))


# Mistakes


@pytest.mark.parametrize(
    "lines, words",
    [
        ("", r"run.txt holds no candidates"),
        ("q Q0 d 1 1 x\nr Q0 d 1 1 x\n", r"run.txt, line 2: qid 'r' has no query among the topics, but None"),
        ("q Q0 d 1 1 x\nq Q0 d 2 1 x\n", r"run.txt, line 2: qid 'q' has docno 'd' twice"),
        ("q Q0 d 1 1 x\np Q0 d 1 1 x\nq Q0 e 1 1 x\n", r"line 3: qid 'q' came before, with others in between"),
        ("q Q0 d 1\n", r"run.txt, line 1 has 4 columns; wanted six"),
    ],
)
def test_what_is_no_run_is_named(tmp_path, lines, words):
    (tmp_path / "run.txt").write_text(lines)
    with pytest.raises(ValueError, match=words):
        StoredRun(tmp_path / "run.txt", {"q": "one", "p": "two"}, {})


def test_other_mistakes_are_named_before_the_first_step(rows, qrels, cross_encoder_folder, tmp_path):
    path = written(rows, tmp_path / "run.txt")
    with pytest.raises(TypeError, match=r"topics=list; wanted a frame with qid and query, a mapping, or a file"):
        StoredRun(path, ["q1"], {})
    with pytest.raises(ValueError, match=r"qid 'q2' has no query among the topics, but nan"):
        StoredRun(path, rows.assign(query=float("nan")), {})
    write_jsonl(tmp_path / "run.jsonl", [{"qid": "q1", "docno": "two words", "score": 1}])
    with pytest.raises(ValueError, match=r"run.jsonl, line 1 has docno 'two words'; a stored run needs one without"):
        StoredRun(tmp_path / "run.jsonl", rows, {})
    run, student = StoredRun(path, rows, texts_of(rows)), CrossEncoder(str(cross_encoder_folder), device="cpu")
    for given, teaches, labels, words in (
        (run, FineTune(student), None, "there are no labels to learn from"),
        (run, FineTune(student), qrels.assign(qid="other"), "none of the 15 passages is judged relevant"),
        (run, Distil(student, qrels.assign(score=1, qid="other")), None, "the teacher ranks none of the 15 passages"),
        (run, FineTune(student), qrels.assign(label=float("nan")), "no number for qid 'q2', docno 'db3' in the qrels"),
        (
            StoredRun(path, rows, {}),
            Distil(student),
            None,
            "qid 'q2' has docno 'db0' in .*run.txt, and its text is None",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            teaches.fit(given, labels)
    with pytest.raises(TypeError, match=r"texts=list; wanted a text loader, a dataset or an index with one"):
        Distil(student).fit(StoredRun(path, rows, []))
    with pytest.raises(ValueError, match=r"this recipe reads text, answers, and a stored run has texts alone"):
        learning(new(RERANKERS["LiT5Score"])).fit(run)
    with pytest.warns(UserWarning, match="10 of 15 passages are not in the teacher's ranking and are left out"):
        run.taught(rows[rows.qid == "q1"], "text")
