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
    check_pieces,
    library_config,
    library_model,
    load_strictly,
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
PROMPTS = "config_sentence_transformers.json"  # where sentence-transformers keeps a prompt for queries


@dataclasses.dataclass(eq=False)
class PairCheckpoint:
    """A cross-encoder in memory."""

    network: "PooledScorer | LabelScorer"
    tokenizer: tokenizers.Tokenizer
    config: dict[str, Any]  # config.json
    tokenizer_config: dict[str, Any]  # tokenizer_config.json
    clean_up: bool = False  # cut texts by way of decoded text, as lightning-ir does
    prompt: str = ""  # stands before every query: the default prompt of sentence-transformers
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
    def is_lightning_ir(self) -> bool:
        """Whether it is of lightning-ir's kind, and not an ordinary classifier."""
        return isinstance(self.network, PooledScorer)

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
            layout = PairLayout(
                tokenizer, limit=self.limit, clean_up=self.clean_up, longest_first=not self.is_lightning_ir
            )
            self._layouts[special_tokens_as_text] = layout
        return self._layouts[special_tokens_as_text]

    def scores(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """input_ids, attention_mask, token_type_ids (B, L) -> float32 scores (B,), perhaps still being computed."""
        if self.device.type == "cuda":
            inputs = {name: tensor.pin_memory() for name, tensor in inputs.items()}
        there = {name: tensor.to(self.device, non_blocking=True) for name, tensor in inputs.items()}
        scores: torch.Tensor = self.network(**there)
        return scores.float()

    def save(self, folder: Path, query_length: int | None, doc_length: int | None) -> None:
        """Write config, weights and tokenizer, with the lengths, into an existing folder."""
        lengths = {"query_length": query_length, "doc_length": doc_length}
        if self.prompt:
            prompts = {"model_type": "CrossEncoder", "prompts": {"query": self.prompt}, "default_prompt_name": "query"}
            save_json(folder / PROMPTS, prompts)
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
    if any(part.get("path") for part in folder.optional("modules.json") or ()):
        raise ValueError(
            f"{folder} is a model of sentence-transformers whose head lies in a module of its own (modules.json), which"
            " is not read; wanted a ...ForSequenceClassification with its head in the weights"
        )
    architectures = config.get("architectures") or ["unknown architecture"]
    if not architectures[0].endswith("ForSequenceClassification"):
        raise ValueError(
            f"{folder} holds {architectures[0]} (model_type {kind!r}), which is no cross-encoder; wanted a checkpoint"
            " of lightning-ir over ELECTRA or BERT, or a ...ForSequenceClassification with one or two labels. To train"
            " a head on an encoder: CrossEncoder.from_backbone"
        )
    return _labelled(folder, weights, device, dtype)


def new_pairs(folder: Folder, device: torch.device, dtype: torch.dtype) -> PairCheckpoint:
    """The body of an ELECTRA or BERT, or of a cross-encoder over one, under a new head.

    w ~ N(0, initializer_range) from torch's generator, and no bias.
    """
    backbone = _backbone(folder.config)
    config = folder.config | {"backbone_model_type": backbone}
    network = PooledScorer(_body(folder, config), bias=False)
    nn.init.normal_(network.linear.weight, std=config.get("initializer_range", 0.02))
    own = network.body.state_dict().keys()
    weights = {name: tensor for name, tensor in _bare(folder.weights(), backbone).items() if name in own}
    load_strictly(network.body, weights, str(folder))
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
    """The logit of a sequence classifier with one label; of two labels the second's less the first's.

    wants_types: whether the checkpoint's tokenizer gives token types, which are then read where the model has some.
    """

    def __init__(self, model: "PreTrainedModel", wants_types: bool = True):
        super().__init__()
        self.model = model
        has_types = getattr(model.config, "type_vocab_size", 2) > 1
        known = "token_type_ids" in inspect.signature(model.forward).parameters
        self.reads_types = wants_types and has_types and known

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> torch.Tensor:
        """(B, L) three times -> (B,)"""
        types = {"token_type_ids": token_type_ids} if self.reads_types else {}
        logits: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, **types).logits
        logits = logits.float()
        return logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]

    def save(self, folder: Path, config: dict[str, Any]) -> dict[str, Any]:
        """Write the weights as transformers does; returns config.json's fields."""
        self.model.save_pretrained(folder)
        return Folder(folder).config


