"""Two texts as one input: truncation, the tokenizer's special tokens, padding of a batch. This module does not deal
with models."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import tokenizers
import torch

from pyterrier_lit.batching import padded
from pyterrier_lit.models.tokenization import encode

Pair = tuple[list[int], list[int]]  # the token ids of a query, the token ids of a passage


class Pieces(NamedTuple):
    """The tokens of a text, without special tokens around them."""

    ids: list[int]  # token ids, truncated to `length` (see `PairLayout.pieces`) and then to the maximum input length
    total: int  # the number of tokens after the truncation to `length`
    cut: bool  # whether the text had more than `length` tokens


@dataclasses.dataclass(frozen=True)
class Reading:
    """The settings with which a checkpoint reads two texts as one input. The special tokens around the texts are not
    among these settings, since the tokenizer adds them.

    Args:
        limit: the maximum input length in tokens. None is unlimited.
        types: the number of token types of the model. Higher token types of the tokenizer are replaced by the highest
            type of the model. None keeps all types.
        prompt: a text that is put before each query.
        clean_up: whether a separate n't is joined to the word before it, so that `do n't` becomes `don't`.
            lightning-ir does this when it truncates a text.
        truncation_side: "left" or "right", the side on which tokens are removed.
        padding_side: "left" or "right", the side on which padding is added.
    """

    limit: int | None = None
    types: int | None = None
    prompt: str = ""
    clean_up: bool = False
    truncation_side: str = "right"
    padding_side: str = "right"


class PairLayout:
    """A tokenizer's layout of two texts as one input: prefix, query, middle, passage, suffix. Prefix, middle and suffix
    are the special tokens around the texts. All tokens of a query have the same token type, and all tokens of a passage
    have the same token type.

    Args:
        tokenizer: the tokenizer.
        reading: how the checkpoint reads two texts. None is `Reading()`.

    Raises ValueError if the tokenizer does not put both texts into the input.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, reading: Reading | None = None):
        self.tokenizer = tokenizer
        self.reading = reading or Reading()
        query, passage = (tokenizer.encode(text, add_special_tokens=False) for text in "ab")
        joined = tokenizer.post_process(query, passage)
        special = joined.special_tokens_mask
        if not query or not passage or special.count(0) != len(query) + len(passage):
            raise ValueError(
                f"the tokenizer writes two texts, 'a' and 'b', as {joined.tokens}; wanted both in that. Give the"
                " checkpoint its own tokenizer files"
            )
        at_query = special.index(0)
        at_passage = special.index(0, at_query + len(query))
        parts = [slice(at_query), slice(at_query + len(query), at_passage), slice(at_passage + len(passage), None)]
        self.prefix, self.middle, self.suffix = (joined.ids[part] for part in parts)
        highest = max(joined.type_ids) if self.reading.types is None else self.reading.types - 1
        types = [min(kind, highest) for kind in joined.type_ids]
        before, between, behind = (types[part] for part in parts)
        # One token type for each special token, one for all tokens of the query, one for all tokens of the passage
        each = [*before, types[at_query], *between, types[at_passage], *behind]
        self._types = torch.tensor(each, dtype=torch.long, device="cpu")
        self._texts = [len(before), len(before) + 1 + len(between)]
        vocabulary = tokenizer.get_vocab()
        self._n, self._apostrophe = vocabulary.get("n"), vocabulary.get("'")
        self._ts = {id for piece, id in vocabulary.items() if piece.startswith("t")}

    def queries(self, texts: Sequence[str], length: int | None = None) -> list[Pieces]:
        """Tokenise queries, each with the checkpoint's prompt before it. Prompt and query together are truncated to
        `length` tokens. If `length` is None, they are truncated only to the maximum input length."""
        return self.pieces([self.reading.prompt + text for text in texts], length)

    def pieces(self, texts: Sequence[str], length: int | None = None) -> list[Pieces]:
        """Tokenise texts, and truncate each text to `length` tokens. If `length` is None, a text is truncated only to
        the maximum input length."""
        return [self._pieces(ids, length) for ids in encode(self.tokenizer, texts, special_tokens=False)]

    def fit(self, query: Pieces, passage: Pieces) -> Pair:
        """Truncate a query-passage pair to the maximum input length, as the `tokenizers` package does.

        The special tokens take a part of this length. The rest is shared by the two texts. If both texts need more than
        half of the rest, each text gets half. Otherwise, the shorter text is kept whole, and the other text gets what
        remains: of 100 tokens, a query of 30 tokens gets 30, and a passage of 200 tokens gets 70. If the rest is an odd
        number and both texts need more than half, one token is left over. The longer text gets this token, or the
        passage if both are equally long.
        """
        if self.reading.limit is None:
            return query.ids, passage.ids
        room = max(self.reading.limit - self.length(([], [])), 0)
        shorter = min(query.total, passage.total, room // 2)
        counts = shorter, min(max(query.total, passage.total), room - shorter)
        of_query, of_passage = counts if query.total <= passage.total else counts[::-1]
        return self._cut(query.ids, of_query), self._cut(passage.ids, of_passage)

    def length(self, pair: Pair) -> int:
        """Return the number of tokens of a query-passage pair as one input, including special tokens."""
        return len(self.prefix) + len(pair[0]) + len(self.middle) + len(pair[1]) + len(self.suffix)

    def tensors(self, pairs: Sequence[Pair], pad_id: int) -> dict[str, torch.Tensor]:
        """Build the inputs for a batch of P query-passage pairs. Returns input_ids, attention_mask and token_type_ids,
        each an int64 tensor (P, L). L is the length of the longest input. `pad_id` is the id of the padding token."""
        inputs = [[*self.prefix, *query, *self.middle, *passage, *self.suffix] for query, passage in pairs]
        ids, mask = self._padded(inputs, pad_id)
        counts = torch.ones(len(pairs), len(self._types), dtype=torch.long, device="cpu")
        lengths = [(len(query), len(passage)) for query, passage in pairs]
        counts[:, self._texts] = torch.tensor(lengths, dtype=torch.long, device="cpu")
        types = torch.zeros_like(ids)
        types[mask] = torch.repeat_interleave(self._types.repeat(len(pairs)), counts.flatten())
        return {"input_ids": ids, "attention_mask": mask.long(), "token_type_ids": types}

    def _padded(self, rows: list[list[int]], value: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Pad rows of token ids with `value`. Returns the ids (P, L) and a boolean mask (P, L) that is false on the
        padding."""
        if self.reading.padding_side == "right":
            return padded(rows, value)
        ids, mask = padded([row[::-1] for row in rows], value)
        return ids.flip(1), mask.flip(1)

    def _pieces(self, ids: list[int], length: int | None) -> Pieces:
        kept = self._cleaned(self._cut(ids, length))
        return Pieces(self._cut(kept, self.reading.limit), len(kept), length is not None and len(ids) > length)

    def _cut(self, ids: list[int], count: int | None) -> list[int]:
        if count is None or len(ids) <= count:
            return ids
        return ids[:count] if self.reading.truncation_side == "right" else ids[len(ids) - count :]

    def _cleaned(self, ids: list[int]) -> list[int]:
        """Join a separate n't to the word before it. For this, the ids are decoded and the text is encoded again, as
        lightning-ir's truncation does."""
        if not (self.reading.clean_up and self._n in ids[1:-2] and self._contracted(ids)):
            return ids
        from transformers import PreTrainedTokenizerFast

        text = PreTrainedTokenizerFast(tokenizer_object=self.tokenizer).decode(ids, clean_up_tokenization_spaces=True)
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def _contracted(self, ids: list[int]) -> bool:
        """Return whether the ids contain a separate n't."""
        return any(
            ids[i] == self._n and ids[i + 1] == self._apostrophe and ids[i + 2] in self._ts
            for i in range(1, len(ids) - 2)
        )
