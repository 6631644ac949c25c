"""PERank: a language model reads one vector per passage and names the passages best first (arXiv 2406.14848)."""

from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pandas as pd
import torch

from pyterrier_lit.batching import Budget, map_batches
from pyterrier_lit.decoding import Speller
from pyterrier_lit.frames import rerank_columns
from pyterrier_lit.models.checkpoints import choose_device, choose_dtype, fetch, write
from pyterrier_lit.models.passage_vectors import from_column, from_encoder, from_index, normalised
from pyterrier_lit.models.pe_checkpoint import Ranker, new_ranker, read_ranker
from pyterrier_lit.models.vector_lm import VectorLM
from pyterrier_lit.order import complete, scores
from pyterrier_lit.reranker import ListwiseReranker
from pyterrier_lit.windows import Task, slide, sliding_windows

Columns = dict[str, list[list[Any]]]  # by name of the column, for each query the values of its passages


class PERank(ListwiseReranker):
    """Rerank by PE-Rank: each passage is one vector in the prompt of a language model, whose next word is a passage.

    Args:
        model: hub id or folder of a PE-Rank checkpoint (`liuqi6777/pe-rank-mistral-jina`), or what `save` wrote. No code of
            the checkpoint is run.
        window_size, stride: passages per window and positions it moves up; a shorter list is one window of its own size.
        passes: sweeps over each list.
        top_k: order only the first k ranks; what lies below keeps the order that its windows left. The first k are those of
            the full order. `((first >> PERank()) % 10).compile()` sets it.
        vectors: a pyterrier_dr.FlexIndex with the vectors of the passages, looked up by `docno` (a `docid` is not read).
        encoder: a pyterrier_dr.BiEncoder that encodes passages; None is the encoder inside the checkpoint.
            A `doc_vec` column of the frame goes before `vectors`, and these before an encoder; all must be of the encoder
            that the checkpoint was trained with. Only an encoder, or a mode with text, needs the text.
        mode: "embedding" is the paper's: a vector per passage. "text+embedding": the vector, and the text after it.
            "first": as "embedding", but the passages are ordered by the logits of the first step: one forward pass a window.
            That is an approximation of ours, for which the checkpoints were not trained.
        text_field: the column with the passages.
        max_tokens: prompt tokens of the windows that are decoded together; they cost memory for keys and values (131 kB a
            token for a Mistral of 7B in bfloat16). When memory runs out it is halved and the run goes on.
        device: None is the first GPU, else the CPU.
        dtype: None is bfloat16 on a GPU that has it, else float32.
        verbose: show a progress bar.

    Scores are n, n - 1, ... 1 in the decoded order. Source: Liu et al., WWW 2025; in float32 equal to liuqi6777/pe_rank,
    but for lists of window_size - stride passages, which that one returns unranked, and for texts with special tokens.
    """

    schematic: ClassVar[dict[str, str]] = {"label": "PE-Rank"}

    def __init__(
        self,
        model: str = "liuqi6777/pe-rank-mistral-jina",
        *,
        window_size: int = 20,
        stride: int = 10,
        passes: int = 1,
        top_k: int | None = None,
        vectors: Any = None,
        encoder: Any = None,
        mode: str = "embedding",
        text_field: str = "text",
        max_tokens: int = 16_384,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        verbose: bool = False,
    ):
        self.model = model
        self.window_size = window_size
        self.stride = stride
        self.passes = passes
        self.top_k = top_k
        self.vectors = vectors
        self.encoder = encoder
        self.mode = mode
        self.text_field = text_field
        self.max_tokens = max_tokens
        self.device = device
        self.dtype = dtype
        self.verbose = verbose

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """The same rows with scores that fall along the decoded order. See `frames.rerank` for what is raised."""
        return rerank_columns(inp, self.score, self.ways(), context=self)

    def score(self, queries: list[str], columns: Columns) -> list[list[float]]:
        """n for the best of n passages, 1 for the last: Q queries and the columns of their passages -> Q lists of scores.

        columns: `docno`, and of `doc_vec` and `text_field` what the mode and the source of the vectors need.
        """
        return [scores(order) for order in self.order(queries, columns)]

    def order(self, queries: list[str], columns: Columns) -> list[list[int]]:
        """The positions of each query's passages, best first: Q queries and columns as in `score` -> Q permutations."""
        mode = self._how()
        ranker = self.loaded()
        counts = [len(docnos) for docnos in columns["docno"]]
        texts = columns[self.text_field] if mode.reads_text else None
        total = self.passes * sum(len(sliding_windows(n, self.window_size, self.stride)) for n in counts)
        budget = Budget(self.max_tokens)

        def order_tasks(tasks: list[Task]) -> list[list[int]]:
            asked, sizes = [queries[task.query] for task in tasks], [len(task.passages) for task in tasks]
            prompts = ranker.prompts(asked, _of_tasks(texts, tasks), sizes)
            windows = [
                Window(prompt, vectors[rows], task.wanted)
                for prompt, rows, task in zip(prompts, _of_tasks(row_of, tasks), tasks, strict=True)
            ]
            lengths = [len(window.prompt) + window.wanted for window in windows]
            named = map_batches(lambda batch: mode.decode(ranker.network, batch), windows, lengths, budget, bar.update)
            for order, task, docnos in zip(named, tasks, _of_tasks(columns["docno"], tasks), strict=True):
                if -1 in order:
                    raise ValueError(
                        f"the model gave nan for query {queries[task.query]!r} among {len(docnos)} passages from docno {docnos[0]!r} on;"
                        " try dtype='float32', and check the checkpoint's weights"
                    )
            return [
                complete(order[: task.wanted], len(task.passages)) for order, task in zip(named, tasks, strict=True)
            ]

        with torch.inference_mode():
            vectors, row_of = self.look_up(ranker, columns, budget)
            with self.progress(total, "window") as bar:
                return slide(counts, self.window_size, self.stride, order_tasks, passes=self.passes, k=self.top_k)

    def load(self) -> Ranker:
        """Read the checkpoint: FileNotFoundError or ValueError says what is missing, damaged or of another kind."""
        device = choose_device(self.device)
        return read_ranker(fetch(self.model), device, choose_dtype(self.dtype, device))

    def save(self, path: str | Path) -> None:
        """Write a folder that the constructor loads again: the reference's layout, without the `lm_head` that nothing reads."""
        write(path, self.loaded().save)

    @classmethod
    def from_backbone(
        cls,
        name: str,
        *,
        encoder_name: str | None = None,
        encoder_pooling: str = "mean",
        embedding_size: int | None = None,
        projector_type: str = "mlp2x_gelu",
        **arguments: Any,
    ) -> "PERank":
        """An untrained PE-Rank: a causal language model under a new projector, drawn from torch's generator.

        Args:
            name: hub id or folder of the language model, such as "mistralai/Mistral-7B-Instruct-v0.2".
            encoder_name: hub id or folder of the encoder to take inside, such as "sentence-transformers/all-MiniLM-L6-v2".
                Without one the vectors come from `vectors=`, `encoder=` or `doc_vec`.
            encoder_pooling: how the encoder's states become a vector: "mean", "cls" or "last_token".
            embedding_size: how long the vectors are, where there is no encoder_name.
            projector_type: "linear", "mlp2x_gelu" (any number of layers), or "identity".
            arguments: those of the constructor.
        """
        reranker = cls(name, **arguments)
        device = choose_device(reranker.device)
        fields = {
            "encoder_name": encoder_name,
            "encoder_pooling": encoder_pooling,
            "embedding_size": embedding_size,
            "projector_type": projector_type,
        }
        reranker.hold(new_ranker(fetch(name), fields, device, choose_dtype(reranker.dtype, device)))
        return reranker

    def subtransformers(self) -> dict[str, Any]:
        """None: an index or encoder that is asked for vectors is no stage of the pipeline."""
        return {}

    def _how(self) -> "Mode":
        if self.mode not in MODES:
            raise ValueError(f"mode={self.mode!r}; wanted one of {', '.join(map(repr, MODES))}")
        return MODES[self.mode]

    def ways(self) -> list[dict[str, type]]:
        """The columns that a frame may hold: the vectors or what leads to them, and the text where the prompt has it."""
        text: dict[str, type] = {self.text_field: str}
        shown = text if self._how().reads_text else {}
        return [shown | {"doc_vec": object}, text if self.vectors is None else shown]

    def look_up(self, ranker: Ranker, columns: Columns, budget: Budget) -> tuple[torch.Tensor, list[list[int]]]:
        """Vectors of length 1 (D, d), and for each passage of each query its row among them. Equal passages share a row."""
        docnos = list(chain(*columns["docno"]))
        if "doc_vec" in columns:
            keys: list[Any] = list(range(len(docnos)))
        else:
            keys = docnos if self.vectors is not None else list(chain(*columns[self.text_field]))
        docno_of = dict(zip(keys, docnos, strict=True))
        row_of = {key: row for row, key in enumerate(dict.fromkeys(keys))}
        distinct, names = list(row_of), [docno_of[key] for key in row_of]
        if "doc_vec" in columns:
            vectors = from_column(list(chain(*columns["doc_vec"])), names)
        elif self.vectors is not None:
            vectors = from_index(self.vectors, names)
        elif self.encoder is not None:
            vectors = from_encoder(self.encoder, distinct)
        else:
            vectors = self._encode(ranker, distinct, budget)
        if "doc_vec" in columns or self.vectors is not None:
            ranker.warn_of_strangers()
        rows = iter([row_of[key] for key in keys])
        return normalised(vectors, names, ranker.embedding_size, ranker.trained_on), [
            list(islice(rows, len(ranking))) for ranking in columns["docno"]
        ]

    def _encode(self, ranker: Ranker, texts: list[str], budget: Budget) -> torch.Tensor:
        with self._lock:
            encoder = self._in_words(ranker.text_encoder)
        pieces = encoder.pieces(texts)
        with self.progress(len(texts), "passage") as bar:
            vectors = map_batches(
                lambda batch: list(encoder.encode(batch)),
                pieces,
                [len(ids) for ids in pieces],
                budget,
                bar.update,
            )
        return torch.stack(vectors).cpu()