def _checkpoint(
    folder: Folder,
    network: PooledScorer,
    config: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
) -> PairCheckpoint:
    tokenizer = folder.tokenizer()
    check_pieces(tokenizer.get_vocab_size(), config["vocab_size"], str(folder))
    checkpoint = PairCheckpoint(network, tokenizer, config, folder.tokenizer_config, _cleans_up(folder))
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
    network = PooledScorer(_body(folder, config), pooling=pooling, rows=2 if scoring == "mono" else 1, bias=bias)
    bare = _bare(weights, config["backbone_model_type"])
    named = {name if name.startswith("linear.") else f"body.{name}": tensor for name, tensor in bare.items()}
    load_strictly(network, named, str(folder))
    return network


def _labelled(folder: Folder, weights: Weights, device: torch.device, dtype: torch.dtype) -> PairCheckpoint:
    """A sequence classifier of the library, with its tokenizer as the library makes it."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder.path, trust_remote_code=False)
        mapping = transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
        model = library_model(mapping, config, weights, str(folder), torch.float32)
    except (RuntimeError, KeyError, OSError) as error:
        raise ValueError(
            f"{folder} cannot be loaded as a sequence classifier without code of its own ({error})"
        ) from error
    if (labels := int(model.config.num_labels or 0)) > 2:
        raise ValueError(
            f"{folder} classifies into {labels} labels; a cross-encoder has one, or two: irrelevant and relevant"
        )
    tokenizer = folder.library_tokenizer()
    check_pieces(len(tokenizer), model.config.vocab_size, str(folder))
    if model.config.pad_token_id is None:  # models that read the last token that is no padding
        model.config.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    prompts = folder.optional(PROMPTS)
    prompt = (prompts.get("prompts") or {}).get(prompts.get("default_prompt_name"), "")
    inputs = tokenizer.model_input_names
    if "tokenizer_class" not in folder.tokenizer_config:
        inputs = folder.tokenizer_config.get("model_input_names", ["token_type_ids"])
    network = LabelScorer(model.eval(), "token_type_ids" in inputs)
    config_fields = folder.config | {"pad_token_id": model.config.pad_token_id}
    checkpoint = PairCheckpoint(
        network, tokenizer.backend_tokenizer, config_fields, folder.tokenizer_config, prompt=prompt
    )
    _check_padding(checkpoint, str(folder))
    network.to(device, dtype)
    return checkpoint


@torch.inference_mode()
def _check_padding(checkpoint: PairCheckpoint, source: str) -> None:
    """ValueError for a model that scores a pair otherwise beside a longer one: it wants its padding elsewhere."""
    layout = checkpoint.layout()
    short, long = (layout.pieces([text], 8)[0] for text in ("a b", "b a b a b a b a"))
    pairs = [(short, short), (short, long)]
    together = checkpoint.scores(layout.tensors(pairs, checkpoint.pad_id))
    alone = torch.cat([checkpoint.scores(layout.tensors([pair], checkpoint.pad_id)) for pair in pairs])
    if not torch.allclose(together, alone, rtol=1e-3, atol=1e-3):
        raise ValueError(
            f"{source}: {type(checkpoint.network.model).__name__} scores a pair otherwise when it is padded on the"
            " right beside a longer one, so its scores would depend on the batch; it is not supported"
        )


def _backbone(config: dict[str, Any]) -> str:
    """The kind of the body: "electra", "bert", ..."""
    return config.get("backbone_model_type") or str(config.get("model_type")).removeprefix("mono-")


def _body(folder: Folder, config: dict[str, Any]) -> "PreTrainedModel":
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
    body: PreTrainedModel = model_class(library_config(config, config_class), **options)
    return body


def _bare(weights: Weights, backbone: str) -> Weights:
    """Weights by the names of the bare body: without "electra." in front, and without a buffer of old versions."""
    kept = [name for name in weights if not name.endswith("embeddings.position_ids")]
    return {name.removeprefix(f"{backbone}."): weights[name] for name in kept}


def _cleans_up(folder: Folder) -> bool:
    """The tokenizer's flag clean_up_tokenization_spaces; its default was true until transformers 4.45."""
    written_by = [int(part) for part in str(folder.config.get("transformers_version", "4.41")).split(".")[:2]]
    return bool(folder.tokenizer_config.get("clean_up_tokenization_spaces", written_by < [4, 45]))
