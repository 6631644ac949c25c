"""PE-Rank's passage encoder: texts -> vectors, with Jina v2 or an encoder of transformers. This module does not deal
with queries.

Shapes: B is the number of texts in a batch, L their length in tokens including padding, H the width of the encoder, and
d the dimension of the vectors.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import tokenizers
import torch
from torch import nn
from torch.nn import functional as F

from pyterrier_lit.batching import padded
from pyterrier_lit.models.checkpoints import Folder
from pyterrier_lit.models.library import Weights, auto_config, below, build, load_strictly, positions, today
from pyterrier_lit.models.pooling import POOLING, check_pooling
from pyterrier_lit.models.tokenization import check_pieces, encode, pieces_known

LENGTH = 512  # maximum tokens of a passage, with special tokens
POOLINGS = ("mean", "cls", "last_token")
WORDS = "embeddings.word_embeddings.weight"  # in a BERT with a head, a prefix precedes this name


@dataclasses.dataclass
class TextEncoder:
    """A passage encoder in memory.

    Args:
        network: the encoder.
        tokenizer: its tokenizer. Truncation is enabled in place.
        config: the fields of the encoder's config.json.
        pooling: "mean", "cls" or "last_token".
    """

    network: nn.Module
    tokenizer: tokenizers.Tokenizer
    config: dict[str, Any]
    pooling: str

    def __post_init__(self) -> None:
        limits = [self.config.get("max_position_embeddings"), positions(self.network), LENGTH]
        self.tokenizer.enable_truncation(min(limit for limit in limits if limit))
        self.tokenizer.encode_special_tokens = True  # "[SEP]" in a passage is plain text

    def pieces(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, including special tokens. White space in a text is collapsed to
        single spaces. A text is truncated to LENGTH tokens or to the encoder's maximum input length, whichever is
        smaller."""
        return list(encode(self.tokenizer, [" ".join(text.split()) for text in texts], special_tokens=True))

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.__post_init__()  # pickling loses the tokenizer's flag encode_special_tokens

    def encode(self, batch: Sequence[list[int]]) -> torch.Tensor:
        """Encode B texts. On a GPU, the method may return before the vectors are computed.

        Args:
            batch: the token ids of the B texts.

        Returns the vectors, a float32 tensor (B, d). They are not normalised.
        """
        pad = self.config.get("pad_token_id") or 0
        device = next(self.network.parameters()).device
        input_ids, mask = (tensor.to(device, torch.long) for tensor in padded(batch, pad))
        states = self.network(input_ids=input_ids, attention_mask=mask)
        states = states if torch.is_tensor(states) else states.last_hidden_state
        return POOLING[self.pooling](states.float(), mask)


def read_text_encoder(folder: Folder, pooling: str) -> TextEncoder:
    """Load a trained encoder from a folder. `pooling` is "mean", "cls" or "last_token". Raises FileNotFoundError if a
    file is missing, and ValueError if a file cannot be read. Also raises the errors of `text_encoder`."""
    return text_encoder(folder.config, folder.weights(), folder.tokenizer(), pooling, str(folder))


def text_encoder(
    config: dict[str, Any], weights: Weights, tokenizer: tokenizers.Tokenizer, pooling: str, source: str
) -> TextEncoder:
    """Return the encoder with the given config, weights and tokenizer.

    Args:
        config: the fields of config.json.
        weights: the weights, as name -> tensor.
        tokenizer: the tokenizer.
        pooling: "mean", "cls" or "last_token".
        source: the name of the checkpoint, for error messages.

    Raises ValueError if the pooling is unknown, or if config, weights and tokenizer do not match.
    """
    check_pooling(pooling, POOLINGS, f"{source}: encoder_pooling")
    padding = config.get("pad_token_id") or 0
    check_pieces(max(pieces_known(tokenizer), padding + 1), config["vocab_size"], source, "encoder")
    weights = bare(weights)
    network = build(lambda: empty_encoder(config), config, weights, source)
    load_strictly(network, weights, source)
    return TextEncoder(network, tokenizer, config, pooling)


def empty_encoder(config: dict[str, Any]) -> nn.Module:
    """Return the encoder that a config.json describes, without pooler. No weights are loaded into the encoder.

    Raises ValueError if the encoder needs code inside the checkpoint. This code is not run, and a similar encoder of
    transformers would give wrong vectors.
    """
    import transformers

    positions, kind = config.get("position_embedding_type", "absolute"), str(config.get("model_type"))
    if positions == "alibi" and config.get("feed_forward_type") == "geglu":
        return JinaBert(config)
    if positions != "absolute" or "auto_map" in config or kind not in transformers.CONFIG_MAPPING:
        raise ValueError(
            f"the encoder {config.get('architectures')} (model_type {kind!r}, position_embedding_type {positions!r})"
            " needs code of its own, which is not run; give its vectors as vectors= or in a 'doc_vec' column, or the"
            " encoder as encoder="
        )
    network: nn.Module = transformers.AutoModel.from_config(auto_config(config, kind), trust_remote_code=False)
    if getattr(network, "pooler", None) is not None:
        network.register_module("pooler", None)
    return network


