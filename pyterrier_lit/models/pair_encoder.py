"""Encoders that read two texts as one input and give one score, in all published formats of cross-encoders.

Read are lightning-ir's checkpoints since 2024 (Rank-DistiLLM's monoELECTRA) and the library's sequence classifiers with
one label or two. Knows ids and tensors: no queries, no rankings.
"""

import copy
import dataclasses
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
import torch
import torch.nn.functional as F
from torch import nn

from pyterrier_lit.models.checkpoints import (
    Folder,
    Weights,
    build,
    check_pieces,
    library_config,
    library_model,
    load_strictly,
    pieces_known,
    save_json,
    save_weights,
    wrong_weights,
)
from pyterrier_lit.models.pairs import PairLayout
from pyterrier_lit.models.pooling import POOLING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The model_type that lightning-ir gave a cross-encoder: in 2024-05, 2024-06, and since 2025-08
LIGHTNING_IR = ("mono-electra", "mono-bert", "cross-encoder", "mono")
POOLINGS = ("first", "mean", "sum", "max")  # by lightning-ir's names


@dataclasses.dataclass(eq=False)
class PairCheckpoint:
    """A cross-encoder in memory."""

    network: "PooledScorer | LabelScorer"
    tokenizer: tokenizers.Tokenizer
    config: dict[str, Any]  # config.json
    tokenizer_config: dict[str, Any]  # tokenizer_config.json
    clean_up: bool = False  # cut texts by way of decoded text, as lightning-ir does
    _layouts: dict[bool, PairLayout] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def limit(self) -> int | None:
        """Tokens of the longest input, None for a network without positions of its own."""
        limits = [self.config.get("max_position_embeddings"), self.tokenizer_config.get("model_max_length")]
        for name, module in self.network.named_modules():
            if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
                reserved = 0 if module.padding_idx is None else module.padding_idx + 1  # RoBERTa counts from there on
                limits.append(module.num_embeddings - reserved)
        return min((limit for limit in limits if limit), default=None)

    @property
    def pad_id(self) -> int:
        return self.config.get("pad_token_id") or 0

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def layout(self, *, special_tokens_as_text: bool = False) -> PairLayout:
        """How two texts become one input; special tokens inside a text are control tokens, or plain characters."""
        if special_tokens_as_text not in self._layouts:
            tokenizer = self.tokenizer
            if special_tokens_as_text:
                tokenizer = copy.deepcopy(tokenizer)
                tokenizer.encode_special_tokens = True
            layout = PairLayout(tokenizer, limit=self.limit, clean_up=self.clean_up)
            self._layouts[special_tokens_as_text] = layout
        return self._layouts[special_tokens_as_text]

    def scores(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """input_ids, attention_mask, token_type_ids (B, L) -> float32 scores (B,), perhaps still being computed."""
        if self.device.type == "cuda":
            inputs = {name: tensor.pin_memory() for name, tensor in inputs.items()}
        there = {name: tensor.to(self.device, non_blocking=True) for name, tensor in inputs.items()}
        scores: torch.Tensor = self.network(**there)
        return scores.float()

    def save(self, folder: Path, query_length: int, doc_length: int) -> None:
        """Write config, weights and tokenizer, with the lengths, into an existing folder."""
        lengths = {"query_length": query_length, "doc_length": doc_length}
        save_json(folder / "config.json", self.network.save(folder, self.config) | lengths)
        clean_up = {"clean_up_tokenization_spaces": self.clean_up}
        save_json(folder / "tokenizer_config.json", self.tokenizer_config | clean_up | lengths)
        self.tokenizer.save(str(folder / "tokenizer.json"))

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_layouts": {}}  # a pickled tokenizer loses its flag


def read_pairs(folder: Folder, device: torch.device, dtype: torch.dtype) -> PairCheckpoint:
    """A trained cross-encoder of any supported format; which one it is, the weights decide before the config does."""
    config, weights = folder.config, folder.weights()
    kind = config.get("model_type")
    if "linear.weight" in weights:
        config = config | {"backbone_model_type": _backbone(config)}
        return _checkpoint(folder, _pooled(folder, config, weights), config, device, dtype)
    if kind in LIGHTNING_IR:
        raise wrong_weights(str(folder), ["missing linear.weight"])
    architectures = config.get("architectures") or ["unknown architecture"]
    if not architectures[0].endswith("ForSequenceClassification"):
        raise ValueError(
            f"{folder} holds {architectures[0]} (model_type {kind!r}), which is no cross-encoder; wanted a checkpoint"
            " of lightning-ir over ELECTRA or BERT, or a ...ForSequenceClassification with one or two labels. To train"
            " a head on an encoder: CrossEncoder.from_backbone"
        )
    return _checkpoint(folder, _labelled(folder, weights), config, device, dtype)


def new_pairs(folder: Folder, device: torch.device, dtype: torch.dtype) -> PairCheckpoint:
    """The body of an ELECTRA or BERT, or of a cross-encoder over one, under a new head.

    w ~ N(0, initializer_range) from torch's generator, and no bias.
    """
    backbone = _backbone(folder.config)
    config = folder.config | {"backbone_model_type": backbone}
    weights = folder.weights()
    network = PooledScorer(_body(folder, config, weights), bias=False)
    nn.init.normal_(network.linear.weight, std=config.get("initializer_range", 0.02))
    own = network.body.state_dict().keys()
    bare = {name: tensor for name, tensor in _bare(weights, backbone).items() if name in own}
    load_strictly(network.body, bare, str(folder))
    return _checkpoint(folder, network, config, device, dtype)


class PooledScorer(nn.Module):
    """score = w . pool(h) + b over a bare encoder; with two rows in w, the log-probability of the second."""

    def __init__(self, body: "PreTrainedModel", *, pooling: str = "first", rows: int = 1, bias: bool = True):
        super().__init__()
        self.body = body
        self.pooling = pooling
        self.linear = nn.Linear(body.config.hidden_size, rows, bias=bias)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> torch.Tensor:
        """(B, L) three times -> (B,)"""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        states = self.body(**inputs).last_hidden_state
        pooled, bias = POOLING[self.pooling](states, attention_mask), self.linear.bias
        # In float32 whatever the body's dtype: rounded to bfloat16, close scores would tie
        logits = F.linear(pooled.float(), self.linear.weight.float(), None if bias is None else bias.float())
        return logits[:, 0] if logits.shape[1] == 1 else logits.log_softmax(-1)[:, 1]

    def save(self, folder: Path, config: dict[str, Any]) -> dict[str, Any]:
        """Write the weights as lightning-ir names them since 2025-08; returns config.json's fields."""
        save_weights(folder, {name.removeprefix("body."): tensor for name, tensor in self.state_dict().items()})
        backbone = config["backbone_model_type"]
        return {key: value for key, value in config.items() if key != "auto_map"} | {
            "model_type": "mono",
            "architectures": [f"Mono{backbone.capitalize()}Model"],
            "linear_bias": self.linear.bias is not None,
            "pooling_strategy": self.pooling,
            "scoring_strategy": "rank" if self.linear.out_features == 1 else "mono",
        }


class LabelScorer(nn.Module):
    """The last logit of a sequence classifier with one or two labels."""

    def __init__(self, model: "PreTrainedModel"):
        super().__init__()
        self.model = model
        self.reads_types = "token_type_ids" in inspect.signature(model.forward).parameters

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> torch.Tensor:
        """(B, L) three times -> (B,)"""
        types = {"token_type_ids": token_type_ids} if self.reads_types else {}
        logits: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, **types).logits
        return logits[:, -1]

    def save(self, folder: Path, config: dict[str, Any]) -> dict[str, Any]:
        """Write the weights as transformers does; returns config.json's fields."""
        self.model.save_pretrained(folder)
        return Folder(folder).config


