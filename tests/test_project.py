"""The project's own files: the map in CONTRIBUTING.md, and version numbers that several files repeat."""

import ast
import re
import shutil
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


def test_all_files_have_this_version_and_a_tag_with_another_does_not_go_out():
    def release(tag):
        return subprocess.run([sys.executable, ROOT / ".ci" / "release", tag], capture_output=True, text=True)

    assert release(f"v{pyterrier_lit.__version__}").returncode == 0
    refused = release("v0.0.9")
    assert refused.returncode and refused.stderr.splitlines() == [
        f"{name} has {pyterrier_lit.__version__}; the tag is v0.0.9"
        for name in ("pyterrier_lit/__init__.py", "CITATION.cff", "CHANGELOG.md")
    ]


def test_a_released_package_links_to_its_repository(tmp_path):
    changed = ("pyproject.toml", "README.md", "pyterrier_lit/pt_docs/index.rst")
    for name in (".ci/address", *changed):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    address = "https://example.org/us/lit"
    subprocess.run([sys.executable, tmp_path / ".ci" / "address", address, "v1"], check=True)
    project, readme, index = ((tmp_path / name).read_text(encoding="utf-8") for name in changed)
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert tomllib.loads(project)["project"] == declared | {
        "urls": declared["urls"]
        | {"Repository": address, "Issues": f"{address}/issues", "Changelog": f"{address}/blob/v1/CHANGELOG.md"}
    }
    files = re.findall(rf"\]\({address}/(blob|raw)/v1/([^)]*)\)", readme)
    assert files and all((ROOT / name).exists() for _, name in files)
    assert {name for kind, name in files if kind == "raw"} == {"experiments/demo.png"}
    assert not re.search(r"\]\((?!https:)", readme)
    assert index.endswith(f"   Repository <{address}>\n")


def test_the_citation_has_the_four_papers():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert len(citation["references"]) == 4


def test_a_release_is_built_checked_on_each_supported_python_and_published_by_a_tag_alone():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert workflow[True] == {"push": {"tags": ["v*"]}}  # YAML 1.1 reads the key `on` as true
    assert workflow["jobs"]["publish"]["needs"] == "check" and workflow["jobs"]["check"]["needs"] == "build"
    pythons = workflow["jobs"]["check"]["strategy"]["matrix"]["python"]
    classifiers = [line for line in project["classifiers"] if re.search(r":: 3\.\d+$", line)]
    assert classifiers == [f"Programming Language :: Python :: {python}" for python in pythons]
