"""The networks of cross-encoders: padded token ids of query-passage pairs -> a score for each pair.

This module does not deal with tokenizers.
"""

import functools
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from pyterrier_lit.models.attention import attend
from pyterrier_lit.models.checkpoints import Folder, save_weights
from pyterrier_lit.models.pooling import POOLING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Model types of transformers whose classifier reads the state of the first token and whose layers have BERT's modules
READ_FIRST = ("bert", "camembert", "electra", "roberta", "xlm-roberta")


class PooledScorer(nn.Module):
    """score = w . pool(h) + b on a bare encoder with hidden states h. If w has two rows, they are the logits of two
    classes, and the score is the log-probability of the second class."""

    def __init__(self, body: "PreTrainedModel", *, pooling: str = "first", rows: int = 1, bias: bool = True):
        super().__init__()
        self.body = body
        self.pooling = pooling
        if pooling == "first":
            end_at_first_token(body)
        self.linear = nn.Linear(body.config.hidden_size, rows, bias=bias)

    @property
    def pad_id(self) -> int | None:
        pad: int | None = self.body.config.pad_token_id
        return pad

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> torch.Tensor:
        """input_ids, attention_mask, token_type_ids, each (B, L) -> scores (B,)."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        states = self.body(**inputs).last_hidden_state
        pooled, bias = POOLING[self.pooling](states, attention_mask), self.linear.bias
        # In float32 regardless of the body's dtype, since close scores would tie if they were rounded to bfloat16
        logits = F.linear(pooled.float(), self.linear.weight.float(), None if bias is None else bias.float())
        return logits[:, 0] if logits.shape[1] == 1 else logits.log_softmax(-1)[:, 1]

    def save(self, folder: Path, config: dict[str, Any]) -> dict[str, Any]:
        """Write the weights under the names that lightning-ir has used since 2025-08. Returns the fields of
        config.json."""
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
    """The score of a sequence classifier: with one label its logit, with two labels the second logit minus the first.

    reads_types: whether the network takes token types. reads_padding: whether padding changes the score, so that only
    inputs of equal length may be in one batch.
    """

    reads_padding = False

    def __init__(self, model: "PreTrainedModel", *, reads_types: bool = True):
        super().__init__()
        self.model = model
        if model.config.model_type in READ_FIRST:
            end_at_first_token(model.base_model)
        self.reads_types = reads_types and "token_type_ids" in inspect.signature(model.forward).parameters

    @property
    def pad_id(self) -> int | None:
        pad: int | None = self.model.config.pad_token_id
        return pad

    @property
    def is_decoder(self) -> bool:
        """Whether the network is a decoder, which predicts the class at the last token."""
        return hasattr(self.model, "score")

    @property
    def pieces(self) -> int:
        """The size of the network's vocabulary."""
        embeddings: Any = self.model.get_input_embeddings()
        return int(embeddings.num_embeddings)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> torch.Tensor:
        """input_ids, attention_mask, token_type_ids, each (B, L) -> scores (B,)."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        inputs |= {"token_type_ids": token_type_ids} if self.reads_types else {}
        logits = self._logits(inputs).float()
        return logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]

    def _logits(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The inputs, each (B, L) -> logits (B, labels)."""
        if self.is_decoder and self.pad_id not in range(self.pieces):
            # Without a padding token, transformers would not find the last token of each input
            states = self.model.base_model(**inputs).last_hidden_state
            last: torch.Tensor = self.model.get_submodule("score")(
                POOLING["last_token"](states, inputs["attention_mask"])
            )
            return last
        if not self.reads_padding and not self.model.config.is_encoder_decoder:
            logits: torch.Tensor = self.model(**inputs).logits
            return logits
        lengths = inputs["attention_mask"].sum(1)
        # Encoder-decoders predict the class at the last end token, and require that all inputs of a batch have the same
        # number of end tokens. A text may contain further end tokens
        alike = lengths if self.reads_padding else (inputs["input_ids"] == self.model.config.eos_token_id).sum(1)
        groups = [(alike == value).nonzero()[:, 0] for value in alike.unique()]
        parts = [
            self.model(**{name: tensor[rows, : lengths[rows].max()] for name, tensor in inputs.items()}).logits
            for rows in groups
        ]
        return torch.cat(parts)[torch.cat(groups).argsort()]

    def save(self, folder: Path, config: dict[str, Any]) -> dict[str, Any]:
        """Write the weights as transformers does. Returns the fields of config.json."""
        self.model.save_pretrained(folder)
        return Folder(folder).config


def end_at_first_token(body: Any) -> None:
    """Let the last layer of a BERT-like encoder compute the state of the first token only: (B, 1, H) instead of (B, L,
    H).

    Keys and values are still computed for all tokens. Query, feed-forward network and norms are computed for the first
    token only. In training mode, the layer is unchanged.
    """
    layer = body.encoder.layer[-1]
    layer.forward = functools.partial(_first_state, layer)


def _first_state(
    layer: Any, states: torch.Tensor, mask: torch.Tensor | None = None, *others: Any, **named: Any
) -> torch.Tensor:
    """The forward pass of the last layer: states (B, L, H), mask (B, 1, L, L) or None -> (B, 1, H)."""
    if layer.training:
        whole: torch.Tensor = type(layer).forward(layer, states, mask, *others, **named)
        return whole
    attention, first = layer.attention.self, states[:, :1]
    query, key, value = (
        projected.unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)
        for projected in (attention.query(first), attention.key(states), attention.value(states))
    )
    seen = attend(query, key, value, None if mask is None else mask[:, :, :1])
    state: torch.Tensor = layer.feed_forward_chunk(layer.attention.output(seen.transpose(1, 2).flatten(2), first))
    return state
