"""experiments/measured.py: recorded rows are read back with machine, commit and date; measured.csv has valid rows."""

import datetime
import re

import measured
import pandas as pd
import pytest

ROWS = [
    {"setting": "BM25", "n": 50, "measure": "nDCG@10", "value": 0.198},
    {"setting": "ours", "n": 50, "measure": "nDCG@10", "value": 0.307, "p": 0.001, "seconds": 1.5},
]


def test_what_is_recorded_comes_back_with_machine_commit_and_date(tmp_path):
    file = tmp_path / "measured.csv"
    measured.record("does it rank?", ROWS, file)
    measured.record("is it fast?", pd.DataFrame([{"setting": "ours, 2", "measure": "s", "value": 3}]), file)
    rows = measured.read(file=file)
    assert list(rows.columns) == list(measured.TYPES) and rows["value"].tolist() == [0.198, 0.307, 3]
    assert rows["n"].tolist()[:2] == [50, 50] and rows["n"].isna().tolist() == [False, False, True]
    assert rows["p"].isna().tolist() == [True, False, True]
    assert set(rows["date"]) == {str(datetime.date.today())} and rows["threads"].gt(0).all()
    assert "/" not in "".join(rows["machine"]) and rows["machine"].str.contains(r"^\d+ cores").all()
    assert measured.read("is it fast?", file)["setting"].tolist() == ["ours, 2"]
    assert not list(tmp_path.glob("*.part"))


def test_what_is_measured_again_is_a_new_row_and_the_latest(tmp_path):
    file = tmp_path / "measured.csv"
    for value in (0.1, 0.2):
        measured.record("does it rank?", [ROWS[0] | {"value": value}], file)
    assert measured.read(file=file)["value"].tolist() == [0.1, 0.2]
    assert measured.latest(measured.read(file=file))["value"].tolist() == [0.2]


def test_rows_and_files_of_another_form_are_refused_and_change_nothing(tmp_path):
    file = tmp_path / "measured.csv"
    measured.record("does it rank?", ROWS, file)
    before = file.read_bytes()
    with pytest.raises(ValueError, match="has no value; wanted setting, measure and value"):
        measured.record("q", [{"setting": "a", "measure": "b"}], file)
    with pytest.raises(ValueError, match=r"q has the columns .*, colour; wanted question, setting"):
        measured.record("q", [ROWS[0] | {"colour": "red"}], file)
    assert file.read_bytes() == before
    file.write_text("question,value\na,1\n")
    with pytest.raises(ValueError, match=r"measured\.csv has the columns question, value; wanted question, setting"):
        measured.record("q", ROWS, file)


def test_an_experiments_table_gives_a_row_for_each_measure():
    table = pd.DataFrame({"name": ["a", "b"], "nDCG@10": [0.1, 0.2], "RR@10": [0.3, 0.4]})
    table["nDCG@10 p-value corrected"] = [None, 0.03]
    rows = pd.DataFrame(measured.from_experiment(table, 7, ["nDCG@10", "RR@10"]))
    assert rows[["setting", "n", "measure", "value"]].values.tolist() == [
        ["a", 7, "nDCG@10", 0.1], ["a", 7, "RR@10", 0.3], ["b", 7, "nDCG@10", 0.2], ["b", 7, "RR@10", 0.4]
    ]  # fmt: skip
    assert rows["p"].dropna().tolist() == [0.03]


def test_the_committed_rows_are_sound():
    rows = measured.read()
    assert len(rows) > 100 and not rows.duplicated().any()
    assert rows["p"].dropna().between(0, 1).all()
    assert rows[rows["measure"].str.contains("nDCG|RR@")]["value"].between(0, 1).all()
    assert all(datetime.date.fromisoformat(day) for day in rows["date"])
    assert rows["commit"].map(lambda commit: bool(re.fullmatch(r"([0-9a-f]{7,}\+?)?", commit))).all()
    assert (rows[["question", "setting", "measure", "machine"]] != "").all(axis=None)
