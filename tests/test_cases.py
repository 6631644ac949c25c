"""../shared/cases: each script tries a fault that was found before, and must print "PASS"."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, SHARED, TINY

CASES = SHARED.parent / "cases"
RENAMED = {"at_once": "micro_batch"}  # an older name of a setting, in the scripts -> its name today


def scripts():
    found = [path for path in sorted(CASES.glob("*.py")) if not path.name.startswith("_")]
    absent = pytest.mark.skip(reason="needs the scripts in ../shared/cases, which are not part of the repository")
    return [pytest.param(path, id=path.stem) for path in found] or [pytest.param(None, marks=absent)]


@pytest.mark.shared
@pytest.mark.slow  # seven minutes for all of them
@pytest.mark.parametrize("script", scripts())
def test_the_case_passes(script, tmp_path):
    text = script.read_text(encoding="utf-8")
    today = re.sub(r"\b(" + "|".join(RENAMED) + r")\b", lambda found: RENAMED[found[1]], text)
    if today != text:
        script = tmp_path / script.name
        script.write_text(today, encoding="utf-8")
    given = {
        "TINY": str(TINY),
        "GOLDEN": str(SHARED.parent / "golden"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(CASES)]),
    }
    done = subprocess.run(
        [sys.executable, str(script)], env=os.environ | given, cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    verdicts = re.findall(r"^(?:PASS|FAIL)\b", done.stdout, re.MULTILINE)
    assert verdicts[-1:] == ["PASS"], done.stdout[-3_000:] + done.stderr[-3_000:]
