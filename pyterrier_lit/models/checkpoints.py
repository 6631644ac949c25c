"""Checkpoints: hub id or folder -> config, weights and tokenizer; device and dtype. Errors say what to do."""

import contextlib
import json
import pickle
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import safetensors
import safetensors.torch
import tokenizers
import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Weights = dict[str, torch.Tensor]
Network = TypeVar("Network", bound=nn.Module)
VOCABULARIES = ("tokenizer.json", "vocab.*", "*.model")  # a tokenizer has one of these
ADAPTER = "adapter_config.json"
CHUNK = 1_000  # texts
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # other names that people use
# How BERT reads letters: by its names in tokenizer_config.json, and in tokenizer.json
BERT = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}
NORM = {"gamma": "LayerNorm.weight", "beta": "LayerNorm.bias"}  # what layer norms were called before 2019
_OLD_NORM = re.compile(r"LayerNorm\.(gamma|beta)$")
# Fields of a config.json that say nothing about the shape of the network
NO_SHAPE = ("model_type", "architectures", "dtype", "torch_dtype", "transformers_version", "tie_word_embeddings")
# Fields by which a checkpoint would choose how the library runs: its code, kernels, packing and outputs. A name that
# begins with _ is one too
NOT_HANDED_ON = (
    *("auto_map", "custom_pipelines", "attn_implementation", "experts_implementation", "use_kernels"),
    *("quantization_config", "compression_config", "base_model_tp_plan", "base_model_pp_plan", "device_map"),
    *("output_attentions", "output_hidden_states", "return_dict", "use_return_dict", "torchscript"),
)
# What architectures call the number of their layers
LAYERS = (
    *("num_hidden_layers", "num_layers", "num_decoder_layers", "n_layer", "n_layers"),
    *("encoder_layers", "decoder_layers"),
)
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


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
        """The fields of config.json."""
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

        They are copies: safetensors maps its file, and whoever overwrote the file would change a loaded model. A copy
        of 1 GB takes 0.7 seconds (reading the map later takes 0.5 of them too) and 1 GB of memory in place of the
        file's pages, 2 GB with these while it is made.
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
        """One tensor, None where there is no such; of safetensors the others are not read."""
        for file in _weight_files(self):
            if file.suffix != ".safetensors":
                return self.weights().get(name)
            with safetensors.safe_open(file, "pt") as tensors:
                if name in tensors.keys():  # noqa: SIM118 (it is no dict)
                    tensor: torch.Tensor = tensors.get_tensor(name).clone()
                    return tensor
        return None

    def tokenizer(self, kind: str | None = None) -> tokenizers.Tokenizer:
        """The tokenizer without truncation or padding; `library_tokenizer` says which."""
        return bare_tokenizer(self.library_tokenizer(kind))

    def library_tokenizer(self, kind: str | None = None) -> "PreTrainedTokenizerFast":
        """What the library makes of the folder: its vocabulary under the class and settings of tokenizer_config.json.

        kind: the type of model ("bert", ...) whose tokenizer it is where the folder names no class of the library.
        ValueError for a class that needs code of its own, or that does not run in the `tokenizers` package.
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
                if has_file:  # of a damaged one the library may make another
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
        """ValueError for one that runs in Python alone, or was made without the vocabulary that its class reads."""
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} does not run in the tokenizers package")
        files = {"tokenizer.json", *tokenizer.vocab_files_names.values()}
        if not any((self.path / file).exists() for file in files):
            raise ValueError(f"{type(tokenizer).__name__} reads {' or '.join(sorted(files))}")
        # A vocabulary that was cut to nothing fails at the first word it does not know
        tokenizer.backend_tokenizer.encode("\u2603")

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
        return _whole(Folder(folder))
    if folder.exists():
        raise FileNotFoundError(
            f"model={str(model)!r} is a file; give the folder that holds config.json and the weights"
        )
    if not HUB_ID.fullmatch(str(model)):
        raise FileNotFoundError(f"there is no folder {str(model)!r}, and it is no hub id (owner/name) either")
    return fetch_from_hub(str(model), weights=weights, use=use)


def fetch_from_hub(model: str, *, weights: bool = True, use: str = "pass its path as model=") -> Folder:
    """`fetch` for a hub id alone, whatever folders of that name lie here."""
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.txt", "*.model", "*.jinja", *(["*.safetensors"] if weights else [])]
    try:
        folder = Path(snapshot_download(model, allow_patterns=wanted))
        if weights and not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(model, allow_patterns=[*wanted, "pytorch_model*.bin"]))
    except Exception as error:  # the hub's client raises its own, httpx's and the system's errors
        raise FileNotFoundError(
            f"there is no folder {model!r} here, and the hub did not give that checkpoint"
            f" ({type(error).__name__}: {first_line(error)})."
            f" Check the name; without a network, {how_to_fetch(model, use)}"
        ) from error
    return _whole(Folder(folder))


def _whole(folder: Folder) -> Folder:
    """The folder. ValueError where an adapter lies in it: alone it is no model, and beside one it may count or not."""
    if (folder.path / ADAPTER).exists():
        raise ValueError(
            f"{folder} holds an adapter ({ADAPTER}), which is not applied. Merge it into its base model, by peft's"
            " PeftModel.from_pretrained(base, FOLDER).merge_and_unload(), and give the folder that you save; where the"
            f" weights beside it are whole without it, move {ADAPTER} away"
        )
    return folder


def how_to_fetch(name: str = "NAME", use: str = "pass its path as model=") -> str:
    """How a checkpoint comes to a machine without a network: a part of a sentence for errors."""
    return f"run `hf download {name} --local-dir FOLDER` on a machine that has one, copy FOLDER here and {use}"


def library_config(config: dict[str, Any], config_class: type) -> Any:
    """A configuration of the library from the fields of config.json that say what the network looks like."""
    known = config_class().to_dict()
    return config_class(
        **{key: value for key, value in handed_on(config).items() if key in known and key not in NO_SHAPE}
    )


def auto_config(config: dict[str, Any], kind: str) -> Any:
    """`library_config` for a model_type, with the fields that only it knows. KeyError where the library has no such.

    Names of code in the config are not followed.
    """
    from transformers import CONFIG_MAPPING

    ties = config.keys() & {"tie_word_embeddings"}
    fields = {key: value for key, value in handed_on(config).items() if key in ties or key not in NO_SHAPE}
    return CONFIG_MAPPING[kind](**fields)


def handed_on(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config.json, and of the configs inside it, that the library may see."""
    return {
        key: handed_on(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in NOT_HANDED_ON and not str(key).startswith("_")
    }


def build(make: Callable[[], Network], config: dict[str, Any], weights: Weights, source: str) -> Network:
    """The network that `make` makes of a config.json, on the CPU, its weights still to be loaded.

    ValueError where it would have more layers than there are weights, or far more numbers: before any is made.
    """
    check_size(make, config, weights, source)
    with torch.device("cpu"):
        return make()


def check_size(make: Callable[[], nn.Module], config: dict[str, Any], weights: Weights, source: str) -> None:
    """The check of `build`."""
    check_layers(config, weights, source)
    with torch.device("meta"):
        numbers = sum(parameter.numel() for parameter in make().parameters())
    held = sum(tensor.numel() for tensor in weights.values())
    if numbers > 2 * held:  # twice: the library may store shared tensors once
        raise wrong_weights(source, [f"the config describes {numbers:,} numbers, and the weights are {held:,}"])


def check_layers(config: dict[str, Any], weights: Weights, source: str) -> None:
    """The part of `build`'s check that needs no network: to list or make a million layers would take hours."""
    for name, value in config.items():
        if isinstance(value, dict):
            check_layers(value, weights, source)
        elif name in LAYERS and isinstance(value, int) and value > len(weights):
            raise wrong_weights(source, [f"{name}={value} in the config, and {len(weights)} weights"])


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


def library_model(
    mapping: Any, config: dict[str, Any], kind: str, weights: Weights, source: str, dtype: torch.dtype
) -> "PreTrainedModel":
    """The library's model for a config.json, from a mapping such as transformers.MODEL_MAPPING, with these weights.

    Raises KeyError where the library has no such model, and ValueError for weights that are missing, left over or of
    another shape.
    """
    model, found = _library_model(mapping, config, kind, weights, source, dtype)
    _refuse(found, ("missing", "unexpected", "mismatched"), source)
    return model


def library_body(config: dict[str, Any], weights: Weights, source: str, dtype: torch.dtype) -> "PreTrainedModel":
    """The body of a model of the library, whose weights may be those of the whole model. Raises as `library_model`."""
    from transformers import MODEL_MAPPING

    model, found = _library_model(MODEL_MAPPING, config, str(config.get("model_type")), weights, source, dtype)
    _refuse(found, ("missing", "mismatched"), source)
    return model


def _library_model(
    mapping: Any, config: dict[str, Any], kind: str, weights: Weights, source: str, dtype: torch.dtype
) -> tuple["PreTrainedModel", dict[str, Any]]:
    check_layers(config, weights, source)
    shape = auto_config(config, kind)
    make = mapping[type(shape)]
    check_size(lambda: make(shape), config, weights, source)
    with torch.device("cpu"):
        model, found = make.from_pretrained(
            None, config=shape, state_dict=weights, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True
        )
    return model, found


def _refuse(found: dict[str, Any], problems: tuple[str, ...], source: str) -> None:
    """ValueError for the weights in which the library found one of these problems."""
    names = [
        (problem, name if isinstance(name, str) else name[0])
        for problem in problems
        for name in found[f"{problem}_keys"]
    ]
    listed = [f"{problem} {name}" for problem, name in names if "position_ids" not in name]
    if listed:
        raise wrong_weights(source, listed)


def check_pieces(known: int, size: int, source: str, model: str = "model") -> None:
    """ValueError for a tokenizer that knows more pieces than the model has embeddings. known: its highest id + 1."""
    if known > size:
        raise ValueError(
            f"{source}: the tokenizer knows {known} pieces and the {model} {size}; they are of two checkpoints"
        )


def pieces_known(tokenizer: tokenizers.Tokenizer) -> int:
    """The highest id that a tokenizer can write, + 1: of its pieces, and of the tokens that it puts around texts."""
    around = [*tokenizer.encode("").ids, *tokenizer.encode("", "").ids]
    return max([*tokenizer.get_vocab().values(), *around], default=-1) + 1


def is_panic(error: BaseException) -> bool:
    """Whether a tokenizer panicked. That is no Exception: it would pass whatever handles errors."""
    return type(error).__name__ == "PanicException"


@contextlib.contextmanager
def no_panic(source: str) -> Iterator[None]:
    """A tokenizer's panic in the block becomes a ValueError."""
    try:
        yield
    except BaseException as error:
        if not is_panic(error):
            raise
        raise ValueError(f"the tokenizer cannot read {source}: it failed ({first_line(error)})") from error


def encode(tokenizer: tokenizers.Tokenizer, texts: Sequence[str], *, special_tokens: bool) -> Iterator[list[int]]:
    """The ids of each text. The tokenizer is given CHUNK texts at a time: its results are some 10 kB each.

    ValueError names a text at which the tokenizer fails.
    """
    for start in range(0, len(texts), CHUNK):
        chunk = list(texts[start : start + CHUNK])
        try:
            encodings = tokenizer.encode_batch_fast(chunk, add_special_tokens=special_tokens)
        except BaseException as error:
            if not is_panic(error):
                raise
            encodings = [_encode_alone(tokenizer, text, special_tokens) for text in chunk]
        yield from (encoding.ids for encoding in encodings)


def _encode_alone(tokenizer: tokenizers.Tokenizer, text: str, special_tokens: bool) -> tokenizers.Encoding:
    with no_panic(f"the text {text[:60] + '...' if len(text) > 60 else text!r}"):
        return tokenizer.encode(text, add_special_tokens=special_tokens)


def settle(tokenizer: tokenizers.Tokenizer, settings: dict[str, Any]) -> None:
    """Let the settings of a tokenizer_config.json win over BERT's in a tokenizer.json, as transformers does."""
    normalizer = tokenizer.normalizer
    if isinstance(normalizer, tokenizers.normalizers.BertNormalizer):
        for setting in settings.keys() & BERT.keys():
            setattr(normalizer, BERT[setting], settings[setting])
        tokenizer.normalizer = normalizer


def bare_tokenizer(tokenizer: "PreTrainedTokenizerFast") -> tokenizers.Tokenizer:
    """What stands behind a tokenizer of the library, without truncation or padding."""
    bare: tokenizers.Tokenizer = tokenizer.backend_tokenizer
    bare.no_truncation()
    bare.no_padding()
    return bare


def positions(network: nn.Module) -> int | None:
    """Tokens of the longest input by a network's table of positions, None where it has none."""
    counts = [
        # RoBERTa counts its positions from behind the padding
        module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
        for name, module in network.named_modules()
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding)
    ]
    return min(counts, default=None)


