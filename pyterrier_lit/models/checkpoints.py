"""Checkpoints: a hub id or a folder -> config, weights, tokenizer; device and dtype. Every failure in plain words."""

import dataclasses
import json
import pickle
import re
import tempfile
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import tokenizers
import torch
from torch import nn

Weights = dict[str, torch.Tensor]
VOCABULARIES = ("tokenizer.json", "vocab.*", "*.model")  # of which a tokenizer has one
NO_SHAPE = ("model_type", "architectures", "dtype", "torch_dtype", "transformers_version", "tie_word_embeddings")


def fetch(model: str | Path, *, weights: bool = True, use: str = "pass its path as model=") -> Path:
    """The folder of a checkpoint: the path itself, or the hub's files in the local cache, with or without the weights.

    Raises FileNotFoundError when it is neither here nor to be had, saying how to bring it to a machine without a network, and
    what to do with it there: `use`.
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

    wanted = ["*.json", "*.txt", "*.model", "*.jinja", *(["*.safetensors"] if weights else [])]
    try:
        folder = Path(snapshot_download(str(model), allow_patterns=wanted))
        if weights and not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(str(model), allow_patterns=[*wanted, "pytorch_model*.bin"]))
    except Exception as error:  # the hub's client raises its own, httpx's and the system's errors
        raise FileNotFoundError(
            f"there is no folder {str(model)!r} here, and the hub did not give that checkpoint ({type(error).__name__}: {_first_line(error)})."
            f" Check the name; without a network, {how_to_fetch(str(model), use)}"
        ) from error
    return folder


def how_to_fetch(name: str = "NAME", use: str = "pass its path as model=") -> str:
    """How a checkpoint comes to a machine without a network: a part of a sentence for errors."""
    return f"run `hf download {name} --local-dir FOLDER` on a machine that has one, copy FOLDER here and {use}"


def missing(folder: Path, what: str) -> FileNotFoundError:
    """The error for a folder that lacks a file."""
    return FileNotFoundError(
        f"{folder} holds no {what}. Fetch the checkpoint whole; without a network, {how_to_fetch(use=f'put its files into {folder}')}"
    )


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


def read_weight(folder: Path, name: str) -> torch.Tensor | None:
    """One tensor of a folder, if it is there, without reading the others where they are safetensors."""
    for file in _weight_files(folder):
        if file.suffix != ".safetensors":
            return read_weights(folder).get(name)
        with safetensors.safe_open(file, "pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118 (it is no dict)
                tensor: torch.Tensor = tensors.get_tensor(name)
                return tensor
    return None


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


def check_vocabulary(folder: Path) -> None:
    """FileNotFoundError for a folder without a vocabulary, of which transformers makes a tokenizer all the same, with no pieces."""
    if not any(found for name in VOCABULARIES for found in folder.glob(name)):
        raise missing(folder, "tokenizer.json, vocab.txt or tokenizer.model, its vocabulary")


def read_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """The fast tokenizer of a folder (tokenizer.json, else vocab.txt, else what transformers makes of it), without cutting or padding."""
    check_vocabulary(folder)
    try:
        if (folder / "tokenizer.json").exists():
            tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        else:
            import transformers

            known = transformers.BertTokenizer if (folder / "vocab.txt").exists() else transformers.AutoTokenizer
            tokenizer = known.from_pretrained(folder).backend_tokenizer
        tokenizer.encode("\u2603")  # a vocabulary that was cut to nothing fails at the first word it does not know
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(
            f"{folder} has no tokenizer that can be read: wanted tokenizer.json or vocab.txt ({_first_line(error)})"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


class SentencePieces:
    """T5's pieces as the slow tokenizer makes them (`legacy=False`), from spiece.model alone.

    Control tokens in a text, such as </s>, are read as plain characters. Source: specs of LiT5, section 3.
    """

    def __init__(self, file: Path):
        import sentencepiece

        no_dummy_prefix = b"\x1a\x02\x18\x00"  # merges normalizer_spec.add_dummy_prefix = False into the model
        self.processor = sentencepiece.SentencePieceProcessor()
        self.processor.LoadFromSerializedProto(file.read_bytes() + no_dummy_prefix)
        self._guard = len(self.processor.encode("<unk>"))

    def __call__(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, without </s>. The guard in front keeps what a text begins with from being normalised away."""
        guarded = ["<unk>\u2581" + text.replace(" ", "\u2581") for text in texts]
        return [ids[self._guard :] for ids in self.processor.encode(guarded)]

    def decode(self, ids: list[int]) -> str:
        """The text of ids; those that T5 can write but the tokenizer does not know (<extra_id_0>, ...) separate words."""
        known = [list(group) for known, group in groupby(ids, lambda id: id < self.processor.get_piece_size()) if known]
        return " ".join(self.processor.decode(group) for group in known)


def read_sentencepieces(folder: Path) -> SentencePieces:
    """The tokenizer in spiece.model."""
    file = folder / "spiece.model"
    if not file.exists():
        raise missing(folder, "spiece.model, T5's tokenizer")
    try:
        return SentencePieces(file)
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"{file} cannot be read: it is cut short or damaged; fetch it again ({_first_line(error)})"
        ) from error


