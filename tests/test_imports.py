"""Which modules of the package each module may import. A module imports only from its own floor or from lower ones."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "pyterrier_lit"


def source(module):
    path = PACKAGE / module.replace(".", "/")
    return (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")


def files():
    paths = [path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py")]
    return sorted(path.removesuffix("/__init__").replace("/", ".") for path in paths)


MODULES = files()
RERANKERS = [
    node.module.split(".")[-1] for node in ast.parse(source("__init__")).body if isinstance(node, ast.ImportFrom)
]
MODELS = {module for module in MODULES if module.startswith("models.")}
READING = {f"models.{module}" for module in ("checkpoints", "errors", "library", "tokenization")}
MAP = {  # module -> the modules that it may import
    # Ground floor: modules that need no reranker
    "frames": set(),
    "order": set(),
    "signals": set(),
    "windows": set(),
    "batching": set(),
    "decoding": set(),
    "files": set(),
    "files.lines": set(),
    "files.candidates": {"files.lines"},
    "files.teachers": {"files.candidates", "files.lines", "order"},
    "files.locks": set(),
    "files.runs": {"batching", "files.candidates", "files.locks"},
    "models": set(),
    "models.errors": set(),
    "models.pooling": set(),
    "models.passage_vectors": set(),
    "models.attention": set(),
    "models.vector_lm": {"models.attention"},
    "models.devices": {"models.errors"},
    "models.library": {"models.errors"},
    "models.tokenization": {"models.errors"},
    "models.checkpoints": READING - {"models.checkpoints"},
    "models.hub": {"models.checkpoints", "models.errors"},
    "models.sentence_files": READING,
    "models.pairs": {"batching"} | READING,
    "models.pe_prompts": READING,
    "models.t5_pieces": READING,
    "models.t5": {"batching", "models.attention", "models.t5_pieces"} | READING,
    "models.lit5": {"models.checkpoints", "models.t5"},
    "models.text_encoder": {"batching", "models.pooling"} | READING,
    "models.pair_networks": {"models.attention", "models.checkpoints", "models.pooling"},
    "models.int8": {"models.checkpoints", "models.errors", "models.pair_networks"},
    "models.pair_encoder": {"models.devices", "models.int8", "models.pair_networks", "models.pairs"}
    | {"models.sentence_files"}
    | READING,
    "models.text_lm": {"models.pe_prompts", "models.vector_lm"} | READING,
    "models.export": {"models.library", "models.pair_encoder", "models.pair_networks"},
    "models.pe_checkpoint": {"models.pe_prompts", "models.text_encoder", "models.vector_lm"} | READING,
    "training.losses": set(),
    "training.lora": set(),
    "training.data": {"files.candidates", "files.lines", "files.teachers", "frames"},
    "training.stored": {"files.candidates", "frames", "training.data"},
    "training.trainer": {"models.devices"},
    # First floor: the base classes of the rerankers
    "reranker": {"frames", "models.checkpoints", "models.devices", "models.hub"},
    "listwise": {"batching", "decoding", "frames", "order", "reranker", "windows"},
    # Second floor: the rerankers
    **{
        name: {"batching", "decoding", "frames", "listwise", "order", "reranker", "windows"} | MODELS
        for name in RERANKERS
    },
    "rank_mistral": {"decoding", "frames", "listwise", "models.text_lm", "order", "windows"},  # PE-Rank's baseline
    # Third floor: modules that use a reranker, and the training of each reranker
    "files.rerankers": {"models.devices", "reranker"},
    "files.tirex": {"files.candidates", "files.runs", "models.devices", "reranker"},
    "training": {"training.data", "training.distil", "training.stored"},
    "training.distil": {"frames", "reranker", "training.data", "training.stored", "training.trainer"},
    "training.fid": {"batching", "models.t5", "training.losses", "training.trainer"},
    **{
        f"training.{name}": {name, "batching", "decoding", "frames", "training.data", "training.fid", "training.losses"}
        | {"training.lora", "training.trainer"}
        | MODELS
        for name in RERANKERS
    },
    "training.rank_mistral": {"batching", "frames", "models.pe_prompts", "models.text_lm", "rank_mistral"}
    | {"training.data", "training.trainer"},
    # Fourth floor: modules for users
    "scale": {"frames", "reranker", "signals"},
    "__main__": {"pyterrier_lit", "files.candidates", "files.rerankers", "files.runs", "files.tirex", "reranker"}
    | {"files.teachers", "training", "training.data"},
    "__init__": set(RERANKERS),
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
    "openvino",
    "nncf",
)


def imports(module):
    for node in ast.walk(ast.parse(source(module))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "pyterrier_lit")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            if (node.module or "").split(".")[0] == "pyterrier_lit":
                names = (f"{node.module}.{alias.name}" for alias in node.names)
                yield from (name if name.removeprefix("pyterrier_lit.") in MAP else node.module for name in names)


def test_every_module_is_on_the_map():
    assert set(MODULES) == MAP.keys()


@pytest.mark.parametrize("module", MAP)
def test_a_module_imports_only_what_lies_below_it(module):
    assert {name.removeprefix("pyterrier_lit.") for name in imports(module)} <= MAP[module]


def test_pandas_stops_in_frames():
    for module in MAP:
        nodes = [node for node in ast.walk(ast.parse(source(module))) if isinstance(node, ast.Import)]
        names = {alias.name for node in nodes for alias in node.names}
        assert module == "frames" or "numpy" not in names, module
        # reranker, cross_encoder and scale name pd.DataFrame only in signatures
        known = ("frames", "training.data", "training.stored", "reranker", "cross_encoder", "scale", "training.distil")
        assert module in known or "pandas" not in names, module


def test_importing_the_package_loads_nothing_heavy_and_leaves_forks_alone():
    code = f"""
import sys, os
registered = []
os.register_at_fork = lambda **hooks: registered.append(hooks)
import pyterrier_lit
print([name for name in {HEAVY!r} if name in sys.modules])
print([hook for hook in registered if "pyterrier_lit" in str(hook)])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "[]"]


def test_each_module_says_first_what_it_is():
    for module in set(MAP) - {"__init__"}:
        assert source(module).startswith('"""'), module
