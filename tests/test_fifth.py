"""A fifth reranker needs two files and one name: in a copy of the package, Toy then passes the tests of a reranker."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from test_imports import PACKAGE

FIFTH = ROOT / "tests" / "fifth"


@pytest.fixture
def package(tmp_path):
    """A folder with a copy of the package to which Toy was added."""
    copy = shutil.copytree(PACKAGE, tmp_path / "pyterrier_lit", ignore=shutil.ignore_patterns("__pycache__", "pt_docs"))
    shutil.copy(FIFTH / "toy.py", copy / "toy.py")
    shutil.copy(FIFTH / "toy_training.py", copy / "training" / "toy.py")
    listed = (copy / "__init__.py").read_text(encoding="utf-8")
    listed = listed.replace("\n__all__", "from pyterrier_lit.toy import Toy\n\n__all__").replace(
        '"PERank"]', '"PERank", "Toy"]'
    )
    (copy / "__init__.py").write_text(listed, encoding="utf-8")
    return tmp_path


def test_it_has_the_contract_the_command_line_training_and_ray(package):
    paths = os.pathsep.join(map(str, (package, ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--override-ini=addopts=", "-p", "no:cacheprovider", str(FIFTH / "check.py")],
        env=os.environ | {"PYTHONPATH": paths, "RAY_USAGE_STATS_ENABLED": "0"},
        cwd=package,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3_000:] + done.stderr[-1_000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 30


def test_nothing_else_of_the_package_is_touched(package):
    def contents(folder):
        return {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in folder.rglob("*.py")}

    before, after = contents(PACKAGE), contents(package / "pyterrier_lit")
    assert after.keys() - before.keys() == {"toy.py", "training/toy.py"}
    assert [name for name in before if before[name] != after[name]] == ["__init__.py"]
