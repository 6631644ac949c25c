"""T5 with Fusion-in-Decoder: each passage is encoded alone, and one decoder reads the states of all passages.

The cost of the encoder therefore grows linearly with the number of passages. The decoder attends to the tokens of all
passages of a window. This module does not deal with texts, identifiers or rankings.

Sources: Izacard and Grave (arXiv 2007.01282) for Fusion-in-Decoder, and arXiv 2312.16098 for LiT5.

Shapes: B is the number of windows. L is the number of tokens of a prompt, and S the number of tokens of all prompts of
a window. In one pass, the decoder processes m tokens per window. D is the width of the model, H the number of its
heads, and d the width of a head. V is the number of tokens in the vocabulary, and R the number of different tokens that
may be generated.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from pyterrier_lit.batching import encoder_tokens, map_batches, padded
from pyterrier_lit.models.attention import attend, attention_weights, weighted_sum
from pyterrier_lit.models.checkpoints import Folder, save_checkpoint
from pyterrier_lit.models.errors import wrong_weights
from pyterrier_lit.models.library import check_layers, library_config, load_strictly
from pyterrier_lit.models.t5_pieces import SentencePieces, read_pieces
from pyterrier_lit.models.tokenization import check_pieces

# The time of a decoder pass over 1, 2, 3 and 4 tokens, divided by the time of a pass over one token.
# experiments/bench_drafts.py measured these times for a T5-base on two cores. Passes have at most four tokens: with
# more than `attention.FEW` tokens, attention would use the fused kernel
COSTS = {torch.float32: (1.0, 1.5, 1.7, 1.8), torch.bfloat16: (1.0, 1.1, 1.2, 1.3)}
START, EOS = 0, 1  # the decoder's first input (T5's pad token), and the end of sequence


@dataclasses.dataclass(eq=False)
class T5Checkpoint:
    """A T5 in memory: its network, its tokenizer and its config."""

    network: Any  # transformers' T5ForConditionalGeneration
    pieces: SentencePieces
    config: dict[str, Any]  # config.json
    path: str = ""  # the folder of a trained checkpoint
    warned: bool = False  # whether the user was warned that the family (v1 or v2) of the checkpoint is unknown

    def length(self, name: str, own: int | None, default: int, least: int = 1) -> int:
        """Return a maximum length in tokens. The user's length, `own`, comes first, then the length that `save`
        recorded in the config, then `default`.

        Args:
            name: the name of the length, such as "answer_length".
            own: the length that the user gave, or None.
            default: the length if the user gave none and the config has none.
            least: the smallest valid length.

        Raises ValueError if the length is not a whole number, or if it is smaller than `least`.
        """
        recorded = self.config.get("lengths", {})
        number = own if own is not None else recorded.get(name, default) if isinstance(recorded, dict) else recorded
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise ValueError(f"{name}={number!r}; wanted a whole number of tokens, at least {least}")
        return number

    def save(self, folder: Path, **fields: Any) -> None:
        """Write config, weights and tokenizer into an existing folder. `fields` are further fields of the config."""
        tied = FiD(self.network).tied
        twins = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", *(["lm_head.weight"] if tied else []))
        weights = {name: tensor for name, tensor in self.network.state_dict().items() if name not in twins}
        save_checkpoint(folder, self.config | {"tie_word_embeddings": tied} | fields, weights)
        (folder / "spiece.model").write_bytes(self.pieces.model)


def read_t5(folder: Folder, device: torch.device, dtype: torch.dtype) -> T5Checkpoint:
    """Load a T5 with its language model head, ready for inference.

    Args:
        folder: the folder of the checkpoint.
        device: the device of the network.
        dtype: the dtype of the weights.

    Raises FileNotFoundError if a file is missing. Raises ValueError if the architecture is not T5 or mT5, if the
    weights do not match the config, or if the dtype is float16.
    """
    config = folder.config
    if config.get("model_type") not in ("t5", "mt5"):  # both have the same architecture
        raise ValueError(
            f"{folder} holds a {config.get('model_type')!r} checkpoint ({config.get('architectures')}); wanted a T5 or"
            " mT5"
        )
    if dtype == torch.float16:
        raise ValueError("dtype='float16' overflows in T5; wanted 'bfloat16' or 'float32'")
    pieces = read_pieces(folder)
    network = _read_network(folder).to(device, dtype).eval().requires_grad_(False)
    check_pieces(pieces.processor.get_piece_size(), network.shared.num_embeddings, str(folder))
    return T5Checkpoint(network, pieces, config)


def _read_network(folder: Folder) -> Any:
    """Return the network with its weights, on the CPU. The output layer is tied to the embedding if both have equal
    weights. The field tie_word_embeddings of the config is ignored, since transformers 5 writes
    tie_word_embeddings=true for all T5s."""
    from transformers import T5Config, T5ForConditionalGeneration

    weights = folder.weights()
    for name in [name for name in weights if name.endswith("EncDecAttention.relative_attention_bias.weight")]:
        del weights[name]  # T5's first checkpoints contain this unused table
    embedding = weights.get("shared.weight", weights.get("encoder.embed_tokens.weight"))
    head = weights.get("lm_head.weight", embedding)
    if embedding is None or head is None:
        raise wrong_weights(str(folder), ["missing shared.weight"])
    tied = head is embedding or torch.equal(head, embedding)
    twins = ("shared", "encoder.embed_tokens", "decoder.embed_tokens")
    weights |= {f"{name}.weight": embedding for name in twins} | {"lm_head.weight": head}
    check_layers(folder.config, weights, str(folder))
    shape = library_config(folder.config, T5Config)
    if shape.dense_act_fn == "gelu_new":
        shape.dense_act_fn = "gelu_pytorch_tanh"  # the same function in one kernel instead of eight
    buckets, farthest = shape.relative_attention_num_buckets, shape.relative_attention_max_distance
    with torch.device("meta"):
        network: Any = T5ForConditionalGeneration(shape)
        network.lm_head = nn.Linear(network.config.d_model, network.config.vocab_size, bias=False)
    load_strictly(network, weights, str(folder))
    if not farthest > buckets // 2:
        raise ValueError(
            f"{folder}: relative_attention_max_distance={farthest!r}; wanted more than half of the {buckets}"
            " relative_attention_num_buckets"
        )
    network.set_input_embeddings(network.shared)
    if tied:
        network.lm_head.weight = network.shared.weight
    return network


@dataclasses.dataclass
class Memory:
    """The decoder's cache for B windows. It has the keys and values of the passages' tokens, and those of the tokens
    that the decoder has processed. `steps` is the number of decoder tokens per window for which the cache has room."""

    keys: list[torch.Tensor]  # of the passages' tokens, per layer (B, H, S, d)
    values: list[torch.Tensor]  # of the passages' tokens, per layer (B, H, S, d)
    mask: torch.Tensor | None  # (B, 1, 1, S), for cross-attention: -inf on padding, else 0. None if there is no padding
    norms: list[torch.Tensor] | None  # of `values`, per layer (B, H, S) float32. None: `read` returns no attention mass
    own_keys: torch.Tensor  # of the decoder's tokens, (layers, B, H, steps, d)
    own_values: torch.Tensor  # of the decoder's tokens, (layers, B, H, steps, d)
    distance_bias: torch.Tensor  # (H, steps), for self-attention: entry i is the bias for a token i positions back
    read: list[int]  # for each window, the number of tokens that the decoder has processed


class FiD:
    """A T5ForConditionalGeneration whose decoder attends to many separately encoded inputs.

    Encoder and decoder may have different numbers of layers.

    Args:
        network: the T5ForConditionalGeneration.
    """

    def __init__(self, network: Any):
        self.network = network

    @property
    def tied(self) -> bool:
        """Whether the output layer is tied to the embedding."""
        return bool(self.network.lm_head.weight is self.network.shared.weight)

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        embedding: torch.Tensor = self.network.shared.weight
        return embedding.device

    def encode(self, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Encode n prompts. Padding is masked, so the states of a prompt do not depend on the other prompts in the
        batch.

        Args:
            prompts: the token ids of each prompt. Prompt i has L_i tokens.

        Returns n tensors of encoder states. Tensor i has the shape (L_i, D).
        """
        encoder = self.network.encoder
        ids, inside = (tensor.to(self.device) for tensor in padded(prompts))
        bias = encoder.block[0].layer[0].SelfAttention.compute_bias(*[ids.shape[1]] * 2)  # (1, H, L, L)
        if len({len(prompt) for prompt in prompts}) > 1:  # mask padding, once for all layers
            bias = bias.masked_fill(~inside[:, None, None], torch.finfo(bias.dtype).min)
        hidden = encoder.dropout(self.network.shared(ids))
        for block in encoder.block:
            hidden = block(hidden, None, bias)[0]
        states = encoder.dropout(encoder.final_layer_norm(hidden))
        return [row[: len(prompt)] for row, prompt in zip(states, prompts, strict=True)]

    def read_prompts(self, windows: Sequence[Sequence[Sequence[int]]], steps: int, mass: bool = False) -> Memory:
        """Encode the prompts of B windows, and return a decoder cache with room for `steps` tokens per window. Each
        distinct prompt is encoded once, in a batch with prompts of similar lengths.

        Args:
            windows: for each window, the token ids of its prompts.
            steps: the number of decoder tokens per window for which the cache has room.
            mass: whether `read` should also return the attention mass of each token (defined at `read`).
        """
        prompts = list(dict.fromkeys(tuple(prompt) for window in windows for prompt in window))
        lengths = [len(prompt) for prompt in prompts]
        states = map_batches(self.encode, prompts, lengths, encoder_tokens(self.device))
        state_of = dict(zip(prompts, states, strict=True))
        return self.memory([[state_of[tuple(prompt)] for prompt in window] for window in windows], steps, mass)

    def memory(self, windows: Sequence[Sequence[torch.Tensor]], steps: int, mass: bool = False) -> Memory:
        """Return a decoder cache for B windows of encoded passages, with room for `steps` tokens per window.

        The cross-attention's keys and values of each window's passages are computed here, once for all decoder steps.
        Cross-attention in T5 does not depend on positions, so the states of a window's passages are concatenated
        without padding between them.

        Args:
            windows: for each window, the encoder states of its passages, each (L, D).
            steps: as in `read_prompts`.
            mass: as in `read_prompts`.
        """
        decoder, config = self.network.decoder, self.network.config
        joined = [torch.cat(list(passages)) for passages in windows]
        states = pad_sequence(joined, batch_first=True)  # (B, S, D)
        lengths = torch.tensor([len(window) for window in joined], device=states.device)
        mask = None
        if len({len(window) for window in joined}) > 1:
            padding = torch.arange(states.shape[1], device=states.device) >= lengths[:, None]
            mask = torch.zeros(padding.shape, dtype=states.dtype, device=states.device)
            mask = mask.masked_fill(padding, float("-inf"))[:, None, None]
        attentions = [block.layer[1].EncDecAttention for block in decoder.block]
        keys = [_heads(attention.k(states), config) for attention in attentions]
        values = [_heads(attention.v(states), config) for attention in attentions]
        norms = [value.float().norm(dim=-1) for value in values] if mass else None
        own = (len(decoder.block), len(windows), config.num_heads, steps, config.d_kv)
        own_keys, own_values = states.new_zeros(own), states.new_zeros(own)
        bias = self._distance_bias(steps).to(states.dtype)
        return Memory(keys, values, mask, norms, own_keys, own_values, bias, [0] * len(windows))

    def read(self, memory: Memory, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Run the decoder over the next m tokens of each window, with causal attention.

        To remove the last tokens of a window from the cache, the caller lowers the window's number in `memory.read`
        before the call. The new tokens then overwrite the removed tokens.

        Args:
            memory: the decoder cache, which is extended.
            ids: the token ids (B, m).

        Returns the hidden states (B, m, D) after the final norm, and a list. The list is empty if `memory.norms` is
        None. Otherwise, the list has one tensor (B, m, S) per layer: for each of the m tokens, the attention mass of
        the S passage tokens. In one head, the attention mass of a passage token is its cross-attention weight times the
        norm of its value vector. The tensor has the averages over all heads.
        """
        decoder, mass = self.network.decoder, []
        places = torch.tensor(memory.read, device=ids.device)[:, None] + torch.arange(ids.shape[1], device=ids.device)
        rows, stop = torch.arange(len(ids), device=ids.device)[:, None], max(memory.read) + ids.shape[1]
        hidden = self.network.shared(ids)
        back = places[:, :, None] - torch.arange(stop, device=ids.device)  # (B, m, stop)
        bias = memory.distance_bias[:, back.clamp_min(0)].transpose(0, 1)  # (B, H, m, stop)
        if ids.shape[1] > 1 or len(set(memory.read)) > 1:
            bias = bias.masked_fill(back[:, None] < 0, float("-inf"))
        for layer, block in enumerate(decoder.block):
            attention = block.layer[0].SelfAttention
            query, key, value = self._projected(attention, block.layer[0].layer_norm(hidden), "qkv")
            memory.own_keys[layer][rows, :, places] = key.transpose(1, 2)
            memory.own_values[layer][rows, :, places] = value.transpose(1, 2)
            own_keys, own_values = memory.own_keys[layer, :, :, :stop], memory.own_values[layer, :, :, :stop]
            seen = attend(query, own_keys, own_values, bias, scale=1.0)
            hidden = hidden + attention.o(seen.transpose(1, 2).flatten(2))

            attention = block.layer[1].EncDecAttention
            (query,) = self._projected(attention, block.layer[1].layer_norm(hidden), "q")
            keys, values = memory.keys[layer], memory.values[layer]
            if memory.norms is None:
                seen = attend(query, keys, values, memory.mask, scale=1.0)
            else:
                weights = attention_weights(query, keys, memory.mask, scale=1.0)  # (B, H, m, S)
                seen = weighted_sum(weights, values)
                mass.append((weights * memory.norms[layer][:, :, None]).mean(1))
            hidden = hidden + attention.o(seen.transpose(1, 2).flatten(2))
            hidden = block.layer[2](hidden)
        memory.read = [read + ids.shape[1] for read in memory.read]
        return decoder.final_layer_norm(hidden), mass

    def logits(self, states: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Compute logits from hidden states: (..., D) -> (..., V). If `rows` has the vocabulary ids of R tokens, only
        the logits (..., R) of these R tokens are computed."""
        scaled = states * self.network.config.d_model**-0.5 if self.tied else states
        weight = self.network.lm_head.weight
        return F.linear(scaled, weight if rows is None else weight[rows])

    def greedy(
        self, memory: Memory, max_length: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]]:
        """Decode greedily, until every window has generated EOS or has `max_length` tokens including START.

        Yields a tuple at each step:

        - the generated token ids (B,);
        - a mask (B,) of the windows that had no EOS before this step;
        - a number per window (B,), which is NaN or infinite if the window's logits contain NaN or an infinity, else 0;
        - a list with the attention mass that `read` returned, per layer (B, S).
        """
        rows = memory.own_keys.shape[1]
        ids = torch.full((rows,), START, device=self.device)
        unfinished = torch.ones(rows, dtype=torch.bool, device=self.device)
        for _ in range(max_length - 1):
            states, mass = self.read(memory, ids[:, None])
            logits = self.logits(states[:, 0])
            ids = logits.argmax(-1)
            broken = logits.float().masked_fill(logits.isfinite(), 0.0).sum(1)
            yield ids, unfinished, broken, [layer[:, 0] for layer in mass]
            unfinished = unfinished & (ids != EOS)
            if not unfinished.any():
                return

    def _projected(self, attention: Any, states: torch.Tensor, names: str) -> list[torch.Tensor]:
        """Project states (B, m, D) with some of the linear layers "q", "k" and "v" of an attention layer. Returns one
        tensor (B, H, m, d) per letter in `names`."""
        return [_heads(getattr(attention, name)(states), self.network.config) for name in names]

    def _distance_bias(self, steps: int) -> torch.Tensor:
        """Return the bias (H, steps) that self-attention adds to the logits for the distances 0, 1, ... to earlier
        tokens."""
        attention = self.network.decoder.block[0].layer[0].SelfAttention
        buckets = attention._relative_position_bucket(
            -torch.arange(steps, device=self.device),
            bidirectional=False,
            num_buckets=self.network.config.relative_attention_num_buckets,
            max_distance=self.network.config.relative_attention_max_distance,
        )
        bias: torch.Tensor = attention.relative_attention_bias(buckets)
        return bias.T


