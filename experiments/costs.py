"""Measures the costs of a reranker: seconds, FLOPs, parameters and tokens. PyTorch's counter counts the FLOPs. For
memory, see `growth.py` and `bench.py`: each of their measurements runs in a process of its own."""

import importlib
import importlib.util
import time
from collections.abc import Callable

import pandas as pd
import pyterrier as pt
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from pyterrier_lit import PERank
from pyterrier_lit.reranker import Reranker
from pyterrier_lit.windows import sliding_windows


def of(reranker: pt.Transformer, candidates: pd.DataFrame) -> dict[str, float]:
    """The costs of reranking these candidates (qid, query, docno, text), with all queries in one call and weights
    already loaded.

    `seconds` and `GFLOP` are per query. The FLOPs are those of the operations that the networks run. FLOPs for padding
    are included, and FLOPs that a cache saves are not. `parameters` is in millions. It is nan if no networks are found.
    """
    reranker(candidates.groupby("qid").head(2))  # so that the additional costs of a first call do not count
    begin = time.perf_counter()
    reranker(candidates)
    seconds = time.perf_counter() - begin
    queries = candidates["qid"].nunique()
    return {
        "seconds": seconds / queries,
        "GFLOP": flops(reranker, candidates) / queries / 1e9,
        "parameters": parameters(reranker) / 1e6 or float("nan"),
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


def parameters(reranker: pt.Transformer) -> int:
    """The number of parameters of a reranker's networks. PE-Rank's passage encoder is included only after its first
    use. For a reranker of another package, or its bi-encoder, the networks are the modules among its attributes."""
    if isinstance(reranker, Reranker):
        loaded = reranker.load()
        networks = [loaded.network, *([loaded.encoder.network] if getattr(loaded, "encoder", None) else [])]
    else:
        owner = getattr(reranker, "bi_encoder_model", reranker)  # the attribute of pyterrier_dr's scorers
        networks = [value for value in vars(owner).values() if isinstance(value, torch.nn.Module)]
    return sum(parameter.numel() for network in networks for parameter in network.parameters())


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


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object) -> int:
    return sdpa_flop_count(query, key, value)
