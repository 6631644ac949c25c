"""Measures the costs of a reranker: seconds, FLOPs, parameters, memory and tokens. PyTorch's counter counts the FLOPs,
and tirex-tracker tracks the memory."""

import importlib
import importlib.util
import json
import time
from collections.abc import Callable

import pandas as pd
import pyterrier as pt
import torch
from tirex_tracker import Measure, tracking
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from pyterrier_lit import PERank
from pyterrier_lit.reranker import Reranker
from pyterrier_lit.windows import sliding_windows

MEMORY = {Measure.RAM_USED_PROCESS_KB: 1 / 1024, Measure.GPU_VRAM_USED_PROCESS_MB: 1.0}  # measure -> its unit in MB


def of(reranker: pt.Transformer, candidates: pd.DataFrame) -> dict[str, float]:
    """The costs of reranking these candidates (qid, query, docno, text), with all queries in one call and weights
    already loaded.

    `seconds` and `TFLOP` are per query. The FLOPs are those of the operations that the networks run. FLOPs for padding
    are included, and FLOPs that a cache saves are not. `parameters` is in millions. `MB` is the memory of the weights
    plus the working memory. The working memory is the difference between the most and the least memory that the process
    held during the call. It is measured in RAM and on the GPU, and the larger difference counts. `parameters` and `MB`
    are nan for a transformer that is not a reranker of this package.
    """
    reranker(candidates.groupby("qid").head(2))  # so that the additional costs of a first call do not count
    with tracking(measures=MEMORY, poll_intervall_ms=20) as tracked:
        begin = time.perf_counter()
        reranker(candidates)
        seconds = time.perf_counter() - begin
    queries, known = candidates["qid"].nunique(), isinstance(reranker, Reranker)
    working = max(_spread(tracked, measure) * unit for measure, unit in MEMORY.items())
    return {
        "seconds": seconds / queries,
        "TFLOP": flops(reranker, candidates) / queries / 1e12,
        "parameters": parameters(reranker) / 1e6 if known else float("nan"),
        "MB": weights(reranker) + working if known else float("nan"),
    }


def installed(peers: dict[str, tuple[str, str, dict]]) -> dict[str, pt.Transformer]:
    """The systems of `peers` whose package is installed, as transformers. peers: name -> (package, class, arguments of
    the constructor)."""
    return {
        name: getattr(importlib.import_module(package), kind)(**arguments)
        for name, (package, kind, arguments) in peers.items()
        if importlib.util.find_spec(package)
    }


def flops(reranker: pt.Transformer, candidates: pd.DataFrame) -> int:
    """The number of multiplications and additions of reranking these candidates in one call."""
    return counted(lambda: reranker(candidates))


def counted(call: Callable[[], object]) -> int:
    """The number of multiplications and additions of a call. PyTorch's counter counts them, with an added formula for
    the attention kernel of CPUs."""
    cpu = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}
    with FlopCounterMode(display=False, custom_mapping=cpu) as counter:
        call()
    return counter.get_total_flops()


def parameters(reranker: Reranker) -> int:
    """The number of parameters that a reranker has loaded. PE-Rank's passage encoder is included only after its first
    use."""
    return sum(parameter.numel() for parameter in _parameters(reranker))


def weights(reranker: Reranker) -> float:
    """The memory of the loaded parameters, in MB."""
    return sum(parameter.numel() * parameter.element_size() for parameter in _parameters(reranker)) / 2**20


def prompt_tokens(reranker: PERank, candidates: pd.DataFrame) -> float:
    """The number of tokens of PE-Rank's prompts per query, summed over the windows of the query. PE-Rank's paper calls
    them "processed tokens"."""
    ids = reranker.load().prompter.ids
    windows = [
        (query, window.stop - window.start)
        for query, n in candidates.groupby("qid")["query"].agg(["first", "size"]).itertuples(index=False)
        for window in sliding_windows(n, reranker.window_size, reranker.stride)
    ]
    tokens = sum(len(ids([query], [[]], [size])[0]) for query, size in windows)
    return tokens / candidates["qid"].nunique()


def _parameters(reranker: Reranker) -> list[torch.nn.Parameter]:
    loaded = reranker.load()
    networks = [loaded.network, *([loaded.encoder.network] if getattr(loaded, "encoder", None) else [])]
    return [parameter for network in networks for parameter in network.parameters()]


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object) -> int:
    return sdpa_flop_count(query, key, value)


def _spread(tracked: dict, measure: Measure) -> float:
    series = json.loads(tracked[measure].value) if measure in tracked else {"max": 0, "min": 0}
    return series["max"] - series["min"]
