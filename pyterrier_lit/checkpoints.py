"""Checkpoints: a hub id or a folder -> config, weights, tokenizer; device and dtype. Every failure in plain words."""

import json
import pickle
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import tokenizers
import torch
from torch import nn

Weights = dict[str, torch.Tensor]


def fetch(model: str | Path) -> Path:
    """The folder of a checkpoint: the path itself, or the hub's files in the local cache.

    Raises FileNotFoundError when it is neither here nor to be had, saying how to bring it to a machine without a network.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise FileNotFoundError(
            f"model={str(model)!r} is a file; give the folder that holds config.json and the weights"
        )
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(model)):
        raise FileNotFoundError(f"there is no folder {str(model)!r}, and it is no hub id (owner/name) either")
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.txt", "*.model", "*.safetensors"]
    try:
        folder = Path(snapshot_download(str(model), allow_patterns=wanted))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(str(model), allow_patterns=[*wanted, "pytorch_model*.bin"]))
    except Exception as error:  # the hub's client raises its own, httpx's and the system's errors
        raise FileNotFoundError(
            f"there is no folder {str(model)!r} here, and the hub did not give that checkpoint ({type(error).__name__}: {_first_line(error)})."
            f" Check the name; without a network, run `hf download {model} --local-dir FOLDER` on a machine that has one, copy FOLDER here"
            " and pass its path as model="
        ) from error
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """The fields of config.json."""
    return _read_json(folder / "config.json")


def read_weights(folder: Path) -> Weights:
    """All tensors of a folder by name, on the CPU in their stored dtype: safetensors if there are any, else pytorch_model*.bin."""
    files = _weight_files(folder)
    weights: Weights = {}
    for file in files:
        try:
            if file.suffix == ".safetensors":
                weights.update(safetensors.torch.load_file(file))
            else:
                weights.update(torch.load(file, map_location="cpu", weights_only=True))
        except (safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
            raise ValueError(
                f"{file} cannot be read: it is cut short or damaged; fetch it again ({_first_line(error)})"
            ) from error
    return weights


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
    module.load_state_dict(weights)


def wrong_weights(source: str, problems: list[str]) -> ValueError:
    """The error for a checkpoint whose weights are not those of its architecture; `problems` are listed, up to ten."""
    listed = "; ".join(sorted(problems)[:10]) + (f"; and {len(problems) - 10} more" if len(problems) > 10 else "")
    return ValueError(f"{source} does not hold the weights of this model: {listed}")


def read_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """The fast tokenizer of a folder (tokenizer.json, else vocab.txt, else what transformers makes of it), without cutting or padding."""
    try:
        if (folder / "tokenizer.json").exists():
            tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        else:
            import transformers

            known = transformers.BertTokenizerFast if (folder / "vocab.txt").exists() else transformers.AutoTokenizer
            tokenizer = known.from_pretrained(folder).backend_tokenizer
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(
            f"{folder} has no tokenizer that can be read: wanted tokenizer.json or vocab.txt ({_first_line(error)})"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """The fields of tokenizer_config.json, {} where there is none."""
    file = folder / "tokenizer_config.json"
    return _read_json(file) if file.exists() else {}


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device asked for; None is the first GPU, else the CPU. ValueError when it is unknown or not there."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(
            f"device={device!r} cannot be used here; wanted None, 'cpu', 'cuda', 'cuda:1', ... ({_first_line(error)})"
        ) from error
    return chosen


def choose_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype asked for; None is bfloat16 on a GPU that has it, else float32."""
    if dtype is None:
        return (
            torch.bfloat16
            if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
            else torch.float32
        )
    chosen = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(chosen, torch.dtype) or not chosen.is_floating_point:
        raise ValueError(
            f"dtype={dtype!r} is not a floating point type; wanted None, 'float32', 'bfloat16' or 'float16'"
        )
    return chosen


def write(path: str | Path, fill: Callable[[Path], None]) -> None:
    """Save a checkpoint: `fill` writes into a new folder, whose files go to `path` only when all of them are complete.

    Until then an older checkpoint at `path` stays as it was; files of other names stay in any case.
    """
    path = Path(path).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=path) as new:
        fill(Path(new))
        for file in sorted(Path(new).iterdir()):
            file.chmod(0o644)
            file.replace(path / file.name)


def _weight_files(folder: Path) -> list[Path]:
    for whole in ("model.safetensors", "pytorch_model.bin"):
        index = f"{whole}.index.json"
        if (folder / whole).exists():
            return [folder / whole]
        if (folder / index).exists():
            files = [folder / name for name in sorted(set(_read_json(folder / index)["weight_map"].values()))]
            absent = [file.name for file in files if not file.exists()]
            if absent:
                raise FileNotFoundError(f"{folder} lacks {', '.join(absent)}, which {index} names")
            return files
    raise FileNotFoundError(
        f"{folder} holds no weights: wanted model.safetensors or pytorch_model.bin, in one file or in shards with their index"
    )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{file.parent} holds no {file.name}, so it is not a checkpoint folder") from None
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{file} cannot be read: it is cut short or damaged; fetch it again ({_first_line(error)})"
        ) from error
    if not isinstance(fields, dict):
        raise ValueError(f"{file} holds a {type(fields).__name__}, wanted an object of named fields")
    return fields


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
