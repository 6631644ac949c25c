"""Training of PERank in two stages: alignment of the passage vectors, then ranking by these vectors.

Source: arXiv 2406.14848.

Stage 1, alignment: the language model sees the vector of a passage in place of its text and must reconstruct the text.
Only the projector is trained. The projector maps the vector into the input space of the language model.

Stage 2, ranking: a training example is a window of passages from a query's list. The prompt contains the vectors of the
passages. After the prompt, the input contains these vectors once more, in the teacher's order. The student learns to
predict each of these vectors from the hidden state of the token before the vector (ListMLE). The dot product of this
state with the next vector should be larger than its dot products with the vectors that come later. The student also
learns the teacher's order from a second prompt, which contains both the vectors and the texts of the passages. A KL
divergence makes the ranking that the student gives with the first prompt similar to the ranking that it gives with the
second prompt.
"""

import dataclasses
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from pyterrier_lit.batching import Budget, inference, padded
from pyterrier_lit.frames import Ranking
from pyterrier_lit.models.pe_checkpoint import PERankCheckpoint
from pyterrier_lit.models.pe_prompts import RANK, Prompter
from pyterrier_lit.pe_rank import PERank
from pyterrier_lit.training.data import Passages, some_of, uneven, window
from pyterrier_lit.training.lora import adapted
from pyterrier_lit.training.losses import list_kl, list_mle
from pyterrier_lit.training.trainer import Objective, Recipe, as_it_is, device_of, enable_gradient_checkpointing


@dataclasses.dataclass(frozen=True)
class AlignmentRecipe(Recipe):
    """A recipe for alignment, stage 1 of PERank's training. Only the projector is trained. Each passage is a training
    example. The answer that the student must generate is the text of the passage.

    Args:
        max_length: maximum tokens of a prompt and its answer together. A longer answer is truncated.

    The fields of `trainer.Recipe` are accepted, too.
    """

    max_length: int = 512

    def objective(self, student: PERank) -> Objective:
        """Return the training objective: the cross-entropy of a passage's text given its vector.

        Raises ValueError if the checkpoint has no output layer of the language model. A checkpoint that `save` wrote
        has none, unless the output layer is tied to the input embeddings.
        """
        return alignment(student, self)


@dataclasses.dataclass(frozen=True)
class RankingRecipe(Recipe):
    """A recipe for stage 2 of PERank. A training example is a window of passages, sampled from a query's list.

    Args:
        smallest: the smallest number of passages in a window. None is the same as `largest`.
        largest: the largest number of passages in a window. None is the student's window size.
        shuffle: the probability that a window is shuffled. A window that is not shuffled keeps the order of the first
            stage.
        text_weight: the weight of ListMLE for the prompt with texts. 0 omits this prompt and the KL divergence.
        kl_weight: the weight of the KL divergence between the rankings with and without texts in the prompt.
        reduction: "sum" or "mean" over the ranks of a window in ListMLE. The published code of PE-Rank used the sum
            until October 2024 and has used the mean since. The KL divergence is always a sum over the ranks. ListMLE of
            a window of n passages is divided by n with "mean", so the KL divergence then weighs n times as much in
            comparison. In the issue tracker of the published code, a user reports an `nDCG@10` of .6355 on TREC DL 2019
            after training with "mean", and an `nDCG@10` of .7046 after training with "sum".
        max_length: maximum tokens of a prompt and its answer together.
        lora: the rank of LoRA adapters that are trained instead of the language model's weights. Training adapters
            needs less memory than training all weights, and is meant for a single GPU. After training, the adapters are
            merged into the weights. None trains all weights. The projector is trained in both cases.

    The fields of `trainer.Recipe` are accepted, too.
    """

    smallest: int | None = None
    largest: int | None = None
    shuffle: float = 0.5
    text_weight: float = 1.0
    kl_weight: float = 0.2
    reduction: str = "sum"
    max_length: int = 4096
    lora: int | None = None

    def objective(self, student: PERank) -> Objective:
        """Return the training objective: ListMLE without texts in the prompt, ListMLE with texts, and the KL divergence
        between the two rankings."""
        return ranking(student, self)