def _checkpoint(
    folder: Folder,
    network: PooledScorer | LabelScorer,
    config: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
) -> PairCheckpoint:
    tokenizer = folder.tokenizer()
    check_pieces(pieces_known(tokenizer), config["vocab_size"], str(folder))
    clean_up = isinstance(network, PooledScorer) and _cleans_up(folder)
    checkpoint = PairCheckpoint(network, tokenizer, config, folder.tokenizer_config, clean_up)
    if checkpoint.pad_id not in range(config["vocab_size"]):
        raise ValueError(f"{folder}: pad_token_id={checkpoint.pad_id!r} is no piece of {config['vocab_size']}")
    network.to(device, dtype).eval()
    return checkpoint


def _pooled(folder: Folder, config: dict[str, Any], weights: Weights) -> PooledScorer:
    pooling, scoring = config.get("pooling_strategy", "first"), config.get("scoring_strategy", "rank")
    if pooling not in POOLINGS or scoring not in ("rank", "mono"):
        raise ValueError(
            f"{folder}: pooling_strategy={pooling!r} with scoring_strategy={scoring!r} is not supported; wanted"
            f" {', '.join(POOLINGS)} with 'rank' or 'mono'"
        )
    bias = "linear.bias" in weights  # the file decides: some configs forgot that a bias was trained
    network = PooledScorer(
        _body(folder, config, weights), pooling=pooling, rows=2 if scoring == "mono" else 1, bias=bias
    )
    bare = _bare(weights, config["backbone_model_type"])
    named = {name if name.startswith("linear.") else f"body.{name}": tensor for name, tensor in bare.items()}
    load_strictly(network, named, str(folder))
    return network


