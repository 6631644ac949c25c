"""The language model of the small PE-Rank before training: it already averages the words of the query.

The weighted average of the word embeddings of a text has about the direction of MiniLM's vector of the text. One word
of the prompt comes before the query (ANNOUNCES), and another comes after the query (ENDS). Between these two words are
mainly the words of the query. The first layer marks the tokens after each of the two words, so that the second layer
can average the words between them. The passages also have small weights in this average; the first passages have the
largest of these. So the state at the end of the prompt has about the direction of the query's vector. The dot products
of this state with the passages rank as dense retrieval does, with a preference for the first stage's order. The
function `teach` trains the model from there.
"""

import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers

from pyterrier_lit.models.pe_checkpoint import PERankCheckpoint
from pyterrier_lit.models.pe_prompts import PROMPT, RANK
from pyterrier_lit.training.losses import list_kl
from pyterrier_lit.training.pe_rank import read

WIDTH, HEADS, LAYERS = 128, 4, 2
HEAD = WIDTH // HEADS
PROMPT_WORDS = PROMPT.format(n=20, query="", passages="Passage 1: []")  # all words of a prompt but the query's
ANNOUNCES, ENDS = "relevance", "relatively"  # words of the prompt: before the query, and after the query
SILENT = (":", ".", ",", "[", "]", "passage", *map(str, range(1, 21)))  # words that do not count in the average
# Dimensions of the states
MEANING = 120  # the first 120 hold the meaning of a word, a passage or the query
CONSTANT = 120  # is MARK in every token
WEIGHT = 121  # a quarter of the logarithm of a word's weight in the average
ANNOUNCE, END = 122, 123  # mark the tokens ANNOUNCES and ENDS
AFTER, BEYOND = 124, 125  # mark the tokens after ANNOUNCES, and after ENDS
PASSAGE = 126  # marks passages
# Dimensions of a head, by how fast the rotary embedding turns them
SLOW = 15  # hardly turned within a prompt
TURNING = 6  # turned once in 199 tokens

# Lengths of the parts of a state. The norm before each layer makes the state of a word about NORM times as long
WORD_LENGTH, PASSAGE_LENGTH, QUERY_LENGTH, MARK = 5.0, 2.0, 10.0, 3.0
NORM = 1.75
# Attention logits
SURE = 15.0  # of the tokens ANNOUNCES and ENDS
INSIDE = 8.0  # of tokens between ANNOUNCES and ENDS
LEAST, MOST = -8.0, 2.0  # of a word, relative to a word of the median weight
SOME = -3.5  # of a passage, relative to a word of the median weight
RAMP, FAR = 3.0, 180  # RAMP is added for a passage that is FAR tokens back, and less for other passages

NOISE = 0.1  # standard deviation of the noise on the teacher's scores, with which `teach` orders the passages


class Taught(NamedTuple):
    """A query, and the first stage's passages for this query."""

    query: str
    vector: torch.Tensor  # (d,), MiniLM's vector of the query
    passages: torch.Tensor  # (N,), the numbers of the passages
    scores: torch.Tensor  # (N,), the teacher's scores


@torch.no_grad()
def write_mistral(folder: Path, vocabulary: Sequence[str], words: torch.Tensor) -> None:
    """Write a Mistral of two layers to a folder.

    vocabulary: the V words. words: a vector for each word, (V, WIDTH). The sum of these vectors over a text has about
    the direction of the text's vector. The direction of a word's vector is its meaning, and its length is the word's
    weight in the average.
    """
    config = transformers.MistralConfig(
        vocab_size=len(vocabulary),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=2_048,
        sliding_window=None,
        tie_word_embeddings=True,
    )
    model: Any = transformers.MistralForCausalLM(config)
    number = {word: i for i, word in enumerate(vocabulary)}
    embeddings, silent = model.model.embed_tokens.weight, [number[word] for word in SILENT if word in number]
    lengths = words[:, :MEANING].norm(dim=1)
    embeddings.zero_()
    embeddings[:, :MEANING] = WORD_LENGTH * F.normalize(words[:, :MEANING], dim=1)
    embeddings[:, CONSTANT] = MARK
    embeddings[:, WEIGHT] = (lengths / lengths.median()).log().clamp(LEAST, MOST) / 4
    embeddings[silent, :MEANING], embeddings[silent, WEIGHT] = 0.0, LEAST / 4
    embeddings[number[ANNOUNCES], ANNOUNCE] = embeddings[number[ENDS], END] = MARK
    _plan(model.model)
    model.save_pretrained(folder)


