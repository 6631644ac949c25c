"""Reads checkpoints (config, weights, tokenizer) from a hub id or a folder, and writes them. If a file is missing or
damaged, the error message states what to do."""

import json
import pickle
import re
import tempfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import tokenizers
import torch

from pyterrier_lit.models.errors import damaged, first_line
from pyterrier_lit.models.library import Weights, auto_config
from pyterrier_lit.models.tokenization import bare_tokenizer, no_panic, settle

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCABULARIES = ("tokenizer.json", "vocab.*", "*.model")  # a checkpoint must have one of these files
ADAPTER = "adapter_config.json"
BESIDE_WEIGHTS = ("*.json", "*.txt", "*.model", "*.jinja", "README.md")  # always fetched from the hub
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
INT8_FILES = ("int8.xml", "int8.bin")  # a network in OpenVINO's format: its graph and its weights
# The files that make up a checkpoint. Saving into a folder replaces or removes the folder's files with these names
FILES = (
    *("config.json", "generation_config.json", "modules.json", "adapter_config.json", "encoder_tokenizer.json"),
    *("config_sentence_transformers.json", "sentence_bert_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("vocab.txt", "vocab.json", "merges.txt", "chat_template.*", "adapter_model.*", *INT8_FILES),
)


class Folder:
    """The files of a checkpoint in a local folder. Each file is read when it is first needed.

    The methods raise FileNotFoundError if a file is missing, and ValueError if a file cannot be read. The error message
    names the file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def __str__(self) -> str:
        return str(self.path)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The fields of config.json."""
        return _read_json(self, "config.json")

    @cached_property
    def tokenizer_config(self) -> dict[str, Any]:
        """The fields of tokenizer_config.json, or {} if there is no such file. Raises ValueError if the value of
        model_max_length is not a positive number."""
        name = "tokenizer_config.json"
        fields = _read_json(self, name) if (self.path / name).exists() else {}
        limit = fields.get("model_max_length")
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int | float) or not limit > 0):
            raise ValueError(f"{self.path / name}: model_max_length={limit!r}; wanted a number of tokens")
        return fields

    def weights(self) -> Weights:
        """Read all weights. Returns a dict name -> tensor. The tensors are on the CPU in their stored dtype. They are
        read from safetensors files if the folder has such files, else from pytorch_model*.bin.

        Tensors from a safetensors file are copied. Without the copy, a tensor would be a memory map of the file, and
        overwriting the file would change a loaded model. Reading a file of 1 GB takes 0.7 seconds (0.5 seconds without
        the copy), and up to 2 GB of memory.
        """
        weights: Weights = {}
        for file in _weight_files(self):
            try:
                if file.suffix == ".safetensors":
                    weights.update((name, tensor.clone()) for name, tensor in safetensors.torch.load_file(file).items())
                else:
                    weights.update(torch.load(file, map_location="cpu", weights_only=True))
            except (safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
                raise damaged(file, error) from error
        return weights

    def weight(self, name: str) -> torch.Tensor | None:
        """Read one tensor. Returns None if the checkpoint has no tensor with this name. If the weights are in
        safetensors files, no other tensor is read."""
        for file in _weight_files(self):
            if file.suffix != ".safetensors":
                return self.weights().get(name)
            with safetensors.safe_open(file, "pt") as tensors:
                if name in tensors.keys():  # noqa: SIM118 (not a dict)
                    tensor: torch.Tensor = tensors.get_tensor(name).clone()
                    return tensor
        return None

    def tokenizer(self, kind: str | None = None) -> tokenizers.Tokenizer:
        """Return the tokenizer of the folder as an object of the `tokenizers` package, without truncation or padding.
        `kind` is as in `library_tokenizer`."""
        return bare_tokenizer(self.library_tokenizer(kind))

    def library_tokenizer(self, kind: str | None = None) -> "PreTrainedTokenizerFast":
        """Return the tokenizer of the folder as an object of transformers. The tokenizer has the folder's vocabulary,
        and the class and settings of tokenizer_config.json.

        Args:
            kind: a model type, such as "bert", or None. The tokenizer class of this model type is used if
                tokenizer_config.json names no class of transformers and there is no tokenizer.json.

        Raises ValueError if the tokenizer class needs code in the checkpoint, or if the class is not implemented in the
        `tokenizers` package.
        """
        import transformers

        self.check_vocabulary()
        has_file, name = (self.path / "tokenizer.json").exists(), self.tokenizer_config.get("tokenizer_class")
        reader: Any = transformers.AutoTokenizer
        options: dict[str, Any] = {}
        if kind:
            known = getattr(transformers, str(name), None)
            if isinstance(known, type) and issubclass(known, transformers.PreTrainedTokenizerBase):
                reader = known
            elif has_file:
                reader = transformers.PreTrainedTokenizerFast
            else:
                options["tokenizer_type"] = kind
        elif (model_type := str(self.config.get("model_type"))) in transformers.CONFIG_MAPPING:
            options["config"] = auto_config(self.config, model_type)
        try:
            with no_panic("any text"):
                if has_file:  # for a damaged file, transformers may build a different tokenizer
                    tokenizers.Tokenizer.from_file(str(self.path / "tokenizer.json"))
                tokenizer: Any = reader.from_pretrained(
                    self.path, trust_remote_code=False, local_files_only=True, **options
                )
                self._check_tokenizer(tokenizer)
                settle(tokenizer.backend_tokenizer, self.tokenizer_config)
        except Exception as error:  # tokenizers raises bare Exception
            said = f", read as the {name} of tokenizer_config.json" if name else ""
            raise ValueError(
                f"{self} has no tokenizer that can be read: wanted tokenizer.json or vocab.txt{said}"
                f" ({first_line(error)})"
            ) from error
        fast: PreTrainedTokenizerFast = tokenizer
        return fast

    def _check_tokenizer(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} does not run in the tokenizers package")
        files = {"tokenizer.json", *tokenizer.vocab_files_names.values()}
        if not any((self.path / file).exists() for file in files):
            raise ValueError(f"{type(tokenizer).__name__} reads {' or '.join(sorted(files))}")
        # A tokenizer with an empty vocabulary fails here
        tokenizer.backend_tokenizer.encode("\u2603")

    def check_vocabulary(self) -> None:
        """Raise FileNotFoundError if the folder has no vocabulary file. Without a vocabulary file, transformers would
        build an empty tokenizer."""
        if not any(found for name in VOCABULARIES for found in self.path.glob(name)):
            raise self.missing("tokenizer.json, vocab.txt or tokenizer.model, its vocabulary")

    def saved_tokenizer(self) -> tokenizers.Tokenizer:
        """Return the tokenizer in tokenizer.json, without the settings of tokenizer_config.json."""
        file = self.path / "tokenizer.json"
        if not file.exists():
            raise self.missing(file.name)
        try:
            with no_panic("any text"):
                return tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises bare Exception
            raise damaged(file, error) from error

    def missing(self, what: str) -> FileNotFoundError:
        """Return the error for a missing file. `what` describes the file in the message."""
        use = f"put its files into {self}"
        return FileNotFoundError(
            f"{self} holds no {what}. Fetch the checkpoint whole; without a network, {how_to_fetch(use=use)}"
        )


def fetch(model: str | Path, *, revision: str | None = None) -> Folder:
    """Return the folder of a checkpoint: the given folder, or a folder in the local cache with the files from the hub.

    Args:
        model: a folder or a hub id.
        revision: a branch, tag or commit on the hub. None is the main branch of the repository.

    Raises FileNotFoundError if `model` is neither a folder nor the id of a checkpoint that the hub provides. Raises
    ValueError if a revision is given for a folder, or if the checkpoint contains an adapter, such as LoRA weights
    without their base model.
    """
    if revision is not None and not (isinstance(revision, str) and revision):
        raise ValueError(f"revision={revision!r}; wanted the name of a branch, a tag or a commit on the hub")
    folder = Path(model).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ValueError(
                f"revision={revision!r} is of a checkpoint on the hub, and model={str(model)!r} is a folder here, which"
                " is read as it is; leave revision= out, or give a hub id that is not the name of a folder"
            )
        return _whole(Folder(folder))
    if folder.exists():
        raise FileNotFoundError(
            f"model={str(model)!r} is a file; give the folder that holds config.json and the weights"
        )
    if not HUB_ID.fullmatch(str(model)):
        raise FileNotFoundError(f"there is no folder {str(model)!r}, and it is not a hub id (owner/name) either")
    return fetch_from_hub(str(model), revision=revision)


def fetch_from_hub(
    model: str, *, revision: str | None = None, weights: bool = True, use: str = "pass its path as model="
) -> Folder:
    """Return a folder in the local cache with the files of a checkpoint on the hub. Files that are not in the cache are
    downloaded. A local folder whose path equals the hub id is ignored.

    Args:
        model: a hub id.
        revision: as in `fetch`.
        weights: whether to fetch the weights, too.
        use: what the error message says to do with a copy of the checkpoint's folder.

    Raises FileNotFoundError if the hub does not provide the checkpoint, and ValueError if it contains an adapter.
    """
    from huggingface_hub import snapshot_download

    wanted = [*BESIDE_WEIGHTS, *(["*.safetensors", *INT8_FILES] if weights else [])]
    try:
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=wanted))
        if weights and not any(folder.glob("*.safetensors")):
            wanted.append("pytorch_model*.bin")
            folder = Path(snapshot_download(model, revision=revision, allow_patterns=wanted))
    except Exception as error:  # the hub's client raises errors of its own, of httpx and of the system
        raise FileNotFoundError(
            f"there is no folder {model!r} here, and the hub did not provide that checkpoint"
            f"{f' at revision {revision!r}' if revision else ''} ({type(error).__name__}: {first_line(error)})."
            f" Check the name; without a network, {how_to_fetch(model, use, revision)}"
        ) from error
    return _whole(Folder(folder))


