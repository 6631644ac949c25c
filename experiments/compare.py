"""Compares measured figures with published ones: their difference, and whether it is within a tolerance.

This module works on tables, without models or collections. `published.csv` holds every figure of the papers' tables
with its source and status. `claims.csv` holds the figures in the papers' texts.
"""

import re
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

PUBLISHED = Path(__file__).parent / "published.csv"
CLAIMS = Path(__file__).parent / "claims.csv"
KEY = ["paper", "collection", "first_stage", "depth", "model", "measure"]
FIRST_STAGE = "first stage"  # the `model` of a ranking that is not reranked
NOT_TO_BE_MATCHED = ("recalled", "erratum")  # a run is not compared with figures of these statuses

# (paper, model, tolerance of nDCG and similar measures). Paper and model are regular expressions. The first line in
# which both match gives the tolerance. A tolerance is the difference between two published evaluations of the same
# checkpoint (LiT5's README of 2023 and 2024; Rank-DistiLLM's README and notebook), or rounding.
TOLERANCES = [
    (".*", FIRST_STAGE, 0.001),  # needs no model: only rounding and the order of ties may differ
    ("LiT5", r"castorini/LiT5-Distill-(base|large|xl)", 0.008),
    ("LiT5", ".*", 0.005),
    ("Rank-DistiLLM", ".*", 0.003),
    ("PE-Rank", ".*", 0.005),  # as for LiT5, which also runs in bfloat16; the two evaluations known differ by .0002
]


def published(**where: str | Iterable[str]) -> pd.DataFrame:
    """The rows of published.csv that have the given values in the given columns. For example,
    `published(paper="LiT5", table="ecir_table1")` returns the figures of one table. A value is a string, or several
    strings of which one must match.

    Columns: paper, table, collection, measure, first_stage, depth, model, value, source, status. The status is
    confirmed, readme (from a README), recalled (unchecked: do not cite) or erratum (printed, but wrong).
    """
    figures = pd.read_csv(PUBLISHED, dtype=str, keep_default_na=False)
    figures["value"] = figures["value"].astype(float)
    for column, wanted in where.items():
        figures = figures[figures[column].isin([wanted] if isinstance(wanted, str) else list(wanted))]
    return figures.reset_index(drop=True)


def claims() -> pd.DataFrame:
    """A row for each figure in the papers' texts. Columns: paper, claim, value, unit, compares, where."""
    return pd.read_csv(CLAIMS, keep_default_na=False)


def results(experiment: pd.DataFrame, *, paper: str, collection: str, first_stage: str, depth: int) -> pd.DataFrame:
    """The table of a `pt.Experiment` in long form: a row for each pipeline and measure.

    The columns are those of KEY, `measured` and `p`. The name of a pipeline becomes its `model`. To be compared with
    published figures, the name must be a model of published.csv, or "first stage" for a first stage alone. `p` is the
    p-value against the experiment's baseline, corrected if the experiment corrected it. Without a test, `p` is nan.
    """
    tests = re.compile(r" (\+|-|p-value|reject|p-value corrected)$")
    rows = []
    for measure in [column for column in experiment if column != "name" and not tests.search(column)]:
        p = next(
            (f"{measure} {test}" for test in ("p-value corrected", "p-value") if f"{measure} {test}" in experiment), ""
        )
        for _, row in experiment.iterrows():
            where = (paper, collection, first_stage, str(depth), row["name"], measure)
            rows.append((*where, float(row[measure]), float(row[p]) if p else float("nan")))
    return pd.DataFrame(rows, columns=[*KEY, "measured", "p"])


def repeated(results: pd.DataFrame) -> pd.DataFrame:
    """Merge the rows of several runs of one system, which are named "NAME #1", "NAME #2", ..., into one row. `measured`
    is the mean over the runs, `lowest` and `highest` are the extremes, and `p` is nan. A system with one run keeps its
    p, and its `lowest` and `highest` are nan."""
    names = results["model"].str.replace(r" #\d+$", "", regex=True)
    groups = results.assign(model=names).groupby(KEY, sort=False)
    rows = groups.agg(
        measured=("measured", "mean"), p=("p", "first"), lowest=("measured", "min"), highest=("measured", "max")
    )
    once = groups.size() == 1
    rows["p"] = rows["p"].where(once)
    rows[["lowest", "highest"]] = rows[["lowest", "highest"]].mask(once)
    return rows.reset_index()