class PieceReader:
    """A `decoding.Reader` for B windows of prompts. The tokens that may be generated have the numbers 0, 1, 2, ...:
    token i has the id pieces[i] in the vocabulary of the T5.

    Args:
        fid: the T5.
        windows: for each window, the token ids of its prompts.
        pieces: the vocabulary ids of the R tokens that may be generated.
        steps: the maximum number of tokens to generate per window. The cache has room for some more tokens, since a
            pass may also process tokens that `keep` then removes.
    """

    def __init__(self, fid: FiD, windows: Sequence[Sequence[Sequence[int]]], pieces: Sequence[int], steps: int):
        self.fid = fid
        self.pieces = torch.tensor(pieces, device=fid.device)  # (R,)
        self.memory = fid.read_prompts(windows, steps + len(self.costs))
        self.rows = len(windows)

    @property
    def device(self) -> torch.device:
        """The device of the T5."""
        return self.fid.device

    @property
    def costs(self) -> tuple[float, ...]:
        """The time of a pass over 1, 2, ... tokens, divided by the time of a pass over one token."""
        return COSTS.get(self.fid.network.shared.weight.dtype, COSTS[torch.bfloat16])

    def start(self) -> torch.Tensor:
        """Process the prompts. Returns the logits (B, R) of the first token."""
        return self._after(torch.full((self.rows, 1), START, device=self.device))[:, -1]

    def read(self, tokens: torch.Tensor) -> torch.Tensor:
        """Process the next m tokens of each window in one pass: tokens (B, m) -> logits (B, m, R) after each of these
        tokens. The tokens are indices in `pieces`."""
        self.last = tokens.shape[1]
        return self._after(self.pieces[tokens])

    def keep(self, counts: Sequence[int]) -> None:
        """Keep the first counts[b] tokens of the last pass in window b, and remove the other tokens of this pass."""
        self.memory.read = [read - self.last + count for read, count in zip(self.memory.read, counts, strict=True)]

    def _after(self, ids: torch.Tensor) -> torch.Tensor:
        """Process the next m tokens of each window: vocabulary ids (B, m) -> logits (B, m, R) after each of these
        tokens."""
        return self.fid.logits(self.fid.read(self.memory, ids)[0], self.pieces)


def _heads(projected: torch.Tensor, config: Any) -> torch.Tensor:
    """Split projected states into heads: (B, n, H * d) -> (B, H, n, d)."""
    return projected.view(*projected.shape[:2], config.num_heads, config.d_kv).transpose(1, 2).contiguous()
