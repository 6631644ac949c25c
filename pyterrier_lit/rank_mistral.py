"""RankMistral: a language model reads the texts of a window of passages and generates their identifiers, best first.

This is PE-Rank's uncompressed baseline: the same language model, the same windows and nearly the same prompt, but with
the full text of each passage. So a prompt has thousands of tokens instead of hundreds, and an identifier takes several
decoding steps where a passage of PE-Rank takes one. Source: arXiv 2406.14848, section 4.
"""

import dataclasses
from itertools import chain
from typing import ClassVar

import torch

from pyterrier_lit.decoding import Choices, in_turn
from pyterrier_lit.frames import Columns
from pyterrier_lit.listwise import ListwiseReranker, Prompt, of_windows
from pyterrier_lit.models.text_lm import TextCheckpoint, read_text_lm
from pyterrier_lit.order import parse
from pyterrier_lit.windows import Window

ANSWER_LENGTH = 256  # tokens that decoding="free" may generate


@dataclasses.dataclass(eq=False, repr=False)
class RankMistral(ListwiseReranker):
    """Rerank by a causal language model that reads the texts of the passages: PE-Rank's uncompressed baseline.

    Args:
        model: hub id or folder of a causal language model of transformers that has a chat template and was trained to
            rank with this prompt, or a folder that `save` wrote. Code inside a checkpoint is never run.
        window_size, stride: passages per window, and how many positions the window moves. A list shorter than the
            window is one window.
        passes: how often the windows slide over each list.
        top_k: decode only the first k ranks. They equal the first k ranks of the full order; the passages below stay
            where the windows leave them. `((first >> RankMistral(...)) % 10).compile()` sets it.
        decoding: "constrained" generates each identifier exactly once, so the result is a permutation. "free" is
            unconstrained greedy decoding of 256 tokens with the original code's clean-up: repeated identifiers are
            dropped, missing ones follow in incoming order. Where the generated text is a permutation in the form "[4] >
            [2] > ...", both give the same order.
        text_field: the column with the passages. They are not truncated: a prompt longer than the model's maximum
            length is an error.
        max_tokens: prompt tokens per batch of windows. Each token needs memory for its keys and values (131 kB for a
            Mistral 7B in bfloat16). When memory runs out, max_tokens is halved and the batch retried.
        device: None is the first GPU (CUDA's, else Apple's mps), else the CPU.
        dtype: None is bfloat16 on a GPU that has it, else float32.
        verbose: show a progress bar.

    `RankMistral.from_backbone("mistralai/Mistral-7B-Instruct-v0.2")` starts from a model that has not learned to rank.
    Scores are n, n - 1, ... 1 in the decoded order. Source: the text mode of liuqi6777/pe_rank.
    """

    _: dataclasses.KW_ONLY
    window_size: int = 20
    stride: int = 10
    max_tokens: int = 16_384

    schematic: ClassVar[dict[str, str]] = {"label": "RankMistral"}
    read = staticmethod(read_text_lm)
    begin = staticmethod(read_text_lm)

    def order_columns(self, queries: list[str], columns: Columns) -> list[list[int]]:
        """The positions of each query's passages, best first."""
        decode = self.option("decoding", DECODINGS)
        checkpoint: TextCheckpoint = self.load()
        texts = columns[self.text_field]

        def prompts(windows: list[Window]) -> list[Prompt]:
            shown = of_windows(texts, windows)
            read = checkpoint.prompts([queries[window.query] for window in windows], shown)
            return [
                Prompt(ids, len(ids), len(passages), window.top)
                for ids, passages, window in zip(read, shown, windows, strict=True)
            ]

        shape = self.window_size, self.stride
        return self.slide(queries, columns, shape, prompts, lambda batch: decode(checkpoint, batch))


def constrained(checkpoint: TextCheckpoint, batch: list[Prompt]) -> Choices:
    """Greedy decoding in which each step chooses among tokens that continue an unused identifier."""
    counts = [prompt.n for prompt in batch]
    opening, words = checkpoint.prompter.identifiers(max(counts))
    pieces = sorted(set(chain.from_iterable(words)))
    tokens = [[pieces.index(piece) for piece in word] for word in words]
    reader = checkpoint.network.begin([prompt.content + opening for prompt in batch], pieces)
    return in_turn(reader, tokens, counts, [prompt.top for prompt in batch])


def free(checkpoint: TextCheckpoint, batch: list[Prompt]) -> Choices:
    """The original code's decoding: unconstrained greedy decoding, then its clean-up of the text. Generates all ranks
    and ignores `top`."""
    reader = checkpoint.network.begin([prompt.content for prompt in batch])
    ends = torch.tensor(checkpoint.ends(), device=reader.device)
    logits, written = reader.start(), []
    broken = torch.zeros(len(batch), device=reader.device)
    ended = torch.zeros(len(batch), dtype=torch.bool, device=reader.device)
    while True:
        broken = broken + logits.masked_fill(logits.isfinite() | ended[:, None], 0.0).sum(1)
        written.append(logits.argmax(1))
        ended = ended | torch.isin(written[-1], ends)
        if len(written) == ANSWER_LENGTH or ended.all():
            break
        logits = reader.read(written[-1][:, None])[:, -1]
    texts = checkpoint.answers(torch.stack(written, 1).tolist())
    return [parse(text, prompt.n) for text, prompt in zip(texts, batch, strict=True)], broken.tolist()


DECODINGS = {"constrained": constrained, "free": free}
