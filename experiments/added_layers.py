"""Trains the added layers of a cross-encoder that begins as a bi-encoder (`towers.py`) on stored hidden states.

The layers of the bi-encoder are not trained. In these layers, a token attends almost only to tokens of its own text. So
its hidden state is nearly the same in all query-passage pairs. The states of each text are computed once and stored.
From them, `Score` computes nearly the score of the whole network. On one core, training on stored states reads some 300
query-passage pairs a second.
"""

import copy
import itertools
import random
from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd
import pyterrier as pt
import torch
import torch.nn.functional as F
import towers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import get_cosine_schedule_with_warmup

from pyterrier_lit import CrossEncoder
from pyterrier_lit.batching import like_lengths, padded
from pyterrier_lit.training import losses
from pyterrier_lit.training.data import sample

BEGINS = 5, 24  # the position ids from which that of a passage's first token is drawn. In a pair, the query precedes it
RATE = {
    "attention": 2e-4,
    "units": 1e-3,
    "weights": 3e-4,
    "means": 3e-5,
}  # peak learning rates of the groups in `Score.groups`
QUERIES, PASSAGES = 16, 16  # queries per step, and passages per query
WARMUP, EVERY, CLIP = 30, 100, 1.0  # steps of the warm-up, steps between validations, maximum norm of the gradients


class States:
    """The hidden states of texts after the layers of the bi-encoder, in half precision."""

    def __init__(self, texts: list[str], lengths: list[int], states: Tensor):
        ends = [*itertools.accumulate(lengths)]
        self.where = {text: slice(end - n, end) for text, n, end in zip(texts, lengths, ends, strict=True)}
        self.states = states

    def __getitem__(self, text: str) -> Tensor:
        """The states of a text, (L, d)."""
        return self.states[self.where[text]].float()

    def padded(self, texts: Iterable[str]) -> tuple[Tensor, Tensor]:
        """The states of n texts (n, L, d), and which of them are tokens (n, L)."""
        rows = [self[text] for text in texts]
        mask = pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in rows], batch_first=True)
        return pad_sequence(rows, batch_first=True), mask


def states(student: CrossEncoder, texts: Iterable[str], length: int, passages: bool, file: Path) -> States:
    """The states of the texts, truncated to `length` tokens. They are read from `file` if it exists. Otherwise they are
    computed and written to it.

    passages: True for passages, False for queries. A query's states are those of [CLS], its tokens and [SEP]. A
    passage's states are those of its tokens and [SEP], but the network also reads [CLS] before the passage.
    """
    if not file.exists():
        part = file.with_suffix(".part")
        torch.save(_read(student, [*dict.fromkeys(texts)], length, passages), part)
        part.rename(file)
    return States(**torch.load(file))


@torch.inference_mode()
def _read(student: CrossEncoder, texts: list[str], length: int, passages: bool) -> dict:
    body, tokenizer = student.load().network.body, copy.deepcopy(student.load().tokenizer)
    tokenizer.no_padding(), tokenizer.enable_truncation(length + 2)
    ids = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    drawn, found = random.Random(0), [torch.empty(0)] * len(texts)
    for batch in pt.tqdm([*like_lengths([len(row) for row in ids], 2_048)], desc="states"):
        rows, mask = padded([ids[i] for i in batch])
        types, positions = torch.zeros_like(rows), torch.arange(rows.shape[1]).expand_as(rows).clone()
        if passages:
            types[:, 1:] = 1
            positions[:, 1:] += torch.tensor([[drawn.randint(*BEGINS) - 1] for _ in batch])
        hidden = body.embeddings(input_ids=rows, token_type_ids=types, position_ids=positions)
        minus = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)[:, None, None]
        for layer in body.encoder.layer[: -towers.ADDED]:
            hidden = layer(hidden, minus)
        for i, row in zip(batch, hidden, strict=True):
            found[i] = row[int(passages) : len(ids[i])].half()
    return {"texts": texts, "lengths": [len(row) for row in found], "states": torch.cat(found)}


