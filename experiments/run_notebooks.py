"""Runs notebooks from top to bottom, and keeps their outputs without warnings, progress bars and times.

python experiments/run_notebooks.py                        each in the profile that its first cell names, in place
python experiments/run_notebooks.py --profile small --output FOLDER                            on any machine, offline
python experiments/run_notebooks.py --profile paper --output FOLDER experiments/trec_dl.ipynb
"""

import argparse
import os
import re
import shutil
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all notebooks with profiles")
    parser.add_argument("--profile", help="default: the profile that a notebook's first cell names")
    parser.add_argument("--output", type=Path, default=HERE, help="folder for the notebooks with their outputs")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for path in arguments.notebooks or notebooks():
        begun = time.perf_counter()
        profile = arguments.profile or named_profile(path)
        nbformat.write(run(path, HERE, PROFILE=profile), arguments.output / path.name)
        print(f"{path.name}, {profile}: {time.perf_counter() - begun:.0f} s", flush=True)


def notebooks() -> list[Path]:
    return [path for path in sorted(HERE.glob("*.ipynb")) if named_profile(path)]


def named_profile(path: Path) -> str | None:
    """The profile that the cell tagged `parameters` names, or None. The outputs in the repository are those of this
    profile."""
    cells = nbformat.read(path, as_version=4).cells
    chosen = next((cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])), "")
    found = re.match(r'PROFILE = "(\w+)"', chosen)
    return found and found[1]


def run(path: Path, folder: Path, **parameters: str) -> nbformat.NotebookNode:
    """Run a notebook in `folder`. Returns the notebook with its new outputs. parameters: values that replace those in
    the cell tagged `parameters`.

    In the small profile, the notebook's earlier results are deleted first. In the other profiles, the notebook uses its
    earlier results again. An exception in a cell is raised.
    """
    notebook = nbformat.read(path, as_version=4)
    chosen = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    written = chosen.source
    chosen.source += "\n" + "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    if parameters.get("PROFILE") == "small":
        shutil.rmtree(folder / "results" / "small" / path.stem, ignore_errors=True)
    paths = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    client = NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(folder)}}, record_timing=False)
    client.execute(env=os.environ | {"PYTHONPATH": paths})
    chosen.source = written
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


if __name__ == "__main__":
    main()
