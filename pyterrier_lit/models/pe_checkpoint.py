"""PE-Rank's checkpoints: the reference's layout on disk to a language model, its prompts and its encoder, and back."""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import tokenizers
import torch

from pyterrier_lit.models.checkpoints import (
    Weights,
    check_vocabulary,
    fetch,
    load_strictly,
    missing,
    read_config,
    read_tokenizer,
    read_tokenizer_config,
    read_weight,
    read_weights,
    wrong_weights,
)
from pyterrier_lit.models.pe_prompts import Prompter, read_prompter
from pyterrier_lit.models.text_encoder import POOLING, TextEncoder, bare, empty_encoder
from pyterrier_lit.models.vector_lm import VectorLM, projector

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ENCODER, PROJECTOR = "model.encoder.encoder.", "model.projector."  # in front of the names of their weights
ENCODER_TOKENIZER = "encoder_tokenizer.json"
KIND = "embed_"  # in front of the model_type of the language model


@dataclasses.dataclass
class Ranker:
    """A checkpoint in memory."""

    network: VectorLM
    prompter: Prompter
    config: dict[str, Any]  # config.json
    folder: Path
    encoder_weights: Weights  # of the encoder inside, which is built when a text is to be encoded
    encoder: TextEncoder | None = None

    @property
    def embedding_size(self) -> int:
        size: int = self.config["embedding_size"]
        return size

    @property
    def trained_on(self) -> str:
        name = self.config.get("encoder_name")
        return (
            f"{name} ({self.config.get('encoder_pooling', 'mean')} pooling)"
            if name
            else "the encoder it was trained with"
        )

    def warn_of_strangers(self) -> None:
        """Say once that vectors without a name must be of the right encoder: those of another give a senseless order."""
        if self.config.get("encoder_name"):
            warnings.warn(
                f"neither a 'doc_vec' column nor an index says which encoder made its vectors; this checkpoint reads those of {self.trained_on}",
                stacklevel=2,
            )

    def prompts(self, queries: list[str], texts: list[list[str]], counts: list[int]) -> list[list[int]]:
        """The ids of the prompt for each query and its n passages, with their texts where there are any."""
        prompts = self.prompter.ids(queries, texts, counts)
        limit = self.config.get("max_position_embeddings") or float("inf")
        for ids, query, n in zip(prompts, queries, counts, strict=True):
            if len(ids) + n > limit:
                raise ValueError(
                    f"the prompt for query {query!r} with {n} passages has {len(ids)} tokens and the model {limit}"
                    " positions; use a smaller window_size, or shorter texts"
                )
        return prompts

    def text_encoder(self) -> TextEncoder:
        """The encoder inside the checkpoint, built from the config and tokenizer of `encoder_name` on first use."""
        if self.encoder is None:
            self.encoder = read_text_encoder(self)
        return self.encoder

    def head(self) -> torch.Tensor:
        """The language model's own output layer (V, H), which ranking does not read: from its file, or its input embeddings."""
        words: Any = self.network.body.get_input_embeddings()
        tied = self.config.get("tie_word_embeddings")
        weight = words.weight.detach() if tied else read_weight(self.folder, "lm_head.weight")
        if weight is None:
            raise ValueError(
                f"{self.folder} holds no lm_head.weight: a PE-Rank that was saved can no longer write; align it before, right after"
                " PERank.from_backbone"
            )
        return weight

    def save(self, folder: Path) -> None:
        """Write config, weights and tokenizers into an existing folder."""
        parts = {"model.": self.network.body, "model.projector.": self.network.projector}
        weights = {
            prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.state_dict().items()
        }
        config = self.config
        if self.encoder:
            config = config | {"encoder_config": self.encoder.config}
            self.encoder.tokenizer.save(str(folder / ENCODER_TOKENIZER))
        weights |= {ENCODER + name: tensor for name, tensor in self.encoder_weights.items()}
        weights = {name: tensor.cpu().contiguous() for name, tensor in weights.items()}
        safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        self.prompter.tokenizer.save_pretrained(folder)


def read_ranker(folder: Path, device: torch.device, dtype: torch.dtype) -> Ranker:
    """A trained PE-Rank, on a device in a dtype."""
    config = read_config(folder)
    kind = str(config.get("model_type"))
    if not kind.startswith(KIND):
        raise ValueError(
            f"{folder} holds {config.get('architectures')} (model_type {kind!r}), which is no PE-Rank checkpoint; wanted a model_type"
            f" such as '{KIND}mistral'. To train one on a language model: PERank.from_backbone"
        )
    weights = read_weights(folder)
    encoder_weights = bare(_below(weights, ENCODER))
    projector_weights = _below(weights, PROJECTOR)
    body_weights = {
        name.removeprefix("model."): tensor
        for name, tensor in weights.items()
        if not name.startswith((ENCODER, PROJECTOR, "lm_head."))
    }
    fields = {key: value for key, value in config.items() if key not in ("model_type", "architectures", "auto_map")}
    body = _body(folder, kind.removeprefix(KIND), fields, body_weights, dtype)
    hidden = body.config.hidden_size
    head = projector(
        config.get("projector_type", "identity") if config.get("use_proj", True) else "identity",
        config.setdefault("embedding_size", hidden),
        hidden,
    )
    load_strictly(head, projector_weights, f"{folder} (projector)")
    prompter = _prompter(folder, body.config.vocab_size)
    network = VectorLM(body, head.to(dtype), prompter.placeholder)
    return Ranker(network.to(device).eval(), prompter, config, folder, encoder_weights)


