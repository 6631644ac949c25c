"""Finds how often PE-Rank's most likely next passage is one that it has already named, which constrained decoding
forbids."""

import pandas as pd
import torch

from pyterrier_lit import PERank
from pyterrier_lit.batching import Budget


def repeats(reranker: PERank, candidates: pd.DataFrame, *, free: bool = False) -> pd.DataFrame:
    """Rank the first `window_size` passages of each query. Returns a row for each query and step, with three columns:
    qid, step (from 1) and `named`, which is True if the most likely passage of this step had been named before.

    candidates: qid, query, docno, rank and the text. free: name the most likely passage even if it was named before, as
    decoding without the constraint does. By default, the most likely of the remaining passages is named.
    """
    checkpoint, rows = reranker.load(), []
    for qid, ranking in candidates.sort_values("rank").groupby("qid", sort=False):
        window = ranking.head(reranker.window_size)
        columns = {name: [window[name].tolist()] for name in ("docno", reranker.text_field)}
        with torch.inference_mode():
            vectors, (numbers,) = reranker.vectors_of(checkpoint, columns, Budget(reranker.max_tokens))
            prompt = checkpoint.prompts([window["query"].iloc[0]], [[]], [len(window)])
            reader, named = checkpoint.network.read(prompt, [vectors[numbers]]), []
            logits = reader.start()[0]
            for step in range(1, len(window) + 1):
                likeliest = int(logits.argmax())
                rows.append((qid, step, likeliest in named))
                left = logits.index_fill(0, torch.tensor(named, dtype=torch.long, device=logits.device), float("-inf"))
                named.append(likeliest if free else int(left.argmax()))
                logits = reader.read(torch.tensor([named[-1:]], device=reader.device))[0, 0]
    return pd.DataFrame(rows, columns=["qid", "step", "named"])