def _plan(body: Any) -> None:
    """Set the weights of the two attention layers. The MLPs and the unused heads of the first layer keep their random
    weights."""
    first, second = (layer.self_attn for layer in body.layers)
    one = math.sqrt(HEAD) / (NORM * MARK)  # CONSTANT times this, with a key of 1, is an attention logit of 1
    for head, (seen, written) in enumerate(((ANNOUNCE, AFTER), (END, BEYOND))):
        slow, carried = head * HEAD + SLOW, head * HEAD
        for part, row in ((first.q_proj, slow), (first.k_proj, slow), (first.v_proj, carried)):
            part.weight[row] = 0.0
        first.q_proj.weight[slow, CONSTANT] = one
        first.k_proj.weight[slow, seen] = SURE / (NORM * MARK)
        first.v_proj.weight[carried, seen] = 1 / NORM
        first.o_proj.weight[:, carried] = 0.0
        first.o_proj.weight[written, carried] = 1.0
    first.o_proj.weight[MEANING:, 2 * HEAD :] = 0.0

    angle = FAR * 10_000 ** (-2 * TURNING / HEAD)
    for head in range(0, WIDTH, HEAD):
        slow, turning, other = head + SLOW, head + TURNING, head + TURNING + HEAD // 2
        query, key = second.q_proj.weight, second.k_proj.weight
        query[[slow, turning, other]] = key[[slow, turning, other]] = 0.0
        query[slow, CONSTANT] = one
        key[slow, WEIGHT] = 4 / NORM
        key[slow, AFTER], key[slow, BEYOND] = INSIDE / (NORM * MARK), -INSIDE / (NORM * MARK)
        key[slow, PASSAGE] = SOME / (NORM * MARK)
        query[turning, CONSTANT], query[other, CONSTANT] = RAMP * one * math.cos(angle), -RAMP * one * math.sin(angle)
        key[turning, PASSAGE] = 1 / (NORM * MARK)
    second.v_proj.weight.zero_(), second.o_proj.weight.zero_()
    second.v_proj.weight[:MEANING, :MEANING] = torch.eye(MEANING)
    second.o_proj.weight[:MEANING, :MEANING] = 2 * QUERY_LENGTH / (NORM * WORD_LENGTH) * torch.eye(MEANING)
    body.norm.weight[MEANING:] = 0.0


@torch.no_grad()
def plan_projector(projector: torch.nn.Linear, middle: torch.Tensor, directions: torch.Tensor) -> None:
    """Set the weights of the projector. It keeps the main directions of the passages' vectors, and marks them as
    passages.

    middle: the mean of the passages' vectors, (d,). directions: the directions of their main dimensions, (d, WIDTH).
    """
    projector.weight.zero_(), projector.bias.zero_()
    projector.weight[:MEANING] = PASSAGE_LENGTH * directions.T[:MEANING]
    projector.bias[:MEANING] -= projector.weight[:MEANING] @ middle
    projector.bias[CONSTANT] = projector.bias[PASSAGE] = MARK


def teach(
    checkpoint: PERankCheckpoint,
    draw: Callable[[random.Random], Taught],
    vectors: torch.Tensor,
    steps: int,
    batch: int,
    learning_rate: float,
    temperature: float = 0.05,
) -> None:
    """Train the language model, but not the projector, on windows of 2 to 20 passages in the first stage's order.

    The loss has two terms for the state before each rank. The first term compares the direction of the state with that
    of the query's vector (cosine). The second term compares the state's dot products with the remaining passages to the
    teacher's scores of these passages (KL divergence). The passages of earlier ranks are in the teacher's order with
    random errors, since the trained model will make errors, too.

    vectors: the vectors of the D passages, by their numbers, (D, d). temperature: divides the teacher's scores.
    """
    network, prompter = checkpoint.network.train(), checkpoint.prompter
    network.projector.requires_grad_(False)
    optimizer = torch.optim.AdamW(network.body.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 50, steps)
    chosen = random.Random(0)
    for _ in range(steps):
        size, lists = chosen.choice((2, 5, 10, 20)), [draw(chosen) for _ in range(batch)]
        rows = [sorted(chosen.sample(range(len(each.passages)), min(size, len(each.passages)))) for each in lists]
        scores = [each.scores[row] for each, row in zip(lists, rows, strict=True)]
        prompts = [
            prompter.answered(prompter.messages(each.query, [None] * len(row)), RANK * len(row))[0]
            for each, row in zip(lists, rows, strict=True)
        ]
        shown = [vectors[each.passages[row]] for each, row in zip(lists, rows, strict=True)]
        noisy = [each + NOISE * torch.tensor([chosen.gauss(0, 1) for _ in each]) for each in scores]
        orders = [each.argsort(descending=True, stable=True).tolist() for each in noisy]
        found = read(checkpoint, prompts, shown, orders)
        before = found.states[:, :-1][found.ids[:, 1:] == prompter.rank]
        states = torch.zeros_like(found.passages).masked_scatter(found.inside[..., None], before)
        wanted = torch.stack([each.vector for each in lists])[:, None, :MEANING]
        unlike = 1 - F.cosine_similarity(states[..., :MEANING], wanted, dim=2)[found.inside].mean()
        products = torch.einsum("bih,bjh->bij", states, found.passages)
        taught, ranked = (torch.nn.utils.rnn.pad_sequence(each, batch_first=True) for each in (scores, noisy))
        loss = unlike + list_kl(products, taught / temperature, ranked, found.inside, "mean")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.body.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    network.eval()
