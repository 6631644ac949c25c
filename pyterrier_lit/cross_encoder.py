"""CrossEncoder: a query and a passage through one encoder to one score. Rank-DistiLLM's monoELECTRA (arXiv 2405.07920)."""

import dataclasses
import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd
import safetensors.torch
import tokenizers
import torch
import torch.nn.functional as F
from torch import nn

from pyterrier_lit.batching import encoder_tokens, map_batches
from pyterrier_lit.frames import rerank
from pyterrier_lit.models.checkpoints import (
    Weights,
    choose_device,
    choose_dtype,
    fetch,
    library_config,
    load_strictly,
    read_config,
    read_tokenizer,
    read_tokenizer_config,
    read_weights,
    write,
    wrong_weights,
)
from pyterrier_lit.models.pairs import Pair, PairLayout
from pyterrier_lit.reranker import Reranker

if TYPE_CHECKING:
    from transformers import PreTrainedModel

QUERY_LENGTH, DOC_LENGTH = 32, 256  # pieces kept where neither the caller nor the checkpoint says
LIGHTNING_IR = (
    "mono-electra",
    "mono-bert",
    "cross-encoder",
    "mono",
)  # what lightning-ir called it: 2024-05, 2024-06, since 2025-08


class CrossEncoder(Reranker):
    """Rerank by a cross-encoder that reads each (query, passage) pair: score(q, d) = w . h_[CLS] + b.

    Args:
        model: hub id or folder. Read are the checkpoints of lightning-ir over ELECTRA or BERT (`webis/monoelectra-base`,
            `webis/monoelectra-large`; all its formats since 2024) and ordinary sequence classification checkpoints with one
            label, or two of which the second is the score. No code of the checkpoint is run.
        query_length, doc_length: pieces kept of each query and passage; None takes what the checkpoint records, else 32 and
            256. Together they are capped by the model's positions, the longer side first.
        text_field: the column with the passages.
        special_tokens: "parse" reads [SEP], [CLS], ... inside a text as the reference does, as control tokens; "text" reads
            them as plain characters, for texts from strangers.
        max_tokens: tokens per batch with padding; None is 4,096 on a CPU and 16,384 on a GPU. When memory runs out the batch is
            halved and the run goes on.
        device: None is the first GPU, else the CPU.
        dtype: None is bfloat16 on a GPU that has it, else float32.
        verbose: show a progress bar.

    A pair's score depends on the pair alone, so `pyterrier_caching.ScorerCache` is safe; equal scores are ties and keep
    their incoming order. Source: Schlatt et al., Rank-DistiLLM, ECIR 2025; inference equal to lightning-ir's.
    """

    schematic: ClassVar[dict[str, str]] = {"label": "CrossEncoder"}
    loads_from: ClassVar[tuple[str, ...]] = ("model", "special_tokens", "device", "dtype")

    def __init__(
        self,
        model: str = "webis/monoelectra-base",
        *,
        query_length: int | None = None,
        doc_length: int | None = None,
        text_field: str = "text",
        special_tokens: str = "parse",
        max_tokens: int | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        verbose: bool = False,
    ):
        self.model = model
        self.query_length = query_length
        self.doc_length = doc_length
        self.text_field = text_field
        self.special_tokens = special_tokens
        self.max_tokens = max_tokens
        self.device = device
        self.dtype = dtype
        self.verbose = verbose

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """The same rows with the model's score and the rank that follows from it. See `frames.rerank` for what is raised."""
        return rerank(inp, self.score, self.text_field, context=self)

    def score(self, queries: list[str], passages: list[list[str]]) -> list[list[float]]:
        """The model's score of every passage of every query: Q queries, Q lists of passages -> Q lists of scores."""
        encoder: Encoder = self.loaded()
        asked = [(query, passage) for query, ranking in zip(queries, passages, strict=True) for passage in ranking]
        pairs = list(dict.fromkeys(asked))
        layout, inputs = self.pairs(pairs)

        def logits(batch: list[Pair]) -> torch.Tensor:
            return encoder.scores(layout.tensors(batch, encoder.pad_id))

        lengths = [layout.length(pair) for pair in inputs]
        with torch.inference_mode(), self.progress(len(inputs), "pair") as bar:
            max_tokens = encoder_tokens(encoder.device) if self.max_tokens is None else self.max_tokens
            computed = map_batches(logits, inputs, lengths, max_tokens, bar.update)
        score_of = dict(zip(pairs, computed, strict=True))
        return [
            [score_of[query, passage] for passage in ranking] for query, ranking in zip(queries, passages, strict=True)
        ]

    def pairs(self, texts: Sequence[tuple[str, str]]) -> tuple[PairLayout, list[Pair]]:
        """P (query, passage) texts -> how they are laid out, and P pairs in ids, cut to the lengths. Each text is read once."""
        layout, query_length, doc_length = self._layout(self.loaded())
        query_pieces = _pieces_of(layout, dict.fromkeys(query for query, _ in texts), query_length)
        passage_pieces = _pieces_of(layout, dict.fromkeys(passage for _, passage in texts), doc_length)
        return layout, [layout.fit(query_pieces[query], passage_pieces[passage]) for query, passage in texts]

    def load(self) -> "Encoder":
        """Read the checkpoint: FileNotFoundError or ValueError says what is missing, damaged or of another kind."""
        device = choose_device(self.device)
        dtype = choose_dtype(self.dtype, device)
        encoder = read_encoder(fetch(self.model))
        encoder.network.to(device, dtype).eval()
        return encoder

    def save(self, path: str | Path) -> None:
        """Write a folder that the constructor loads again: as lightning-ir does today, or as transformers for an ordinary classifier."""
        encoder = self.loaded()
        _, query_length, doc_length = self._layout(encoder)
        write(path, lambda folder: encoder.save(folder, query_length, doc_length))

    @classmethod
    def from_backbone(cls, name: str, **arguments: Any) -> "CrossEncoder":
        """An untrained cross-encoder: the body of an ELECTRA or BERT checkpoint, or of a cross-encoder, under a new head, w ~ N(0, initializer_range), b = 0.

        Args:
            name: hub id or folder, such as "google/electra-base-discriminator". Its other heads are left out. The head
                is drawn from torch's generator: `torch.manual_seed` fixes it.
            arguments: those of the constructor.
        """
        reranker = cls(name, **arguments)
        device = choose_device(reranker.device)
        encoder = new_encoder(fetch(name))
        encoder.network.to(device, choose_dtype(reranker.dtype, device)).eval()
        reranker.hold(encoder)
        return reranker

    def _layout(self, encoder: "Encoder") -> tuple[PairLayout, int, int]:
        lengths = []
        for name, default in (("query_length", QUERY_LENGTH), ("doc_length", DOC_LENGTH)):
            own = getattr(self, name)
            length = own if own is not None else encoder.config.get(name) or default
            if not isinstance(length, int) or length < 1:
                raise ValueError(f"{name}={length!r}; wanted a whole number of pieces from 1 on")
            lengths.append(length)
        if self.special_tokens not in ("parse", "text"):
            raise ValueError(f"special_tokens={self.special_tokens!r}; wanted 'parse' or 'text'")
        as_text = self.special_tokens == "text"
        with self._lock:  # set here, since no copy or pickle keeps it; and once, since not while another thread encodes
            if encoder.tokenizer.encode_special_tokens != as_text:
                encoder.tokenizer.encode_special_tokens = as_text
        query_length, doc_length = lengths
        layout = PairLayout(encoder.tokenizer, limit=encoder.limit, clean_up=encoder.clean_up)
        return layout, query_length, doc_length


