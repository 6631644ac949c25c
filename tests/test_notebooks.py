"""experiments/*.ipynb: each notebook runs, and is committed with the outputs of one run and without local paths."""

import os
import re
import shutil
import subprocess
import sys

import nbformat
import pytest
import run_notebooks
from conftest import ROOT

NOTEBOOKS = run_notebooks.notebooks()
PUBLIC_RUNS = ("trec_dl", "beir", "tirex")

pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture
def offline(monkeypatch):
    for name, value in {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.slow
def test_a_notebook_runs_in_the_small_profile(path, tmp_path, offline):
    notebook = run_notebooks.run(path, tmp_path, PROFILE="small")
    assert not [output for cell in code(notebook) for output in cell.outputs if output.output_type == "error"]


@pytest.mark.slow  # some minutes each, half an hour for all
@pytest.mark.parametrize("profile", ["paper", "runs"])
def test_a_notebook_runs_with_stand_ins_for_hub_and_collections(path, profile, tmp_path, offline):
    """Runs all cells in a copy of experiments/. In this copy, workplace.py installs the stand-ins of standins.py."""
    if profile == "runs" and path.stem not in PUBLIC_RUNS:
        pytest.skip("is as in the small profile")
    folder = tmp_path / "repository" / "experiments"
    shutil.copytree(run_notebooks.HERE, folder, ignore=shutil.ignore_patterns("tiny", "results", "data"))
    (folder / "tiny").symlink_to(run_notebooks.HERE / "tiny")
    shutil.copy(ROOT / "tests" / "standins.py", folder)
    with open(folder / "workplace.py", "a", encoding="utf-8") as workplace:
        workplace.write("\nimport standins\n\nstandins.install()\n")
    documents = "200" if path.stem == "scaling" else "30"  # scaling.ipynb reranks 100 passages per query
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "STANDIN_DOCUMENTS": documents}
    subprocess.run([sys.executable, folder / "standins.py"], cwd=folder, env=environment, check=True)
    command = [
        sys.executable,
        folder / "run_notebooks.py",
        "--profile",
        profile,
        "--output",
        tmp_path,
        folder / path.name,
    ]
    subprocess.run(command, cwd=folder, env=environment, check=True)
    ran = code(nbformat.read(tmp_path / path.name, as_version=4))
    assert not [output for cell in ran for output in cell.outputs if output.output_type == "error"]
    assert "left out" not in "".join(output.get("text", "") for cell in ran for output in cell.outputs)


def test_a_notebook_is_committed_with_the_outputs_of_one_run_and_a_choice_of_profile(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.cells[0].source.startswith("# ") and "PROFILE" in code(notebook)[0].source
    assert code(notebook)[0].metadata["tags"] == ["parameters"]
    assert run_notebooks.named_profile(path) == ("runs" if path.stem in PUBLIC_RUNS else "small")
    assert [cell.execution_count for cell in code(notebook)] == [*range(1, len(code(notebook)) + 1)]
    assert {output.output_type for cell in code(notebook) for output in cell.outputs} >= {"display_data"}


def test_a_notebook_has_no_branch_on_its_profile(path):
    for cell in code(nbformat.read(path, as_version=4))[1:]:
        assert "PROFILE" not in re.sub(r"workplace\.enter\(\n    PROFILE,", "", cell.source)


def test_a_notebook_names_no_machine(path):
    text = path.read_text(encoding="utf-8")
    assert not re.findall(r"(?<![\w.:/])/(?:home|root|tmp|work|usr|opt|mnt|Users|var|data)/[^\s\"\\]*", text)
    assert "stderr" not in text


def test_trec_dl_shows_first_what_is_reproduced_and_then_what_waits(path):
    if path.stem != "trec_dl":
        pytest.skip("is of trec_dl alone")
    notebook = nbformat.read(path, as_version=4)
    tables = [str(output["data"]) for cell in code(notebook) for output in cell.outputs if "data" in output]
    assert "waiting" in tables[0] and "within" in tables[1] and "outside" not in tables[1]
    text = "".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert text.index("## What is reproduced") < text.index("## What waits for a GPU")


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]
