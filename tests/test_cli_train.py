"""`python -m pyterrier_lit train`: the same checkpoint as in Python; each mistake is reported in one line."""

import json

import pandas as pd
import pytest
import torch
from conftest import GOLDEN, write_jsonl

from pyterrier_lit import CrossEncoder, LiT5Distill, LiT5Score, PERank
from pyterrier_lit.__main__ import RERANKERS, documented, main
from pyterrier_lit.training import FineTune

LIT5 = GOLDEN / "lit5" / "tiny-random"
FEW = ["--set", "steps=2", "--set", "batch_size=2", "--set", "micro_batch=2", "--device", "cpu"]


@pytest.fixture
def rows():
    return [
        {"qid": f"q{q}", "query": letter, "docno": f"d{i}", "text": f"{letter if i == q else 'no'} {i}", "rank": i + 1}
        for q, letter in enumerate("abcd")
        for i in range(5)
    ]


@pytest.fixture
def file(tmp_path, rows):
    return write_jsonl(tmp_path / "rerank.jsonl", rows)


@pytest.fixture
def labels(tmp_path):
    path = tmp_path / "qrels.txt"
    path.write_text("".join(f"q{q} 0 d{q} 1\n" for q in range(4)))
    return path


def train(*arguments):
    return main(["train", *map(str, arguments)])


def test_from_labels_it_is_the_training_in_python(file, rows, labels, cross_encoder_folder, tmp_path, capsys):
    more = ["--set", "n_passages=3", "--set", "learning_rate=1e-2", "--seed", 5]
    where = [
        "--input",
        file,
        "--labels",
        labels,
        "--output",
        tmp_path / "out",
        "--state",
        tmp_path / "state",
        "--every",
        1,
    ]
    valid = ["--valid", file, "--valid-labels", labels]
    assert train("--reranker", "cross-encoder", "--model", cross_encoder_folder, *where, *valid, *FEW, *more) == 0
    assert "measurements, the last {'step': 2.0, 'nDCG@10'" in capsys.readouterr().out
    assert (tmp_path / "state" / "checkpoint-2").is_dir()
    frame = pd.DataFrame(rows)
    qrels = pd.DataFrame([(f"q{q}", f"d{q}", 1) for q in range(4)], columns=["qid", "docno", "label"])
    student = CrossEncoder(str(cross_encoder_folder), device="cpu")
    settings = {
        "steps": 2,
        "batch_size": 2,
        "micro_batch": 2,
        "n_passages": 3,
        "learning_rate": 1e-2,
        "seed": 5,
        "every": 1,
    }
    FineTune(student, **settings, verbose=False).fit(frame, qrels, frame, qrels)
    trained = CrossEncoder(str(tmp_path / "out"), device="cpu")
    pd.testing.assert_frame_equal(trained(frame), student(frame))


def test_ids_of_labels_are_text(rows, cross_encoder_folder, tmp_path):
    names = dict(zip((f"d{i}" for i in range(5)), ("NA", "nan", "null", '"x', "007"), strict=True))
    rows = [row | {"docno": names[row["docno"]]} for row in rows]
    file, labels = write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "qrels"
    labels.write_text("q0 0 NA 2\nq0 0 nan 0\nq1 0 nan 1\nq2 0 007 1\nq3 0 7 1\n")
    words = ["--reranker", "cross-encoder", "--model", cross_encoder_folder, "--output", tmp_path / "out", "--input"]
    assert train(*words, file, "--labels", labels, *FEW, "--set", "learning_rate=1e-2") == 0
    qrels = pd.DataFrame(
        [("q0", "NA", 2), ("q0", "nan", 0), ("q1", "nan", 1), ("q2", "007", 1), ("q3", "7", 1)],
        columns=["qid", "docno", "label"],
    )
    student, frame = CrossEncoder(str(cross_encoder_folder), device="cpu"), pd.DataFrame(rows)
    FineTune(student, steps=2, batch_size=2, micro_batch=2, learning_rate=1e-2, verbose=False).fit(frame, qrels)
    pd.testing.assert_frame_equal(CrossEncoder(str(tmp_path / "out"), device="cpu")(frame), student(frame))


def test_a_training_from_a_backbone_resumes(file, labels, electra, tmp_path):
    words = ["--reranker", "cross-encoder", "--backbone", electra, "--input", file, "--labels", labels, *FEW]
    for name in ("first", "again"):
        assert train(*words, "--state", tmp_path / "state", "--output", tmp_path / name) == 0
    first, again = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "again"))
    assert first == again
    assert train(*words, "--state", tmp_path / "state", "--output", tmp_path / "other", "--seed", 1) == 1


