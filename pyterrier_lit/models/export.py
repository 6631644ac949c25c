"""Converts a cross-encoder of lightning-ir to a sequence classifier of transformers with the same scores.

Let h be the hidden state of the first token. lightning-ir's score is w . h + b, with a weight vector w and a bias b. A
BERT or ELECTRA classifier of transformers applies two linear layers to h, with a nonlinear function in between. The
conversion sets the weights of both layers so that the nonlinear function has almost no effect. The second layer adds b.

Let x = w . h. ELECTRA's nonlinear function is GELU, and the new classifier computes GELU(x) - GELU(-x). This difference
is exactly x. BERT's nonlinear function is tanh, and the new classifier computes tanh(e x) / e with a small number e.
This quotient is almost x.
"""

import dataclasses
from typing import Any

import torch

from pyterrier_lit.models.library import NO_SHAPE, Weights, library_model
from pyterrier_lit.models.pair_encoder import IDENTITY, PairCheckpoint
from pyterrier_lit.models.pair_networks import LabelScorer, PooledScorer

# The factor e for BERT. The tanh changes a score of 20 by 4e-5. Multiplying a weight by a power of two is exact
SCALE = 2.0**-13
READS = ["input_ids", "token_type_ids", "attention_mask"]
NAMED = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")


def as_classifier(checkpoint: PairCheckpoint, lengths: dict[str, int | None]) -> PairCheckpoint:
    """Return the checkpoint as a sequence classifier with one label. If the encoder's embedding size differs from its
    hidden size, the classifier is an ELECTRA, else a BERT. A checkpoint that is already a sequence classifier is
    returned unchanged.

    Args:
        checkpoint: the cross-encoder.
        lengths: the maximum lengths of a query and of a passage in tokens. If both are given, the classifier truncates
            its input to their sum plus the number of special tokens. The checkpoint's own limit applies if it is lower,
            or if a length is None.

    Raises ValueError if the checkpoint is in int8, or if the score is not a linear function of the first token's hidden
    state.
    """
    network = checkpoint.network
    if isinstance(network, LabelScorer):
        return checkpoint
    if not isinstance(network, PooledScorer):
        raise ValueError(
            "layout='transformers' writes float weights, and this reranker is in int8; save it without one"
        )
    if network.pooling != "first" or network.linear.out_features != 1:
        raise ValueError(
            f"layout='transformers' writes w . h of the first token as a classifier; this checkpoint pools by"
            f" {network.pooling!r} into {network.linear.out_features} numbers, which no classifier of transformers"
            " does; save it without a layout"
        )
    classifier = LabelScorer(_classifier(network))
    sides = [length for length in lengths.values() if length is not None]
    room = sum(sides) + checkpoint.layout().length(([], [])) if len(sides) == 2 else None
    limits = [limit for limit in (checkpoint.reading.limit, room) if limit is not None]
    kept = {name: checkpoint.tokenizer_config[name] for name in NAMED if name in checkpoint.tokenizer_config}
    tokenizer_config = kept | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": checkpoint.tokenizer.id_to_token(checkpoint.pad_id),
        "model_input_names": READS,
        **({"model_max_length": min(limits)} if limits else {}),
    }
    reading = dataclasses.replace(checkpoint.reading, clean_up=False)
    return dataclasses.replace(
        checkpoint, network=classifier, tokenizer_config=tokenizer_config, reading=reading, _layouts={}
    )


def _classifier(network: PooledScorer) -> Any:
    import transformers

    own = network.body.config.to_dict()
    kind = "bert" if own.get("embedding_size", own["hidden_size"]) == own["hidden_size"] else "electra"
    known = transformers.CONFIG_MAPPING[kind]().to_dict().keys() - {*NO_SHAPE, "id2label", "label2id"}
    config = {name: own[name] for name in sorted(known & own.keys())} | {"num_labels": 1} | IDENTITY
    weights = {f"{kind}.{name}": tensor.cpu() for name, tensor in network.body.state_dict().items()}
    weights |= _head(kind, network.linear.weight.detach().cpu(), network.linear.bias)
    mapping = transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    return library_model(mapping, config, kind, weights, "the exported checkpoint", network.linear.weight.dtype)


def _head(kind: str, row: torch.Tensor, bias: torch.Tensor | None) -> Weights:
    """Return the weights of the classifier's two linear layers (see the module's docstring), as name -> tensor. `row`
    is w, of shape (1, H), where H is the hidden size. `bias` is b, of shape (1,), or None for 0."""
    size = row.shape[1]
    inner, outer = row.new_zeros(size, size), row.new_zeros(1, size)
    inner[0] = row[0] * SCALE if kind == "bert" else row[0]
    outer[0, 0] = 1 / SCALE if kind == "bert" else 1
    if kind == "electra":
        inner[1], outer[0, 1] = -row[0], -1
    first, second = (
        ("bert.pooler.dense", "classifier") if kind == "bert" else ("classifier.dense", "classifier.out_proj")
    )
    return {
        f"{first}.weight": inner,
        f"{first}.bias": row.new_zeros(size),
        f"{second}.weight": outer,
        f"{second}.bias": row.new_zeros(1) if bias is None else bias.detach().cpu(),
    }
