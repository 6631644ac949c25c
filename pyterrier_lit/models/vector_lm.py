"""A causal language model with vectors among its words: projector, inputs, decoding with a cache. Knows no text, no queries."""

import re
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class VectorLM(nn.Module):
    """The body of a causal language model of the library, and the projector that brings vectors into its input space."""

    def __init__(self, body: "PreTrainedModel", projector: nn.Module, placeholder: int):
        super().__init__()
        self.body = body
        self.projector = projector
        self.placeholder = placeholder  # the id that stands for a vector

    def read(self, prompts: list[list[int]], vectors: list[torch.Tensor]) -> "Reading":
        """Begin with B prompts, each with as many placeholders as its vectors (N, d) have rows.

        The words that all of them begin with are read once. Each prompt goes on after padding of its own.
        """
        device = next(self.parameters()).device
        cache, common = None, self._common(prompts)
        if common:
            embedded = self.body.get_input_embeddings()(torch.tensor([common], device=device))
            cache = self.body(inputs_embeds=embedded, use_cache=True).past_key_values
            cache.batch_repeat_interleave(len(prompts))
        rests = [prompt[len(common) :] for prompt in prompts]
        length = max(map(len, rests))
        ids = torch.tensor([[0] * (length - len(rest)) + rest for rest in rests], device=device)
        mask = torch.tensor([[0] * (length - len(rest)) + [1] * len(rest) for rest in rests], device=device)
        stacked = pad_sequence(vectors, batch_first=True).to(device, self.body.dtype)
        counts = torch.tensor([len(rows) for rows in vectors], device=device)
        inside = torch.arange(stacked.shape[1], device=device) < counts[:, None]
        passages = self.projector(stacked)
        inputs = self.embed(ids, mask, passages, inside)
        return Reading(self.body, inputs, F.pad(mask, (len(common), 0), value=1), passages, cache)

    def _common(self, prompts: list[list[int]]) -> list[int]:
        """The ids before any vector that several prompts begin with, one less than the shortest prompt at most."""
        if len(prompts) < 2:
            return []
        columns = zip(*(prompt[:-1] for prompt in prompts), strict=False)
        common = [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]
        return common[: common.index(self.placeholder)] if self.placeholder in common else common

    def embed(
        self, ids: torch.Tensor, mask: torch.Tensor, passages: torch.Tensor, inside: torch.Tensor
    ) -> torch.Tensor:
        """The input embeddings of ids (B, L) under mask (B, L), where projected passages (B, N, H), as far as `inside`
        (B, N) says, stand in for the placeholders in order: (B, L, H)."""
        embedded: torch.Tensor = self.body.get_input_embeddings()(ids)
        at = ((ids == self.placeholder) & (mask == 1))[..., None]
        return embedded.masked_scatter(at, passages[inside])


class Reading:
    """B prompts under decoding: `logits` reads what is new, `name` appends a passage to each.

    inputs: (B, L, H), what is still to be read. mask: (B, C + L), 0 on padding, over what `cache` holds (C) and that.
    passages: (B, N, H), the vectors that may be named.
    """

    def __init__(
        self,
        body: "PreTrainedModel",
        inputs: torch.Tensor,
        mask: torch.Tensor,
        passages: torch.Tensor,
        cache: Any = None,
    ):
        self.body = body
        self.inputs = inputs
        self.mask = mask
        self.positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -inputs.shape[1] :]  # the first real token is at 0
        self.passages = passages
        self.cache = cache

    def logits(self) -> torch.Tensor:
        """h . e_j of the last state h with every passage j: float32 (B, N). The vocabulary's own logits are never made."""
        read = self.body(
            inputs_embeds=self.inputs,
            attention_mask=self.mask,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.cache = read.past_key_values
        return torch.einsum("bh,bnh->bn", read.last_hidden_state[:, -1].float(), self.passages.float())

    def name(self, picked: torch.Tensor) -> None:
        """picked (B,): the passage that each prompt goes on with."""
        self.inputs = self.passages[torch.arange(len(picked), device=picked.device), picked][:, None]
        self.mask = torch.cat([self.mask, self.mask[:, -1:]], 1)
        self.positions = self.positions[:, -1:] + 1


def projector(kind: str, width: int, hidden: int) -> nn.Module:
    """`linear`, `mlp{k}x_gelu` (k linear layers with GELU between them) or `identity`, from `width` to `hidden`."""
    if kind == "identity" and width == hidden:
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(width, hidden)
    layers = re.fullmatch(r"mlp([1-9])x_gelu", kind)
    if not layers:
        raise ValueError(
            f"projector_type={kind!r} from {width} to {hidden} dimensions; wanted 'linear', 'mlp2x_gelu' or, between equals, 'identity'"
        )
    modules: list[nn.Module] = [nn.Linear(width, hidden)]
    for _ in range(int(layers[1]) - 1):
        modules += [nn.GELU(), nn.Linear(hidden, hidden)]
    return nn.Sequential(*modules)