def _of_tasks(values: list[list[Any]] | None, tasks: list[Task]) -> list[list[Any]]:
    """The values of each task's passages; without any, an empty list for each."""
    return [[values[task.query][number] for number in task.passages] if values else [] for task in tasks]


class Window(NamedTuple):
    """A prompt in ids, the vectors (n, d) of its passages, and how many of these are to be named."""

    prompt: list[int]
    vectors: torch.Tensor
    wanted: int


def name_in_turn(network: VectorLM, windows: list[Window]) -> torch.Tensor:
    """The paper's decoding, of B windows at once: the best passage not yet named is named and read as the next word.

    Returns (B, T) passages, best first, and -1 in a row where the model gave NaN. The last of n passages is not asked for.
    """
    counts = [len(window.vectors) for window in windows]
    steps = max(min(window.wanted, n - 1) for window, n in zip(windows, counts, strict=True))
    device = next(network.parameters()).device
    speller = Speller([[passage] for passage in range(max(counts))], counts, device)
    named = torch.zeros(len(windows), steps, dtype=torch.long, device=device)
    reading = network.read([window.prompt for window in windows], [window.vectors for window in windows])
    for step in range(steps):
        named[:, step], _ = speller.step(reading.logits())
        reading.name(named[:, step])
    return named.masked_fill(speller.broken[:, None], -1)


def name_at_once(network: VectorLM, windows: list[Window]) -> torch.Tensor:
    """All passages of B windows by the logits of the first step alone: (B, N), and -1 in a row where one was NaN."""
    counts = torch.tensor([len(window.vectors) for window in windows])[:, None]
    logits = network.read([window.prompt for window in windows], [window.vectors for window in windows]).logits()
    outside = torch.arange(logits.shape[1], device=logits.device) >= counts.to(logits.device)
    broken = (logits.isnan() & ~outside).any(1, keepdim=True)
    order = logits.masked_fill(outside, float("-inf")).sort(descending=True, stable=True).indices
    return order.masked_fill(broken, -1)


class Mode(NamedTuple):
    """Whether the prompt has the passages' texts too, and how the passages are named."""

    reads_text: bool
    decode: Callable[[VectorLM, list[Window]], torch.Tensor]


MODES = {
    "embedding": Mode(False, name_in_turn),
    "text+embedding": Mode(True, name_in_turn),
    "first": Mode(False, name_at_once),
}
