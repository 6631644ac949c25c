"""Training of Fusion-in-Decoder, which both LiT5 rerankers share: a T5 learns to generate a text from many passages.

Source: arXiv 2007.01282.

The text to generate is called the answer. LiT5Distill generates a ranking of the passages, such as "3 1 2". LiT5Score
generates the answer to a question. The encoder of the T5 reads each passage alone, in a prompt with the query. The
decoder attends to the tokens of all passages and learns to generate the answer. The loss is the cross-entropy of the
answer. The encoder's activations for a hundred passages would fill the memory of a GPU. With gradient checkpointing,
the forward pass keeps only the encoder's output states. The backward pass then recomputes the activations, for some of
the passages at a time.
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

# For one query: the token ids of each passage's prompt, and the token ids of the answer with EOS
PromptsAndAnswer = tuple[list[list[int]], list[int]]


@dataclasses.dataclass(frozen=True)
class FiDRecipe(Recipe):
    """The fields that the recipes of both LiT5 rerankers share.

    Args:
        dropout: the dropout rate of the T5.
        max_tokens: maximum tokens, including padding, in one forward pass of the encoder. None is 1,024 on a CPU and
            16,384 on a GPU.
    """

    dropout: float = 0.1
    checkpointing: bool = True
    max_tokens: int | None = None


class AnswerBatch(NamedTuple):
    """The token ids of B queries. `prompts` holds, for each query, the prompts of its passages. `answers` holds, for
    each query, the answer with EOS."""

    prompts: list[list[list[int]]]
    answers: list[list[int]]


def collate(read: Callable[[Any], PromptsAndAnswer], examples: list[Any]) -> AnswerBatch:
    """Tokenise B examples, and return them as a batch. `read` is a function that tokenises one example."""
    prompts, answers = zip(*map(read, examples), strict=True)
    return AnswerBatch(list(prompts), list(answers))


def set_dropout(network: Any, dropout: float) -> None:
    """Set the dropout rate of every layer of a T5. The T5 of transformers stores the rate in Dropout modules and, for
    the attention weights, as a number."""
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = dropout


def answer_loss(
    t5: T5Checkpoint, decay: float, max_tokens: int | None, checkpointing: bool, batch: AnswerBatch
) -> torch.Tensor:
    """Return the cross-entropy of B answers, a scalar tensor: the weighted mean over the tokens of all answers. The
    token at position t of an answer (t = 0, 1, ...) has the weight `decay ** t`.

    Args:
        t5: the T5 to train.
        decay: the weight of a token divided by the weight of the token before it.
        max_tokens: maximum tokens, including padding, in one forward pass of the encoder. None is 1,024 on a CPU and
            16,384 on a GPU.
        checkpointing: whether to use gradient checkpointing in the encoder.
        batch: the prompts and the answers of B queries.
    """
    fid = FiD(t5.network)
    states, attention_mask = encode(fid, batch.prompts, max_tokens, checkpointing)
    return text_loss(fid, states, attention_mask, batch.answers, decay)


def text_loss(
    fid: FiD, states: torch.Tensor, attention_mask: torch.Tensor, answers: Sequence[Sequence[int]], decay: float
) -> torch.Tensor:
    """Return the cross-entropy of B answers, a scalar tensor, weighted as in `answer_loss`.

    Args:
        fid: the T5.
        states: the encoder states (B, S, D) of the passages of each query.
        attention_mask: the mask (B, S) of these states.
        answers: the token ids of each answer.
        decay: as in `answer_loss`.
    """
    labels, inside = (tensor.to(fid.device) for tensor in padded(answers, EOS))
    written = torch.cat([labels.new_full((len(labels), 1), START), labels[:, :-1]], 1)  # the decoder's inputs
    return decayed_cross_entropy(fid.logits(decode(fid, states, attention_mask, written)), labels, inside, decay)


def decode(fid: FiD, states: torch.Tensor, attention_mask: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
    """Run the decoder on its input ids `written` (B, T), and return the decoder's states (B, T, D). `states` (B, S, D)
    are the encoder's states, and `attention_mask` (B, S) is their mask."""
    decoder = fid.network.decoder
    read = decoder(input_ids=written, encoder_hidden_states=states, encoder_attention_mask=attention_mask)
    decoded: torch.Tensor = read.last_hidden_state
    return decoded


def encode(
    fid: FiD, windows: Sequence[Sequence[Sequence[int]]], max_tokens: int | None, checkpointing: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode the prompts of B queries. Returns encoder states (B, S, D) and a mask (B, S). The states of a query are
    those of its prompts, one prompt after another. S is the number of tokens in all prompts of a query, for the query
    with the most tokens.

    Args:
        fid: the T5.
        windows: for each query, the token ids of its prompts.
        max_tokens: as in `answer_loss`.
        checkpointing: as in `answer_loss`.
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
