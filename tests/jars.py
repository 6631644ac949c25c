"""Starts Terrier without a network, from jars on this machine. As a script, it also indexes and reranks three texts.

This module imports nothing from pytest or the tests, since `make wheel` runs it in an environment with only the wheel.
"""

import os
import re
import shutil
import tempfile
from pathlib import Path

import pandas as pd
import pyterrier as pt

ROOT = Path(__file__).resolve().parents[1]
JARS = {"terrier-assemblies-": "-jar-with-dependencies.jar", "terrier-python-helper-": ".jar"}


def start(home: Path) -> str | None:
    """Start Terrier in this process, with the empty folder `home` as PyTerrier's home. Returns None, or the reason why
    Terrier cannot be started."""
    if shutil.which("java") is None and "JAVA_HOME" not in os.environ:
        return "needs Java 11 or newer"
    folders = [Path(pt.io.pyterrier_home()), ROOT.parent / "shared" / "terrier"]
    folder = next((folder for folder in folders if all(newest(folder, name) for name in JARS)), None)
    if folder is None:
        return "needs Terrier's jars in PyTerrier's home (run pt.java.init() with a network) or in ../shared/terrier"
    for jar in folder.glob("terrier-*.jar"):
        (home / jar.name).symlink_to(jar.resolve())
    os.environ["PYTERRIER_HOME"] = str(home)
    version, helper = (newest(folder, name) for name in JARS)
    pt.terrier.set_version(version)
    pt.terrier.set_helper_version(helper)
    pt.java.init()
    return None


def newest(folder: Path, name: str) -> str | None:
    versions = [path.name[len(name) : -len(JARS[name])] for path in folder.glob(f"{name}*{JARS[name]}")]
    return max(versions, key=lambda version: [int(number) for number in re.findall(r"\d+", version)], default=None)


def main() -> None:
    from pyterrier_lit import CrossEncoder

    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder, "home")
        home.mkdir()
        reason = start(home)
        if reason is not None:
            print(f"not tried with Terrier: {reason}")
            return
        docs = [{"docno": f"d{i}", "text": f"{word} a list"} for i, word in enumerate(["sort", "reverse", "copy"])]
        index = pt.terrier.TerrierIndex(str(Path(folder, "index")))
        index.indexer(meta={"docno": 20, "text": 100}).index(iter(docs))
        model = CrossEncoder(str(ROOT / "experiments" / "tiny" / "cross-encoder"), device="cpu")
        found = (index.bm25() >> index.text_loader() >> model)(
            pd.DataFrame([["q", "sort list"]], columns=["qid", "query"])
        )
        print(found[["docno", "text", "score", "rank"]])
        assert found["docno"][found["rank"] == 0].tolist() == ["d0"]


if __name__ == "__main__":
    main()
