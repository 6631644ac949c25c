"""RankMistral: a language model reads the texts of a window of passages and generates their identifiers, best first.

RankMistral is the baseline without compression in the paper on PE-Rank. It has the same language model, the same
windows and nearly the same prompt as PE-Rank, but RankMistral's prompt contains the full text of each passage. A prompt
of RankMistral has thousands of tokens; a prompt of PE-Rank has hundreds. To decode one rank, RankMistral takes several
decoding steps, one for each token of an identifier; PE-Rank takes one step. Source: arXiv 2406.14848, section 4.
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

ANSWER_LENGTH = 256  # maximum number of tokens that decoding="free" generates


@dataclasses.dataclass(eq=False, repr=False)
class RankMistral(ListwiseReranker):
    """Rerank by a causal language model that reads the texts of the passages: PE-Rank's uncompressed baseline.

    Args:
        model: hub id or folder of a causal language model of transformers, or a folder that `save` wrote. The model
            must have a chat template and must be trained to rank with the prompt of this class. Code inside a
            checkpoint is never run.
        window_size: number of passages per window. A list shorter than the window is read in one window.
        stride: number of passages by which the window moves up the list.
        passes: number of times that the windows slide over each list.
        top_k: number of ranks to decode; None decodes all ranks. The first `top_k` passages are the same as without
            `top_k`. The other passages follow in the order in which the windows left them. Compiling a rank cutoff also
            sets `top_k`: `((first_stage >> RankMistral(...)) % 10).compile()` sets `top_k` to 10.
        decoding: how the order of a window is generated. "constrained" is greedy decoding that generates each
            identifier exactly once, so the result is a permutation. "free" is greedy decoding of at most 256 tokens
            without constraints, followed by the clean-up of the original code. The clean-up drops repeated identifiers.
            The passages whose identifier is missing are appended in their incoming order. If the freely generated text
            is a permutation in the form "[4] > [2] > ...", "constrained" and "free" give the same order.
        revision: a branch, tag or commit of the model on the hub; None takes the main branch.
        text_field: name of the column with the texts of the passages. The texts are not truncated. If a prompt and its
            answer together are longer than the model's maximum length, ValueError is raised.
        max_tokens: maximum number of prompt tokens in a batch of windows. The keys and values of each token take
            memory: 131 kB per token with a Mistral 7B in bfloat16. If a batch does not fit into memory, the maximum is
            halved for the rest of the call, and the batch is computed again.
        device: device of the model, such as "cpu" or "cuda:1"; None takes the first CUDA GPU, else Apple's GPU (mps),
            else the CPU.
        dtype: data type of the weights, such as "float32" or "bfloat16"; None is bfloat16 on a CUDA GPU that supports
            bfloat16, else float32.
        verbose: show a progress bar.

    `RankMistral.from_backbone("mistralai/Mistral-7B-Instruct-v0.2")` creates an untrained RankMistral from a
    pre-trained language model. It must then be trained to rank.

    In a list of n passages, the first passage of the decoded order gets the score n, the second gets n - 1, and the
    last gets 1. Source: the text mode of liuqi6777/pe_rank, the original code.
    """

    _: dataclasses.KW_ONLY
    window_size: int = 20
    stride: int = 10
    max_tokens: int = 16_384

    schematic: ClassVar[dict[str, str]] = {"label": "RankMistral"}
    read = staticmethod(read_text_lm)
    begin = staticmethod(read_text_lm)

    def order_columns(self, queries: list[str], columns: Columns) -> list[list[int]]:
        """Rank the passages of Q queries. Returns for each query the positions of its passages in the given list (from
        0), best first.

        columns: column name -> a list per query, with one value per passage, such as {"docno": [["d1", "d2"], ["d7"]]}.
        Only `docno` and the column with the texts are used.
        """
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
    """Greedy decoding in which each step chooses among the tokens that continue an unused identifier."""
    counts = [prompt.n for prompt in batch]
    opening, words = checkpoint.prompter.identifiers(max(counts))
    pieces = sorted(set(chain.from_iterable(words)))
    tokens = [[pieces.index(piece) for piece in word] for word in words]
    reader = checkpoint.network.begin([prompt.content + opening for prompt in batch], pieces)
    return in_turn(reader, tokens, counts, [prompt.top for prompt in batch])


def free(checkpoint: TextCheckpoint, batch: list[Prompt]) -> Choices:
    """The original code's decoding: greedy decoding without constraints, then a clean-up of the generated text. The
    text is generated to its end, even if only the first ranks of the window are needed (`Prompt.top`)."""
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
