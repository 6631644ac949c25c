"""Records results in measured.csv, a row for each value of a measure. Scripts record with --record, notebooks with
RECORD=1.

A row has a measure and its value. The row also has the question that the value answers (or the name of an experiment),
the setting (a system, a collection, a size), and n (the number of queries, query-passage pairs, ...). If there was a
test, the row also has the p-value p. Further columns are the seconds that the measurement took, the machine, the number
of threads, the commit and the date. A repeated measurement adds new rows.
"""

import argparse
import os
import subprocess
from collections.abc import Iterable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import pandas as pd
import torch

FILE = Path(__file__).with_name("measured.csv")
TYPES = {
    "question": "str", "setting": "str", "n": "Int64", "measure": "str", "value": "float64", "p": "float64",
    "seconds": "float64", "machine": "str", "threads": "Int64", "commit": "str", "date": "str",
}  # fmt: skip
FLAGS = {  # of /proc/cpuinfo
    "avx2": "AVX2", "avx512f": "AVX-512", "avx512_vnni": "VNNI", "avx512_bf16": "AVX512-BF16", "amx_tile": "AMX"
}  # fmt: skip


def record(question: str, rows: pd.DataFrame | Iterable[Mapping[str, Any]], file: Path = FILE) -> pd.DataFrame:
    """Append rows to measured.csv, and return them as they were written. A row has setting, measure and value, and
    optionally n, p and seconds.

    Machine, threads, commit and date are added. Raises ValueError if there is another column, or if setting, measure or
    value is missing.
    """
    new = pd.DataFrame(rows)
    for column in ("setting", "measure", "value"):
        if column not in new or new[column].isna().any():
            raise ValueError(f"a row of {question!r} has no {column}; wanted setting, measure and value")
    here = {"machine": machine(), "threads": torch.get_num_threads(), "commit": commit(), "date": str(date.today())}
    new = _typed(new.assign(question=question, **here).reindex(columns=[*TYPES, *(set(new) - set(TYPES))]), question)
    before = read(file=file) if file.exists() else new.head(0)
    part = file.with_name(f"{file.name}.part")
    pd.concat([before, new]).to_csv(part, index=False, float_format="%.6g", lineterminator="\n")
    part.replace(file)
    return new


def read(question: str | None = None, file: Path = FILE) -> pd.DataFrame:
    """All rows of measured.csv, or those of a question, in the order in which they were recorded. Raises ValueError if
    the columns of the file are not those of TYPES."""
    rows = _typed(pd.read_csv(file, dtype="str", keep_default_na=False, na_values=[""]), str(file.name))
    return rows if question is None else rows[rows["question"] == question].reset_index(drop=True)


def latest(rows: pd.DataFrame, *also: str) -> pd.DataFrame:
    """The newest row of each question, setting, n and measure. also: further columns, such as "threads". A row does not
    replace an older row that has another value in one of these columns."""
    return rows.drop_duplicates(["question", "setting", "n", "measure", *also], keep="last", ignore_index=True)


def from_experiment(table: pd.DataFrame, n: int, measures: Iterable[Any]) -> list[dict[str, Any]]:
    """The rows of measured.csv for the table of a `pt.Experiment` over n queries: a row per pipeline and measure, with
    its p-value (the corrected one if the table has it)."""
    return [
        {"setting": row["name"], "n": n, "measure": measure, "value": row[measure], "p": _p_value(row, measure)}
        for row in table.to_dict("records")
        for measure in map(str, measures)
    ]


def add_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--record", action="store_true", help=f"append the results to {FILE.name}")


def machine() -> str:
    """This machine in a few words: number of cores, instructions for matrix products, GPU."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        flags = set()
    parts = [f"{os.cpu_count()} cores", *(name for flag, name in FLAGS.items() if flag in flags)]
    return ", ".join([*parts, *([torch.cuda.get_device_name()] if torch.cuda.is_available() else [])])


def commit() -> str:
    """The commit of this checkout, with a plus if files differ from it; empty outside of git."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    done = subprocess.run(command, cwd=FILE.parent, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def noted(question: str, table: pd.DataFrame, n: int, measures: Iterable[Any]) -> pd.DataFrame:
    """Return the table of a `pt.Experiment` unchanged. If the environment variable RECORD is 1, also record the table
    in measured.csv."""
    if os.environ.get("RECORD") == "1":
        record(question, from_experiment(table, n, measures))
    return table


def _typed(rows: pd.DataFrame, source: str) -> pd.DataFrame:
    if list(rows.columns) != list(TYPES):
        raise ValueError(f"{source} has the columns {', '.join(rows.columns)}; wanted {', '.join(TYPES)}")
    texts = [name for name, kind in TYPES.items() if kind == "str"]
    numbers = {name: kind for name, kind in TYPES.items() if kind != "str"}
    rows = rows.astype({name: "float64" for name in numbers})
    return rows.assign(**{name: rows[name].fillna("").astype("str") for name in texts}).astype(numbers)


def _p_value(row: Mapping[str, Any], measure: str) -> float | None:
    return next((row[name] for name in (f"{measure} p-value corrected", f"{measure} p-value") if name in row), None)
