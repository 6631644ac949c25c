"""Where the small LiT5s begin: an encoder taught MiniLM's vectors inside LiT5's prompts, and a decoder that looks where query and
passage are alike. No pre-trained T5 is that small, and from random weights one learns nothing in an hour.

In each prompt two tokens carry what was read: one the query's vector, one the passage's, both in the first MEANING dimensions, with a
mark each; the passage's also carries a LABEL, its identifier or its name. The decoder's first layer fetches the query, its second the
label of the passages whose vectors are like it. `align` trains the encoder to this plan; all weights are free to leave it later.
"""

import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import sentencepiece
import torch
import torch.nn.functional as F
import transformers

WIDTH, HEADS, HEAD, INNER, PIECES = 160, 4, 64, 320, 4_000
MEANING = 128  # the first dimensions
QUERY, PASSAGE, LABEL, ALWAYS = 128, 129, slice(130, 159), 159  # marks of the two tokens, the label, and a constant
LENGTH = 96


class Prompt(NamedTuple):
    """A prompt in three parts. The passage's token is the last of `mark`; the query's is `asked` tokens after the last of `head`."""

    head: str
    mark: str
    rest: str
    asked: int


def write_pieces(texts: list[str], folder: Path) -> sentencepiece.SentencePieceProcessor:
    """T5's kind of vocabulary, learned from texts, without upper case."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=written,
        vocab_size=PIECES,
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        normalization_rule_name="nmt_nfkc_cf",
        max_sentence_length=20_000,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(written.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())


@torch.no_grad()
def write_t5(folder: Path, alone: torch.Tensor, labels: dict[int, torch.Tensor], sharp: float, sure: float) -> None:
    """A T5 of two and two layers. alone: (V, MEANING), MiniLM's vectors of the pieces. labels: of the pieces that are answers.

    sharp: of the decoder's look at the passages. sure: how much likelier than others the pieces in `labels` are at first.
    """
    chance = torch.Generator().manual_seed(0)
    config = transformers.T5Config(
        vocab_size=len(alone),
        d_model=WIDTH,
        d_kv=HEAD,
        d_ff=INNER,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=HEADS,
        dropout_rate=0.0,
        feed_forward_proj="relu",
        tie_word_embeddings=True,
        decoder_start_token_id=0,
    )
    network = transformers.T5ForConditionalGeneration(config)
    pieces = network.shared.weight
    pieces[:, :MEANING] = alone / alone.std()
    pieces[:, MEANING:].normal_(std=0.5, generator=chance)
    pieces[:, LABEL].mul_(0.05)
    pieces[:, ALWAYS] = 1.0
    for piece, label in {0: 0.0, 1: 0.0, **labels}.items():
        pieces[piece], pieces[piece, LABEL], pieces[piece, ALWAYS] = 0.0, label, 3.0

    read = network.encoder.block[1].layer[0].SelfAttention  # two heads average what is to the right, two to the left
    bias = network.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    bias.mul_(0.1)
    bias[1:16, :2] -= 5.0
    bias[16:, 2:] -= 5.0
    halves = [half for _ in range(2) for half in _rotation(chance).split(HEAD)]
    read.v.weight.zero_(), read.o.weight.zero_()
    for rows, half in zip(_heads(), halves, strict=True):
        read.v.weight[rows, :MEANING], read.o.weight[:MEANING, rows] = half, 2 * half.T
    network.encoder.block[0].layer[0].SelfAttention.o.weight.mul_(0.3)
    for block in network.encoder.block:
        block.layer[1].DenseReluDense.wo.weight.mul_(0.3)

    own = network.decoder.block[0].layer[0].SelfAttention  # what was written is not written again
    first, second = (block.layer[1].EncDecAttention for block in network.decoder.block)
    for attention in (own, first, second):
        for part in (attention.q, attention.k, attention.v, attention.o):
            part.weight.zero_()
    each = torch.arange(LABEL.stop - LABEL.start)
    for rows in _heads():
        part, last, label = slice(rows.start, rows.stop - 1), rows.stop - 1, rows.start + each
        rotation = _rotation(chance)[: HEAD - 1]
        own.v.weight[label, LABEL.start + each], own.o.weight[LABEL.start + each, label] = 1.0, -2.0
        first.q.weight[last, ALWAYS], first.k.weight[last, QUERY] = 0.2, 2.0
        first.v.weight[part, :MEANING], first.o.weight[:MEANING, part] = rotation, rotation.T
        second.q.weight[part, :MEANING], second.k.weight[part, :MEANING] = sharp * rotation, rotation
        second.q.weight[last, ALWAYS], second.k.weight[last, PASSAGE], second.k.weight[last, QUERY] = 1.0, 2.0, -4.0
        second.v.weight[label, LABEL.start + each], second.o.weight[LABEL.start + each, label] = 1.0, 0.5
    network.decoder.block[1].layer[0].SelfAttention.o.weight.mul_(0.1)
    for block in network.decoder.block:
        block.layer[2].DenseReluDense.wo.weight.mul_(0.1)
    network.decoder.final_layer_norm.weight.zero_()
    network.decoder.final_layer_norm.weight[LABEL] = 2.0 if sure else 12.0
    network.decoder.final_layer_norm.weight[ALWAYS] = sure
    network.save_pretrained(folder)


def align(
    folder: Path,
    prompt: Prompt,
    texts: list[str],
    vectors: torch.Tensor,
    draw: Callable[[random.Random], tuple[int, int, str, int]],
    label_weight: float,
    steps: int,
    batch: int = 64,
) -> None:
    """Train a T5's encoder until the two tokens of its prompts carry what they are to.

    vectors: (N, MEANING), of the N texts. draw: a query and a passage, by number, with the text for the mark and the piece that is the label.
    """
    network: Any = transformers.T5ForConditionalGeneration.from_pretrained(folder).train()
    pieces = sentencepiece.SentencePieceProcessor(str(folder / "spiece.model"))
    optimizer = torch.optim.AdamW(network.encoder.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 100, steps)
    chosen, every = random.Random(0), torch.arange(batch)
    codes = network.shared.weight[:, LABEL].detach().clone()
    for _ in range(steps):
        queries, passages, shown, labels = zip(*(draw(chosen) for _ in range(batch)), strict=True)
        heads = [f"{prompt.head}{texts[query]}" for query in queries]
        marked = [f"{head}{prompt.mark.format(text)}" for head, text in zip(heads, shown, strict=True)]
        whole = [f"{head} {texts[number]}{prompt.rest}" for head, number in zip(marked, passages, strict=True)]
        asked = torch.tensor([len(ids) - 1 + prompt.asked for ids in pieces.encode(heads)])
        told = torch.tensor([len(ids) - 1 for ids in pieces.encode(marked)])
        rows = [torch.tensor([*ids[: LENGTH - 1], 1]) for ids in pieces.encode(whole)]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(row)) for row in rows], batch_first=True)
        marks = torch.zeros(*ids.shape, 2)
        marks[every, asked, 0], marks[every, told, 1] = 2.0, 2.0
        with torch.autocast("cpu", torch.bfloat16):
            states = network.encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        states = states.float()
        told_label = states[every, told][:, LABEL]
        carried = torch.cat([states[every, asked], states[every, told]])[:, :MEANING]
        found, wanted = F.normalize(carried, dim=1), vectors[[*queries, *passages]]
        off_marks = (states[..., QUERY : PASSAGE + 1] - marks).square().sum(-1) * mask
        off_constant = (states[..., ALWAYS] - 1).square() * mask
        off_length = (carried.norm(dim=1) / 10 - 1).square().mean() + (told_label.norm(dim=1) / 5 - 1).square().mean()
        loss = (
            1
            - (found * wanted).sum(1).mean()
            + 5 * (found @ found.T - wanted @ wanted.T).square().mean()
            + 0.3 * off_marks.sum() / mask.sum()
            + 0.1 * off_constant.sum() / mask.sum()
            + 0.1 * off_length
            + label_weight * F.cross_entropy(told_label @ codes.T, torch.tensor(labels))
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.encoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    network.save_pretrained(folder)


def _rotation(chance: torch.Generator) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(MEANING, MEANING, generator=chance))[0]


def _heads() -> list[slice]:
    return [slice(head * HEAD, (head + 1) * HEAD) for head in range(HEADS)]
