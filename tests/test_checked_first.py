"""files.rerankers: wrong arguments are found before a checkpoint loads, and a fingerprint identifies the weights."""

import os
import shutil

import pytest
import torch
from conftest import ELECTRA, RERANKERS, T5_TRAINED

from pyterrier_lit import CrossEncoder, LiT5Distill, LiT5Score, PERank
from pyterrier_lit.files.rerankers import check_values, chunk_for, fingerprint

WRONG = [
    (CrossEncoder, {"max_tokens": 0}, "max_tokens=0; wanted a positive whole number"),
    (CrossEncoder, {"doc_length": -5}, "doc_length=-5; wanted a positive whole number"),
    (CrossEncoder, {"special_tokens": "keep"}, "special_tokens='keep'; wanted one of 'parse', 'text'"),
    (CrossEncoder, {"device": "toaster"}, "device='toaster' cannot be used here"),
    (CrossEncoder, {"dtype": "int8"}, "dtype='int8'; wanted None, 'auto', 'float32'"),
    (LiT5Distill, {"decoding": "beam"}, "decoding='beam'; wanted one of"),
    (LiT5Distill, {"window_size": 10, "stride": 20}, "window_size=10 with stride=20; wanted 1 <= stride"),
    (LiT5Distill, {"passes": 0}, "passes=0"),
    (LiT5Score, {"aggregation": "sum"}, "aggregation='sum'; wanted one of"),
    (LiT5Score, {"n_passages": 0}, "n_passages=0"),
    (PERank, {"mode": "text"}, "mode='text'; wanted one of"),
    (PERank, {"decoding": "free"}, "decoding='free'; wanted one of"),
    (PERank, {"stride": 30}, "window_size=20 with stride=30"),
    (PERank, {"top_k": 0}, "top_k=0"),
]  # fmt: skip


@pytest.mark.parametrize("kind, wrong, message", WRONG)
def test_what_is_wrong_shows_without_a_checkpoint(kind, wrong, message):
    with pytest.raises(ValueError) as raised:
        check_values(kind("no/such-model", **{"device": "cpu"} | wrong))
    assert message in str(raised.value)


@pytest.mark.parametrize("known", RERANKERS.values(), ids=RERANKERS)
def test_what_is_right_passes_and_loads_nothing(known):
    for more in ({}, {"max_tokens": 1, "dtype": torch.bfloat16, "verbose": True}):
        reranker = known.kind("no/such-model", device="cpu", **more)
        check_values(reranker)
        assert reranker.in_memory() is None


@pytest.fixture
def model(tmp_path):
    return shutil.copytree(T5_TRAINED, tmp_path / "model")


def of(folder, **arguments):
    return fingerprint(LiT5Distill(str(folder), **{"device": "cpu"} | arguments))


def test_a_fingerprint_is_that_of_the_same_files_wherever_and_whenever_they_were_written(model, tmp_path):
    before = of(model)
    os.utime(model / "model.safetensors")
    shutil.copytree(model, tmp_path / "elsewhere")
    (model / "README.md").write_text("a note")
    (model / "run.txt").write_text("q1 Q0 d1 1 1 x\n")
    assert of(model) == of(tmp_path / "elsewhere") == before


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "spiece.model", "inner/model-00001-of-2.safetensors"]
)
def test_one_byte_changes_it_even_at_the_same_size_and_time(model, name):
    (model / "inner").mkdir()
    (model / "inner" / "model-00001-of-2.safetensors").write_bytes(bytes(100))
    before, times = of(model), (model / name).stat()
    data = bytearray((model / name).read_bytes())
    data[-1] ^= 1
    (model / name).write_bytes(data)
    os.utime(model / name, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert of(model) != before


def test_the_precision_and_a_file_more_or_less_change_it(model):
    seen = {of(model), of(model, dtype="bfloat16")}
    (model / "added_tokens.json").write_text("{}")
    seen.add(of(model))
    (model / "added_tokens.json").rename(model / "special_tokens_map.json")
    seen.add(of(model))
    assert len(seen) == 4


def test_files_of_the_hubs_cache_are_told_by_their_names_and_other_links_by_their_content(tmp_path):
    blob = tmp_path / "blobs" / (64 * "a")
    blob.parent.mkdir()
    shutil.copy(ELECTRA / "model.safetensors", blob)
    shutil.copytree(ELECTRA, tmp_path / "snapshots" / "0123")
    weights = tmp_path / "snapshots" / "0123" / "model.safetensors"

    def points_to(target):
        weights.unlink()
        weights.symlink_to(target)
        return fingerprint(CrossEncoder(str(weights.parent), device="cpu"))

    cached = points_to(blob)
    assert 64 * "a" in cached
    other = shutil.copy(blob, blob.with_name(64 * "b"))
    assert points_to(other) != cached
    mine = shutil.copy(blob, tmp_path / "current")
    before = points_to(mine)
    with open(mine, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    assert points_to(mine) != before


def test_a_model_that_is_nowhere_is_named():
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        of("/no/such/folder")


def test_a_cpu_has_a_query_of_the_usual_depth_at_a_time():
    assert chunk_for(CrossEncoder(device="cpu")) == 100