def bare(weights: Weights) -> Weights:
    """Return weights under the names that `empty_encoder` uses. The names of the encoder's weights may have a prefix,
    such as "bert.". This prefix is removed, and weights without the prefix, such as those of a head, are left out. The
    weights of the pooler are left out, too."""
    names = [name for name in weights if name.endswith(WORDS)]
    body = below(today(weights), names[0].removesuffix(WORDS)) if names else today(weights)
    return {name: tensor for name, tensor in body.items() if not name.startswith("pooler.")}


class JinaBert(nn.Module):
    """The encoder in the checkpoints jinaai/jina-embeddings-v2-*, without pooler. Its weights have the same names as in
    these checkpoints, so that all weights can be loaded strictly.

    Args:
        config: the fields of the checkpoint's config.json.

    Source: Günther et al., Jina Embeddings 2 (arXiv 2310.19923).
    """

    embeddings: Any  # nested ModuleDicts, for which torch has no types
    encoder: Any

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        hidden, eps = config["hidden_size"], config["layer_norm_eps"]
        self.heads = config["num_attention_heads"]
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(config["vocab_size"], hidden),
                "token_type_embeddings": nn.Embedding(config["type_vocab_size"], hidden),
                "LayerNorm": nn.LayerNorm(hidden, eps=eps),
            }
        )
        layers = [
            Layer(hidden, self.heads, config["intermediate_size"], eps) for _ in range(config["num_hidden_layers"])
        ]
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Encode a batch: input_ids and attention_mask, each (B, L) -> hidden states (B, L, H)."""
        words, types = self.embeddings["word_embeddings"], self.embeddings["token_type_embeddings"]
        states: torch.Tensor = self.embeddings["LayerNorm"](words(input_ids) + types.weight[0])
        bias = alibi(self.heads, input_ids.shape[1], input_ids.device)[None]
        bias = bias.masked_fill(attention_mask[:, None, None] == 0, float("-inf")).to(states.dtype)
        for layer in self.encoder["layer"]:
            states = layer(states, bias)
        return states


class Layer(nn.Module):
    """A layer of JinaBert: attention with a bias, then a gated feed-forward network. The feed-forward network projects
    its input to two vectors a and b, and projects the product GELU(a) * b to H dimensions. A residual connection and a
    layer norm follow the attention, and also follow the feed-forward network.

    Args:
        hidden: the width H of the encoder.
        heads: the number of heads.
        intermediate: the width of the feed-forward network.
        eps: the epsilon of the layer norms.
    """

    attention: Any

    def __init__(self, hidden: int, heads: int, intermediate: int, eps: float):
        super().__init__()
        self.heads = heads
        reads = nn.ModuleDict({name: nn.Linear(hidden, hidden) for name in ("query", "key", "value")})
        writes = nn.ModuleDict({"dense": nn.Linear(hidden, hidden), "LayerNorm": nn.LayerNorm(hidden, eps=eps)})
        self.attention = nn.ModuleDict({"self": reads, "output": writes})
        self.mlp = nn.ModuleDict(
            {
                "gated_layers": nn.Linear(hidden, 2 * intermediate, bias=False),
                "wo": nn.Linear(intermediate, hidden),
                "layernorm": nn.LayerNorm(hidden, eps=eps),
            }
        )

    def forward(self, states: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Apply the layer: states (B, L, H), attention bias (B, heads, L, L) -> states (B, L, H)."""
        reads, writes = self.attention["self"], self.attention["output"]
        query, key, value = (
            reads[name](states).unflatten(-1, (self.heads, -1)).transpose(1, 2) for name in ("query", "key", "value")
        )
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2).flatten(2)
        states = writes["LayerNorm"](writes["dense"](attended) + states)
        gate, passed = self.mlp["gated_layers"](states).chunk(2, dim=-1)
        states = self.mlp["layernorm"](self.mlp["wo"](F.gelu(gate) * passed) + states)
        return states


def alibi(heads: int, length: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return the attention bias of ALiBi, a float32 tensor (heads, L, L). `length` is L. The bias of a head for the
    positions i and j is -s * |i - j|, where s is the head's slope (see `slopes`)."""
    at = torch.arange(length, device=device)
    return -torch.tensor(slopes(heads), dtype=torch.float32, device=device)[:, None, None] * (at[:, None] - at).abs()


def slopes(heads: int) -> list[float]:
    """Return the slope of each head in ALiBi. Let n be the number of heads. If n is a power of two, the slopes are
    2^-(8/n), 2^-(16/n), ..., 2^-8. For 8 heads, they are 1/2, 1/4, ..., 1/256.

    Otherwise, let m be the largest power of two below n. The first m heads get the slopes for m heads. The other n - m
    heads get the 1st, 3rd, 5th, ... slope for 2m heads.
    """
    n = 2 ** math.floor(math.log2(heads))
    own = [2 ** (-8 * (i + 1) / n) for i in range(n)]
    return own if n == heads else own + slopes(2 * n)[0::2][: heads - n]
