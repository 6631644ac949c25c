"""Writes RESULTS.md and its pictures from questions.toml and measured.csv: a question, its finding, a picture, a
command.

python experiments/results.py --write        writes the page and its pictures
python experiments/results.py                checks that the page and its pictures are up to date (exit code 1 if not)
"""

import argparse
import dataclasses
import json
import re
import sys
import textwrap
import tomllib
from pathlib import Path
from typing import Any

import measured
import pandas as pd
from matplotlib import pyplot
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
QUESTIONS = HERE / "questions.toml"
PAGE = HERE / "RESULTS.md"
HEAD = """# Results

Each question has its finding, a command that measures it again, and notes on how it was measured. The values of the
pictures and most other values are in [measured.csv](measured.csv), one per row, with machine, threads, commit and date.
Results that did not turn out as hoped are kept. `python experiments/results.py --write` writes this page from
[questions.toml](questions.toml).

On this page, small checkpoints are checkpoints with 2 to 6 million parameters that this project has trained itself
([tiny](tiny/README.md)). The papers' published checkpoints have not been run.
"""


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture of the page. If the picture has bars, this script draws it. Otherwise, another script has drawn the
    file of the picture.

    file: the path of the picture, relative to the folder of RESULTS.md. measure: the measure that the bars show. bars:
    label -> settings in measured.csv, one setting for each series. series: the names of the series. peers: the first
    `peers` labels are systems other than this package.
    """

    file: str
    measure: str = ""
    bars: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    series: tuple[str, ...] = ("",)
    peers: int = 1


@dataclasses.dataclass(frozen=True)
class Question:
    """An entry of questions.toml.

    recorded: the questions of measured.csv whose rows belong to this entry; by default, only the entry's own question.
    A star in such a question stands for any text, and this text is added to the settings of the rows. notes: a dict
    {date, text} for each measurement.
    """

    section: str
    question: str
    finding: str
    command: str
    notes: list[dict[str, Any]]
    recorded: list[str] = dataclasses.field(default_factory=list)
    picture: Picture | None = None

    def rows(self, recorded: pd.DataFrame) -> pd.DataFrame:
        """The rows of measured.csv that belong to this entry: the newest of each setting, n, measure, machine and
        threads."""
        parts = []
        for name in self.recorded or [self.question]:
            pattern = re.escape(name).replace(r"\*", "(.+)")
            found = recorded["question"].str.extract(f"^({pattern})$")
            rows = recorded[found[0].notna()]
            parts.append(rows.assign(setting=rows["setting"] + ", " + found[1].dropna()) if "*" in name else rows)
        return measured.latest(pd.concat(parts), "machine", "threads")


def read(file: Path = QUESTIONS) -> list[Question]:
    """The entries of questions.toml, in the order of the file. Raises TypeError if an entry has an unknown field."""
    entries = tomllib.loads(file.read_text(encoding="utf-8"))["questions"]
    pictures = [entry.pop("picture", None) for entry in entries]
    return [
        Question(**entry, picture=picture and Picture(**picture))
        for entry, picture in zip(entries, pictures, strict=True)
    ]


def page(questions: list[Question], recorded: pd.DataFrame) -> str:
    """The text of RESULTS.md. Raises ValueError if a question has no rows in measured.csv, or if rows of measured.csv
    belong to no question."""
    told, contents, body = set(), [], []
    for section in dict.fromkeys(question.section for question in questions):
        contents.append(f"\n**{section}**\n")
        body.append(f"\n## {section}\n")
        for question in (question for question in questions if question.section == section):
            rows = question.rows(recorded)
            if rows.empty:
                raise ValueError(f"measured.csv has no row of {question.question!r}; wanted one for each value")
            told |= set(rows["question"])
            contents.append(f"- [{question.question}](#{anchor(question.question)})\n")
            body.append(part(question, rows))
    untold = set(recorded["question"]) - told
    if untold:
        raise ValueError(f"questions.toml has no entry for {', '.join(map(repr, sorted(untold)))}")
    return HEAD + "".join(contents) + "".join(body)


def part(question: Question, rows: pd.DataFrame) -> str:
    dates = sorted(set(rows["date"]))
    when = " to ".join(dict.fromkeys([dates[0], dates[-1]]))
    machines = rows.groupby("machine", sort=False)["threads"]
    where = ", and on ".join(named(machine, sorted(used.dropna().unique())) for machine, used in machines)
    picture = f"![{question.question}]({question.picture.file})\n\n" if question.picture else ""
    notes = [f"{note['date']}: {note['text'].strip()}" for note in question.notes] + [f"Measured on {where}."]
    values = f"{len(rows)} value{'s' * (len(rows) != 1)}"
    listed = "".join(textwrap.indent(f"- {note}", "  ")[2:] + "\n" for note in notes)
    return (
        f"\n### {question.question}\n\n{question.finding.strip()}\n\n{picture}"
        f"Measure it again: `{question.command}`\n\n"
        f"<details><summary>Notes ({values} in measured.csv, {when})</summary>\n\n{listed}\n</details>\n"
    )


def named(machine: str, threads: list[int]) -> str:
    """The words for a machine of measured.csv and the numbers of threads that were used, such as "2 cores with AVX2 and
    VNNI (1 thread)". threads: empty if they are not known."""
    cores, *extensions = (part for part in machine.split(", ") if part != "no GPU")
    listed = " and ".join(filter(None, [", ".join(extensions[:-1]), *extensions[-1:]]))
    used = f" ({' or '.join(map(str, threads))} thread{'s' * (threads != [1])})" if threads else ""
    return (f"{cores} with {listed}" if listed else cores) + used