class Score:
    """Nearly the score of the whole network, computed from states. Its tensors are the weights of the network, except
    for two vectors that `store` writes into the network.

    The score is exact up to this: the states are those of single texts, and [CLS] and the heads' shares of attention
    change the means of query and passage only a little.
    """

    def __init__(self, student: CrossEncoder):
        network = student.load().network.eval().requires_grad_(False)
        self.look, self.average, self.compare = network.body.encoder.layer[-towers.ADDED :]
        self.linear = network.linear
        self.plan = towers.Plan(network.body.config)
        self.units = slice(towers.ROUNDING, towers.ROUNDING + towers.UNITS)
        # What the layers add is read from, and written in, one direction of the state. So Adam must not see the matrix
        self.of_units = (self.plan.of_number @ self.look.output.dense.weight)[self.units].clone()
        keys = self.plan.by_head(self.average.attention.self.key.weight)[:, : self.plan.part]
        self.of_tokens = keys.sum(1) / self.plan.head**0.5

    def groups(self) -> dict[str, list[Tensor]]:
        """The trained tensors: those of the first added layer (attention and units), of the second (the weights of the
        tokens in a mean, and what is read), and of the third (what is read from the means)."""
        own, first = self.look.attention.self, self.look.intermediate.dense
        return {
            "attention": [own.query.weight, own.query.bias, own.key.weight],
            "units": [first.weight, first.bias, self.of_units],
            "weights": [self.of_tokens],
            "means": [self.average.attention.self.value.weight, self.compare.attention.self.value.weight],
        }

    @torch.no_grad()
    def store(self) -> None:
        self.look.output.dense.weight[:, self.units] = torch.outer(self.plan.of_number, self.of_units)
        keys = self.plan.by_head(self.average.attention.self.key.weight)
        keys[:, : self.plan.part] = self.of_tokens[:, None] * self.plan.head**0.5 / self.plan.part

    def __call__(self, query: Tensor, passages: Tensor, mask: Tensor) -> Tensor:
        """The scores of n passages for a query, (n).

        query: the states of [CLS], the query's tokens and [SEP], (1 + Q, d). passages: the states of the passages,
        (n, P, d). mask: which of these states are tokens and not padding, (n, P).
        """
        norm = self.look.output.LayerNorm
        numbers = self.numbers(query, passages, mask)[..., None] * self.plan.of_number
        asked = norm(self.rounded(query[1:]) + numbers)
        with torch.no_grad():
            given = norm(self.rounded(passages))
        means = [self.mean(asked, torch.ones(asked.shape[:2], dtype=torch.bool)), self.mean(given, mask)]
        return self.compared(torch.stack([sum(means) / 2, *means], 1))

    def numbers(self, query: Tensor, passages: Tensor, mask: Tensor) -> Tensor:
        """How well each passage matches each token of the query, (n, Q). The first added layer writes this number into
        the state of the token."""
        shares, tokens = self.shares(query, passages, mask), query[1:]
        out, first = self.look.attention.output, self.look.intermediate.dense
        added = out.dense.weight[:, self.plan.part :: self.plan.head]  # (d, heads)
        variance = tokens.var(1, correction=0) + (shares @ (added.T @ added) * shares).sum(2) / tokens.shape[1]
        read = first.weight[self.units] * out.LayerNorm.weight
        inputs = (tokens @ read.T + shares @ (read @ added).T) / variance.sqrt()[..., None] + first.bias[self.units]
        return F.gelu(inputs) @ self.of_units

    def shares(self, query: Tensor, passages: Tensor, mask: Tensor) -> Tensor:
        """How much of its attention each head of the first added layer gives to the passage rather than the query, for
        each token of the query: (n, Q, heads), between -1 and 1."""
        own, tokens = self.look.attention.self, query[1:]
        asked = self.plan.by_head((tokens @ own.query.weight.T + own.query.bias).T)  # (heads, head, Q)
        read = (
            torch.einsum("hrq,hrd->qhd", asked, self.plan.by_head(own.key.weight)).flatten(0, 1) / self.plan.head**0.5
        )
        value = self.plan.by_head(own.value.weight)[:, self.plan.part].mean(0)
        n = len(passages)
        in_query = (read @ query.T).expand(n, -1, -1)
        in_passage = (passages @ read.T).transpose(1, 2).masked_fill(~mask[:, None], -torch.inf)
        values = torch.cat([(query @ value).expand(n, -1), passages @ value], 1)
        attention = torch.cat([in_query, in_passage], 2).softmax(2)
        return (attention @ values[..., None]).view(n, len(tokens), -1)

    def rounded(self, states: Tensor) -> Tensor:
        """The states (..., d) after the first added layer without its last LayerNorm, shares and numbers."""
        after = self.look.attention.output.LayerNorm(states)
        signs = self.plan.signs
        marks = (after[..., self.plan.marks] @ signs).sign()[..., None] * signs
        return torch.cat([after[..., : self.plan.marks.start], marks, after[..., self.plan.marks.stop :]], -1)

    def mean(self, states: Tensor, mask: Tensor) -> Tensor:
        """The states of n texts (n, L, d) after the second added layer. A text has one state there, (n, d)."""
        own, out = self.average.attention.self, self.average.attention.output
        inside = mask / mask.sum(1, keepdim=True)
        marks = states[..., self.plan.marks] @ self.plan.signs / self.plan.heads
        told = towers.TOLD * marks * (marks * inside).sum(1, keepdim=True)
        logits = states @ self.of_tokens.T + told[..., None]
        attention = logits.masked_fill(~mask[..., None], -torch.inf).softmax(1)  # (n, L, heads)
        read = torch.einsum("nhd,hrd->nhr", attention.transpose(1, 2) @ states, self.plan.by_head(own.value.weight))
        after = out(read.flatten(1) + own.value.bias, (inside[..., None] * states).sum(1))
        return self.average.output(self.average.intermediate(after), after)

    def compared(self, rows: Tensor) -> Tensor:
        """The scores from the states of [CLS], query and passage before the last layer, (n, 3, d)."""
        own, first = self.compare.attention.self, rows[:, 0]
        heads = (len(rows), -1, self.plan.heads, self.plan.head)
        asked, keys, values = own.query(first).view(heads), own.key(rows).view(heads), own.value(rows).view(heads)
        logits = (asked * keys)[:, 1:].sum(3) / self.plan.head**0.5  # [CLS] itself is not read
        read = (logits.softmax(1)[..., None] * values[:, 1:]).sum(1).flatten(1)
        after = self.compare.attention.output(read, first)
        return self.linear(self.compare.output(self.compare.intermediate(after), after))[:, 0]


