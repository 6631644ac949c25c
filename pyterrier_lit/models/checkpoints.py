"""Checkpoints: hub id or folder -> config, weights and tokenizer; device and dtype. Errors say what to do."""

import copy
import json
import pickle
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import tokenizers
import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Weights = dict[str, torch.Tensor]
VOCABULARIES = ("tokenizer.json", "vocab.*", "*.model")  # a tokenizer has one of these
CHUNK = 1_000  # texts
# What a checkpoint's folder may hold that is read with it
FILES = (
    *("config.json", "generation_config.json", "modules.json", "adapter_config.json", "encoder_tokenizer.json"),
    *("config_sentence_transformers.json", "sentence_bert_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("vocab.txt", "vocab.json", "merges.txt", "chat_template.*", "adapter_model.*"),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # other names that people use
# Fields of a config.json that say nothing about the shape of the network
NO_SHAPE = ("model_type", "architectures", "dtype", "torch_dtype", "transformers_version", "tie_word_embeddings")


class Folder:
    """The files of a checkpoint. Each is read when it is asked for, and an error says which is missing or damaged.

    Methods raise FileNotFoundError for a file that is not there, and ValueError for one that cannot be read.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def __str__(self) -> str:
        return str(self.path)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The fields of config.json. ValueError for a folder with an adapter, whose weights would be left out."""
        if (self.path / "adapter_config.json").exists():
            raise ValueError(
                f"{self} holds an adapter (adapter_config.json), which is not read; merge it into its base model and"
                " save that: `PeftModel.from_pretrained(BASE, FOLDER).merge_and_unload().save_pretrained(NEW_FOLDER)`"
            )
        return _read_json(self, "config.json")

    @cached_property
    def tokenizer_config(self) -> dict[str, Any]:
        """The fields of tokenizer_config.json, {} where there is none."""
        name = "tokenizer_config.json"
        fields = _read_json(self, name) if (self.path / name).exists() else {}
        limit = fields.get("model_max_length")
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int | float) or not limit > 0):
            raise ValueError(f"{self.path / name}: model_max_length={limit!r}; wanted a number of tokens")
        return fields

    def weights(self) -> Weights:
        """All tensors by name, on the CPU in their stored dtype: of safetensors, else of pytorch_model*.bin.

        They are copied into memory: as a map of the file they would change with it.
        """
        weights: Weights = {}
        for file in _weight_files(self):
            try:
                if file.suffix == ".safetensors":
                    weights |= {name: tensor.clone() for name, tensor in safetensors.torch.load_file(file).items()}
                else:
                    weights.update(torch.load(file, map_location="cpu", weights_only=True))
            except (safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
                raise damaged(file, error) from error
        return {_today(name): tensor for name, tensor in weights.items()}

    def weight(self, name: str) -> torch.Tensor | None:
        """One tensor, None where there is no such; of safetensors the others are not read."""
        for file in _weight_files(self):
            if file.suffix != ".safetensors":
                return self.weights().get(name)
            with safetensors.safe_open(file, "pt") as tensors:
                if name in tensors.keys():  # noqa: SIM118 (it is no dict)
                    tensor: torch.Tensor = tensors.get_tensor(name)
                    return tensor
        return None

    def tokenizer(self) -> tokenizers.Tokenizer:
        """The fast tokenizer, without truncation or padding: tokenizer.json, else vocab.txt, else the library's."""
        self.check_vocabulary()
        try:
            if (self.path / "tokenizer.json").exists():
                tokenizer = tokenizers.Tokenizer.from_file(str(self.path / "tokenizer.json"))
            else:
                import transformers

                has_words = (self.path / "vocab.txt").exists()
                known = transformers.BertTokenizer if has_words else transformers.AutoTokenizer
                tokenizer = known.from_pretrained(self.path, trust_remote_code=False).backend_tokenizer
            tokenizer.encode("\u2603")  # a vocabulary that was cut to nothing fails at the first word it does not know
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(
                f"{self} has no tokenizer that can be read: wanted tokenizer.json or vocab.txt ({first_line(error)})"
            ) from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def library_tokenizer(self) -> Any:
        """The tokenizer as the library makes it of all files; where no class is named, tokenizer.json says all.

        ValueError for one that cannot be read, or has no fast version.
        """
        import transformers

        self.check_vocabulary()
        named = self.tokenizer_config.get("tokenizer_class")
        alone = named is None and (self.path / "tokenizer.json").exists()
        known: Any = transformers.PreTrainedTokenizerFast if alone else transformers.AutoTokenizer
        try:
            tokenizer: Any = known.from_pretrained(self.path, trust_remote_code=False)
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(f"{self} has no tokenizer that can be read ({first_line(error)})") from error
        if not tokenizer.is_fast:
            raise ValueError(f"{self}: {named or type(tokenizer).__name__} has no fast version, which is wanted")
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        return tokenizer

    def optional(self, name: str) -> Any:
        """What a JSON file holds, {} where it is not there."""
        file = self.path / name
        try:
            return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        except (ValueError, OSError) as error:
            raise damaged(file, error) from error

    def check_vocabulary(self) -> None:
        """FileNotFoundError where there is no vocabulary: transformers would make a tokenizer without pieces."""
        if not any(found for name in VOCABULARIES for found in self.path.glob(name)):
            raise self.missing("tokenizer.json, vocab.txt or tokenizer.model, its vocabulary")

    def missing(self, what: str) -> FileNotFoundError:
        """The error for a folder that lacks a file."""
        use = f"put its files into {self}"
        return FileNotFoundError(
            f"{self} holds no {what}. Fetch the checkpoint whole; without a network, {how_to_fetch(use=use)}"
        )


def fetch(model: str | Path, *, weights: bool = True, use: str = "pass its path as model=") -> Folder:
    """The folder of a checkpoint: the path itself, or the hub's files in the local cache, with or without the weights.

    Raises FileNotFoundError when it is neither here nor on the hub. The message says how to bring it to a machine
    without a network, and what to do with it there: `use`.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return Folder(folder)
    if folder.exists():
        raise FileNotFoundError(
            f"model={str(model)!r} is a file; give the folder that holds config.json and the weights"
        )
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(model)):
        raise FileNotFoundError(f"there is no folder {str(model)!r}, and it is no hub id (owner/name) either")
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.txt", "*.model", "*.jinja", *(["*.safetensors"] if weights else [])]
    try:
        folder = Path(snapshot_download(str(model), allow_patterns=wanted))
        if weights and not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(str(model), allow_patterns=[*wanted, "pytorch_model*.bin"]))
    except Exception as error:  # the hub's client raises its own, httpx's and the system's errors
        raise FileNotFoundError(
            f"there is no folder {str(model)!r} here, and the hub did not give that checkpoint"
            f" ({type(error).__name__}: {first_line(error)})."
            f" Check the name; without a network, {how_to_fetch(str(model), use)}"
        ) from error
    return Folder(folder)


def how_to_fetch(name: str = "NAME", use: str = "pass its path as model=") -> str:
    """How a checkpoint comes to a machine without a network: a part of a sentence for errors."""
    return f"run `hf download {name} --local-dir FOLDER` on a machine that has one, copy FOLDER here and {use}"


def library_config(config: dict[str, Any], config_class: type) -> Any:
    """A configuration of the library from the fields of config.json that say what the network looks like."""
    return config_class(
        **{key: config[key] for key in config_class().to_dict() if key in config and key not in NO_SHAPE}
    )


def load_strictly(module: nn.Module, weights: Weights, source: str) -> None:
    """Put weights into a module; ValueError names every weight that is missing, left over or of another shape."""
    own = module.state_dict()
    problems = [f"missing {name}" for name in own.keys() - weights.keys()]
    problems += [f"unexpected {name}" for name in weights.keys() - own.keys()]
    problems += [
        f"{name} has shape {list(weights[name].shape)}, wanted {list(own[name].shape)}"
        for name in own.keys() & weights.keys()
        if weights[name].shape != own[name].shape
    ]
    if problems:
        raise wrong_weights(source, problems)
    module.load_state_dict(weights, assign=True)


def wrong_weights(source: str, problems: list[str]) -> ValueError:
    """The error for a checkpoint whose weights are not those of its architecture; `problems` are listed, up to ten."""
    listed = "; ".join(sorted(problems)[:10]) + (f"; and {len(problems) - 10} more" if len(problems) > 10 else "")
    return ValueError(f"{source} does not hold the weights of this model: {listed}")


def library_model(mapping: Any, config: Any, weights: Weights, source: str, dtype: torch.dtype) -> "PreTrainedModel":
    """The library's model for a config, from a mapping such as transformers.MODEL_MAPPING, with exactly these weights.

    Raises KeyError where the mapping has no model for the config, and ValueError for weights that are missing, left
    over or of another shape.
    """
    model: PreTrainedModel
    model, found = mapping[type(config)].from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True
    )
    names = [
        (problem, name if isinstance(name, str) else name[0])
        for problem in ("missing", "unexpected", "mismatched")
        for name in found[f"{problem}_keys"]
    ]
    problems = [f"{problem} {name}" for problem, name in names if "position_ids" not in name]
    if problems:
        raise wrong_weights(source, problems)
    return model


def check_pieces(known: int, size: int, source: str, model: str = "model") -> None:
    """ValueError for a tokenizer that knows more pieces than the model has embeddings."""
    if known > size:
        raise ValueError(
            f"{source}: the tokenizer knows {known} pieces and the {model} {size}; they are of two checkpoints"
        )


def encode(tokenizer: tokenizers.Tokenizer, texts: Sequence[str], *, special_tokens: bool) -> Iterator[list[int]]:
    """The ids of each text. The tokenizer is given CHUNK texts at a time: its results are some 10 kB each."""
    for start in range(0, len(texts), CHUNK):
        encodings = tokenizer.encode_batch_fast(list(texts[start : start + CHUNK]), add_special_tokens=special_tokens)
        yield from (encoding.ids for encoding in encodings)


def damaged(file: Path, error: BaseException) -> ValueError:
    """The error for a file that cannot be read."""
    return ValueError(f"{file} cannot be read: it is cut short or damaged; fetch it again ({first_line(error)})")


def below(weights: Weights, prefix: str) -> Weights:
    """The weights whose names begin so, without that beginning."""
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def save_checkpoint(folder: Path, config: dict[str, Any], weights: Weights) -> None:
    """Write config.json and model.safetensors."""
    save_weights(folder, weights)
    save_json(folder / "config.json", config)


def save_weights(folder: Path, weights: Weights) -> None:
    """Write model.safetensors."""
    weights = {name: tensor.cpu().contiguous() for name, tensor in weights.items()}
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def save_json(file: Path, fields: dict[str, Any]) -> None:
    """Write a config."""
    file.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device asked for; None is the first GPU, else the CPU. ValueError when it is unknown or not there."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(
            f"device={device!r} cannot be used here; wanted None, 'cpu', 'cuda', 'cuda:1', ... ({first_line(error)})"
        ) from error
    return chosen


def choose_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype asked for; None is bfloat16 on a GPU that computes in it, else float32.

    "auto" is bfloat16 also on a CPU that computes in it (AVX512-BF16 or AMX). ValueError for what is no floating point
    type of inference.
    """
    if dtype is None or (isinstance(dtype, str) and dtype == "auto"):
        native = _computes_in_bfloat16(device) and (device.type == "cuda" or dtype == "auto")
        return torch.bfloat16 if native else torch.float32
    named = getattr(torch, DTYPE_NAMES.get(dtype, dtype), None) if isinstance(dtype, str) else dtype
    if named not in DTYPES:
        raise ValueError(
            f"dtype={dtype!r}; wanted None, 'auto', 'float32', 'bfloat16' or 'float16' (or 'fp32', 'bf16', 'fp16')"
        )
    chosen: torch.dtype = named
    return chosen


def _computes_in_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, check, lambda: False)() for check in checks)


