"""A causal language model whose prompts contain vectors, and whose next token is one of these vectors.

A projector maps the vectors into the space of the model's input embeddings. Each projected vector replaces the
embedding of a placeholder in the prompt. After a prompt, the model generates only tokens that stand for vectors of this
prompt. The logit of such a token is the dot product of its projected vector with the last hidden state. This module
does not deal with texts or queries.

Shapes: B is the number of prompts, and L their length in tokens. The KV cache has C tokens. N is the largest number of
vectors in one prompt, and d the dimension of the vectors. One forward pass reads m vectors per prompt. H is the width
of the model.

Source: PE-Rank (arXiv 2406.14848), section 3.
"""

import functools
import inspect
import re
from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from pyterrier_lit.models.attention import use_for_few_queries

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# The time of a pass over 1, 2, 3 and 4 vectors, divided by the time of a pass over one vector. The numbers are averages
# over models of width 512 and 1,024 and over batches of 1 and 8 prompts, measured on two cores
COSTS = {torch.float32: (1.0, 1.3, 1.45, 1.6), torch.bfloat16: (1.0, 1.1, 1.2, 1.3)}


class VectorLM(nn.Module):
    """The body of a causal language model, and the projector that maps vectors into the model's input space.

    Args:
        body: the language model without its output layer.
        projector: the projector, d -> H dimensions.
        placeholder: the token id that stands for a vector in a prompt.
    """

    def __init__(self, body: "PreTrainedModel", projector: nn.Module, placeholder: int):
        super().__init__()
        use_for_few_queries(body)
        self.body = body
        self.projector = projector
        self.placeholder = placeholder

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        use_for_few_queries(self.body)  # registers the attention function in a new process

    def forward(
        self, inputs: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Any = None
    ) -> tuple[torch.Tensor, Any]:
        """Process the next L tokens of B prompts.

        Args:
            inputs: (B, L, H), the input embeddings.
            mask: (B, C + L), 1 for each token to attend to, else 0. It covers the C tokens in the cache and the L
                inputs.
            positions: (B, L), the positions of the inputs.
            cache: the cache of transformers with the C earlier tokens, or None.

        Returns hidden states (B, L, H) and the extended cache. Raises RuntimeError if the installed version of
        transformers ignores `cache`.
        """
        body: Any = type(self.body)
        name = _cache_argument(body)
        read = self.body(
            inputs_embeds=inputs, attention_mask=mask, position_ids=positions, use_cache=True, **{name: cache}
        )
        grown = read[name]
        if grown.get_seq_length() != mask.shape[1]:
            raise RuntimeError(
                f"the cache of {type(self.body).__name__} holds {grown.get_seq_length()} tokens after {mask.shape[1]}"
                " were read: this version of transformers is not supported"
            )
        states: torch.Tensor = read.last_hidden_state
        return states, grown

    def read(self, prompts: list[list[int]], vectors: list[torch.Tensor]) -> "VectorReader":
        """Return a `VectorReader` for B prompts.

        Args:
            prompts: the token ids of each prompt. A prompt has one placeholder for each of its vectors.
            vectors: for each prompt, its vectors (n, d).

        If the model attends to all previous tokens, a common prefix of the prompts is processed only once. The rest of
        each prompt is padded on the left.
        """
        device = next(self.parameters()).device
        cache, common = None, self._common(prompts) if _minds_no_gaps(self.body) else []
        if common:
            embedded = self.body.get_input_embeddings()(torch.tensor([common], device=device))
            at = torch.arange(len(common), device=device)[None]
            _, cache = self(embedded, torch.ones_like(at), at)
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
        return VectorReader(self, inputs, F.pad(mask, (len(common), 0), value=1), passages, cache)

    def _common(self, prompts: list[list[int]]) -> list[int]:
        """Return the common prefix of several prompts, as token ids. The prefix ends before the first placeholder. It
        is shorter than the shortest prompt. For a single prompt, the prefix is empty."""
        if len(prompts) < 2:
            return []
        columns = zip(*(prompt[:-1] for prompt in prompts), strict=False)
        common = [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]
        return common[: common.index(self.placeholder)] if self.placeholder in common else common

    def embed(
        self, ids: torch.Tensor, mask: torch.Tensor, passages: torch.Tensor, inside: torch.Tensor
    ) -> torch.Tensor:
        """Return the input embeddings (B, L, H) of B prompts. The projected vectors replace the placeholders, in order.

        Args:
            ids: (B, L), the token ids.
            mask: (B, L), 1 for each token, 0 on padding.
            passages: (B, N, H), the projected vectors.
            inside: (B, N), true where there is a vector, false on padding.
        """
        embedded: torch.Tensor = self.body.get_input_embeddings()(ids)
        at = ((ids == self.placeholder) & (mask == 1))[..., None]
        return embedded.masked_scatter(at, passages[inside].to(embedded.dtype))


