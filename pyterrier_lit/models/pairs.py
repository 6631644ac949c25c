"""Two texts as one input: cut each, lay them out with the tokenizer's special tokens, pad a batch. Knows no model."""

from collections.abc import Sequence

import tokenizers
import torch

from pyterrier_lit.batching import padded
from pyterrier_lit.models.checkpoints import encode

Pair = tuple[list[int], list[int]]  # the pieces of a query, the pieces of a passage


class PairLayout:
    """How a tokenizer writes two texts:  prefix query middle | passage suffix,  with token types 0 | 1 for BERT.

    limit: the longest input in tokens; None has no limit.
    clean_up: cut as lightning-ir does, by way of decoded text (specs: `do n't` becomes `don't` after the cut).
    longest_first: over the limit the pair is cut as the tokenizers library does, not as lightning-ir.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        limit: int | None = None,
        clean_up: bool = False,
        longest_first: bool = False,
    ):
        self.tokenizer = tokenizer
        self.limit = limit
        self.clean_up = clean_up
        self.longest_first = longest_first
        query, passage = (tokenizer.encode(text, add_special_tokens=False) for text in "ab")
        joined = tokenizer.post_process(query, passage)
        ids, special = joined.ids, joined.special_tokens_mask
        if sum(special) < 2 or special.count(0) != len(query) + len(passage):
            raise ValueError(
                f"the tokenizer sets no special tokens between two texts (it writes {joined.tokens}); a cross-encoder's"
                " does"
            )
        at_query = special.index(0)
        at_passage = special.index(0, at_query + len(query))
        self.prefix, self.middle, self.suffix = (
            ids[:at_query],
            ids[at_query + len(query) : at_passage],
            ids[at_passage + len(passage) :],
        )
        self.passage_type = joined.type_ids[at_passage]
        vocabulary = tokenizer.get_vocab()
        self._n, self._apostrophe = vocabulary.get("n"), vocabulary.get("'")
        self._ts = {id for piece, id in vocabulary.items() if piece.startswith("t")}

    def pieces(self, texts: Sequence[str], length: int | None) -> list[list[int]]:
        """The first `length` pieces of each text (None: all), without special tokens around them."""
        return [self._cleaned(ids[:length]) for ids in encode(self.tokenizer, texts, special_tokens=False)]

    def fit(self, query: list[int], passage: list[int]) -> Pair:
        """The pair within `limit`: while it is too long the longer side loses its last piece, the passage on a tie."""
        excess = self.length((query, passage)) - (self.limit or float("inf"))
        if excess > 0 and self.longest_first:
            shorter, longer = sorted((len(query), len(passage)))
            room = shorter + longer - int(excess)
            shorter = min(shorter, room // 2)
            kept = (shorter, room - shorter) if len(query) <= len(passage) else (room - shorter, shorter)
            return query[: kept[0]], passage[: kept[1]]
        while excess > 0:
            query, passage = (query[:-1], passage) if len(query) > len(passage) else (query, passage[:-1])
            excess -= 1
        return query, passage

    def length(self, pair: Pair) -> int:
        """Tokens of the input that a pair makes."""
        return len(self.prefix) + len(pair[0]) + len(self.middle) + len(pair[1]) + len(self.suffix)

    def tensors(self, pairs: Sequence[Pair], pad_id: int) -> dict[str, torch.Tensor]:
        """input_ids, attention_mask and token_type_ids of a batch, each (B, L) int64, padded on the right."""
        inputs = [[*self.prefix, *query, *self.middle, *passage, *self.suffix] for query, passage in pairs]
        ids, mask = padded(inputs, pad_id)
        passage_starts = torch.tensor([len(self.prefix) + len(query) + len(self.middle) for query, _ in pairs])[:, None]
        at = torch.arange(mask.shape[1])
        return {
            "input_ids": ids,
            "attention_mask": mask.long(),
            "token_type_ids": (mask & (at >= passage_starts)).long() * self.passage_type,
        }

    def _cleaned(self, ids: list[int]) -> list[int]:
        """lightning-ir's cut goes through text, and decoding glues a free-standing n't to the word before it."""
        if not (self.clean_up and self._n in ids[1:-2] and self._contracted(ids)):
            return ids
        from transformers import PreTrainedTokenizerFast

        text = PreTrainedTokenizerFast(tokenizer_object=self.tokenizer).decode(ids, clean_up_tokenization_spaces=True)
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def _contracted(self, ids: list[int]) -> bool:
        return any(
            ids[i] == self._n and ids[i + 1] == self._apostrophe and ids[i + 2] in self._ts
            for i in range(1, len(ids) - 2)
        )