def train(
    student: CrossEncoder,
    lists: pd.DataFrame,
    queries: States,
    passages: States,
    steps: int,
    seed: int,
    validate: Callable[[Score], float],
) -> None:
    """Train the added layers of the student with RankNet, and keep the weights with the best validation.

    lists: the teacher's scores of the passages of each query (qid, query, text, score). A list gives PASSAGES passages
    for a step, which are sampled by rank ("log_random"). validate: computes the nDCG@10 of the student on the
    validation queries.
    """
    scored, rng = Score(student), random.Random(seed)
    rankings = [
        (query, rows["text"].tolist(), rows["score"].tolist())
        for (_, query), rows in lists.sort_values("score", ascending=False).groupby(["qid", "query"])
    ]
    groups = scored.groups()
    trained = [tensor.requires_grad_() for tensors in groups.values() for tensor in tensors]
    optimizer = torch.optim.AdamW(
        [{"params": tensors, "lr": RATE[name]} for name, tensors in groups.items()], betas=(0.9, 0.98), weight_decay=0
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, WARMUP, steps)
    best, kept = validate(scored), [tensor.detach().clone() for tensor in trained]
    drawn: list[int] = []
    progress = pt.tqdm(range(1, steps + 1), desc="training")
    for step in progress:
        loss = 0.0
        for _ in range(QUERIES):
            drawn = drawn or rng.sample(range(len(rankings)), len(rankings))
            query, texts, targets = rankings[drawn.pop()]
            chosen = sample(targets, PASSAGES, "log_random", rng)
            scores = scored(queries[query], *passages.padded([texts[i] for i in chosen]))
            part = losses.ranknet(scores[None], torch.tensor([[targets[i] for i in chosen]])) / QUERIES
            part.backward()
            loss += part.item()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step(), schedule.step(), optimizer.zero_grad()
        if step % EVERY == 0 or step == steps:
            found = validate(scored)
            progress.write(f"step {step}: loss {loss:.3f}, validation nDCG@10 {found:.3f}")
            if found >= best:
                best, kept = found, [tensor.detach().clone() for tensor in trained]
    with torch.no_grad():
        for tensor, value in zip(trained, kept, strict=True):
            tensor.copy_(value)
    scored.store()