# Source: the published scripts. They use AdamW, a cosine schedule, and a warm-up of 3 % of the steps. In stage 1, the
# global batch size is 4 in the README (4 GPUs x 1) and 32 in the paper (4 GPUs x 8). In stage 2, it is 32 (4 GPUs x 4 x
# 2 accumulation steps)
RECIPES: dict[str, Recipe] = {
    "pe-rank-alignment": AlignmentRecipe(
        1e-3, batch_size=32, warmup=0.03, schedule="cosine", weight_decay=0.0, checkpointing=True
    ),
    "pe-rank-ranking": RankingRecipe(
        2e-5, batch_size=32, warmup=0.03, schedule="cosine", weight_decay=0.0, clip=1.0, checkpointing=True
    ),
}
FINE_TUNE = DISTIL = "pe-rank-ranking"  # the default recipe for labels and for a teacher's ranking


# Both stages


class Read(NamedTuple):
    """The language model's output for B inputs of at most L tokens, with at most N passages each. H is the width of the
    model."""

    states: torch.Tensor  # (B, L, H), the hidden state after each token
    ids: torch.Tensor  # (B, L), the token ids, padded on the right
    passages: torch.Tensor  # (B, N, H), the projected vectors of the passages
    inside: torch.Tensor  # (B, N), true where there is a passage


def read(
    checkpoint: PERankCheckpoint,
    prompts: Sequence[Sequence[int]],
    vectors: Sequence[torch.Tensor],
    orders: Sequence[Sequence[int]],
) -> Read:
    """Run the language model on B prompts with their answers. Each prompt has a placeholder for each of its passages.
    The inputs at the placeholders are the projected vectors of the passages. In stage 2, each answer has one token
    <RANK> per passage. The inputs at these rank tokens are the projected vectors once more, in the order of `orders`.

    Args:
        checkpoint: the PE-Rank model.
        prompts: the token ids of each prompt with its answer.
        vectors: for each prompt, the vectors (n, d) of its passages.
        orders: for each prompt, a permutation of the positions of its passages (from 0). In stage 1, there are no rank
            tokens, and this order has no effect.
    """
    network, device = checkpoint.network, device_of(checkpoint.network)
    ids, mask = (tensor.to(device) for tensor in padded(prompts))
    order, inside = (tensor.to(device) for tensor in padded(orders))
    passages = network.projector(pad_sequence(list(vectors), batch_first=True).to(device))
    inputs = network.embed(ids, mask, passages, inside)
    ranked = passages.gather(1, order[..., None].expand_as(passages))
    inputs = inputs.masked_scatter((ids == checkpoint.prompter.rank)[..., None], ranked[inside].to(inputs.dtype))
    states = network.body(inputs_embeds=inputs, attention_mask=mask.long(), use_cache=False).last_hidden_state
    return Read(states, ids, passages, inside)


# A function: lists -> for each list, the vectors (n, d) of its n passages
Embed = Callable[[Sequence[Ranking]], list[torch.Tensor]]


def embedding(student: PERank) -> Embed:
    """Return a function: lists -> for each list, the vectors (n, d) of its n passages. The vectors come from the
    column `doc_vec`, from the student's index or from its encoder. The encoder is not trained."""
    checkpoint, budget, quiet = student.load(), Budget(student.max_tokens), student.apply_attributes(verbose=False)

    def embed(lists: Sequence[Ranking]) -> list[torch.Tensor]:
        columns = {name: [list(given.columns[name]) for given in lists] for name in lists[0].columns}
        if checkpoint.encoder:
            checkpoint.encoder.network.to(device_of(checkpoint.network))  # with several processes, each has its own GPU
        with inference():
            vectors, rows = quiet.vectors_of(checkpoint, columns, budget)
        return [vectors[each] for each in rows]

    return embed


def tried(embed: Embed, lists: Sequence[Ranking]) -> Sequence[Ranking]:
    """Return the lists, unchanged. First try to read the vectors of the first list, so that unusable vectors raise an
    error before the first training step. If the lists have a column `doc_vec`, the vectors of all lists are tried."""
    for given in lists:
        embed([given])
        if "doc_vec" not in given.columns:
            break
    return lists


# Stage 1: alignment


class AlignmentBatch(NamedTuple):
    """A batch of B passages for stage 1. A conversation is a prompt with its answer. `conversations` holds the token
    ids of B conversations. `starts` holds, for each conversation, the position of the first token of the answer (from
    0). `passages` holds the passages, each as a list of one passage."""

    conversations: list[list[int]]
    starts: list[int]
    passages: list[Ranking]


