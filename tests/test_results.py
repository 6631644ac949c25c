"""experiments/results.py: RESULTS.md and its pictures are up to date, and its findings state measured numbers."""

import re
import shlex

import measured
import pandas as pd
import pytest
import results
from conftest import ROOT

QUESTIONS, RECORDED = results.read(), measured.read()
NUMBER = re.compile(r"(?<![\w.,/-])(?:\d{1,3}(?:,\d{3})+|\d+(?:\.\d+)?|\.\d+)(?:e-?\d+)?(?![\w-])")
each = pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.question[:50])


def test_the_page_and_its_pictures_are_up_to_date():
    assert results.stale(QUESTIONS, RECORDED) == [], "run `python experiments/results.py --write`"
    pictures = list((results.HERE / "pictures").iterdir())
    used = {question.picture.file for question in QUESTIONS if question.picture}
    assert {f"pictures/{file.name}" for file in pictures} <= used
    assert sum(file.stat().st_size for file in pictures) < 500_000


@each
def test_a_finding_says_what_was_measured(question):
    """Each number of a finding is a value (or a percentage of it), a p-value or an n of its rows. Other numbers must be
    in the question, the settings or the notes."""
    rows = question.rows(RECORDED)
    text = " ".join([question.question, *rows["setting"], *(note["text"] for note in question.notes)])
    values = [*rows["value"], *(100 * rows["value"]), *rows["p"].dropna(), *rows["n"].dropna()]
    for bound in re.findall(r"p < (\.\d+)", question.finding):
        assert (rows["p"] < float(bound)).any()
    for number in set(numbers(re.sub(r"p < \.\d+", "", question.finding))) - set(numbers(text)):
        half = 0.501 * 10 ** -len(number.partition(".")[2])
        assert any(abs(float(number) - value) <= half for value in values), number


def numbers(text):
    return [number.replace(",", "") for number in NUMBER.findall(text)]


@each
def test_a_command_names_what_there_is(question):
    words = shlex.split(question.command)
    assert words[0] in ("python", "pytest", "make"), question.command
    files = [word for word in words if re.search(r"\.(py|ipynb)$", word)]
    for file in files:
        assert (ROOT / file).exists(), file
    if words[0] == "python":
        source = (ROOT / files[0]).read_text(encoding="utf-8")
        assert all(f'"{word}"' in source for word in words if word.startswith("--"))
    if words[0] == "make":
        assert re.search(f"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


def test_the_links_of_the_page_lead_somewhere():
    text = results.PAGE.read_text(encoding="utf-8")
    places = {results.anchor(heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) > len(QUESTIONS)
    for link in links:
        assert link[1:] in places if link.startswith("#") else (results.HERE / link).exists(), link


ENTRY = {"section": "Speed", "question": "Is it fast?", "finding": "It takes 2 s.", "command": "make demo"}
ENTRY["notes"] = [{"date": "2026-11-26", "text": "By hand."}]
ROWS = pd.DataFrame(
    [("Is it fast?", "ours", 1, "seconds", 3.0), ("Is it fast?", "ours", 1, "seconds", 2.0)],
    columns=["question", "setting", "n", "measure", "value"],
).assign(p=None, seconds=None, machine="2 cores", threads=1, commit="", date=["2026-11-25", "2026-11-26"])


def test_a_question_is_shown_with_the_newest_of_its_values():
    picture = results.Picture("a.svg", "seconds", {"ours": ["ours"]})
    question = results.Question(**ENTRY, picture=picture)
    page = results.page([question], ROWS)
    assert "- [Is it fast?](#is-it-fast)\n" in page and "\n### Is it fast?\n\nIt takes 2 s.\n" in page
    assert (
        "![Is it fast?](a.svg)" in page
        and "`make demo`" in page
        and "Notes (1 value in measured.csv, 2026-11-26)" in page
    )
    assert results.drawn(question, ROWS) == {"ours": [2.0]}


def test_a_question_without_rows_and_rows_without_a_question_are_named():
    question = results.Question(**ENTRY)
    with pytest.raises(ValueError, match="no row of 'Is it fast\\?'"):
        results.page([question], ROWS.assign(question="Is it slow?"))
    with pytest.raises(ValueError, match="no entry for 'Is it slow\\?'"):
        results.page([question], pd.concat([ROWS, ROWS.assign(question="Is it slow?")]))
    lost = results.Question(**ENTRY, picture=results.Picture("a.svg", "seconds", {"theirs": ["theirs"]}))
    with pytest.raises(ValueError, match="'Is it fast\\?' has no seconds of 'theirs'"):
        results.drawn(lost, ROWS)


def test_a_machine_is_named_with_its_threads():
    assert results.named("2 cores, AVX2, VNNI, no GPU", [1]) == "2 cores with AVX2 and VNNI (1 thread)"
    assert results.named("2 cores", [1, 2]) == "2 cores (1 or 2 threads)"
    assert results.named("1 of 2 cores, AMX", []) == "1 of 2 cores with AMX"


def test_an_entry_may_take_the_rows_of_several_questions():
    two = pd.concat([ROWS.assign(question=f"Is it fast on {name}?") for name in ("dl19", "dl21")])
    question = results.Question(**ENTRY, recorded=["Is it fast on *?"])
    assert question.rows(two)["setting"].tolist() == ["ours, dl19", "ours, dl21"]
    assert "Is it fast?" in results.page([question], two)


def test_a_picture_keeps_the_values_that_it_shows(tmp_path):
    values = {"ours & <theirs>": [2.0, 3.5], "both": [1.0, 0.25]}
    picture = results.Picture("a.svg", "nDCG@10", {}, ("a", "b"))
    results.save(results.draw(picture, values), values, tmp_path / "a.svg")
    assert results.shown(tmp_path / "a.svg") == values and results.shows(tmp_path / "a.svg", values)
    assert not results.shows(tmp_path / "a.svg", dict(reversed(values.items())))
    assert ">.250<" in (tmp_path / "a.svg").read_text()
