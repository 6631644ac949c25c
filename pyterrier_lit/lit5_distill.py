"""LiT5Distill: a T5 reads every passage of a window with its identifier and writes the identifiers best first."""

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pandas as pd
import torch

from pyterrier_lit.batching import Budget, map_batches
from pyterrier_lit.decoding import Speller
from pyterrier_lit.frames import rerank
from pyterrier_lit.models.checkpoints import T5, choose_device, choose_dtype, fetch, read_t5, write
from pyterrier_lit.models.t5 import EOS, START, FiD, refuse_nan
from pyterrier_lit.order import complete, parse, scores
from pyterrier_lit.reranker import ListwiseReranker
from pyterrier_lit.windows import Task, slide, sliding_windows

IDENTIFIERS = 100  # the most that any checkpoint was trained with
LENGTH = 150  # tokens of a prompt in the papers, for MS MARCO
ANSWER_LENGTH = 140  # tokens of a free answer, with the start token

Prompts = list[list[int]]  # the prompts of one window


class LiT5Distill(ListwiseReranker):
    """Rerank lists by LiT5-Distill: T5 Fusion-in-Decoder over a window of up to 100 passages, then the window slides up.

    Args:
        model: hub id or folder: `castorini/LiT5-Distill-{base,large,xl}` (v1: windows of 20) or the same with `-v2` (one
            window of 100), or what `save` wrote.
        window_size, stride: passages per window (at most 100) and positions it moves up. None for window_size takes what the
            checkpoint records, else 100 for a name that ends in v2 and 20 for others; None for stride is half the window.
            A shorter list is one window of its own size.
        passes: sweeps over each list.
        max_length: tokens of a prompt, cut on the right; None takes what the checkpoint records, else 150, the papers' for MS
            MARCO (512 for BEIR).
        top_k: order only the first k ranks; what lies below keeps its incoming order. The first k are those of the full
            order. `((first >> LiT5Distill()) % 10).compile()` sets it.
        decoding: "constrained" writes each identifier once, so the result is a permutation. "free" is the reference's greedy
            text, repaired: first mention wins, what is missing follows in incoming order; where that text is already a
            permutation both agree. "first" orders by the probabilities of the first identifier alone (FIRST, arXiv
            2406.15657): one step, or two above 56 identifiers, an approximation that LiT5 was not trained for.
        text_field: the column with the passages.
        max_tokens: prompt tokens of the windows that are read and written together; they cost memory for keys and values
            (37 kB a token for base in bfloat16). When memory runs out it is halved and the run goes on.
        device: None is the first GPU, else the CPU.
        dtype: None is bfloat16 on a GPU that has it, else float32.
        verbose: show a progress bar.

    Scores are n, n - 1, ... 1 in the order written. Source: arXiv 2312.16098 (v1); LiT and Lean, ECIR 2025 (v2). In
    float32 equal to castorini/LiT5 for lists that fill their windows; where that one pads a short list with empty
    passages, this one does not.
    """

    schematic: ClassVar[dict[str, str]] = {"label": "LiT5-Distill"}

    def __init__(
        self,
        model: str = "castorini/LiT5-Distill-base-v2",
        *,
        window_size: int | None = None,
        stride: int | None = None,
        passes: int = 1,
        max_length: int | None = None,
        top_k: int | None = None,
        decoding: str = "constrained",
        text_field: str = "text",
        max_tokens: int = 65_536,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        verbose: bool = False,
    ):
        self.model = model
        self.window_size = window_size
        self.stride = stride
        self.passes = passes
        self.max_length = max_length
        self.top_k = top_k
        self.decoding = decoding
        self.text_field = text_field
        self.max_tokens = max_tokens
        self.device = device
        self.dtype = dtype
        self.verbose = verbose

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """The same rows with scores that fall along the order written. See `frames.rerank` for what is raised."""
        return rerank(inp, self.score, self.text_field, context=self)

    def score(self, queries: list[str], passages: list[list[str]]) -> list[list[float]]:
        """n for the best of n passages, 1 for the last: Q queries, Q lists of passages -> Q lists of scores."""
        return [scores(order) for order in self.order(queries, passages)]

    def order(self, queries: list[str], passages: list[list[str]]) -> list[list[int]]:
        """The positions of each query's passages, best first: Q queries, Q lists of passages -> Q permutations."""
        t5 = self.loaded()
        if self.decoding not in DECODINGS:
            raise ValueError(f"decoding={self.decoding!r}; wanted one of {', '.join(map(repr, DECODINGS))}")
        decode = DECODINGS[self.decoding]
        size, stride = self.window()
        counts = [len(ranking) for ranking in passages]
        total = self.passes * sum(len(sliding_windows(n, size, stride)) for n in counts)
        budget = Budget(self.max_tokens)

        def order_tasks(tasks: list[Task]) -> list[list[int]]:
            windows = [
                Asked(
                    self.prompts(queries[query], [passages[query][number] for number in numbers]),
                    wanted,
                    queries[query],
                )
                for query, numbers, wanted in tasks
            ]
            lengths = [sum(map(len, window.prompts)) for window in windows]
            return map_batches(lambda batch: decode(t5, batch), windows, lengths, budget, bar.update)

        with torch.inference_mode(), self.progress(total, "window") as bar:
            return slide(counts, size, stride, order_tasks, passes=self.passes, k=self.top_k)

    def load(self) -> T5:
        """Read the checkpoint: FileNotFoundError or ValueError says what is missing, damaged or of another kind."""
        device = choose_device(self.device)
        return read_t5(fetch(self.model), device, choose_dtype(self.dtype, device))

    def save(self, path: str | Path) -> None:
        """Write a folder that the constructor loads again, with the window size, the stride and the length of prompts."""
        t5, lengths = self.loaded(), {"max_length": self.length()}
        size, stride = self.window()
        write(path, lambda folder: t5.save(folder, window_size=size, stride=stride, lengths=lengths))

    @classmethod
    def from_backbone(cls, name: str, **arguments: Any) -> "LiT5Distill":
        """An untrained LiT5: a T5 as it was pre-trained.

        Args:
            name: hub id or folder, such as "google/t5-v1_1-base".
            arguments: those of the constructor.
        """
        return cls(name, **arguments)

    def window(self) -> tuple[int, int]:
        """The window size and the stride: the caller's, else the checkpoint's, else those of its family."""
        t5 = self.loaded()
        by_name = 100 if str(self.model).rstrip("/").endswith("v2") else 20
        size = t5.config.get("window_size", by_name) if self.window_size is None else self.window_size
        if size > IDENTIFIERS:
            raise ValueError(
                f"window_size={size}: LiT5 was trained with identifiers up to {IDENTIFIERS}; use at most that"
            )
        recorded = t5.config.get("stride") if self.window_size is None else None
        return size, (recorded or max(size // 2, 1)) if self.stride is None else self.stride

    def length(self) -> int:
        """Tokens of a prompt: the caller's, else the checkpoint's, else the papers'."""
        t5: T5 = self.loaded()
        return t5.length("max_length", self.max_length, LENGTH)

    def prompts(self, query: str, passages: list[str]) -> Prompts:
        """The prompt of each passage of a window, at most `max_length` ids with </s> at the end."""
        length = self.length()
        texts = [
            f"Search Query: {query} Passage: [{i}] {passage} Relevance Ranking: "
            for i, passage in enumerate(passages, 1)
        ]
        return [[*ids[: length - 1], EOS] for ids in self.loaded().pieces(texts)]


class Asked(NamedTuple):
    """A window to be read, how many of its ranks are to be written, and the query, to be named in an error."""

    prompts: Prompts
    wanted: int
    query: str


def constrained(t5: T5, windows: list[Asked]) -> list[list[int]]:
    """Orders of which the first `wanted` ranks are written greedily, at each step the likeliest piece that goes on with
    an identifier not yet used. Only the rows of the output layer that spell identifiers are computed; the last identifier
    left needs no step.
    """
    counts = [len(window.prompts) for window in windows]
    needed = [min(window.wanted, n - 1) for window, n in zip(windows, counts, strict=True)]
    if not any(needed):
        return [list(range(n)) for n in counts]
    words, pieces = _identifiers(t5, max(counts))
    fid = FiD(t5.network, t5.tied)
    most = sum(map(len, words))
    memory = fid.read_prompts([window.prompts for window in windows], steps=most)
    speller = Speller(words, counts, fid.device)
    ids, at = torch.full((len(windows),), START, device=fid.device), torch.tensor(pieces, device=fid.device)
    written: list[torch.Tensor] = []
    while len(written) < most and not _all_written(written, needed):
        symbols, candidates = speller.step(fid.logits(fid.write(memory, ids)[0], at))
        written.append(candidates)
        ids = at[symbols]
    refuse_nan(speller.broken, [window.query for window in windows])
    rows = torch.stack(written, 1).tolist()
    return [
        complete([position for position in row if position >= 0][:enough], n)
        for row, enough, n in zip(rows, needed, counts, strict=True)
    ]


def free(t5: T5, windows: list[Asked]) -> list[list[int]]:
    """The reference's orders: greedy text without constraint, repaired. All ranks are written, wanted or not."""
    sequences = greedy(t5, windows, ANSWER_LENGTH)
    return [parse(t5.pieces.decode(ids), len(window.prompts)) for ids, window in zip(sequences, windows, strict=True)]


def greedy(t5: T5, windows: list[Asked], max_length: int) -> list[list[int]]:
    """The tokens that each window's decoder writes, up to and without EOS, at most max_length - 1."""
    fid = FiD(t5.network, t5.tied)
    memory = fid.read_prompts([window.prompts for window in windows], max_length)
    written = [ids for ids, _, _ in fid.greedy(memory, max_length, [window.query for window in windows])]
    rows = torch.stack(written, 1).tolist()
    return [row[: row.index(EOS)] if EOS in row else row for row in rows]


def first(t5: T5, windows: list[Asked]) -> list[list[int]]:
    """Orders by the probability of each identifier to come first: log p(N), and log p(_) + log p(N | _) for the identifiers
    of two pieces. Source: FIRST, arXiv 2406.15657, section 3.
    """
    counts = [len(window.prompts) for window in windows]
    words, pieces = _identifiers(t5, max(counts))
    begins, long = {word[0] for word in words if len(word) > 1}, [len(word) > 1 for word in words]
    if len(begins) > 1 or max(map(len, words)) > 2:
        raise ValueError(
            "decoding='first' knows identifiers of one piece, or of two that begin alike; this tokenizer has others"
        )
    fid = FiD(t5.network, t5.tied)
    memory = fid.read_prompts([window.prompts for window in windows], steps=2)
    usable = torch.arange(len(words), device=fid.device) < torch.tensor(counts, device=fid.device)[:, None]  # (B, N)
    ids, at = torch.full((len(windows),), START, device=fid.device), torch.tensor(pieces, device=fid.device)
    symbols = torch.tensor([word[0] for word in words], device=fid.device)
    likelihood = _log_probability(fid.logits(fid.write(memory, ids)[0], at), symbols, usable)
    if begins:
        second = torch.tensor([word[-1] for word in words], device=fid.device)
        going_on = usable & torch.tensor(long, device=fid.device)
        logits = fid.logits(fid.write(memory, at[list(begins)].expand(len(windows)))[0], at)
        likelihood = likelihood + _log_probability(logits, second, going_on).where(going_on, 0.0)
    refuse_nan(likelihood.isnan().any(1), [window.query for window in windows])
    best = likelihood.masked_fill(~usable, float("-inf")).argsort(dim=1, descending=True, stable=True).tolist()
    return [order[:n] for order, n in zip(best, counts, strict=True)]


DECODINGS: dict[str, Callable[[T5, list[Asked]], list[list[int]]]] = {
    "constrained": constrained,
    "free": free,
    "first": first,
}


def _identifiers(t5: T5, n: int) -> tuple[list[list[int]], list[int]]:
    """How the identifiers 1..n are spelt, in symbols, and the piece that each symbol is."""
    spelt = t5.pieces([str(i) for i in range(1, n + 1)])
    pieces = sorted(set(chain.from_iterable(spelt)))
    return [[pieces.index(piece) for piece in word] for word in spelt], pieces


def _log_probability(logits: torch.Tensor, symbols: torch.Tensor, usable: torch.Tensor) -> torch.Tensor:
    """logits (B, S), symbols (N,), usable (B, N) -> log softmax over the symbols of each row's usable words, by word (B, N)."""
    allowed = torch.zeros_like(logits).index_add_(1, symbols, usable.to(logits.dtype)) > 0
    return logits.float().masked_fill(~allowed, float("-inf")).log_softmax(1)[:, symbols]


def _all_written(written: list[torch.Tensor], needed: list[int]) -> bool:
    """Whether every row holds the identifiers it needs; the device is asked only once that can be."""
    if len(written) < max(needed):
        return False
    counts = (torch.stack(written, 1) >= 0).sum(1).tolist()
    return all(count >= enough for count, enough in zip(counts, needed, strict=True))