def table(results: pd.DataFrame, tables: Iterable[str] = ()) -> pd.DataFrame:
    """A table of measured figures next to published ones.

    results: frames that the function `results` returned, concatenated. tables: names of tables of published.csv.

    A measured figure is compared with each published figure of the same paper, collection, first stage, depth, model
    and measure. For a first stage, the depth is ignored. If `tables` is empty, the rows are the measured figures, and
    all of published.csv is searched. If `tables` is given, only these tables are searched, and each of their figures
    has a row, even if nothing was measured for it. Figures of a measure that does not occur in `results` have no row.

    Columns: those of `results`, `published`, `difference` (measured - published), `tolerance`, `reproduced`, `table`,
    `source`, `status`. `reproduced` is "within" or "outside" the tolerance. It is empty if the measured figure, the
    published figure or the tolerance is missing, or if the status is "recalled" or "erratum". If a system has several
    runs, a published figure between `lowest` and `highest` counts as "within", too.
    """
    tables = list(tables)
    figures = (published(table=tables) if tables else published()).query("measure in @results.measure")
    key = [*KEY[:3], "_depth", *KEY[4:]]
    both = _comparable(results).merge(
        _comparable(figures).rename(columns={"value": "published"}),
        on=key,
        how="outer" if tables else "left",
        sort=False,
    )
    both["depth"] = both["depth_x"].fillna(both["depth_y"])
    both["difference"] = both["measured"] - both["published"]
    both["tolerance"] = [tolerance(*row) for row in both[["paper", "model", "measure"]].itertuples(index=False)]
    comparable = both["difference"].notna() & both["tolerance"].notna() & ~both["status"].isin(NOT_TO_BE_MATCHED)
    within = both["difference"].abs() <= both["tolerance"] + 1e-9
    if "lowest" in both:
        within |= both["published"].between(both["lowest"], both["highest"])
    both["reproduced"] = within.map({True: "within", False: "outside"}).where(comparable, "")
    extremes = [column for column in ("lowest", "highest") if column in results]
    columns = [
        *KEY,
        "measured",
        *extremes,
        "p",
        "published",
        "difference",
        "tolerance",
        "reproduced",
        "table",
        "source",
        "status",
    ]
    return both.reindex(columns=columns).fillna({"table": "", "source": "", "status": ""})


def progress(table: pd.DataFrame) -> pd.DataFrame:
    """A row for each paper and table of published.csv. `cells` is the number of published figures in the table.
    `measured` counts the cells that have a measured figure, and `waiting` counts those that have none. `within` and
    `outside` count the measured figures that are within and outside the tolerance.

    table: a table that the function `table` returned.
    """
    cells = table[table["published"].notna()].assign(
        measured=lambda rows: rows["measured"].notna(),
        within=lambda rows: rows["reproduced"] == "within",
        outside=lambda rows: rows["reproduced"] == "outside",
    )
    counts = cells.groupby(["paper", "table"], sort=False)[["measured", "within", "outside"]].sum()
    counts.insert(0, "cells", cells.groupby(["paper", "table"], sort=False).size())
    return counts.assign(waiting=counts["cells"] - counts["measured"])


def tolerance(paper: str, model: str, measure: str) -> float:
    """The largest difference from a published figure that a faithful reproduction may have. Only nDCG@k, alpha-nDCG@k,
    MAP@k, R@k, RR@k and P@k have a tolerance. For any other measure, the result is nan. It is also nan if no line of
    TOLERANCES matches the paper and the model."""
    if not re.match(r"(nDCG|MAP|alpha-nDCG|R|RR|P)@\d+$", measure):
        return float("nan")
    fitting = (t for papers, models, t in TOLERANCES if re.fullmatch(papers, paper) and re.fullmatch(models, model))
    return next(fitting, float("nan"))


def pivot(table: pd.DataFrame, values: tuple[str, ...] = ("measured", "published")) -> pd.DataFrame:
    """A table of the function `table` in the form that the papers print: a row per model and first stage, and for each
    collection the columns `values`."""
    wide = table.pivot_table(
        index=["first_stage", "model"],
        columns="collection",
        values=list(values),
        aggfunc="first",
        sort=False,
        dropna=False,
    )
    collections = table["collection"].unique()
    order = [(value, name) for name in collections for value in values if (value, name) in wide.columns]
    return wide[order].swaplevel(axis=1).dropna(how="all")


def show(table: pd.DataFrame) -> "pd.io.formats.style.Styler":
    """Style a table for a notebook: three decimal places, blanks for missing values, no empty columns, no row
    numbers."""
    told = table[[column for column in table if table[column].notna().any() and (table[column] != "").any()]]
    style = _rounded(told).style.format(precision=3, na_rep="")
    return style.hide(axis="index") if isinstance(table.index, pd.RangeIndex) else style


def export(table: pd.DataFrame, path: str | Path) -> None:
    """Write the table to `path`.md in Markdown and to `path`.tex in LaTeX."""
    path, index = Path(path), not isinstance(table.index, pd.RangeIndex)
    path.parent.mkdir(parents=True, exist_ok=True)
    table = _rounded(table)
    printed = table.astype(object).where(table.notna(), None)
    text = printed.to_markdown(index=index, floatfmt=".3f", missingval="")
    path.with_name(f"{path.name}.md").write_text(text + "\n", encoding="utf-8")
    latex = table.style.format(precision=3, na_rep="", escape="latex").format_index(escape="latex", axis=1)
    latex = latex.format_index(escape="latex") if index else latex.hide(axis="index")
    path.with_name(f"{path.name}.tex").write_text(latex.to_latex(hrules=True), encoding="utf-8")


def _rounded(table: pd.DataFrame) -> pd.DataFrame:
    """Round to three decimal places. Adding 0.0 turns -0 into 0."""
    return table.apply(lambda column: column.round(3) + 0.0 if column.dtype.kind == "f" else column)


def _comparable(frame: pd.DataFrame) -> pd.DataFrame:
    """Add the column `_depth`, which `table` compares: the depth, but empty for first stages."""
    return frame.assign(_depth=frame["depth"].where(frame["model"] != FIRST_STAGE, ""))
