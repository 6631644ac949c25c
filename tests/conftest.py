"""Fixtures for the tests: small checkpoints, small result frames, Terrier, and a stand-in for the hub."""

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PT_TEST_TRANSFORMER_REPORTS": "0"}

import gzip
import importlib.util
import json
import shutil
import signal
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import hypothesis
import jars
import pandas as pd
import pyterrier as pt
import pytest
import tokenizers
import torch
import transformers
from hub import Hub

from pyterrier_lit import CrossEncoder, LiT5Distill, LiT5Score, PERank, __main__
from pyterrier_lit.reranker import Reranker

pt.documentation._cached_objects_inv = {}  # otherwise schematics download an inventory
hypothesis.settings.register_profile("unhurried", parent=hypothesis.settings(), deadline=None)
hypothesis.settings.load_profile("unhurried")  # no deadlines, since other jobs may run on the machine
torch.set_num_threads(1)  # tiny models: threads would only wait for each other
signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # a shell's background job ignores Ctrl-C, and so would the tests

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,:'[]?-"


def pytest_configure(config):
    # The checkpoints in golden/ cause this warning
    config.addinivalue_line("filterwarnings", "ignore:neither the name nor the config of:UserWarning")


def pytest_runtest_setup(item):
    """Skip the tests of Terrier unless pytest runs with `-m terrier`."""
    if item.get_closest_marker("terrier") and item.config.option.markexpr != "terrier":
        pytest.skip("Java stays in the process that it starts in: run pytest -m terrier")


class Known(NamedTuple):
    """A reranker, and checkpoints of it."""

    kind: type[Reranker]
    random: Path  # small, for tests in which any weights do
    golden: Path  # the reference's results for it are in golden/
    tiny: Path  # trained on Python's documentation

    @property
    def command(self) -> str:
        """The name on the command line."""
        return next(name for name, kind in __main__.RERANKERS.items() if kind is self.kind)


ELECTRA, PE_RANK = GOLDEN / "cross_encoder" / "ckpt" / "electra_bias", GOLDEN / "pe_rank" / "checkpoint"
T5, T5_TRAINED = GOLDEN / "lit5" / "tiny-random", GOLDEN / "lit5" / "tiny-trained"
TINY = ROOT / "experiments" / "tiny"
# Tests that run once per reranker run with these
RERANKERS = {
    "CrossEncoder": Known(CrossEncoder, ELECTRA, ELECTRA, TINY / "cross-encoder"),
    "LiT5Distill": Known(LiT5Distill, T5, T5_TRAINED, TINY / "lit5-distill"),
    "LiT5Score": Known(LiT5Score, T5, T5_TRAINED, TINY / "lit5-score"),
    "PERank": Known(PERank, PE_RANK, PE_RANK, TINY / "pe-rank"),
}
CHECKPOINTS = {known.command: known.golden for known in RERANKERS.values()}


@pytest.fixture(scope="session", params=RERANKERS)
def small(request):
    """small(...): a reranker with these arguments and a small checkpoint. A test runs once for each reranker. All calls
    share the loaded checkpoint, unless they set an argument that changes what is loaded."""
    kind, folder, *_ = RERANKERS[request.param]
    read = kind(str(folder), device="cpu")

    def build(**arguments):
        reranker = kind(**{"model": str(folder), "device": "cpu"} | arguments)
        if not set(kind.loads_from) & arguments.keys():
            reranker.hold(read.load())
        return reranker

    return build


def write_jsonl(path, records):
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return path


@pytest.fixture(scope="session")
def electra(tmp_path_factory):
    """The folder of a random ELECTRA with 2 layers. Each of its tokens is one character."""
    folder = tmp_path_factory.mktemp("electra")
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    (folder / "vocab.txt").write_text("\n".join(pieces), encoding="utf-8")
    tokenizers.BertWordPieceTokenizer(str(folder / "vocab.txt")).save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    config = transformers.ElectraConfig(
        vocab_size=len(pieces),
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        initializer_range=0.3,
    )
    transformers.ElectraModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def cross_encoder_folder(electra, tmp_path_factory):
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("cross-encoder")
    CrossEncoder.from_backbone(str(electra), device="cpu").save(folder)
    return folder


@pytest.fixture(scope="session")
def backbone(tmp_path_factory):
    """backbone(kind): the folder of a tiny random causal language model of transformers, with the tokenizer of
    golden/pe_rank."""

    def build(kind):
        folder = tmp_path_factory.mktemp(kind)
        torch.manual_seed(3)
        size = {"vocab_size": 700, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = transformers.AutoConfig.for_model(
            kind,
            **size,
            num_key_value_heads=2,
            intermediate_size=48,
            max_position_embeddings=2048,
            initializer_range=0.3,
        )
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        for name in ("tokenizer.model", "tokenizer_config.json"):
            shutil.copy(GOLDEN / "pe_rank" / "checkpoint" / name, folder)
        fields = json.loads((folder / "tokenizer_config.json").read_text())
        fields["added_tokens_decoder"] = {k: v for k, v in fields["added_tokens_decoder"].items() if int(k) < 700}
        fields["additional_special_tokens"] = []
        (folder / "tokenizer_config.json").write_text(json.dumps(fields))
        return str(folder)

    return build


@pytest.fixture
def frame():
    """A result frame with two queries, which have 5 and 2 passages, and with two extra columns. Its rows are not in
    order, and its index has strings."""
    rows = [
        ("q2", "red fox", "d6", "a fox is red", 2.0, 0),
        ("q1", "what is a cat?", "d1", "a cat is an animal.", 5.0, 0),
        ("q1", "what is a cat?", "d3", "dogs bark", 3.0, 2),
        ("q1", "what is a cat?", "d2", "cats and dogs: 2 animals", 4.0, 1),
        ("q2", "red fox", "d7", "the sky is blue", 1.0, 1),
        ("q1", "what is a cat?", "d4", "", 2.0, 3),
        ("q1", "what is a cat?", "d5", "x" * 300, 1.0, 4),
    ]
    return pd.DataFrame(rows, columns=["qid", "query", "docno", "text", "score", "rank"], index=list("gfedcba")).assign(
        title="t", extra=range(7)
    )


@pytest.fixture(scope="session")
def shared():
    """The module ../shared/data/load.py, which reads the reference data."""
    if not (SHARED / "load.py").exists():
        pytest.skip(
            "needs the reference data in ../shared/data, which is not part of the repository (its licences forbid that)"
        )
    spec = importlib.util.spec_from_file_location("shared_load", SHARED / "load.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def java(tmp_path_factory):
    """Start Terrier in this process, without a network. Skips the test if Java or the jars are missing."""
    reason = jars.start(tmp_path_factory.mktemp("pyterrier"))
    if reason is not None:
        pytest.skip(reason)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Java has replaced this handler


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The stand-in of hub.py in place of the hub, with an empty cache."""
    constants = huggingface_hub.constants
    server = Hub()
    template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    huggingface_hub.close_session()  # a session that was opened offline refuses all requests
    yield server
    server.shutdown()
    server.server_close()
    huggingface_hub.close_session()
