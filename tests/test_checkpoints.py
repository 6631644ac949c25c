"""checkpoints: what is missing, damaged or unknown is named; saving loses nothing."""

import json
import shutil

import pytest
import safetensors.torch
import torch

from pyterrier_lit.models.checkpoints import Folder, choose_device, choose_dtype, fetch, load_strictly, write


def test_a_folder_is_its_own_checkpoint(tmp_path):
    assert fetch(str(tmp_path)).path == tmp_path


@pytest.mark.parametrize(
    "model, words",
    [
        ("no/such-model", "hf download no/such-model"),
        ("/no/such/folder", "no folder '/no/such/folder'"),
        ("a b", "no folder 'a b'"),
    ],
)
def test_a_checkpoint_that_is_not_to_be_had_is_named_with_the_cure(model, words):
    with pytest.raises(FileNotFoundError, match=words):
        fetch(model)


def test_a_file_is_no_checkpoint(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(FileNotFoundError, match="is a file"):
        fetch(tmp_path / "model.safetensors")


def test_a_folder_without_config_or_weights_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no config.json.*`hf download .*put its files into /"):
        _ = Folder(tmp_path).config
    with pytest.raises(FileNotFoundError, match=r"holds no weights: wanted model.safetensors or pytorch_model.bin"):
        Folder(tmp_path).weights()
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer.json, vocab.txt or tokenizer.model"):
        Folder(tmp_path).tokenizer()


@pytest.mark.parametrize("keep", [0, 7, 300, -1])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_file_cut_short_is_named(cross_encoder_folder, tmp_path, name, keep):
    shutil.copytree(cross_encoder_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[: -3 if keep == -1 else keep])
    with pytest.raises(ValueError, match=name if name != "tokenizer.json" else "no tokenizer that can be read"):
        Folder(tmp_path).config, Folder(tmp_path).weights(), Folder(tmp_path).tokenizer()


def test_weights_in_shards_and_in_torch_files_are_read(tmp_path):
    weights = {"a": torch.arange(3.0), "b": torch.ones(2, 2)}
    for name, tensor in weights.items():
        safetensors.torch.save_file({name: tensor}, tmp_path / f"model-{name}.safetensors")
    index = {"weight_map": {"a": "model-a.safetensors", "b": "model-b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert all(torch.equal(Folder(tmp_path).weights()[name], tensor) for name, tensor in weights.items())
    (tmp_path / "model-b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no model-b.safetensors, which"):
        Folder(tmp_path).weights()
    (tmp_path / "model.safetensors.index.json").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    assert all(torch.equal(Folder(tmp_path).weights()[name], tensor) for name, tensor in weights.items())
    torch.save({"a": object()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin cannot be read"):
        Folder(tmp_path).weights()


def test_a_pickle_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "owned"), "w")

    torch.save({"a": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"cannot be read"):
        Folder(tmp_path).weights()
    assert not (tmp_path / "owned").exists()


def test_every_weight_that_does_not_fit_is_named():
    module = torch.nn.Linear(2, 3)
    with pytest.raises(
        ValueError,
        match=r"here does not hold the weights.*missing bias; unexpected extra;"
        r" weight has shape \[2, 3\], wanted \[3, 2\]",
    ):
        load_strictly(module, {"weight": torch.zeros(2, 3), "extra": torch.zeros(1)}, "here")


def test_devices_and_dtypes():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert choose_dtype(None, torch.device("cpu")) is torch.float32
    assert (
        choose_dtype("bfloat16", torch.device("cpu"))
        is choose_dtype(torch.bfloat16, torch.device("cpu"))
        is torch.bfloat16
    )
    for wrong in ("int8", "float", "nn", torch.int8):
        with pytest.raises(ValueError, match="wanted None, 'auto', 'float32'"):
            choose_dtype("long" if wrong == "float" else wrong, torch.device("cpu"))


def test_write_replaces_a_checkpoint_only_when_the_new_one_is_complete(tmp_path):
    (tmp_path / "config.json").write_text("old")
    (tmp_path / "notes.txt").write_text("mine")

    def breaks(folder):
        (folder / "config.json").write_text("new")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        write(tmp_path, breaks)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"config.json": "old", "notes.txt": "mine"}
    write(tmp_path, lambda folder: (folder / "config.json").write_text("new"))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"config.json": "new", "notes.txt": "mine"}