def damaged(file: Path, error: BaseException) -> ValueError:
    """The error for a file that cannot be read."""
    return ValueError(f"{file} cannot be read: it is cut short or damaged; fetch it again ({first_line(error)})")


def today(weights: Weights) -> Weights:
    """Weights by today's names: layer norms were called gamma and beta, and positions were saved as a buffer."""
    kept = [name for name in weights if not name.endswith("embeddings.position_ids")]
    return {_OLD_NORM.sub(lambda found: NORM[found[1]], name): weights[name] for name in kept}


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

    Until then an older checkpoint at `path` stays as it was; files of other names stay in any case. OSError when the
    new one cannot be written, as when a disk is full.
    """
    path = Path(path).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=path) as new:
        try:
            fill(Path(new))
        except Exception as error:  # safetensors and tokenizers raise their own for a full disk
            raise OSError(f"{path} could not be saved and is as it was before ({first_line(error)})") from error
        for file in sorted(Path(new).iterdir()):
            file.chmod(0o644)
            file.replace(path / file.name)


def first_line(error: BaseException) -> str:
    """What an error says, in a line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _weight_files(folder: Folder) -> list[Path]:
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
    """The files that an index names. ValueError for one that leads out of the folder."""
    weight_map = _read_json(folder, index).get("weight_map")
    names: list[Any] = list(weight_map.values()) if isinstance(weight_map, dict) else [weight_map]
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[^/\\\0]+", name) or name in (".", ".."):
            raise ValueError(f"{folder.path / index} names {name!r} as a file with weights; wanted one beside it")
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
