"""The map of who imports whom, executed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "pyterrier_lit"
ROOMS = {  # room: the rooms it may import
    "__init__": {"cross_encoder", "lit5_distill", "lit5_score", "pe_rank"},
    "__main__": {
        "files.candidates",
        "cross_encoder",
        "lit5_distill",
        "lit5_score",
        "pe_rank",
        "reranker",
        "files.runs",
        "files.tirex",
        "training",
        "training.data",
    },
    "batching": set(),
    "files.candidates": set(),
    "models": set(),
    "models.checkpoints": set(),
    "cross_encoder": {"batching", "models.checkpoints", "frames", "models.pairs", "reranker"},
    "decoding": set(),
    "models.t5": {"batching"},
    "files": set(),
    "frames": set(),
    "lit5_distill": {
        "batching",
        "models.checkpoints",
        "decoding",
        "models.t5",
        "frames",
        "order",
        "reranker",
        "windows",
    },
    "lit5_score": {"batching", "models.checkpoints", "models.t5", "frames", "reranker"},
    "order": set(),
    "models.pairs": set(),
    "models.passage_vectors": set(),
    "models.pe_checkpoint": {"models.checkpoints", "models.pe_prompts", "models.text_encoder", "models.vector_lm"},
    "models.pe_prompts": set(),
    "pe_rank": {
        "batching",
        "models.checkpoints",
        "decoding",
        "frames",
        "order",
        "models.passage_vectors",
        "models.pe_checkpoint",
        "reranker",
        "models.vector_lm",
        "windows",
    },
    "reranker": set(),
    "files.runs": {"batching", "files.candidates"},
    "scale": {"reranker"},
    "models.text_encoder": set(),
    "training": {"training.distil"},
    "training.cross_encoder": {
        "batching",
        "cross_encoder",
        "frames",
        "models.pairs",
        "training.data",
        "training.losses",
        "training.trainer",
    },
    "training.data": {"files.candidates", "frames"},
    "training.distil": {"frames", "reranker", "training.data", "training.trainer"},
    "training.fid": {"batching", "models.checkpoints", "models.t5", "training.losses"},
    "training.lit5_distill": {
        "models.checkpoints",
        "models.t5",
        "frames",
        "lit5_distill",
        "training.data",
        "training.fid",
        "training.trainer",
    },
    "training.lit5_score": {
        "models.checkpoints",
        "models.t5",
        "frames",
        "lit5_score",
        "training.fid",
        "training.trainer",
    },
    "training.losses": set(),
    "training.pe_rank": {
        "batching",
        "frames",
        "models.pe_checkpoint",
        "models.pe_prompts",
        "pe_rank",
        "training.data",
        "training.losses",
        "training.trainer",
    },
    "training.trainer": {"models.checkpoints"},
    "files.tirex": {"files.candidates", "models.checkpoints", "reranker", "files.runs"},
    "models.vector_lm": set(),
    "windows": set(),
}
HEAVY = (
    "transformers",
    "accelerate",
    "ray",
    "sentence_transformers",
    "pyterrier_pisa",
    "matplotlib",
    "huggingface_hub",
    "tira",
    "tirex_tracker",
    "pyterrier_dr",
    "sentencepiece",
    "scipy",
    "ir_datasets",
)


def source(room):
    path = PACKAGE / room.replace(".", "/")
    return (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")


def imports(room):
    """Our modules that a room's source imports."""
    for node in ast.walk(ast.parse(source(room))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "pyterrier_lit")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{room} imports relatively"
            if (node.module or "").split(".")[0] == "pyterrier_lit":
                rooms = (f"{node.module}.{alias.name}" for alias in node.names)
                yield from (name if name.removeprefix("pyterrier_lit.") in ROOMS else node.module for name in rooms)


def test_every_room_is_on_the_map():
    files = [path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py")]
    assert {file.removesuffix("/__init__").replace("/", ".") for file in files} == ROOMS.keys()


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_lies_below_it(room):
    assert {module.removeprefix("pyterrier_lit.") for module in imports(room)} <= ROOMS[room]


def test_only_frames_knows_pandas():
    for room in ROOMS:
        names = {
            alias.name
            for node in ast.walk(ast.parse(source(room)))
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        assert room == "frames" or "numpy" not in names
        assert (
            room
            in (
                "frames",
                "training.data",
                "cross_encoder",
                "lit5_distill",
                "lit5_score",
                "pe_rank",
                "scale",
                "training.distil",
            )
            or "pandas" not in names
        )  # training.data puts targets beside frames; rerankers and estimators name the frame in a signature


def test_importing_the_package_loads_nothing_heavy():
    code = f"import sys, pyterrier_lit; print([name for name in {HEAVY!r} if name in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_each_room_says_first_what_it_is():
    for room in set(ROOMS) - {"__init__"}:
        assert source(room).startswith('"""'), room
