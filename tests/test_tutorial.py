"""experiments/tutorial.ipynb: it runs, imports no other file of experiments/, and is committed with its outputs."""

import ast
import re

import nbformat
import pytest
import run_notebooks

TUTORIAL = run_notebooks.HERE / "tutorial.ipynb"
TOLD = ("the same first ten for all questions: True", "the same scores after loading: True")


@pytest.mark.slow
def test_the_tutorial_runs_in_a_checkout(tmp_path, monkeypatch):
    for package in ("pyterrier_pisa", "pyterrier_caching", "accelerate"):
        pytest.importorskip(package, reason="needs the experiments extra")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "tiny").symlink_to(run_notebooks.HERE / "tiny")
    ran = run_notebooks.run(TUTORIAL, tmp_path)
    assert all(told in printed(ran) for told in TOLD)


def test_the_tutorial_imports_nothing_of_ours_but_the_package():
    imported = set()
    for cell in code(nbformat.read(TUTORIAL, as_version=4)):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Import):
                imported |= {name.name.split(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
    assert "pyterrier_lit" in imported
    assert imported.isdisjoint(path.stem for path in run_notebooks.HERE.iterdir())


def test_the_tutorial_is_committed_with_the_outputs_of_one_run():
    notebook = nbformat.read(TUTORIAL, as_version=4)
    nbformat.validate(notebook)
    cells = code(notebook)
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)
    assert all(told in printed(notebook) for told in TOLD)
    text = TUTORIAL.read_text(encoding="utf-8")
    assert "stderr" not in text
    assert not re.findall(r"(?<![\w.:/])/(?:home|root|tmp|work|usr|opt|mnt|Users|var|data)/[^\s\"\\]*", text)


def printed(notebook):
    return "".join(output.get("text", "") for cell in code(notebook) for output in cell.outputs)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]
