"""checkpoints: errors name what is missing, damaged or unknown; saving loses nothing."""

import json
import os
import shutil

import pytest
import safetensors.torch
import tokenizers
import torch
from conftest import ELECTRA
from transformers import BertConfig

from pyterrier_lit import CrossEncoder
from pyterrier_lit.models.checkpoints import Folder, fetch, write
from pyterrier_lit.models.devices import choose_device, choose_dtype
from pyterrier_lit.models.library import auto_config, build, library_config, load_strictly
from pyterrier_lit.models.tokenization import encode, pieces_known


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


def test_devices_and_dtypes(monkeypatch):
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device(None) == torch.device("mps")
    assert choose_dtype(None, torch.device("mps")) == torch.float32
    assert choose_dtype(None, torch.device("cpu")) is torch.float32
    assert (
        choose_dtype("bfloat16", torch.device("cpu"))
        is choose_dtype(torch.bfloat16, torch.device("cpu"))
        is torch.bfloat16
    )
    for wrong in ("int8", "long", "nn", torch.int8):
        with pytest.raises(ValueError, match="wanted None, 'auto', 'float32'"):
            choose_dtype(wrong, torch.device("cpu"))


@pytest.mark.parametrize(
    "names, dtype",
    [
        (("float32", "fp32", "float", "torch.float32", torch.float32), torch.float32),
        (("bfloat16", "bf16", torch.bfloat16), torch.bfloat16),
        (("float16", "fp16", "half", "torch.half", torch.half), torch.float16),
        (("float64", "fp64", "double"), torch.float64),
    ],
)
def test_a_dtype_has_several_names_and_one_in_repr(names, dtype):
    for name in names:
        assert choose_dtype(name, torch.device("cpu")) is dtype
        assert repr(CrossEncoder(dtype=name)) == f"CrossEncoder('webis/monoelectra-base', dtype={names[0]!r})"


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


def test_weights_are_copies_that_no_change_of_the_file_reaches(tmp_path):
    file = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"a": torch.arange(4.0), "b": torch.ones(3)}, file)
    read, one = Folder(tmp_path).weights(), Folder(tmp_path).weight("a")
    with file.open("r+b") as opened:
        opened.seek(-28, os.SEEK_END)
        opened.write(bytes(28))
    assert not Folder(tmp_path).weights()["b"].any()
    os.truncate(file, 9)
    assert read["a"].tolist() == one.tolist() == [0, 1, 2, 3]
    assert read["b"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "sub/model", "..", "", ".", "a\\b", None, 3, ["a"]])
def test_an_index_names_files_of_its_own_folder_alone(tmp_path, name):
    folder = tmp_path / "checkpoint"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path / "outside", folder / "sub" / "model"):
        safetensors.torch.save_file({"a": torch.ones(1)}, place)
    for index in ({"weight_map": {"a": name}}, {"weight_map": name}, {}):
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match=r"index.json names .* as a file with weights; wanted one in its folder"):
            Folder(folder).weights()


def test_what_a_config_says_of_the_librarys_run_is_not_handed_on():
    hostile = {
        "_attn_implementation": "somebody/kernel",
        "attn_implementation": "somebody/kernel",
        "_attn_implementation_internal": "somebody/kernel",
        "quantization_config": {"quant_method": "gptq", "bits": 4},
        "auto_map": {"AutoModel": "evil.Evil"},
        "return_dict": False,
        "output_attentions": True,
        "_name_or_path": "/somewhere",
        "dtype": "float16",
    }
    config = {"model_type": "bert", "num_hidden_layers": 3} | hostile
    for shape in (auto_config(config, "bert"), library_config(config, BertConfig)):
        assert shape.num_hidden_layers == 3
        assert shape._attn_implementation is None
        assert shape.return_dict is True and shape.output_attentions is False and shape.dtype is None
        assert not {"quantization_config", "auto_map"} & vars(shape).keys() and shape._name_or_path == ""
    inner = auto_config({"text_config": {"vocab_size": 9} | hostile}, "qwen2_vl").text_config
    assert inner.vocab_size == 9 and inner._attn_implementation is None and inner.return_dict is True


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"num_hidden_layers": 10**6}, "num_hidden_layers=1000000 in the config, and 2 weights"),
        ({"num_hidden_layers": 10**15}, "num_hidden_layers=10{15} in the config"),
        ({"inner": {"n_layers": 3}}, "n_layers=3 in the config"),
        ({"width": 10**6}, r"the config describes 1,000,001,000,000 numbers, and the weights are 12"),
    ],
)
def test_a_network_that_its_weights_cannot_fill_is_refused_before_it_is_made(fields, words):
    made = []

    def make():
        made.append(torch.empty(0).device)
        width = fields.get("width", 3)
        return torch.nn.Linear(width, width)

    weights = {"weight": torch.zeros(3, 3), "bias": torch.zeros(3)}
    with pytest.raises(ValueError, match=f"here does not hold the weights of this model: {words}"):
        build(make, fields, weights, "here")
    assert torch.device("cpu") not in made


def test_ids_of_gaps_and_of_the_tokens_around_a_text_count():
    tokenizer = tokenizers.Tokenizer.from_file(str(ELECTRA / "tokenizer.json"))
    size = tokenizer.get_vocab_size()
    assert pieces_known(tokenizer) == size
    fields = json.loads(tokenizer.to_str())
    fields["post_processor"]["special_tokens"]["[SEP]"]["ids"] = [size + 7]
    assert pieces_known(tokenizers.Tokenizer.from_str(json.dumps(fields))) == size + 8
    fields = json.loads(tokenizer.to_str())
    fields["model"]["vocab"]["gap"] = 5_000
    assert pieces_known(tokenizers.Tokenizer.from_str(json.dumps(fields))) == 5_001


def test_a_text_at_which_a_tokenizer_panics_is_named():
    tokenizer = tokenizers.Tokenizer.from_file(str(ELECTRA / "tokenizer.json"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("^(a+)+$"), "isolated")
    with pytest.raises(ValueError, match=r"the tokenizer cannot read the text 'aaa.*: it failed \(.*retry-limit"):
        list(encode(tokenizer, ["a cat", "a" * 40 + "!", "a dog"], special_tokens=False))
    assert len(list(encode(tokenizer, ["a cat", "a dog"], special_tokens=False))) == 2


def test_no_other_exception_than_a_panic_is_reworded():
    class Interrupted:
        def encode_batch_fast(self, texts, add_special_tokens):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(encode(Interrupted(), ["a"], special_tokens=False))