def _pieces_of(layout: PairLayout, texts: dict[str, None], length: int) -> dict[str, list[int]]:
    return dict(zip(texts, layout.pieces(list(texts), length), strict=True))


@dataclasses.dataclass
class Encoder:
    """A checkpoint in memory."""

    network: "PooledScorer | LabelScorer"
    tokenizer: tokenizers.Tokenizer
    config: dict[str, Any]  # config.json
    tokenizer_config: dict[str, Any]  # tokenizer_config.json
    clean_up: bool = False  # cut texts by way of decoded text, as lightning-ir does

    @property
    def limit(self) -> int | None:
        """Tokens of the longest input, None for a network without positions of its own."""
        limits = [self.config.get("max_position_embeddings"), self.tokenizer_config.get("model_max_length")]
        for name, module in self.network.named_modules():
            if name.endswith("position_embeddings") and isinstance(
                module, nn.Embedding
            ):  # RoBERTa counts from padding_idx + 1
                limits.append(module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1))
        return min((limit for limit in limits if limit), default=None)

    @property
    def pad_id(self) -> int:
        return self.config.get("pad_token_id") or 0

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

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
        config = self.network.save(folder, self.config)
        settings = self.tokenizer_config | {"clean_up_tokenization_spaces": self.clean_up}
        (folder / "config.json").write_text(json.dumps(config | lengths, indent=2) + "\n", encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | lengths, indent=2) + "\n", encoding="utf-8")
        self.tokenizer.save(str(folder / "tokenizer.json"))


