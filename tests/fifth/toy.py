"""Toy: a listwise reranker in a few lines, for the test that adds a fifth reranker to the package.

Each word has a vector, and the vector of a text is the mean of the vectors of its words. The passages are ordered by
the dot product of their vector with the vector of the query.
"""

import dataclasses
import zlib
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from pyterrier_lit.decoding import Choices, in_turn
from pyterrier_lit.frames import Columns
from pyterrier_lit.listwise import ListwiseReranker, Prompt, of_windows
from pyterrier_lit.models.checkpoints import Folder, save_checkpoint
from pyterrier_lit.models.library import load_strictly
from pyterrier_lit.windows import Window

PIECES, WIDTH = 97, 8


@dataclasses.dataclass(eq=False)
class ToyCheckpoint:
    """Word vectors in memory."""

    network: nn.EmbeddingBag

    def vectors(self, texts: list[str]) -> torch.Tensor:
        """n texts -> (n, WIDTH)"""
        ids = [torch.tensor([0, *(1 + zlib.crc32(word.encode()) % (PIECES - 1) for word in t.split())]) for t in texts]
        starts = torch.tensor([0, *map(len, ids[:-1])]).cumsum(0)
        device = self.network.weight.device
        return self.network(torch.cat(ids).to(device), starts.to(device))

    def save(self, folder: Path) -> None:
        """Write config and weights."""
        save_checkpoint(folder, {"model_type": "toy"}, self.network.state_dict())


def read_toy(folder: Folder, device: torch.device, dtype: torch.dtype) -> ToyCheckpoint:
    """Load trained word vectors."""
    network = nn.EmbeddingBag(PIECES, WIDTH)
    load_strictly(network, folder.weights(), str(folder))
    return ToyCheckpoint(network.to(device, dtype).eval())


def new_toy(folder: Folder, device: torch.device, dtype: torch.dtype, *, scale: float = 1.0) -> ToyCheckpoint:
    """Return random word vectors."""
    network = nn.EmbeddingBag(PIECES, WIDTH)
    nn.init.normal_(network.weight, std=scale)
    return ToyCheckpoint(network.to(device, dtype).eval())


class ToyReader:
    """Logits that do not depend on the passages decoded so far: the dot product of each passage with the query."""

    costs = (1.0,) * 4

    def __init__(self, checkpoint: ToyCheckpoint, batch: list[Prompt]):
        rows = [checkpoint.vectors([query, *texts]) for query, texts in (prompt.content for prompt in batch)]
        self.logits = nn.utils.rnn.pad_sequence([row[1:] @ row[0] for row in rows], batch_first=True)
        self.device = self.logits.device

    def start(self) -> torch.Tensor:
        """Return the logits (B, N)."""
        return self.logits

    def read(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the logits (B, m, N) after each of the tokens (B, m)."""
        return self.logits[:, None].expand(-1, tokens.shape[1], -1)

    def keep(self, counts: list[int]) -> None:
        """Do nothing, since `read` has no state."""


def constrained(checkpoint: ToyCheckpoint, batch: list[Prompt]) -> Choices:
    """Decode one passage after the other."""
    counts = [prompt.n for prompt in batch]
    return in_turn(
        ToyReader(checkpoint, batch), [[i] for i in range(max(counts))], counts, [prompt.top for prompt in batch]
    )


@dataclasses.dataclass(eq=False, repr=False)
class Toy(ListwiseReranker):
    """Rerank by word vectors."""

    model: str = "toy"
    _: dataclasses.KW_ONLY
    window_size: int = 20
    stride: int = 10

    schematic: ClassVar[dict[str, str]] = {"label": "Toy"}
    read = staticmethod(read_toy)
    begin = staticmethod(new_toy)

    def order_columns(self, queries: list[str], columns: Columns) -> list[list[int]]:
        """The positions of each query's passages, best first."""
        checkpoint: ToyCheckpoint = self.load()
        decode = self.option("decoding", {"constrained": constrained})

        def prompts(windows: list[Window]) -> list[Prompt]:
            texts: list[list[Any]] = of_windows(columns[self.text_field], windows)
            return [
                Prompt((queries[window.query], shown), sum(map(len, shown)), len(shown), window.top)
                for window, shown in zip(windows, texts, strict=True)
            ]

        shape = self.window_size, self.stride
        return self.slide(queries, columns, shape, prompts, lambda batch: decode(checkpoint, batch))