def alignment(student: PERank, recipe: AlignmentRecipe) -> Objective:
    """Return the training objective of a PERank in stage 1. Raises ValueError if the student's language model has no
    output layer."""
    checkpoint: PERankCheckpoint = student.load()
    head = output_layer(checkpoint)
    checkpoint.network.body.requires_grad_(False)
    if recipe.checkpointing:
        enable_gradient_checkpointing(checkpoint.network)
    text: dict[str, type] = {student.text_field: str}
    embed = embedding(student)
    return Objective(
        network=checkpoint.network,
        column_sets=[text | {"doc_vec": object}, text],
        prepare=lambda lists: tried(embed, Passages(lists, student.text_field)),
        sample=the_passage,
        collate=partial(collate_conversations, checkpoint.prompter, recipe.max_length, student.text_field),
        loss=partial(alignment_loss, checkpoint, head, embed),
        wanted="wanted passages with a text",
    )


def output_layer(checkpoint: PERankCheckpoint) -> nn.Linear:
    """Return the language model's output layer (hidden size -> vocabulary size). Only stage 1 uses this layer. The
    layer is not trained."""
    weight = checkpoint.head()
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    head.weight = nn.Parameter(weight, requires_grad=False)
    return head


def the_passage(passage: Ranking, rng: random.Random) -> Ranking:
    return passage


def collate_conversations(
    prompter: Prompter, max_length: int, text_field: str, passages: list[Ranking]
) -> AlignmentBatch:
    """Return a batch with the tokenised conversations of B passages. The prompt of a conversation has a placeholder for
    the passage's vector. The answer is the text of the passage. A conversation is truncated to `max_length` tokens."""
    answered = [prompter.answered(*prompter.alignment(*passage.columns[text_field])) for passage in passages]
    return AlignmentBatch(
        conversations=[ids[:max_length] for ids, _ in answered],
        starts=[start for _, start in answered],
        passages=passages,
    )


def alignment_loss(checkpoint: PERankCheckpoint, head: nn.Linear, embed: Embed, batch: AlignmentBatch) -> torch.Tensor:
    """Return the mean of -log p(token) over the tokens of all answers, a scalar tensor."""
    states, ids, *_ = read(checkpoint, batch.conversations, embed(batch.passages), [[0]] * len(batch.passages))
    starts = torch.tensor(batch.starts, device=ids.device)[:, None]
    stops = torch.tensor([len(row) for row in batch.conversations], device=ids.device)[:, None]
    position = torch.arange(1, ids.shape[1], device=ids.device)
    answer = (position >= starts) & (position < stops)
    logits = head.to(states.device, states.dtype)(states[:, :-1][answer])
    return F.cross_entropy(logits.float(), ids[:, 1:][answer])


# Stage 2: ranking


class RankingExample(NamedTuple):
    """A window of passages for stage 2. `prompts` holds the token ids of two prompts: without texts and with texts. If
    the recipe's text_weight is 0, there is no prompt with texts. Each prompt is followed by its answer, which has one
    rank token per passage. `window` holds the passages in the order in which the student sees them. `order`
    holds the positions of the passages in the window (from 0), best first."""

    prompts: list[list[int]]
    window: Ranking
    order: list[int]


class RankingBatch(NamedTuple):
    """A batch of B windows for stage 2. `views` holds the token ids of the B prompts without texts, and then those of
    the B prompts with texts. If the recipe's text_weight is 0, there are no prompts with texts. Each prompt is followed
    by its answer. `windows` holds the passages of each window. `orders` holds, for each window, the positions
    of its passages (from 0), best first."""

    views: list[list[list[int]]]
    windows: list[Ranking]
    orders: list[list[int]]


def ranking(student: PERank, recipe: RankingRecipe) -> Objective:
    """Return the training objective of a PERank in stage 2."""
    checkpoint: PERankCheckpoint = student.load()
    checkpoint.network.requires_grad_(True)
    if recipe.lora:
        checkpoint.network.body.requires_grad_(False)
    if recipe.checkpointing:
        enable_gradient_checkpointing(checkpoint.network)
    text: dict[str, type] = {student.text_field: str}
    column_sets = [text | {"doc_vec": object}, text] if recipe.text_weight else student.column_sets()
    embed = embedding(student)
    return Objective(
        network=checkpoint.network,
        column_sets=[{**columns, "target": float} for columns in column_sets],
        prepare=lambda lists: tried(embed, uneven(lists)),
        sample=partial(sample_window, checkpoint.prompter, recipe, student.window_size, student.text_field),
        collate=collate_windows,
        loss=partial(ranking_loss, checkpoint, recipe, embed),
        around=partial(adapted, checkpoint.network.body, recipe.lora) if recipe.lora else as_it_is,
    )


