"""The networks of cross-encoders: padded token ids of query-passage pairs -> a score for each pair.

This module does not deal with tokenizers. Shapes: B is the number of query-passage pairs, L their length in tokens
including padding, and H the width of the encoder.
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


# Model types of transformers whose classifier uses only the hidden state of the first token, and whose layers have the
# same modules as BERT's
READ_FIRST = ("bert", "camembert", "electra", "roberta", "xlm-roberta")


class PooledScorer(nn.Module):
    """An encoder with a linear head, whose weights are w and b. The score is w . pool(h) + b, where h are the encoder's
    hidden states, and pool(h) is a vector. If w has two rows, w . pool(h) + b gives the logits of two classes. The
    score is then the log-probability of the second class.

    Args:
        body: the encoder.
        pooling: how the hidden states of a pair are pooled into a vector, one of the names in `pooling.POOLING`.
        rows: the number of rows of w, 1 or 2.
        bias: whether the head has b.
    """

    def __init__(self, body: "PreTrainedModel", *, pooling: str = "first", rows: int = 1, bias: bool = True):
        super().__init__()
        self.body = body
        self.pooling = pooling
        if pooling == "first":
            end_at_first_token(body)
        self.linear = nn.Linear(body.config.hidden_size, rows, bias=bias)

    @property
    def pad_id(self) -> int | None:
        """The id of the padding token, or None."""
        pad: int | None = self.body.config.pad_token_id
        return pad

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> torch.Tensor:
        """Score B query-passage pairs: input_ids, attention_mask and token_type_ids, each (B, L) -> float32 scores
        (B,)."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        states = self.body(**inputs).last_hidden_state
        pooled, bias = POOLING[self.pooling](states, attention_mask), self.linear.bias
        # Scores are computed in float32 for any dtype of the body, since close scores would tie in bfloat16
        logits = F.linear(pooled.float(), self.linear.weight.float(), None if bias is None else bias.float())
        return logits[:, 0] if logits.shape[1] == 1 else logits.log_softmax(-1)[:, 1]

    def save(self, folder: Path, config: dict[str, Any]) -> dict[str, Any]:
        """Write the weights into an existing folder, under the names that lightning-ir has used since 2025-08. Returns
        the fields of the new config.json.

        Args:
            folder: the folder.
            config: the fields of the current config.json.
        """
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
    """A sequence classifier of transformers. With one label, the score is the logit of the label. With two labels, the
    score is the second logit minus the first logit.

    If padding changes the score, `reads_padding` must be true. The pairs of a batch are then processed in groups of
    equal length, without padding.

    Args:
        model: the classifier.
        reads_types: whether token types are passed to the classifier. A classifier that does not accept token types
            never gets them.
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
        """The id of the padding token, or None."""
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
        """Score B query-passage pairs: input_ids, attention_mask and token_type_ids, each (B, L) -> float32 scores
        (B,)."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        inputs |= {"token_type_ids": token_type_ids} if self.reads_types else {}
        logits = self._logits(inputs).float()
        return logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]

    def _logits(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Run the classifier: inputs, each (B, L) -> logits (B, labels)."""
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
        # Encoder-decoders predict the class at the last end token. In transformers, all inputs of a batch must have the
        # same number of end tokens. A text may contain end tokens, so the inputs are grouped by this number
        alike = lengths if self.reads_padding else (inputs["input_ids"] == self.model.config.eos_token_id).sum(1)
        groups = [(alike == value).nonzero()[:, 0] for value in alike.unique()]
        parts = [
            self.model(**{name: tensor[rows, : lengths[rows].max()] for name, tensor in inputs.items()}).logits
            for rows in groups
        ]
        return torch.cat(parts)[torch.cat(groups).argsort()]

    def save(self, folder: Path, config: dict[str, Any]) -> dict[str, Any]:
        """Write weights and config.json into an existing folder, in the format of transformers. Returns the fields of
        the new config.json. `config` is not used."""
        self.model.save_pretrained(folder)
        return Folder(folder).config


def end_at_first_token(body: Any) -> None:
    """Let the last layer of a BERT-like encoder return the state of the first token only: (B, 1, H) instead of (B, L,
    H). `body` is the encoder, which is changed in place.

    The keys and values of the attention are still computed for all tokens. The query of the attention, the feed-forward
    network and the norms are computed for the first token only. In training mode, the layer returns the states of all
    tokens.
    """
    layer = body.encoder.layer[-1]
    layer.forward = functools.partial(_first_state, layer)


def _first_state(
    layer: Any, states: torch.Tensor, mask: torch.Tensor | None = None, *others: Any, **named: Any
) -> torch.Tensor:
    """Compute the last layer: states (B, L, H), mask (B, 1, L, L) or None -> state (B, 1, H) of the first token, or
    states (B, L, H) of all tokens in training mode."""
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