def _whole(folder: Folder) -> Folder:
    """Return the folder, unchanged. Raises ValueError if the folder contains an adapter, such as LoRA weights without
    their base model."""
    if (folder.path / ADAPTER).exists():
        raise ValueError(
            f"{folder} holds an adapter ({ADAPTER}), which is not applied. Merge it into its base model, by peft's"
            " PeftModel.from_pretrained(base, FOLDER).merge_and_unload(), and give the folder that you save; where the"
            f" weights beside it are whole without it, move {ADAPTER} away"
        )
    return folder


def how_to_fetch(name: str = "NAME", use: str = "pass its path as model=", revision: str | None = None) -> str:
    """Return advice for error messages: how to bring a checkpoint to a machine without a network.

    Args:
        name: the hub id of the checkpoint.
        use: what to do with the checkpoint's folder on that machine, such as "pass its path as model=".
        revision: as in `fetch`.
    """
    which = f"{name} --revision {revision}" if revision else name
    return f"run `hf download {which} --local-dir FOLDER` on a machine that has one, copy FOLDER here and {use}"


def save_checkpoint(folder: Path, config: dict[str, Any], weights: Weights) -> None:
    """Write config.json and model.safetensors into an existing folder.

    Args:
        folder: the folder.
        config: the fields of config.json.
        weights: name -> tensor.
    """
    save_weights(folder, weights)
    save_json(folder / "config.json", config)


