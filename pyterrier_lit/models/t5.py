"""Fusion-in-Decoder on the library's T5: passages encoded alone, one decoder over them all, with caches.

Knows token ids and tensors: no prompts, no identifiers, no rankings. Source: Izacard and Grave, arXiv 2007.01282; LiT5's
use of it, arXiv 2312.16098. D is the model's width, H its heads, S the tokens of a window's passages together.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from pyterrier_lit.batching import encoder_tokens, map_batches

START, EOS = 0, 1  # T5's first input of a decoder (its pad token) and its end of sequence


@dataclasses.dataclass
class Memory:
    """What B decoders in step read: the passages of their windows, and what they have written so far."""

    keys: list[torch.Tensor]  # per layer (B, H, S, d), of the passages' tokens
    values: list[torch.Tensor]
    mask: (
        torch.Tensor | None
    )  # (B, 1, 1, S), added to the attention: 0, and -inf on padding; None where nothing is padded
    norms: (
        list[torch.Tensor] | None
    )  # per layer (B, H, S) float32, the length of each value, where attention is watched
    own_keys: torch.Tensor  # (layers, B, H, steps, d)
    own_values: torch.Tensor
    distance_bias: torch.Tensor  # (H, steps): for a token so many positions back
    step: int = 0


class FiD:
    """A T5ForConditionalGeneration whose decoder reads many separately encoded inputs. Encoder and decoder may differ in depth."""

    def __init__(self, network: Any, tied: bool):
        self.network = network
        self.tied = tied  # the output layer is the embedding, scaled

    @property
    def device(self) -> torch.device:
        embedding: torch.Tensor = self.network.shared.weight
        return embedding.device

    def encode(self, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """n prompts of L_i ids -> n states (L_i, D). Padding is masked: prompts encode alike in any company."""
        ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True).to(self.device)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        mask = None if bool((lengths == ids.shape[1]).all()) else torch.arange(ids.shape[1])[None] < lengths[:, None]
        mask = mask if mask is None else mask.long().to(self.device)
        states = self.network.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return [row[: len(prompt)] for row, prompt in zip(states, prompts, strict=True)]

    def read_prompts(self, windows: Sequence[Sequence[Sequence[int]]], steps: int, watch: bool = False) -> Memory:
        """B windows of prompts -> the memory of decoders of at most `steps` tokens. Each is encoded once,
        those of like length together.
        """
        prompts = list(dict.fromkeys(tuple(prompt) for window in windows for prompt in window))
        lengths = [len(prompt) for prompt in prompts]
        states = map_batches(self.encode, prompts, lengths, encoder_tokens(self.device))
        state_of = dict(zip(prompts, states, strict=True))
        return self.read([[state_of[tuple(prompt)] for prompt in window] for window in windows], steps, watch)

    def read(self, windows: Sequence[Sequence[torch.Tensor]], steps: int, watch: bool = False) -> Memory:
        """B windows of encoded passages -> what a decoder of at most `steps` tokens needs; keys and values made once.

        Cross-attention has no positions: states are concatenated without their padding. watch: keep the values' lengths,
        so that `write` gives attention mass.
        """
        decoder, config = self.network.decoder, self.network.config
        joined = [torch.cat(list(passages)) for passages in windows]
        states = pad_sequence(joined, batch_first=True)  # (B, S, D)
        lengths = torch.tensor([len(window) for window in joined], device=states.device)
        mask = None
        if len({len(window) for window in joined}) > 1:
            padding = torch.arange(states.shape[1], device=states.device) >= lengths[:, None]
            mask = torch.zeros(padding.shape, dtype=states.dtype, device=states.device).masked_fill(
                padding, float("-inf")
            )
            mask = mask[:, None, None]
        keys, values, norms = [], [], []
        for block in decoder.block:
            cross = block.layer[1].EncDecAttention
            keys.append(_heads(cross.k(states), config))
            values.append(_heads(cross.v(states), config))
            if watch:
                norms.append(values[-1].float().norm(dim=-1))
        own = (len(decoder.block), len(windows), config.num_heads, steps, config.d_kv)
        return Memory(
            keys,
            values,
            mask,
            norms if watch else None,
            own_keys=states.new_empty(own),
            own_values=states.new_empty(own),
            distance_bias=self._distance_bias(steps).to(states.dtype),
        )

    def write(self, memory: Memory, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """One decoder step: the last token of each row, ids (B,) -> its state (B, D) after the final norm.

        With it, where the memory is watched, the attention mass of the step, per layer (B, S): the mean over heads of
        attention weight times value length; otherwise an empty list.
        """
        decoder, t, mass = self.network.decoder, memory.step, []
        hidden = self.network.shared(ids)
        back = memory.distance_bias[:, : t + 1].flip(-1)[:, None]  # (H, 1, t + 1)
        for layer, block in enumerate(decoder.block):
            attention = block.layer[0].SelfAttention
            normed = block.layer[0].layer_norm(hidden)
            memory.own_keys[layer, :, :, t] = _heads(attention.k(normed)[:, None], self.network.config)[:, :, 0]
            memory.own_values[layer, :, :, t] = _heads(attention.v(normed)[:, None], self.network.config)[:, :, 0]
            own_keys, own_values = memory.own_keys[layer, :, :, : t + 1], memory.own_values[layer, :, :, : t + 1]
            query = _heads(attention.q(normed)[:, None], self.network.config)
            read = F.scaled_dot_product_attention(query, own_keys, own_values, attn_mask=back, scale=1.0)
            hidden = hidden + attention.o(read.flatten(1))

            attention = block.layer[1].EncDecAttention
            query = _heads(attention.q(block.layer[1].layer_norm(hidden))[:, None], self.network.config)
            if memory.norms is None:
                read = F.scaled_dot_product_attention(
                    query, memory.keys[layer], memory.values[layer], attn_mask=memory.mask, scale=1.0
                )
            else:
                logits = (query @ memory.keys[layer].mT).float()  # (B, H, 1, S)
                weights = (logits if memory.mask is None else logits + memory.mask).softmax(-1)
                read = weights.to(hidden.dtype) @ memory.values[layer]
                mass.append((weights[:, :, 0] * memory.norms[layer]).mean(1))
            hidden = hidden + attention.o(read.flatten(1))
            hidden = block.layer[2](hidden)
        memory.step += 1
        return decoder.final_layer_norm(hidden), mass

    def logits(self, states: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """states (B, D) -> logits (B, V), or (B, R) over the given rows of the vocabulary alone."""
        scaled = states * self.network.config.d_model**-0.5 if self.tied else states
        weight = self.network.lm_head.weight
        return F.linear(scaled, weight if rows is None else weight[rows])

    def greedy(
        self, memory: Memory, max_length: int, queries: Sequence[str]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]]:
        """Write the likeliest token step by step, until every row has written EOS or holds `max_length` tokens with START.

        Yields per step the tokens (B,), which rows were unfinished before it (B,), and the attention mass as `write` gives it.
        Raises ValueError when a logit is NaN, which names the row's among `queries`.
        """
        rows = memory.own_keys.shape[1]
        ids = torch.full((rows,), START, device=self.device)
        unfinished = torch.ones(rows, dtype=torch.bool, device=self.device)
        for _ in range(max_length - 1):
            states, mass = self.write(memory, ids)
            logits = self.logits(states)
            refuse_nan(logits.isnan().any(1), queries)
            ids = logits.argmax(-1)
            yield ids, unfinished, mass
            unfinished = unfinished & (ids != EOS)
            if not unfinished.any():
                return

    def _distance_bias(self, steps: int) -> torch.Tensor:
        attention = self.network.decoder.block[0].layer[0].SelfAttention
        buckets = attention._relative_position_bucket(
            -torch.arange(steps, device=self.device),
            bidirectional=False,
            num_buckets=self.network.config.relative_attention_num_buckets,
            max_distance=self.network.config.relative_attention_max_distance,
        )
        bias: torch.Tensor = attention.relative_attention_bias(buckets)
        return bias.T


def refuse_nan(broken: torch.Tensor, queries: Sequence[str]) -> None:
    """ValueError that names the first of B queries whose logits were NaN, broken (B,). Waits for the device."""
    if broken.any():
        raise ValueError(
            f"the model gave nan for query {queries[int(broken.int().argmax())]!r}; try dtype='float32', and check the checkpoint's weights"
        )


def _heads(projected: torch.Tensor, config: Any) -> torch.Tensor:
    """(B, n, H * d) -> (B, H, n, d)"""
    return projected.view(*projected.shape[:2], config.num_heads, config.d_kv).transpose(1, 2).contiguous()