def _labelled(folder: Folder, weights: Weights) -> LabelScorer:
    import transformers

    try:
        mapping = transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
        kind = str(folder.config.get("model_type"))
        model = library_model(mapping, folder.config, kind, weights, str(folder), torch.float32)
    except (RuntimeError, KeyError, OSError) as error:
        raise ValueError(
            f"{folder} cannot be loaded as a sequence classifier without code of its own ({error})"
        ) from error
    if (labels := int(model.config.num_labels or 0)) > 2:
        raise ValueError(
            f"{folder} classifies into {labels} labels; a cross-encoder has one, or two of which the second"
            " is the score"
        )
    return LabelScorer(model)


def _backbone(config: dict[str, Any]) -> str:
    """The kind of the body: "electra", "bert", ..."""
    return config.get("backbone_model_type") or str(config.get("model_type")).removeprefix("mono-")


def _body(folder: Folder, config: dict[str, Any], weights: Weights) -> "PreTrainedModel":
    """A bare ELECTRA or BERT, without pooler, of the shape that a config gives; its weights are still random."""
    import transformers

    backbone = config["backbone_model_type"]
    classes = {
        "electra": (transformers.ElectraConfig, transformers.ElectraModel),
        "bert": (transformers.BertConfig, transformers.BertModel),
    }
    if backbone not in classes:
        raise ValueError(f"{folder} has a body of type {backbone!r}; wanted one of {', '.join(classes)}")
    config_class, model_class = classes[backbone]
    options = {"add_pooling_layer": False} if backbone == "bert" else {}
    shape = library_config(config, config_class)
    body: PreTrainedModel = build(lambda: model_class(shape, **options), config, weights, str(folder))
    return body


def _bare(weights: Weights, backbone: str) -> Weights:
    """Weights by the names of the bare body: without "electra." in front, and without a buffer of old versions."""
    kept = [name for name in weights if not name.endswith("embeddings.position_ids")]
    return {name.removeprefix(f"{backbone}."): weights[name] for name in kept}


def _cleans_up(folder: Folder) -> bool:
    """The tokenizer's flag clean_up_tokenization_spaces; its default was true until transformers 4.45."""
    written_by = [int(part) for part in str(folder.config.get("transformers_version", "4.41")).split(".")[:2]]
    return bool(folder.tokenizer_config.get("clean_up_tokenization_spaces", written_by < [4, 45]))