def save_weights(folder: Path, weights: Weights) -> None:
    """Write model.safetensors into an existing folder. `weights` is a dict name -> tensor."""
    weights = {name: tensor.cpu().contiguous() for name, tensor in weights.items()}
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def save_json(file: Path, fields: dict[str, Any]) -> None:
    """Write a dict to a JSON file."""
    file.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def write(path: str | Path, fill: Callable[[Path], None]) -> None:
    """Save a checkpoint into the folder `path`. `fill` gets the path of a new temporary folder, and writes the
    checkpoint's files there. When all files are written, they are moved to `path`.

    Before the move, an older checkpoint at `path` is unchanged. The move replaces files with the same names. Files that
    only the older checkpoint has are then removed: they would be loaded together with the new files. Files that are not
    part of a checkpoint (see FILES) are kept.

    Raises OSError if the checkpoint cannot be written, for example on a full disk.
    """
    path = Path(path).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=path) as new:
        try:
            fill(Path(new))
        except Exception as error:  # safetensors and tokenizers raise their own errors for a full disk
            raise OSError(f"{path} could not be saved and is as it was before ({first_line(error)})") from error
        written = sorted(Path(new).iterdir())
        for file in written:
            file.chmod(0o644)
            file.replace(path / file.name)
    for file in {file for pattern in FILES for file in path.glob(pattern)} - {path / file.name for file in written}:
        file.unlink()


def _weight_files(folder: Folder) -> list[Path]:
    """Return the paths of the files with the weights. Raises FileNotFoundError if there is no such file, or if a shard
    is missing."""
    for whole in ("model.safetensors", "pytorch_model.bin"):
        index = f"{whole}.index.json"
        if (folder.path / whole).exists():
            return [folder.path / whole]
        if (folder.path / index).exists():
            files = [folder.path / name for name in _shards(folder, index)]
            absent = [file.name for file in files if not file.exists()]
            if absent:
                raise folder.missing(f"{', '.join(absent)}, which {index} names")
            return files
    raise folder.missing(
        "weights: wanted model.safetensors or pytorch_model.bin, in one file or in shards with their index"
    )


def _shards(folder: Folder, index: str) -> list[str]:
    """Return the names of the shards that the JSON file `index` lists. Raises ValueError if a name is not a plain file
    name: a path could lead to files outside the folder."""
    weight_map = _read_json(folder, index).get("weight_map")
    names: list[Any] = list(weight_map.values()) if isinstance(weight_map, dict) else [weight_map]
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[^/\\\0]+", name) or name in (".", ".."):
            raise ValueError(f"{folder.path / index} names {name!r} as a file with weights; wanted one in its folder")
    return sorted(set(names))


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