def sample_window(
    prompter: Prompter, recipe: RankingRecipe, size: int, text_field: str, given: Ranking, rng: random.Random
) -> RankingExample:
    """Sample a window of passages from a list, and return it as a training example. `size` is the student's window
    size, in passages.

    Raises ValueError if a prompt with its answer has more than the recipe's max_length tokens.
    """
    largest = recipe.largest or size
    shown, order = window(given.columns["target"], recipe.smallest or largest, largest, recipe.shuffle, rng)
    passages = some_of(given, shown)
    texts: list[list[str | None]] = [[None] * len(shown)]
    if recipe.text_weight:
        texts.append(passages.columns[text_field])
    answer = RANK * len(shown)
    prompts = [prompter.answered(prompter.messages(given.query, view), answer)[0] for view in texts]
    if len(prompts[-1]) > recipe.max_length:
        raise ValueError(
            f"the prompt for query {given.query!r} with {len(shown)} passages has {len(prompts[-1])} tokens; wanted at"
            f" most {recipe.max_length}: truncate the texts, or use fewer passages (largest=) or text_weight=0"
        )
    return RankingExample(prompts, passages, order)


def collate_windows(examples: list[RankingExample]) -> RankingBatch:
    """Collect B windows into a batch."""
    views = [list(view) for view in zip(*(example.prompts for example in examples), strict=True)]
    return RankingBatch(views, [example.window for example in examples], [example.order for example in examples])


def ranking_loss(
    checkpoint: PERankCheckpoint, recipe: RankingRecipe, embed: Embed, batch: RankingBatch
) -> torch.Tensor:
    """Return the loss of B windows, a scalar tensor. The student ranks the passages of each window twice: with the
    prompt without texts and with the prompt with texts. The loss is the sum of three terms, each a mean over the B
    windows:

    - ListMLE of the ranking without texts;
    - ListMLE of the ranking with texts, times the recipe's text_weight;
    - KL(ranking with texts || ranking without texts), times the recipe's kl_weight.

    If text_weight is 0, only the first term remains.
    """
    vectors = embed(batch.windows)
    scores, insides = zip(*(rank_scores(checkpoint, view, vectors, batch.orders) for view in batch.views), strict=True)
    inside = insides[0]
    targets = padded([worth(order) for order in batch.orders])[0].to(inside.device)
    loss = list_mle(scores[0], targets, inside, recipe.reduction)
    if recipe.text_weight:
        loss = loss + recipe.text_weight * list_mle(scores[1], targets, inside, recipe.reduction)
        loss = loss + recipe.kl_weight * list_kl(scores[0], scores[1], targets, inside)
    return loss


def rank_scores(
    checkpoint: PERankCheckpoint, prompts: list[list[int]], vectors: list[torch.Tensor], orders: list[list[int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two tensors for B windows with at most N passages. The first tensor (B, N, N) holds, for each window and
    each rank, the scores of the passages. The score of a passage is the dot product of its projected vector with the
    hidden state of the token before the rank token. The second tensor (B, N) is a mask of the passages.

    Args:
        checkpoint: the PE-Rank model.
        prompts: the token ids of each prompt with its answer.
        vectors: for each prompt, the vectors (n, d) of its passages.
        orders: for each prompt, the positions of its passages (from 0), best first.
    """
    states, ids, passages, inside = read(checkpoint, prompts, vectors, orders)
    before = states[:, :-1][ids[:, 1:] == checkpoint.prompter.rank]
    at_ranks = torch.zeros_like(passages).masked_scatter(inside[..., None], before.to(passages.dtype))
    return torch.einsum("bih,bjh->bij", at_ranks.float(), passages.float()), inside


def worth(order: list[int]) -> list[int]:
    """Return the ListMLE targets of n passages, in the order of the prompt. The target of the passage that `order`
    lists first is n, and the target of the passage that `order` lists last is 1."""
    value_of = dict(zip(order, range(len(order), 0, -1), strict=True))
    return [value_of[position] for position in range(len(order))]