def read_encoder(folder: Path) -> Encoder:
    """A trained cross-encoder of any supported format; which one it is, the weights decide before the config does."""
    config, weights = read_config(folder), read_weights(folder)
    kind = config.get("model_type")
    if "linear.weight" in weights:
        network: PooledScorer | LabelScorer = _read_pooled(folder, config, weights)
        return _encoder(folder, network, config, clean_up=_cleans_up(folder, config))
    if kind in LIGHTNING_IR:
        raise wrong_weights(str(folder), ["missing linear.weight"])
    architectures = config.get("architectures") or ["unknown architecture"]
    if not architectures[0].endswith("ForSequenceClassification"):
        raise ValueError(
            f"{folder} holds {architectures[0]} (model_type {kind!r}), which is no cross-encoder; wanted a checkpoint of lightning-ir over"
            " ELECTRA or BERT, or a ...ForSequenceClassification with one or two labels. To train a head on an encoder: CrossEncoder.from_backbone"
        )
    return _encoder(folder, _read_labelled(folder), config)


def new_encoder(folder: Path) -> Encoder:
    """The body of an ELECTRA or BERT checkpoint under an untrained head."""
    config = read_config(folder)
    backbone = _backbone(config)
    network = PooledScorer(_body(folder, backbone, config), bias=False)
    nn.init.normal_(network.linear.weight, std=config.get("initializer_range", 0.02))
    own = network.body.state_dict().keys()
    weights = {name: tensor for name, tensor in _bare(read_weights(folder), backbone).items() if name in own}
    load_strictly(network.body, weights, str(folder))
    return _encoder(folder, network, config | {"backbone_model_type": backbone}, clean_up=_cleans_up(folder, config))


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
        states = self.body(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        ).last_hidden_state
        pooled, bias = POOLING[self.pooling](states, attention_mask[..., None]), self.linear.bias
        # In float32 whatever the body's dtype: rounded to bfloat16, close scores would tie
        logits = F.linear(pooled.float(), self.linear.weight.float(), None if bias is None else bias.float())
        return logits[:, 0] if logits.shape[1] == 1 else logits.log_softmax(-1)[:, 1]

    def save(self, folder: Path, config: dict[str, Any]) -> dict[str, Any]:
        """Write the weights as lightning-ir names them since 2025-08; returns config.json's fields."""
        weights = {name.removeprefix("body."): tensor.contiguous().cpu() for name, tensor in self.state_dict().items()}
        safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        backbone = config["backbone_model_type"]
        return {key: value for key, value in config.items() if key != "auto_map"} | {
            "model_type": "mono",
            "architectures": [f"Mono{backbone.capitalize()}Model"],
            "linear_bias": self.linear.bias is not None,
            "pooling_strategy": self.pooling,
            "scoring_strategy": "rank" if self.linear.out_features == 1 else "mono",
        }


