"""Trains a bi-encoder on rankings: its cosines of a query and 16 passages learn a teacher's scores of these passages.

The bi-encoder is a BERT. Its vector of a text is the mean of the last hidden states. The loss is the KL divergence
between two distributions over the passages: the softmax of the teacher's scores, and the softmax of the cosines.
"""

from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pyterrier as pt
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from torch.nn.utils.rnn import pad_sequence

from pyterrier_lit.batching import like_lengths, padded
from pyterrier_lit.training import losses

QUERIES, PASSAGES = 8, 16  # queries of a step; passages of a query in a step
QUERY_LENGTH, DOC_LENGTH = 32, 64  # maximum lengths in tokens
FROZEN = 3  # number of layers, from the first one, that are not trained
RATE, WARMUP, CLIP = 5e-5, 10, 1.0  # the highest learning rate; steps until it is reached; the highest gradient norm
SPREAD, SHARP = 1.5, 20.0  # the standard deviation of the teacher's scores in a step; factor of the cosines
TOKENS = 4_096  # of a batch


def train(folder: str, lists: pd.DataFrame, steps: int, seed: int) -> transformers.BertModel:
    """Load the bi-encoder in a folder and train it without dropout.

    lists: a row for each query and passage, with qid, query, text and the teacher's score.
    """
    model = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    for part in (model.embeddings, *model.encoder.layer[:FROZEN]):
        part.requires_grad_(False)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=RATE)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, WARMUP, steps)
    rankings = [rows.sort_values("score", ascending=False) for _, rows in lists.groupby("qid")]
    random = torch.Generator().manual_seed(seed)
    for _ in pt.tqdm(range(steps), desc=f"training, seed {seed}"):
        chosen = torch.randperm(len(rankings), generator=random)[:QUERIES].tolist()
        loss = loss_of(model, Path(folder), [sampled(rankings[number], random) for number in chosen])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, CLIP)
        optimizer.step()
        schedule.step()
    return model


def sampled(ranking: pd.DataFrame, random: torch.Generator) -> pd.DataFrame:
    """PASSAGES of the passages in a teacher's ranking, or all if there are fewer. The passage at rank r = 1, 2, ... is
    sampled with weight 1 / r."""
    weights = 1 / torch.arange(1, len(ranking) + 1)
    return ranking.iloc[torch.multinomial(weights, min(PASSAGES, len(ranking)), generator=random).tolist()]


def loss_of(model: transformers.BertModel, folder: Path, batch: list[pd.DataFrame]) -> torch.Tensor:
    """The mean loss of several queries. batch: a frame for each query, with query, text and the teacher's score.

    folder: has tokenizer.json.
    """
    queries = vectors(model, folder, [rows["query"].iloc[0] for rows in batch], QUERY_LENGTH)
    passages = vectors(model, folder, [text for rows in batch for text in rows["text"]], DOC_LENGTH)
    found = passages.split([len(rows) for rows in batch])
    scores = [SHARP * each @ query for query, each in zip(queries, found, strict=True)]
    given = [torch.tensor(rows["score"].to_numpy(), dtype=torch.float32) for rows in batch]
    targets = [SPREAD * (each - each.mean()) / (each.std() + 1e-9) for each in given]
    _, mask = padded([range(len(rows)) for rows in batch])
    return losses.kl(pad_sequence(scores, batch_first=True), pad_sequence(targets, batch_first=True), mask)


def vectors(model: transformers.BertModel, folder: Path, texts: list[str], length: int) -> torch.Tensor:
    """The vectors of N texts, of length 1, (N, d). length: the maximum length of a text in tokens."""
    found = {text: state.mean(0) for text, state in states(model, folder, texts, length)}
    return F.normalize(torch.stack([found[text] for text in texts]), dim=1)


def states(
    model: transformers.BertModel, folder: Path, texts: list[str], length: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a tuple for each distinct text: the text, and its last hidden states (L, d).

    folder: has tokenizer.json. length: the maximum length of a text in tokens.
    """
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(length)
    tokenizer.no_padding()
    distinct = list(dict.fromkeys(texts))
    ids = [encoding.ids for encoding in tokenizer.encode_batch(distinct)]
    for batch in like_lengths([len(row) for row in ids], TOKENS):
        rows, mask = padded([ids[i] for i in batch])
        found = model(input_ids=rows, attention_mask=mask.long()).last_hidden_state
        yield from ((distinct[i], row[: len(ids[i])]) for i, row in zip(batch, found, strict=True))
