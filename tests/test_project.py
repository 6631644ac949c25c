"""The project's own files: the map in CONTRIBUTING.md, and versions that stand in two places."""

import ast
import re
import subprocess
import sys
import tomllib

import pytest
import yaml
from conftest import ROOT

import pyterrier_lit


def test_the_map_of_files_is_the_one_that_make_tree_prints():
    if subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True).returncode:
        pytest.skip("no checkout of git")
    printed = subprocess.run([sys.executable, ROOT / ".ci" / "tree"], capture_output=True, text=True, check=True).stdout
    assert f"```text\n{printed}```" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), "run `make tree`"


def test_every_module_says_what_it_is_in_its_first_line():
    for path in (ROOT / "pyterrier_lit").rglob("*.py"):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        assert docstring or path.name == "__init__.py", path


def test_the_lowest_versions_are_those_that_are_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    lowest = {tuple(re.sub(r"\[.*?\]", "", one).split(">=")) for one in wanted if ">=" in one}
    for name, pinned in (line.split("==") for line in (ROOT / "constraints-lowest.txt").read_text().split()):
        (bound,) = (bound for package, bound in lowest if package == name)
        assert re.fullmatch(rf"{re.escape(bound)}(\.0)*", pinned), name
        lowest.remove((name, bound))
    assert not lowest


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == pyterrier_lit.__version__
    assert len(citation["references"]) == 4
