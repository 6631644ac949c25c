"""Cross-encoders, which read two texts as one input and return one score, and their checkpoints.

Two published checkpoint formats are supported. The first is lightning-ir's format since 2024. Rank-DistiLLM's
monoELECTRA has this format. The second is that of sequence classifiers of transformers with one or two labels. A
checkpoint in int8 has a third format, which only this package uses. This module does not deal with rankings.
"""

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
import torch
from torch import nn

from pyterrier_lit.models.checkpoints import Folder, save_json
from pyterrier_lit.models.devices import check_int8
from pyterrier_lit.models.errors import wrong_weights
from pyterrier_lit.models.int8 import Int8Scorer, quantized, read_int8
from pyterrier_lit.models.library import (
    Weights,
    build,
    library_config,
    library_model,
    library_student,
    load_strictly,
    positions,
    today,
)
from pyterrier_lit.models.pair_networks import LabelScorer, PooledScorer
from pyterrier_lit.models.pairs import Pair, PairLayout, Pieces, Reading
from pyterrier_lit.models.sentence_files import SentenceFiles, read_sentence_files
from pyterrier_lit.models.tokenization import (
    CHAT_TEMPLATE,
    bare_tokenizer,
    chats_about_pairs,
    check_pieces,
    pieces_known,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# Values of model_type in lightning-ir's cross-encoders. The first two are from 2024-05, the third is from 2024-06, and
# "mono" has been written since 2025-08
LIGHTNING_IR = ("mono-electra", "mono-bert", "cross-encoder", "mono")
# Model type of a cross-encoder's body (the encoder without its head) -> prefix of the body's classes in transformers
BODIES = {"electra": "Electra", "bert": "Bert"}
# Without these fields, sentence-transformers would apply a sigmoid to the score of a classifier with a single label.
# High scores would then tie
IDENTITY = {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}
INT8 = "int8"  # the field of config.json that only a checkpoint in int8 has. The field states how pairs are read
POOLINGS = ("first", "mean", "sum", "max")  # lightning-ir's names for how hidden states are pooled
UNLIMITED = 10**9  # for a tokenizer without a maximum length, transformers writes a number above 10**9
LENGTHS = {"query_length": 32, "doc_length": 256}  # maximum tokens of a query and of a passage in Rank-DistiLLM


@dataclasses.dataclass(eq=False)
class PairCheckpoint:
    """A cross-encoder in memory: its network, its tokenizer, and how it reads query-passage pairs."""

    network: PooledScorer | LabelScorer | Int8Scorer
    tokenizer: tokenizers.Tokenizer
    config: dict[str, Any]  # config.json
    tokenizer_config: dict[str, Any]  # tokenizer_config.json
    reading: Reading
    files: dict[str, Any] = dataclasses.field(default_factory=dict)  # further JSON files: name -> content
    _layouts: dict[bool, PairLayout] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def lengths(self) -> dict[str, int | None]:
        """The maximum lengths of a query and of a passage in tokens, as {"query_length": ..., "doc_length": ...}.

        If the config does not record a length, the default depends on the format of the checkpoint. In lightning-ir's
        format, the default is query_length=32 and doc_length=256, as in Rank-DistiLLM. In any other format, the default
        is None: only the query-passage pair as a whole is truncated.
        """
        default = LENGTHS if isinstance(self.network, PooledScorer) else dict.fromkeys(LENGTHS)
        return {name: self.config.get(name) or length for name, length in default.items()}

    @property
    def stock(self) -> bool:
        """Whether the checkpoint is a sequence classifier of transformers, which other libraries can load."""
        return isinstance(self.network, LabelScorer)

    @property
    def arguments(self) -> str:
        """The arguments that a reranker's constructor needs in addition to the checkpoint, as text: ', device="cpu"'
        for a checkpoint in int8, else ""."""
        return ', device="cpu"' if isinstance(self.network, Int8Scorer) else ""

    @property
    def pad_id(self) -> int:
        """The id of the padding token, or 0 if the network has no padding token."""
        return max(self.network.pad_id or 0, 0)

    @property
    def device(self) -> torch.device:
        """The device of the network's parameters, or the CPU if it has no parameters."""
        return next((parameter.device for parameter in self.network.parameters()), torch.device("cpu"))

    def layout(self, *, special_tokens_as_text: bool = False) -> PairLayout:
        """Return the object that joins the token ids of two texts into one input.

        Args:
            special_tokens_as_text: whether special tokens inside a text are read as plain characters instead of as
                control tokens.
        """
        if special_tokens_as_text not in self._layouts:
            tokenizer = self.tokenizer
            if special_tokens_as_text or self.tokenizer_config.get("split_special_tokens"):
                tokenizer = copy.deepcopy(tokenizer)
                tokenizer.encode_special_tokens = True
            self._layouts[special_tokens_as_text] = PairLayout(tokenizer, self.reading)
        return self._layouts[special_tokens_as_text]

    def scores(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Score a batch of B query-passage pairs. On a GPU, the method may return before the scores are computed.

        Args:
            inputs: input_ids, attention_mask and token_type_ids, each an int64 tensor (B, L), as `PairLayout.tensors`
                returns them.

        Returns the scores, a float32 tensor (B,).
        """
        if self.device.type == "cuda":
            inputs = {name: tensor.pin_memory() for name, tensor in inputs.items()}
        there = {name: tensor.to(self.device, non_blocking=True) for name, tensor in inputs.items()}
        scores: torch.Tensor = self.network(**there)
        return scores.float()

    def save(self, folder: Path, **lengths: int | None) -> None:
        """Write config, weights and tokenizer into an existing folder. `lengths` are the maximum lengths in tokens that
        are recorded, such as query_length=32. A length that is None is not recorded."""
        recorded = {name: length for name, length in lengths.items() if length is not None}
        save_json(folder / "config.json", self.network.save(folder, self.config) | recorded)
        settings = {name: value for name, value in self.tokenizer_config.items() if name != CHAT_TEMPLATE}
        clean_up = {"clean_up_tokenization_spaces": self.reading.clean_up}
        save_json(folder / "tokenizer_config.json", settings | clean_up | recorded)
        self.tokenizer.save(str(folder / "tokenizer.json"))
        for name, fields in self.files.items():
            save_json(folder / name, fields)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_layouts": {}}  # pickled tokenizers lose the flag encode_special_tokens


def read_pairs(folder: Folder, device: torch.device, dtype: torch.dtype) -> PairCheckpoint:
    """Load a trained cross-encoder in any supported format. The format is recognised by the config and by the names of
    the weights.

    Args:
        folder: the folder of the checkpoint.
        device: the device of the network.
        dtype: the dtype of the weights.

    Raises ValueError if the checkpoint is not a supported cross-encoder.
    """
    config = folder.config
    if INT8 in config:
        return _read_int8(folder, device, dtype)
    weights, kind = folder.weights(), config.get("model_type")
    if "linear.weight" in weights:
        if kind not in (*LIGHTNING_IR, *BODIES):
            raise ValueError(
                f"{folder} is of model_type {kind!r}, whose score depends on more than its pair, or is computed in a"
                f" way that is not known; of lightning-ir's wanted one of {', '.join(LIGHTNING_IR)}"
            )
        config = config | {"backbone_model_type": _backbone(config)}
        return _lightning_ir(folder, _pooled(folder, config, weights), config, device, dtype)
    if kind in LIGHTNING_IR:
        raise wrong_weights(str(folder), ["missing linear.weight"])
    beside = read_sentence_files(folder)
    architectures = config.get("architectures") or ["unknown architecture"]
    if not architectures[0].endswith("ForSequenceClassification"):
        raise ValueError(
            f"{folder} holds {architectures[0]} (model_type {kind!r}), which is not a cross-encoder; wanted a"
            " checkpoint of lightning-ir over ELECTRA or BERT, or a ...ForSequenceClassification with one or two"
            " labels. To train a head on an encoder: CrossEncoder.from_backbone"
        )
    return _classifier(folder, _labelled(folder, weights), beside, device, dtype)


def in_int8(checkpoint: PairCheckpoint, pairs: Sequence[Pair]) -> PairCheckpoint:
    """Return a copy of a checkpoint with its network quantised to int8.

    Args:
        checkpoint: the cross-encoder.
        pairs: the token ids of the calibration pairs (see the module `int8`).

    Raises the errors of `int8.quantized`.
    """
    layout = checkpoint.layout()
    by_length = sorted(pairs, key=layout.length)
    batches = [layout.tensors(by_length[i : i + 2], checkpoint.pad_id) for i in range(0, len(by_length), 2)]
    network = quantized(checkpoint.network, batches)
    recorded = {name: length for name, length in checkpoint.lengths.items() if length is not None}
    config = checkpoint.config | recorded | {INT8: {"pad_id": network.pad_id, **dataclasses.asdict(checkpoint.reading)}}
    return dataclasses.replace(checkpoint, network=network, config=config, _layouts={})


def _read_int8(folder: Folder, device: torch.device, dtype: torch.dtype) -> PairCheckpoint:
    check_int8(str(folder), device, dtype)
    fields = dict(folder.config[INT8])
    pad_id = fields.pop("pad_id")
    checkpoint = PairCheckpoint(
        read_int8(folder, pad_id),
        folder.saved_tokenizer(),  # already has the settings of the other JSON files
        folder.config,
        folder.tokenizer_config,
        Reading(**fields),
        read_sentence_files(folder).files,
    )
    _check(checkpoint, folder.config["vocab_size"], str(folder))
    return checkpoint


def new_pairs(folder: Folder, device: torch.device, dtype: torch.dtype) -> PairCheckpoint:
    """Return an untrained cross-encoder with a new head on a pre-trained encoder.

    An ELECTRA or BERT becomes a cross-encoder in lightning-ir's format. If the folder already has a cross-encoder, its
    head is not used. The new head is a random vector w without bias. Torch's random generator draws each number in w
    from a normal distribution with mean 0. The standard deviation is the field `initializer_range` of config.json, or
    0.02 if there is no such field.

    Any other encoder becomes a sequence classifier of transformers with one label. The weights that the checkpoint has
    for the classifier's head are used. The other weights of the head are random. The maximum lengths are those of
    Rank-DistiLLM (`LENGTHS`).

    Args:
        folder: the folder of the encoder.
        device: the device of the network.
        dtype: the dtype of the weights.

    Raises ValueError if transformers has no sequence classifier for the encoder.
    """
    backbone = _backbone(folder.config)
    if backbone not in BODIES:
        return _new_classifier(folder, device, dtype)
    config = folder.config | {"backbone_model_type": backbone}
    weights = folder.weights()
    network = PooledScorer(_body(folder, config, weights), bias=False)
    nn.init.normal_(network.linear.weight, std=config.get("initializer_range", 0.02))
    own = network.body.state_dict().keys()
    bare = {name: tensor for name, tensor in _bare(weights, backbone).items() if name in own}
    load_strictly(network.body, bare, str(folder))
    return _lightning_ir(folder, network, config, device, dtype)


def _new_classifier(folder: Folder, device: torch.device, dtype: torch.dtype) -> PairCheckpoint:
    kept = {name: value for name, value in folder.config.items() if name not in ("id2label", "label2id")}
    config = kept | {"num_labels": 1} | IDENTITY | LENGTHS
    try:
        model = library_student(config, today(folder.weights()), str(folder))
    except KeyError as error:
        raise ValueError(
            f"{folder} has a body of type {config.get('model_type')!r}; wanted an encoder of which transformers has a"
            " sequence classifier, without code of its own"
        ) from error
    checkpoint = _classifier(folder, LabelScorer(model), SentenceFiles(chat=False), device, dtype)
    return dataclasses.replace(checkpoint, config=config)


def _lightning_ir(
    folder: Folder, network: PooledScorer, config: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> PairCheckpoint:
    """Return a cross-encoder in lightning-ir's format. Such a cross-encoder always uses token types."""
    tokenizer = folder.library_tokenizer(config["backbone_model_type"])
    reading = Reading(
        _limit(network.body, tokenizer), types=config.get("type_vocab_size") or 2, clean_up=_cleans_up(folder)
    )
    checkpoint = PairCheckpoint(network, bare_tokenizer(tokenizer), config, folder.tokenizer_config, reading)
    _check(checkpoint, config["vocab_size"], str(folder))
    network.to(device, dtype).eval()
    return checkpoint


def _classifier(
    folder: Folder, network: LabelScorer, beside: SentenceFiles, device: torch.device, dtype: torch.dtype
) -> PairCheckpoint:
    """Return a cross-encoder that is a sequence classifier of transformers. It has the tokenizer, the token types and
    the maximum length that sentence-transformers would use."""
    tokenizer = folder.library_tokenizer()
    if beside.chat and tokenizer.chat_template and chats_about_pairs(tokenizer):
        raise ValueError(
            f"{folder} has a chat template for a query and a document, with which sentence-transformers would build its"
            " pairs; it is not read. Take the template away, chat_template.jinja or the chat_template of"
            " tokenizer_config.json, and give queries and passages as it would write them, by pt.apply"
        )
    if beside.lower_case:
        bare, lower = tokenizer.backend_tokenizer, tokenizers.normalizers.Lowercase()
        bare.normalizer = tokenizers.normalizers.Sequence([lower, *([bare.normalizer] if bare.normalizer else [])])
    network.reads_types &= "token_type_ids" in tokenizer.model_input_names
    reading = Reading(
        _limit(network.model, tokenizer, beside.max_length),
        types=getattr(network.model.config, "type_vocab_size", None) or None,
        prompt=beside.prompt,
        truncation_side=tokenizer.truncation_side,
    )
    checkpoint = PairCheckpoint(
        network.eval(), bare_tokenizer(tokenizer), folder.config, folder.tokenizer_config, reading, beside.files
    )
    _check(checkpoint, network.pieces, str(folder))
    checkpoint = _padded_rightly(checkpoint, network, str(folder))
    network.to(device, dtype)
    return checkpoint


def _check(checkpoint: PairCheckpoint, pieces: int, source: str) -> None:
    """Raise ValueError if a token of the tokenizer, or the padding token, is not in the network's vocabulary of
    `pieces` tokens. Raise ValueError, too, if the tokenizer puts no special token between two texts. A decoder needs no
    special token between the texts."""
    check_pieces(pieces_known(checkpoint.tokenizer), pieces, source)
    if checkpoint.pad_id not in range(pieces):
        raise ValueError(f"{source}: pad_token_id={checkpoint.pad_id!r} is not a token of {pieces}")
    if not checkpoint.layout().middle and not getattr(checkpoint.network, "is_decoder", False):
        raise ValueError(
            f"{source}: the tokenizer puts no special tokens between two texts; a cross-encoder's does. Give the"
            " checkpoint its own tokenizer files"
        )


def _padded_rightly(checkpoint: PairCheckpoint, network: LabelScorer, source: str) -> PairCheckpoint:
    """Choose the padding for which the score of a query-passage pair does not depend on the other pairs in the batch.

    Padding on the right is tried first, then padding on the left. If a network ignores the attention mask, padding on
    either side changes the score. Each forward pass of such a network gets only inputs of equal length, without
    padding. Raises ValueError if the score depends on the other pairs even then.
    """
    for side, reads_padding in (("right", False), ("left", False), ("right", True)):
        network.reads_padding = reads_padding
        reading = dataclasses.replace(checkpoint.reading, padding_side=side)
        layout = PairLayout(checkpoint.tokenizer, reading)
        ids = layout.pieces(["a"])[0].ids
        short, long = (layout.fit(Pieces(ids, len(ids), False), Pieces(ids * n, len(ids) * n, False)) for n in (1, 40))
        try:
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                (alone,) = network(**layout.tensors([short], checkpoint.pad_id))
                beside, longer, _ = network(**layout.tensors([short, long, short], checkpoint.pad_id))
        except ValueError:  # with this padding, the network rejects batches of several inputs
            continue
        noise = 1e-6 + 1e-4 * (alone.abs() + longer.abs())
        if not (alone - beside).abs() > noise:  # NaN is reported later
            return dataclasses.replace(checkpoint, reading=reading, _layouts={})
    raise ValueError(
        f"{source} holds a {type(network.model).__name__}, whose score of a pair depends on the other pairs in the"
        " batch: its ranking would depend on the batches, and it is not supported"
    )


def _limit(model: nn.Module, tokenizer: "PreTrainedTokenizerFast", max_length: int | None = None) -> int | None:
    """Return the maximum input length in tokens that sentence-transformers would use, or None if there is no maximum.
    `max_length` is the maximum in the checkpoint's settings of sentence-transformers, or None."""
    config: Any = model.config
    limits = [max_length or tokenizer.model_max_length, getattr(config, "max_position_embeddings", None)]
    limit = min(limit for limit in [*limits, positions(model)] if limit and limit > 0)
    return None if limit > UNLIMITED else int(limit)


def _pooled(folder: Folder, config: dict[str, Any], weights: Weights) -> PooledScorer:
    pooling, scoring = config.get("pooling_strategy", "first"), config.get("scoring_strategy", "rank")
    if pooling not in POOLINGS or scoring not in ("rank", "mono"):
        raise ValueError(
            f"{folder}: pooling_strategy={pooling!r} with scoring_strategy={scoring!r} is not supported; wanted"
            f" {', '.join(POOLINGS)} with 'rank' or 'mono'"
        )
    bias = "linear.bias" in weights  # not from the config: some configs do not record a trained bias
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
            f"{folder} classifies into {labels} labels; a cross-encoder has one, or two whose difference is the score"
        )
    return LabelScorer(model)


def _backbone(config: dict[str, Any]) -> str:
    """Return the model type of a cross-encoder's body (the encoder without its head), such as "electra" or "bert"."""
    return config.get("backbone_model_type") or str(config.get("model_type")).removeprefix("mono-")


def _body(folder: Folder, config: dict[str, Any], weights: Weights) -> "PreTrainedModel":
    """Return an ELECTRA or BERT without pooler. Its weights are random."""
    import transformers

    backbone = config["backbone_model_type"]
    if backbone not in BODIES:
        raise ValueError(f"{folder} has a body of type {backbone!r}; wanted one of {', '.join(BODIES)}")
    config_class, model_class = (getattr(transformers, f"{BODIES[backbone]}{part}") for part in ("Config", "Model"))
    options = {"add_pooling_layer": False} if backbone == "bert" else {}
    shape = library_config(config, config_class)
    body: PreTrainedModel = build(lambda: model_class(shape, **options), config, weights, str(folder))
    return body


def _bare(weights: Weights, backbone: str) -> Weights:
    """Return the weights by the names that transformers gives them today (`today`), without the name of the body, such
    as "electra.", at the beginning."""
    return {name.removeprefix(f"{backbone}."): tensor for name, tensor in today(weights).items()}


def _cleans_up(folder: Folder) -> bool:
    """Return the tokenizer's setting clean_up_tokenization_spaces. If the tokenizer's config does not contain this
    setting, the default depends on the version of transformers that wrote the checkpoint: true before version 4.45,
    else false. If the version is unknown, the default is true."""
    written_by = [int(part) for part in str(folder.config.get("transformers_version", "4.41")).split(".")[:2]]
    return bool(folder.tokenizer_config.get("clean_up_tokenization_spaces", written_by < [4, 45]))