def anchor(heading: str) -> str:
    """The anchor that GitHub makes from a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def drawn(question: Question, recorded: pd.DataFrame) -> dict[str, list[float]]:
    """The values of a picture: label -> a value for each series. Raises ValueError if measured.csv lacks one of these
    values."""
    assert question.picture is not None
    rows = question.rows(recorded)
    values = rows[rows["measure"] == question.picture.measure].groupby("setting")["value"].last()
    missing = [name for names in question.picture.bars.values() for name in names if name not in values]
    if missing:
        raise ValueError(f"{question.question!r} has no {question.picture.measure} of {', '.join(map(repr, missing))}")
    return {label: [float(values[name]) for name in names] for label, names in question.picture.bars.items()}


def draw(picture: Picture, values: dict[str, list[float]]) -> Figure:
    n = len(picture.series)
    figure, panel = pyplot.subplots(
        figsize=(7, 0.28 * n * len(values) + 0.12 * len(values) + 0.7), layout="constrained"
    )
    largest = max(max(some) for some in values.values())
    for i, name in enumerate(picture.series):
        at = [row + 0.8 * ((i + 0.5) / n - 0.5) for row in range(len(values))]
        lengths = [some[i] for some in values.values()]
        peer, ours = (("#9a9a9a", "#1f6fb4"), ("#c8c8c8", "#8fbfe6"))[i]
        colours = [peer] * picture.peers + [ours] * (len(values) - picture.peers)
        panel.barh(at, lengths, height=0.72 / n, color=colours, label=name)
        for place, length in zip(at, lengths, strict=True):
            panel.text(length + 0.01 * largest, place, printed(length, picture.measure), va="center", fontsize=9)
    panel.set_yticks(range(len(values)), list(values), fontsize=9)
    panel.invert_yaxis()
    panel.set_xlim(0, 1.12 * largest)
    panel.set_xlabel(picture.measure, fontsize=9)
    panel.tick_params(axis="x", labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)
    if n > 1:
        handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in ("#1f6fb4", "#8fbfe6")]
        figure.legend(handles, picture.series, loc="outside upper right", ncols=n, frameon=False, fontsize=9)
    pyplot.close(figure)
    return figure


def printed(value: float, measure: str) -> str:
    """A value as text with three digits, such as .198, 1.85 or 22.2."""
    if re.match(r"nDCG|RR@|geometric", measure):
        return f"{value:.3f}".removeprefix("0")
    return f"{value:.3g}"


def save(figure: Figure, values: dict[str, list[float]], file: Path) -> None:
    """Write the figure as an SVG file. The description in the file holds the values."""
    with pyplot.rc_context({"svg.fonttype": "none", "svg.hashsalt": "results"}):
        figure.savefig(file, metadata={"Date": None, "Description": json.dumps(values)})
    lines = file.read_text(encoding="utf-8").splitlines()
    file.write_text("\n".join(line.rstrip() for line in lines) + "\n", encoding="utf-8")


def shown(file: Path) -> dict[str, list[float]] | None:
    """The values that a picture shows, read from the description in its file. None if there is no description."""
    said = re.search(r"<dc:description>(.*?)</dc:description>", file.read_text(encoding="utf-8"), re.DOTALL)
    if said is None:
        return None
    return json.loads(said[1].replace("&quot;", '"').replace("&gt;", ">").replace("&lt;", "<").replace("&amp;", "&"))


def shows(file: Path, values: dict[str, list[float]]) -> bool:
    return json.dumps(shown(file)) == json.dumps(values)


def stale(questions: list[Question], recorded: pd.DataFrame) -> list[str]:
    """The names of the files that are not up to date: the page or pictures."""
    wrong = [] if PAGE.exists() and PAGE.read_text(encoding="utf-8") == page(questions, recorded) else [PAGE.name]
    for question in questions:
        if question.picture is None:
            continue
        file = HERE / question.picture.file
        if not file.exists() or (question.picture.bars and not shows(file, drawn(question, recorded))):
            wrong.append(question.picture.file)
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write RESULTS.md and its pictures")
    arguments = parser.parse_args()
    questions, recorded = read(), measured.read()
    if arguments.write:
        PAGE.write_text(page(questions, recorded), encoding="utf-8")
        for question in questions:
            if question.picture is not None and question.picture.bars:
                file, values = HERE / question.picture.file, drawn(question, recorded)
                file.parent.mkdir(exist_ok=True)
                if not file.exists() or not shows(file, values):  # other versions of matplotlib write other bytes
                    save(draw(question.picture, values), values, file)
    wrong = stale(questions, recorded)
    if wrong:
        sys.exit(f"{', '.join(wrong)}: not up to date; run with --write")


if __name__ == "__main__":
    main()