def test_every_reranker_learns_from_files(file, rows, electra, backbone, tmp_path):
    run = tmp_path / "teacher.run"
    run.write_text("".join(f"{row['qid']} Q0 {row['docno']} {6 - row['rank']} {row['rank']} teacher\n" for row in rows))
    questions = {"question": "who?", "answers": ["he"], "ctxs": [{"text": "he is"}, {"text": "she is"}]}
    qa = write_jsonl(tmp_path / "qa.jsonl", [questions, questions])
    torch.manual_seed(0)
    for number, (kind, arguments) in enumerate(
        [
            (
                CrossEncoder,
                ["cross-encoder", "--backbone", electra, "--input", file, "--teacher", run, "--doc-length", 40],
            ),
            (LiT5Distill, ["lit5-distill", "--backbone", LIT5, "--input", file, "--order", "--window-size", 4]),
            (LiT5Score, ["lit5-score", "--backbone", LIT5, "--input", qa, "--answers"]),
            (
                PERank,
                ["pe-rank", "--backbone", backbone("mistral"), "--input", file, "--passages",
                 "--recipe", "pe-rank-alignment", "--encoder-name", GOLDEN / "pe_rank" / "encoder"],
            ),
        ]
    ):  # fmt: skip
        output = tmp_path / str(number)
        assert train("--reranker", *arguments, "--output", output, *FEW) == 0
        assert len(kind(str(output), device="cpu")(pd.DataFrame(rows))) == len(rows)
    assert LiT5Distill(str(tmp_path / "1"), device="cpu").window()[0] == 4
    assert json.loads((tmp_path / "0" / "config.json").read_text())["doc_length"] == 40


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--order", "--set", "speed=1"], "'speed' is not a setting of PairRecipe"),
        (["--order", "--recipe", "best"], "recipe='best'; CrossEncoder has"),
        (["--teacher", "nowhere.run"], "nowhere.run"),
        (["--answers"], "it has no question; wanted question, answers and ctxs"),
    ],
)
def test_mistakes_are_one_line(file, cross_encoder_folder, tmp_path, capsys, arguments, words):
    model = ["--reranker", "cross-encoder", "--model", cross_encoder_folder, "--device", "cpu"]
    assert train(*model, "--input", file, "--output", tmp_path / "out", *arguments) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in said and said.startswith("python -m pyterrier_lit: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "one of the arguments --labels --teacher --order --answers --passages is required"),
        (["--order", "--set", "steps"], "'steps' is not NAME=VALUE"),
        (["--order", "--valid", "x.jsonl"], "--valid and --valid-labels go together"),
    ],
)
def test_options_that_do_not_go_together_are_named(file, cross_encoder_folder, tmp_path, capsys, arguments, words):
    with pytest.raises(SystemExit) as end:
        train("--reranker", "cross-encoder", "--input", file, "--output", tmp_path / "out", *arguments)
    assert end.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--labels", "qrels.txt", "--recipe", "best"], "recipe='best'; CrossEncoder has"),
        (["--labels", "qrels.txt", "--set", "speed=1"], "'speed' is not a setting of PairRecipe"),
        (["--labels", "qrels.txt", "--doc-length", 0], "doc_length=0; wanted a positive whole number"),
        (["--labels", "no.txt"], "No such file or directory: 'no.txt'"),
        (["--teacher", "no.run"], "No such file or directory: 'no.run'"),
        (["--labels", "qrels.txt", "--valid", "no.jsonl", "--valid-labels", "qrels.txt"], "'no.jsonl'"),
        (
            ["--labels", "qrels.txt", "--output", "qrels.txt/out"],
            "qrels.txt/out cannot be written to; give another output",
        ),
        (["--labels", "qrels.txt", "--input", "no.jsonl"], "'no.jsonl'"),
    ],
)
def test_what_needs_no_backbone_is_checked_before_one_is_read(file, labels, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(labels.parent)
    monkeypatch.setattr(CrossEncoder, "from_backbone", lambda *_, **__: pytest.fail("a backbone was read"))
    where = ["--input", file, "--output", "out", "--device", "cpu"]
    assert train("--reranker", "cross-encoder", "--backbone", "no/such", *where, *arguments) == 1
    assert words in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_model_and_a_backbone_are_not_both_trained(file, labels, capsys):
    both = ["--reranker", "cross-encoder", "--model", "a/model", "--backbone", "a/backbone"]
    with pytest.raises(SystemExit):
        train(*both, "--input", file, "--labels", labels, "--output", "out")
    assert "--model is trained further, --backbone from its beginning; give one" in capsys.readouterr().err


def test_the_help_of_a_backbones_options_is_what_the_docstring_says_and_of_that_reranker_alone(capsys):
    for reranker, kind in RERANKERS.items():
        with pytest.raises(SystemExit):
            train("--reranker", reranker, "--help")
        said = "".join(capsys.readouterr().out.split())  # argparse breaks lines at hyphens
        for other in RERANKERS.values():
            for option in other.begin_options():
                words = documented(other.begin)[option].removesuffix(".").replace(" ", "")
                assert (words in said) == (f"[--{option.replace('_', '-')}" in said) == (other is kind)