def new_ranker(folder: Path, fields: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Ranker:
    """A causal language model under an untrained projector; fields: those of `PERank.from_backbone` for config.json."""
    import transformers

    encoder, encoder_weights = None, {}
    if fields["encoder_name"]:
        source = fetch(fields["encoder_name"])
        encoder_weights = bare(read_weights(source))
        encoder = _encoder(
            read_config(source), encoder_weights, read_tokenizer(source), fields["encoder_pooling"], str(source)
        )
        encoder.network.to(device, dtype).eval()
        fields = fields | {"embedding_size": encoder.config["hidden_size"]}
    if not fields["embedding_size"]:
        raise ValueError("embedding_size=None without encoder_name=; one of them must say how long the vectors are")
    body, found = transformers.AutoModel.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    if found["missing_keys"]:
        raise wrong_weights(str(folder), [f"missing {name}" for name in found["missing_keys"]])
    prompter = _prompter(folder, body.config.vocab_size, add=True)
    body.resize_token_embeddings(max(body.config.vocab_size, len(prompter.tokenizer)), mean_resizing=False)
    kind = body.config.model_type
    head = projector(fields["projector_type"], fields["embedding_size"], body.config.hidden_size)
    config = json.loads(body.config.to_json_string(use_diff=False)) | fields | {"model_type": KIND + kind}
    config["architectures"] = [f"Embed{kind.capitalize()}ForRankLM"]
    config.pop("_name_or_path", None)  # where it lay on this machine
    network = VectorLM(body, head.to(dtype), prompter.placeholder)
    return Ranker(network.to(device).eval(), prompter, config, folder, encoder_weights, encoder)


def read_text_encoder(ranker: Ranker) -> TextEncoder:
    """The encoder inside a checkpoint: its weights from there, its config and tokenizer from `encoder_name` or, saved by us, there too."""
    name = ranker.config.get("encoder_name")
    if not ranker.encoder_weights:
        raise ValueError(
            f"{ranker.folder} holds no encoder; give the passages' vectors as vectors= or in a 'doc_vec' column, or an encoder="
        )
    if "encoder_config" in ranker.config:
        config = ranker.config["encoder_config"]
        if not (ranker.folder / ENCODER_TOKENIZER).exists():
            raise missing(ranker.folder, f"{ENCODER_TOKENIZER}, of the encoder inside")
        tokenizer = tokenizers.Tokenizer.from_file(str(ranker.folder / ENCODER_TOKENIZER))
    else:
        near = [folder / str(name) for folder in (ranker.folder, ranker.folder.parent)]
        use = f"put it at {near[0]}, or give the passages' vectors as vectors= or an encoder="
        source = next((folder for folder in near if folder.is_dir()), None) or fetch(str(name), weights=False, use=use)
        config, tokenizer = read_config(source), read_tokenizer(source)
    pooling = ranker.config.get("encoder_pooling", "mean")
    encoder = _encoder(config, ranker.encoder_weights, tokenizer, pooling, f"{ranker.folder} (encoder {name})")
    weight = next(ranker.network.parameters())
    encoder.network.to(weight.device, weight.dtype).eval()
    return encoder


def _encoder(
    config: dict[str, Any], weights: Weights, tokenizer: tokenizers.Tokenizer, pooling: str, source: str
) -> TextEncoder:
    if pooling not in POOLING:
        raise ValueError(f"{source}: encoder_pooling={pooling!r}; wanted one of {', '.join(map(repr, POOLING))}")
    network = empty_encoder(config)
    load_strictly(network, weights, source)
    if tokenizer.get_vocab_size() > config["vocab_size"]:
        raise ValueError(
            f"{source}: the tokenizer knows {tokenizer.get_vocab_size()} pieces and the encoder {config['vocab_size']}; they are of two checkpoints"
        )
    return TextEncoder(network, tokenizer, config, pooling)


def _body(folder: Path, kind: str, fields: dict[str, Any], weights: Weights, dtype: torch.dtype) -> "PreTrainedModel":
    """The body of a language model of the library with exactly these weights, its position tables in float32."""
    import transformers

    try:
        config = transformers.AutoConfig.for_model(kind, **fields)
        model_class: Any = transformers.MODEL_MAPPING[type(config)]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{folder} is over a language model {kind!r}, which transformers does not know") from error
    body: PreTrainedModel
    body, found = model_class.from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True
    )
    problems = [
        f"{problem} {name if isinstance(name, str) else name[0]}"
        for problem in ("missing", "unexpected", "mismatched")
        for name in found[f"{problem}_keys"]
    ]
    if problems:
        raise wrong_weights(str(folder), problems)
    return body


def _prompter(folder: Path, vocab_size: int, *, add: bool = False) -> Prompter:
    check_vocabulary(folder)
    kind = str(read_tokenizer_config(folder).get("tokenizer_class", "AutoTokenizer"))
    return read_prompter(folder, kind, vocab_size, add=add)


def _below(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