class VectorReader:
    """A `decoding.Reader` for B prompts. Each generated token stands for a vector of its prompt: token i stands for
    vector i, counted from 0.

    Args:
        network: the language model.
        inputs: (B, L, H), the input embeddings of the prompts without the cached prefix.
        mask: (B, C + L), over the C tokens in `cache` and the L inputs; 0 on padding, else 1.
        passages: (B, N, H), the projected vectors.
        cache: the cache of the common prefix, or None.
    """

    def __init__(
        self, network: VectorLM, inputs: torch.Tensor, mask: torch.Tensor, passages: torch.Tensor, cache: Any = None
    ):
        self.network = network
        self.inputs = inputs
        self.mask = mask
        self.positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -inputs.shape[1] :]  # padding is not counted
        self.passages = passages
        self.cache = cache

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.passages.device

    @property
    def costs(self) -> tuple[float, ...]:
        """The time of a pass over 1, 2, ... vectors, divided by the time of a pass over one vector. `keep` removes
        rejected tokens from the cache, or masks them. With some models, masked tokens between other tokens would change
        the result, or tokens cannot be removed from the cache. The tuple then has a single entry: each pass processes
        one vector."""
        if not _minds_no_gaps(self.network.body) or not _can_be_cut(self.cache):
            return COSTS[torch.float32][:1]
        return COSTS.get(self.network.body.dtype, COSTS[torch.bfloat16])

    def start(self) -> torch.Tensor:
        """Process the prompts. Returns float32 logits (B, N): the dot product of the last hidden state of each prompt
        with each of its projected vectors."""
        return self._logits(last=1)[:, 0]

    def read(self, tokens: torch.Tensor) -> torch.Tensor:
        """Process the next m vectors of each prompt in one pass: indices of vectors (B, m) -> float32 logits (B, m, N)
        after each of these vectors."""
        rows = torch.arange(len(tokens), device=tokens.device)[:, None]
        self.inputs = self.passages[rows, tokens]
        self.mask = F.pad(self.mask, (0, tokens.shape[1]), value=1)
        self.positions = self.positions[:, -1:] + torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
        return self._logits(last=tokens.shape[1])

    def keep(self, counts: Sequence[int]) -> None:
        """Keep the first counts[b] tokens of the last pass for prompt b, and remove the other tokens of this pass.

        The cache has equally many tokens for each prompt. Its number of tokens from the last pass is therefore the
        largest of the counts. If prompt b has a smaller count, the cache still contains tokens that prompt b does not
        keep. These tokens are masked, and the next token of prompt b gets the position after the last token that prompt
        b keeps.
        """
        kept, most = torch.tensor(counts, device=self.device)[:, None], max(counts)
        read = self.inputs.shape[1]
        if most < read:
            self.cache.crop(most - read)  # a negative number says how many tokens to remove
        hidden = torch.arange(most, device=self.device) >= kept
        self.mask = self.mask[:, : self.mask.shape[1] - read + most].clone()
        self.mask[:, self.mask.shape[1] - most :].masked_fill_(hidden, 0)
        self.positions = self.positions[:, :1] + kept - 1

    def _logits(self, last: int) -> torch.Tensor:
        """Process the current inputs. Returns float32 logits (B, last, N) after each of the last `last` inputs."""
        states, self.cache = self.network(self.inputs, self.mask, self.positions, self.cache)
        return torch.einsum("bmh,bnh->bmn", states[:, -last:].float(), self.passages.float())


def _minds_no_gaps(body: Any) -> bool:
    """Return whether masked tokens between other tokens leave the result of a model unchanged. The positions do not
    count masked tokens.

    The result is False for sliding-window and chunked attention, because a window or chunk counts masked tokens, too.
    The result is also False for models of transformers that have no argument `position_ids`.
    """
    kinds = getattr(body.config, "layer_types", None)
    limits = [getattr(body.config, name, None) for name in ("sliding_window", "attention_chunk_size", "window_size")]
    sees_all = set(kinds) == {"full_attention"} if kinds else not any(limits)
    return sees_all and "position_ids" in inspect.signature(type(body).forward).parameters


def _can_be_cut(cache: Any) -> bool:
    """Return whether tokens can be removed from a cache of transformers. The result is False if the cache has no
    layers, or if a layer stores anything other than the keys and values of all tokens."""
    from transformers.cache_utils import DynamicLayer

    return bool(cache.layers) and all(type(layer) is DynamicLayer for layer in cache.layers)


@functools.cache
def _cache_argument(model: Any) -> str:
    """Return the name of a model's cache argument in this version of transformers. If the cache is passed under another
    name, the model ignores the cache and raises no error. Raises RuntimeError if the model has no cache argument with a
    known name."""
    names = inspect.signature(model.forward).parameters
    known = [name for name in ("cache", "past_key_values") if name in names]
    if not known:
        raise RuntimeError(f"{model.__name__} of this version of transformers has no cache argument with a known name")
    return known[0]


def projector(kind: str, width: int, hidden: int) -> nn.Module:
    """Return a projector from `width` to `hidden` dimensions.

    Args:
        kind: `linear`, `mlp{k}x_gelu` (k linear layers with GELU between them, k from 1 to 9) or `identity`.
        width: the dimension of the vectors.
        hidden: the width of the language model.

    Raises ValueError for any other kind, and for `identity` if `width` is not equal to `hidden`.
    """
    if kind == "identity" and width == hidden:
        return nn.Identity()
    linear = functools.partial(nn.Linear, dtype=torch.float32)
    if kind == "linear":
        return linear(width, hidden)
    layers = re.fullmatch(r"mlp([1-9])x_gelu", kind)
    if not layers:
        raise ValueError(
            f"projector_type={kind!r} from {width} to {hidden} dimensions; wanted 'linear' or 'mlp2x_gelu', or"
            " 'identity' if both numbers are the same"
        )
    modules: list[nn.Module] = [linear(width, hidden)]
    for _ in range(int(layers[1]) - 1):
        modules += [nn.GELU(), linear(hidden, hidden)]
    return nn.Sequential(*modules)