def write(path: str | Path, fill: Callable[[Path], None]) -> None:
    """Save a checkpoint: `fill` writes into a new folder, whose files go to `path` only when all of them are complete.

    Until then an older checkpoint at `path` stays as it was; then those of its files that the new one has not are
    removed, since loading would read them. Other files stay in any case. OSError when the new one cannot be written, as
    when a disk is full.
    """
    path = Path(path).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=path) as new:
        try:
            fill(Path(new))
        except Exception as error:  # safetensors and tokenizers raise their own for a full disk
            raise OSError(f"{path} could not be saved and is as it was before ({first_line(error)})") from error
        written = sorted(Path(new).iterdir())
        for file in written:
            file.chmod(0o644)
            file.replace(path / file.name)
    for file in {file for pattern in FILES for file in path.glob(pattern)} - {path / file.name for file in written}:
        file.unlink()


def converted(checkpoint: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A copy of a checkpoint in memory, with its networks on a device and their weights in a dtype.

    Tables that are no weights, such as those of positions, keep their dtype.
    """
    networks = [part.network for part in (checkpoint, getattr(checkpoint, "encoder", None)) if part is not None]
    copies = {
        id(weight): nn.Parameter(weight.detach().to(device, dtype, copy=True), requires_grad=weight.requires_grad)
        for network in networks
        for weight in network.parameters()
    }
    copied = copy.deepcopy(checkpoint, copies)  # which takes these in place of the weights
    for part in (copied, getattr(copied, "encoder", None)):
        if part is not None:
            part.network.to(device)
    return copied


def first_line(error: BaseException) -> str:
    """What an error says, in a line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _today(name: str) -> str:
    """The name of a weight in place of that which checkpoints of TensorFlow's time have."""
    return re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name))


def _weight_files(folder: Folder) -> list[Path]:
    for whole in ("model.safetensors", "pytorch_model.bin"):
        index = f"{whole}.index.json"
        if (folder.path / whole).exists():
            return [folder.path / whole]
        if (folder.path / index).exists():
            names = sorted(set(_read_json(folder, index)["weight_map"].values()))
            outside = [name for name in names if Path(name).name != name]
            if outside:
                raise ValueError(f"{folder.path / index} names {outside[0]!r}; weights lie in the folder itself")
            files = [folder.path / name for name in names]
            absent = [file.name for file in files if not file.exists()]
            if absent:
                raise folder.missing(f"{', '.join(absent)}, which {index} names")
            return files
    raise folder.missing(
        "weights: wanted model.safetensors or pytorch_model.bin, in one file or in shards with their index"
    )


def _read_json(folder: Folder, name: str) -> dict[str, Any]:
    file = folder.path / name
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise folder.missing(name) from None
    except (ValueError, OSError) as error:
        raise damaged(file, error) from error
    if not isinstance(fields, dict):
        raise ValueError(f"{file} holds a {type(fields).__name__}, wanted an object of named fields")
    return fields