# states (B, L, H), mask (B, L, 1) -> (B, H)
POOLING: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "first": lambda states, mask: states[:, 0],
    "mean": lambda states, mask: (states * mask).sum(1) / mask.sum(1),
    "sum": lambda states, mask: (states * mask).sum(1),
    "max": lambda states, mask: states.masked_fill(mask == 0, float("-inf")).amax(1),
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
        return read_config(folder)


def _read_pooled(folder: Path, config: dict[str, Any], weights: Weights) -> PooledScorer:
    backbone = _backbone(config)
    pooling, scoring = config.get("pooling_strategy", "first"), config.get("scoring_strategy", "rank")
    if pooling not in POOLING or scoring not in ("rank", "mono"):
        raise ValueError(
            f"{folder}: pooling_strategy={pooling!r} with scoring_strategy={scoring!r} is not supported; wanted"
            f" {', '.join(POOLING)} with 'rank' or 'mono'"
        )
    config["backbone_model_type"] = backbone
    bias = "linear.bias" in weights  # the file decides: some configs forgot that a bias was trained
    network = PooledScorer(
        _body(folder, backbone, config), pooling=pooling, rows=2 if scoring == "mono" else 1, bias=bias
    )
    named = {
        name if name.startswith("linear.") else f"body.{name}": tensor
        for name, tensor in _bare(weights, backbone).items()
    }
    load_strictly(network, named, str(folder))
    return network


def _read_labelled(folder: Path) -> LabelScorer:
    from transformers import AutoModelForSequenceClassification

    try:
        model, found = AutoModelForSequenceClassification.from_pretrained(
            folder, output_loading_info=True, dtype=torch.float32
        )
    except (ValueError, RuntimeError, KeyError, OSError) as error:
        raise ValueError(
            f"{folder} cannot be loaded as a sequence classifier without code of its own ({error})"
        ) from error
    problems = [
        f"{problem} {name}"
        for problem in ("missing", "unexpected")
        for name in found[f"{problem}_keys"]
        if "position_ids" not in name
    ]
    if problems:
        raise wrong_weights(str(folder), problems)
    if model.config.num_labels > 2:
        raise ValueError(
            f"{folder} classifies into {model.config.num_labels} labels; a cross-encoder has one, or two of which the second is the score"
        )
    return LabelScorer(model)


def _encoder(
    folder: Path, network: "PooledScorer | LabelScorer", config: dict[str, Any], clean_up: bool = False
) -> Encoder:
    tokenizer = read_tokenizer(folder)
    if tokenizer.get_vocab_size() > config["vocab_size"]:
        raise ValueError(
            f"{folder}: the tokenizer knows {tokenizer.get_vocab_size()} pieces and the model {config['vocab_size']}; they are of two checkpoints"
        )
    encoder = Encoder(network, tokenizer, config, read_tokenizer_config(folder), clean_up)
    if encoder.pad_id not in range(config["vocab_size"]):
        raise ValueError(f"{folder}: pad_token_id={encoder.pad_id!r} is no piece of {config['vocab_size']}")
    return encoder


def _backbone(config: dict[str, Any]) -> str:
    """The kind of the body: "electra", "bert", ..."""
    return config.get("backbone_model_type") or str(config.get("model_type")).removeprefix("mono-")


def _body(folder: Path, backbone: str | None, config: dict[str, Any]) -> "PreTrainedModel":
    """A bare ELECTRA or BERT, without pooler, of the shape that a config gives; its weights are still random."""
    import transformers

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


def _bare(weights: Weights, backbone: str | None) -> Weights:
    """Weights by the names of the bare body: without "electra." in front, and without the buffer that old versions saved."""
    return {
        name.removeprefix(f"{backbone}."): tensor
        for name, tensor in weights.items()
        if not name.endswith("embeddings.position_ids")
    }


def _cleans_up(folder: Path, config: dict[str, Any]) -> bool:
    """The tokenizer's flag; where the file has none, what the transformers version that wrote it took: true before 4.45."""
    written_by = [int(part) for part in str(config.get("transformers_version", "4.41")).split(".")[:2]]
    return bool(read_tokenizer_config(folder).get("clean_up_tokenization_spaces", written_by < [4, 45]))
