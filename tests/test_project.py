"""The project's own files: the tree in CONTRIBUTING.md, and versions that stand in two places."""

import re
import subprocess
import tomllib

import pytest
import yaml
from conftest import ROOT

import pyterrier_lit


def tree(text):
    """The paths of an indented list, two blanks a level; a folder ends in a slash."""
    parents, paths = [], []
    for line in text.splitlines():
        depth = (len(line) - len(line.lstrip(" "))) // 2
        parents[depth:] = [line.split()[0]]
        paths.append("".join(parents))
    return paths


def test_the_tree_has_a_line_for_every_file():
    git = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if git.returncode:
        pytest.skip("no checkout of git")
    written = tree(
        re.search(r"```\n(README\.md .*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.S)[1]
    )
    # What has nothing below it: a file, or a folder whose line stands for all that it holds
    ends = {path for path in written if not any(other != path and other.startswith(path) for other in written)}
    folders = tuple(path for path in ends if path.endswith("/"))
    found = {next((folder for folder in folders if file.startswith(folder)), file) for file in git.stdout.splitlines()}
    assert found == ends


def test_the_lowest_versions_are_those_that_are_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    lowest = {tuple(one.split(">=")) for one in wanted if ">=" in one}
    for name, pinned in (line.split("==") for line in (ROOT / "constraints-lowest.txt").read_text().split()):
        (bound,) = (bound for package, bound in lowest if package == name)
        assert re.fullmatch(rf"{re.escape(bound)}(\.0)*", pinned), name
        lowest.remove((name, bound))
    assert not lowest


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == pyterrier_lit.__version__
    assert len(citation["references"]) == 4
