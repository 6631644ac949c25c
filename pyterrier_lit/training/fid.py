"""Training of Fusion-in-Decoder (arXiv 2007.01282), which both LiT5 rerankers share: a T5 learns to generate a text
from many passages.

The encoder of the T5 reads each passage alone, in a prompt with the query. The decoder attends to the tokens of all
passages and learns to generate the answer. The loss is the cross-entropy of the answer. The encoder's activations for a
hundred passages would fill the memory of a GPU. With gradient checkpointing, only the encoder's output states are kept.
The backward pass then recomputes the activations for a part of the passages at a time.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from pyterrier_lit.batching import encoder_tokens, like_lengths, padded
from pyterrier_lit.models.t5 import EOS, START, FiD, T5Checkpoint
from pyterrier_lit.training.losses import decayed_cross_entropy
from pyterrier_lit.training.trainer import Recipe

PromptsAndAnswer = tuple[list[list[int]], list[int]]  # one query's token ids: prompts, and the answer with EOS


@dataclasses.dataclass(frozen=True)
class FiDRecipe(Recipe):
    """Fields that the recipes of both LiT5 rerankers share.

    Args:
        dropout: the dropout rate of the T5.
        max_tokens: maximum tokens, including padding, in one forward pass of the encoder. None is 1,024 on a CPU and
            16,384 on a GPU.
    """

    dropout: float = 0.1
    checkpointing: bool = True
    max_tokens: int | None = None


class AnswerBatch(NamedTuple):
    """The token ids of B queries: for each query, the prompts of its passages, and its answer with EOS."""

    prompts: list[list[list[int]]]
    answers: list[list[int]]


def collate(read: Callable[[Any], PromptsAndAnswer], examples: list[Any]) -> AnswerBatch:
    """Tokenise B examples. read: a function that tokenises one example."""
    prompts, answers = zip(*map(read, examples), strict=True)
    return AnswerBatch(list(prompts), list(answers))


def set_dropout(network: Any, dropout: float) -> None:
    """Set the dropout rate of every layer. T5 stores the rate in Dropout modules and, for the attention weights, as a
    number."""
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = dropout


def answer_loss(
    t5: T5Checkpoint, decay: float, max_tokens: int | None, checkpointing: bool, batch: AnswerBatch
) -> torch.Tensor:
    """The mean cross-entropy of the tokens of the answers. Token t of an answer (from 0) has the weight decay^t.

    max_tokens: maximum tokens, including padding, in one forward pass of the encoder. None is 1,024 on a CPU and 16,384
    on a GPU.
    """
    fid = FiD(t5.network)
    states, attention_mask = encode(fid, batch.prompts, max_tokens, checkpointing)
    return text_loss(fid, states, attention_mask, batch.answers, decay)


def text_loss(
    fid: FiD, states: torch.Tensor, attention_mask: torch.Tensor, answers: Sequence[Sequence[int]], decay: float
) -> torch.Tensor:
    """The cross-entropy of B answers, given the encoder states (B, S, D) of their passages and a mask (B, S).

    answers: the token ids of each answer. decay: as in `answer_loss`.
    """
    labels, inside = (tensor.to(fid.device) for tensor in padded(answers, EOS))
    written = torch.cat([labels.new_full((len(labels), 1), START), labels[:, :-1]], 1)  # the decoder's inputs
    return decayed_cross_entropy(fid.logits(decode(fid, states, attention_mask, written)), labels, inside, decay)


def decode(fid: FiD, states: torch.Tensor, attention_mask: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
    """The decoder's states (B, T, D) for the input ids (B, T).

    states: encoder states (B, S, D). attention_mask: their mask (B, S). written: the input ids.
    """
    decoder = fid.network.decoder
    read = decoder(input_ids=written, encoder_hidden_states=states, encoder_attention_mask=attention_mask)
    decoded: torch.Tensor = read.last_hidden_state
    return decoded


def encode(
    fid: FiD, windows: Sequence[Sequence[Sequence[int]]], max_tokens: int | None, checkpointing: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The prompts of B queries -> encoder states (B, S, D) and a mask (B, S). The states of a query are the
    concatenated states of its prompts. S is the largest number of tokens of a query, over all of its prompts.

    windows: for each query, the token ids of its prompts.
    """
    prompts = [prompt for window in windows for prompt in window]
    encoded: list[Any] = [None] * len(prompts)
    for part in like_lengths([len(prompt) for prompt in prompts], max_tokens or encoder_tokens(fid.device)):
        together = [prompts[i] for i in part]
        states = checkpoint(fid.encode, together, use_reentrant=False) if checkpointing else fid.encode(together)
        for i, state in zip(part, states, strict=True):
            encoded[i] = state
    rest = iter(encoded)
    joined = [torch.cat([next(rest) for _ in window]) for window in windows]
    _, mask = padded([range(len(window)) for window in joined])
    return pad_sequence(joined, batch_first=True), mask.long().to(fid.device)
