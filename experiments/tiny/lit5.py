"""The initial weights of the small LiT5s. The encoder is trained to reproduce MiniLM's vectors inside LiT5's prompts,
and the decoder's weights are set by hand: the decoder attends to the passages that are similar to the query. No
pre-trained T5 is as small, and a T5 of this size with random weights learns nothing in an hour.

In each prompt, two tokens carry a vector in the first MEANING dimensions of their hidden states: one token carries the
query's vector, and another token the passage's vector. The dimension QUERY marks the token of the query, and the
dimension PASSAGE marks the token of the passage. The token of the passage also carries a label in the dimensions LABEL.
The label stands for the passage's identifier (LiT5-Distill) or for its name (LiT5-Score).

The decoder's first layer fetches the query's vector, and subtracts the labels that were generated already. The
decoder's second layer attends to the passages that are similar to the query. In LiT5-Distill, this layer ignores a
passage whose label was already generated. The layer fetches the labels of the passages, and these labels select the
next token. The function `align` trains the encoder to produce such states. Later training may change all weights.
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

from pyterrier_lit.models.devices import choose_dtype

BFLOAT16 = choose_dtype("auto", torch.device("cpu")) == torch.bfloat16  # whether this CPU has instructions for it
WIDTH, HEADS, HEAD, INNER, LENGTH = 160, 3, 88, 320, 96
# Dimensions of the encoder's states
MEANING = 64  # the first 64 hold the vector of the query or of the passage
QUERY, PASSAGE = 64, 65  # mark the two tokens that carry a vector
CONSTANT = 66  # is 1 in every token
END = 67  # raises the logit of the end of sequence after a name
LABEL = slice(68, 108)  # the label of a passage: its identifier or its name
LABELS = 40
ONCE = slice(68, 90)  # labels that are generated at most once: after that, their passages get no attention

# Lengths of the parts of a state, and sizes of attention logits
VECTOR_LENGTH, MARK_LENGTH, LABEL_LENGTH = 10.0, 3.0, 5.4
PASSAGE_BONUS = 15.0  # how much higher the attention logit of a passage's token is than that of other tokens
RANK_BONUS = 0.4  # how much higher the attention logit of a passage is than that of the next passage in the window
MARGIN = 20.0  # how much higher the logit of an identifier is than other logits, or that of the end after a name
VALUE_SHRINK = 50.0  # divides the values of the first cross-attention: they then add little to LiT5Score's scores


class Prompt(NamedTuple):
    """The parts of a prompt: `head`, the query, `mark`, the passage, `rest`. The first token of `mark` carries the
    query's vector, and the last token of `mark` carries the passage's vector."""

    head: str
    mark: str
    rest: str


def write_pieces(texts: list[str], folder: Path, size: int) -> sentencepiece.SentencePieceProcessor:
    """Learn a vocabulary of T5's kind from texts, without upper case, and write it to the folder. Returns its
    tokenizer. size: number of pieces."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=written,
        vocab_size=size,
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
def write_t5(
    folder: Path, alone: torch.Tensor, labels: dict[int, torch.Tensor], sharp: float, identifiers: bool
) -> None:
    """Write a T5 with two layers in the encoder and two in the decoder to a folder.

    alone: MiniLM's vectors of the V pieces, (V, MEANING). labels: id of a piece that can be an answer -> its label.
    sharp: the attention logit of a passage whose vector equals the query's. identifiers: True for LiT5-Distill, False
    for LiT5-Score.

    If `identifiers` is True, the labels stand for the identifiers in ascending order. The embeddings of identifiers are
    0 in the first MEANING dimensions. The decoder generates no identifier twice, and prefers passages that come earlier
    in the window.
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
    pieces[:, :MEANING] = MEANING**0.5 * F.normalize(alone, dim=1)
    pieces[:, MEANING:].normal_(std=0.5, generator=chance)
    pieces[:, LABEL] *= 0.05
    pieces[:, CONSTANT] = 1.0
    for piece, label in labels.items():
        if identifiers:
            pieces[piece] = 0.0
        pieces[piece, LABEL], pieces[piece, CONSTANT] = label, 3.0
    pieces[:2], pieces[:2, CONSTANT] = 0.0, 3.0  # 0 is the start and the padding, 1 is the end
    pieces[:, END], pieces[0, END], pieces[1, END] = 3.0, -0.1, 12.0
    _plan_encoder(network.encoder, chance)
    _plan_decoder(network.decoder, chance, pieces[list(labels)].norm(dim=1).mean(), sharp, identifiers)
    network.save_pretrained(folder)


def _plan_encoder(encoder: Any, chance: torch.Generator) -> None:
    """Set the encoder's weights. In the first layer, one head attends to the tokens on the right, one to those on the
    left, and one to all tokens. The second layer gathers what these heads have read."""
    bias = encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    bias.mul_(0.1)
    bias[1:16, 0] -= 5.0
    bias[16:, 1] -= 5.0
    encoder.block[0].layer[0].SelfAttention.o.weight.mul_(0.3)
    gather = encoder.block[1].layer[0].SelfAttention
    gather.v.weight.zero_(), gather.o.weight.zero_()
    for head in _heads(MEANING):
        turn = _rotation(chance)
        gather.v.weight[head, :MEANING], gather.o.weight[:MEANING, head] = turn, 2 * turn.T
    for block in encoder.block:
        block.layer[1].DenseReluDense.wo.weight.mul_(0.3)


def _plan_decoder(
    decoder: Any, chance: torch.Generator, written: torch.Tensor, sharp: float, identifiers: bool
) -> None:
    """Set the decoder's weights, so that the decoder attends to the passages that are similar to the query, and
    generates their labels.

    written: a scalar, the mean length of the embeddings of the pieces that can be answers.
    """
    for block in decoder.block:
        for attention in (block.layer[0].SelfAttention, block.layer[1].EncDecAttention):
            for part in (attention.q, attention.k, attention.v, attention.o):
                part.weight.zero_()
        block.layer[2].DenseReluDense.wo.weight.zero_()

    # Self-attention: two heads attend to the current token. One of them subtracts the token's meaning from the state,
    # and the other subtracts the token's label. The third head attends to all tokens alike, and subtracts a share of
    # their labels.
    own = decoder.block[0].layer[0].SelfAttention
    own.relative_attention_bias.weight.zero_()
    own.relative_attention_bias.weight[0, :2] = 20.0
    gains = ((slice(MEANING), -1.0), (LABEL, -1.0), (LABEL, -0.3))
    for rows, (dimensions, gain) in zip(_heads(), gains, strict=True):
        size = dimensions.stop - (dimensions.start or 0)
        rows = slice(rows.start, rows.start + size)
        own.v.weight[rows, dimensions] = torch.eye(size) * written / WIDTH**0.5
        own.o.weight[dimensions, rows] = torch.eye(size) * gain

    fetch, look = (block.layer[1].EncDecAttention for block in decoder.block)
    scale = (
        (VECTOR_LENGTH**2 + 18) / WIDTH
    ) ** 0.5  # root mean square of a state whose length is VECTOR_LENGTH in MEANING, 3 in CONSTANT, at most 3 in END
    once = ONCE.stop - ONCE.start
    for head in _heads():
        turn, eye = _rotation(chance), torch.eye(LABELS)
        meaning, done = (
            slice(head.start, head.start + MEANING),
            slice(head.start + MEANING, head.start + MEANING + once),
        )
        label, mark = slice(head.start, head.start + LABELS), head.stop - 1
        fetch.q.weight[mark, CONSTANT], fetch.k.weight[mark, QUERY] = 1.0, 0.4
        fetch.v.weight[meaning, :MEANING], fetch.o.weight[:MEANING, meaning] = (
            turn / VALUE_SHRINK,
            VALUE_SHRINK * turn.T / HEADS,
        )
        look.q.weight[meaning, :MEANING] = sharp * scale / VECTOR_LENGTH**2 * turn
        look.k.weight[meaning, :MEANING] = turn
        look.q.weight[mark, CONSTANT] = scale / 3
        look.k.weight[mark, PASSAGE], look.k.weight[mark, QUERY] = PASSAGE_BONUS / MARK_LENGTH, -2 * sharp / MARK_LENGTH
        look.v.weight[label, LABEL], look.o.weight[LABEL, label] = eye, eye / HEADS
        if identifiers:
            look.q.weight[done, ONCE] = sharp / 2 * scale / LABEL_LENGTH**2 * torch.eye(once)
            look.k.weight[done, ONCE] = torch.eye(once)
            look.k.weight[mark, ONCE] = -RANK_BONUS / LABEL_LENGTH * torch.arange(once)
    if identifiers:  # all generated labels get the same weight before the second cross-attention
        count, each = decoder.block[0].layer[2].DenseReluDense, torch.arange(once)
        for part, (rows, least) in enumerate(((2 * each, 0.3), (2 * each + 1, 1.3))):
            count.wi.weight[rows] = 0.0
            count.wi.weight[rows, ONCE.start + each], count.wi.weight[rows, CONSTANT] = -40.0, -least
            count.wo.weight[ONCE.start + each, rows] = (2 * part - 1) * LABEL_LENGTH * scale / 3

    decoder.final_layer_norm.weight.zero_()
    decoder.final_layer_norm.weight[LABEL] = 3.0
    decoder.final_layer_norm.weight[CONSTANT if identifiers else END] = MARGIN  # a name is one piece; the end follows


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
    """Train the encoder of the T5 in `folder`. After training, two tokens of each prompt carry the vectors and the
    label (see the docstring of this module).

    texts: N texts. vectors: their vectors, (N, MEANING). draw: a function that draws a training example. An example has
    the positions in `texts` of a query and of a passage, the text to insert into `prompt.mark`, and the id of the piece
    whose label the passage gets.
    """
    network: Any = transformers.T5ForConditionalGeneration.from_pretrained(folder).train()
    pieces = sentencepiece.SentencePieceProcessor(str(folder / "spiece.model"))
    optimizer = torch.optim.AdamW(network.encoder.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 100, steps)
    chosen, every = random.Random(0), torch.arange(batch)
    codes = network.shared.weight[:, LABEL].detach().clone()
    marks = torch.tensor([[MARK_LENGTH, 0.0]] * batch + [[0.0, MARK_LENGTH]] * batch)
    for _ in range(steps):
        queries, passages, shown, labels = zip(*(draw(chosen) for _ in range(batch)), strict=True)
        heads = [f"{prompt.head}{texts[query]}" for query in queries]
        marked = [f"{head}{prompt.mark.format(text)}" for head, text in zip(heads, shown, strict=True)]
        whole = [f"{head} {texts[number]}{prompt.rest}" for head, number in zip(marked, passages, strict=True)]
        asked = torch.tensor([len(ids) for ids in pieces.encode(heads)])
        told = torch.tensor([len(ids) - 1 for ids in pieces.encode(marked)])
        rows = [torch.tensor([*ids[: LENGTH - 1], 1]) for ids in pieces.encode(whole)]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(row)) for row in rows], batch_first=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=BFLOAT16):
            states = network.encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        states = states.float()
        carried = torch.cat([states[every, asked], states[every, told]])
        found, wanted = F.normalize(carried[:, :MEANING], dim=1), vectors[[*queries, *passages]]
        label = states[every, told][:, LABEL]
        silent = mask.clone()
        silent[every, asked] = silent[every, told] = 0.0
        noise = (
            0.3 * (states[..., :MEANING] / VECTOR_LENGTH).square().sum(-1)
            + 0.1 * (states[..., LABEL] / LABEL_LENGTH).square().sum(-1)
            + 0.2 * states[..., QUERY : PASSAGE + 1].square().sum(-1)
        )
        loss = (
            2 * (1 - (found * wanted).sum(1).mean())
            + 10 * (found @ found.T - wanted @ wanted.T).square().mean()
            + 5 * (carried[:, :MEANING].norm(dim=1) / VECTOR_LENGTH - 1).square().mean()
            + (carried[:, QUERY : PASSAGE + 1] - marks).square().sum(1).mean()
            + label_weight * (label - codes[list(labels)]).square().sum(1).mean() / LABEL_LENGTH**2
            + (label.norm(dim=1) / LABEL_LENGTH - 1).square().mean()
            + (noise * silent).sum() / silent.sum()
            + 0.1 * ((states[..., CONSTANT] - 1).square() * mask).sum() / mask.sum()
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.encoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    network.save_pretrained(folder)


def _rotation(chance: torch.Generator) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(MEANING, MEANING, generator=chance))[0]


def _heads(size: int = HEAD) -> list[slice]:
    """The first `size` rows of each head."""
    return [slice(head * HEAD, head * HEAD + size) for head in range(HEADS)]