@dataclasses.dataclass
class T5:
    """A T5 checkpoint in memory."""

    network: Any  # transformers' T5ForConditionalGeneration
    tied: bool  # the output layer is the embedding, scaled
    pieces: SentencePieces
    config: dict[str, Any]  # config.json
    spiece: bytes  # spiece.model

    def length(self, name: str, own: int | None, default: int, least: int = 1) -> int:
        """A number of tokens: the caller's own, else what `save` recorded under this name, else the default.

        ValueError for anything but a whole number from `least` on.
        """
        recorded = self.config.get("lengths", {})
        number = own if own is not None else recorded.get(name, default) if isinstance(recorded, dict) else recorded
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise ValueError(f"{name}={number!r}; wanted a whole number of tokens, at least {least}")
        return number

    def save(self, folder: Path, **fields: Any) -> None:
        """Write config (with further fields), weights and tokenizer into an existing folder."""
        twins = (
            "encoder.embed_tokens.weight",
            "decoder.embed_tokens.weight",
            *(["lm_head.weight"] if self.tied else []),
        )
        weights = {name: tensor for name, tensor in self.network.state_dict().items() if name not in twins}
        weights = {name: tensor.cpu().contiguous() for name, tensor in weights.items()}
        safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        config = self.config | {"tie_word_embeddings": self.tied} | fields
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (folder / "spiece.model").write_bytes(self.spiece)


def read_t5(folder: Path, device: torch.device, dtype: torch.dtype) -> T5:
    """A T5 with its language model head, on a device in a dtype, ready for inference; ValueError for another architecture."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = read_config(folder)
    if config.get("model_type") != "t5":
        raise ValueError(
            f"{folder} holds a {config.get('model_type')!r} checkpoint ({config.get('architectures')}); wanted a T5"
        )
    if dtype == torch.float16:
        raise ValueError("dtype='float16' overflows in T5; wanted 'bfloat16' or 'float32'")
    pieces = read_sentencepieces(folder)
    weights = read_weights(folder)
    for name in [name for name in weights if name.endswith("EncDecAttention.relative_attention_bias.weight")]:
        del weights[name]  # T5's first checkpoints hold this table, which no version of the model reads
    embedding = weights.get("shared.weight", weights.get("encoder.embed_tokens.weight"))
    head = weights.get("lm_head.weight", embedding)
    if embedding is None or head is None:
        raise wrong_weights(str(folder), ["missing shared.weight"])
    # The weights decide: transformers 5 writes tie_word_embeddings=true for untied models too
    tied = head is embedding or torch.equal(head, embedding)
    twins = ("shared", "encoder.embed_tokens", "decoder.embed_tokens")
    weights |= {f"{name}.weight": embedding for name in twins} | {"lm_head.weight": head}
    architecture = library_config(config, T5Config)
    if architecture.dense_act_fn == "gelu_new":
        architecture.dense_act_fn = "gelu_pytorch_tanh"  # the same function in one kernel in place of eight
    with torch.device("meta"):
        network: Any = T5ForConditionalGeneration(architecture)
        network.lm_head = nn.Linear(network.config.d_model, network.config.vocab_size, bias=False)
    load_strictly(network, weights, str(folder))
    buckets, farthest = architecture.relative_attention_num_buckets, architecture.relative_attention_max_distance
    if not farthest > buckets // 2:
        raise ValueError(
            f"{folder}: relative_attention_max_distance={farthest!r}; wanted more than half of the {buckets} relative_attention_num_buckets"
        )
    network.set_input_embeddings(network.shared)
    if tied:
        network.lm_head.weight = network.shared.weight
    network.to(device, dtype).eval().requires_grad_(False)
    return T5(network, tied, pieces, config, (folder / "spiece.model").read_bytes())


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """The fields of tokenizer_config.json, {} where there is none."""
    file = folder / "tokenizer_config.json"
    fields = _read_json(file) if file.exists() else {}
    limit = fields.get("model_max_length")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int | float) or not limit > 0):
        raise ValueError(f"{file}: model_max_length={limit!r}; wanted a number of tokens")
    return fields


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

    Until then an older checkpoint at `path` stays as it was; files of other names stay in any case. OSError when the new
    one cannot be written, as when a disk is full.
    """
    path = Path(path).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=path) as new:
        try:
            fill(Path(new))
        except Exception as error:  # safetensors and tokenizers raise their own for a full disk
            raise OSError(f"{path} could not be saved and is as it was before ({_first_line(error)})") from error
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
                raise missing(folder, f"{', '.join(absent)}, which {index} names")
            return files
    raise missing(
        folder, "weights: wanted model.safetensors or pytorch_model.bin, in one file or in shards with their index"
    )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise missing(file.parent, file.name) from None
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{file} cannot be read: it is cut short or damaged; fetch it again ({_first_line(error)})"
        ) from error
    if not isinstance(fields, dict):
        raise ValueError(f"{file} holds a {type(fields).__name__}, wanted an object of named fields")
    return fields


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
