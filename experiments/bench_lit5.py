"""LiT5-Distill at T5-base size, random weights, window 100: ours beside one query at a time. Run by hand.

    python experiments/bench_lit5.py ../shared/data/dl19 [--queries 4] [--dtype bfloat16] [--device cpu]

Systems, each in a process of its own, one after the other: this package in full and with top_k=10; the library's T5 and
`generate`, one query at a time with prompts padded to 150; rank_llm, where it is installed (its release runs on
transformers 4 only). All write 132 tokens, what 100 identifiers take. The small vocabulary of the tests stands in for
T5's, so passages are cut to give the 108.8 tokens a prompt that the real vocabulary has on DL19.
"""

import argparse
import gzip
import json
import multiprocessing
import resource
import shutil
import tempfile
import time
from pathlib import Path

import measured
import torch

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "lit5" / "tiny-random"
WANTED_TOKENS, ANSWER = 108.8, 132
BASE = {
    "model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "vocab_size": 32128, "d_model": 768,
    "d_kv": 64, "d_ff": 2048, "num_layers": 12, "num_decoder_layers": 12, "num_heads": 12,
    "feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False, "decoder_start_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 0,
}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with docs.jsonl.gz, queries.tsv and run.bm25.txt")
    parser.add_argument("--queries", type=int, default=4)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=list(SYSTEMS))
    measured.add_option(parser)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        queries, passages = read(arguments.data, arguments.queries, Path(folder))
        rows = []
        for name in arguments.systems:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                rows.append(pool.apply(measure, (name, folder, queries, passages, arguments.dtype, arguments.device)))
            print(json.dumps(rows[-1]), flush=True)
    slowest = max((row["seconds a query"] for row in rows if "seconds a query" in row), default=0)
    for row in rows:
        if "seconds a query" in row:
            print(
                f"{row['system']:40} {row['seconds a query']:8.2f} s a query, {slowest / row['seconds a query']:.2f} x"
            )
    if arguments.record:
        measured.record(
            "LiT5-Distill in full and with top_k=10 against one query at a time",
            [
                {"setting": f"{row['system']}, {arguments.dtype}", "n": len(queries), "measure": name, "value": value}
                for row in rows
                for name, value in row.items()
                if isinstance(value, int | float)
            ],
        )


def make_model(folder: Path) -> None:
    """A T5-base with random weights and the tests' tokenizer."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    network = T5ForConditionalGeneration(T5Config(**{key: value for key, value in BASE.items() if key[0] != "m"}))
    network.lm_head = torch.nn.Linear(BASE["d_model"], BASE["vocab_size"], bias=False)
    network.to(torch.bfloat16).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(BASE))
    shutil.copy(GOLDEN / "spiece.model", folder)


def read(data: Path, n: int, folder: Path) -> tuple[list[str], list[list[str]]]:
    """The first n queries with a hundred passages, cut so that a prompt has WANTED_TOKENS on average."""
    from pyterrier_lit.models.t5 import SentencePieces

    queries, lists = read_whole(data, n)
    pieces, low, high = SentencePieces((folder / "spiece.model").read_bytes()), 0.0, 1.0
    for _ in range(12):  # the share of each text that gives the wanted length
        share = (low + high) / 2
        cut = [[text[: int(len(text) * share)] for text in ranking] for ranking in lists]
        lengths = [
            min(len(ids) + 1, 150)
            for query, ranking in zip(queries, cut, strict=True)
            for ids in pieces([f"Search Query: {query} Passage: [1] {text} Relevance Ranking: " for text in ranking])
        ]
        low, high = (share, high) if sum(lengths) / len(lengths) < WANTED_TOKENS else (low, share)
    return queries, cut


def read_whole(data: Path, n: int) -> tuple[list[str], list[list[str]]]:
    """The first n queries with a hundred passages."""
    with gzip.open(data / "docs.jsonl.gz", "rt", encoding="utf-8") as lines:
        texts = {doc["docno"]: doc["text"] for doc in map(json.loads, lines)}
    topics = dict(line.split("\t") for line in (data / "queries.tsv").read_text(encoding="utf-8").splitlines())
    lists: dict[str, list[str]] = {}
    for line in (data / "run.bm25.txt").read_text().splitlines():
        qid, _, docno, *_ = line.split()
        if len(lists.setdefault(qid, [])) < 100:
            lists[qid].append(texts[docno])
    chosen = [qid for qid, passages in lists.items() if len(passages) == 100][:n]
    return [topics[qid] for qid in chosen], [lists[qid] for qid in chosen]


def measure(name: str, folder: str, queries: list[str], passages: list[list[str]], dtype: str, device: str) -> dict:
    try:
        rank = SYSTEMS[name](folder, dtype, device)
    except ImportError as error:
        return {"system": name, "not run": str(error)}
    rank(queries[:1], [passages[0][:5]])  # load and warm up
    counts = count()
    start = time.perf_counter()
    rank(queries, passages)
    return {
        "system": name,
        "seconds a query": round((time.perf_counter() - start) / len(queries), 3),
        "peak GB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
        **counts,
    }


def count() -> dict:
    """Counts, from now on, of what our decoder does; stays empty for the other systems."""
    from pyterrier_lit.models.t5 import FiD

    counts: dict[str, float] = {}
    encode, read = FiD.encode, FiD.read

    def counted_encode(self, prompts):
        counts["padded tokens"] = counts.get("padded tokens", 0) + len(prompts) * max(map(len, prompts))
        counts["real tokens"] = counts.get("real tokens", 0) + sum(map(len, prompts))
        started = time.perf_counter()
        states = encode(self, prompts)
        counts["encoder s"] = round(counts.get("encoder s", 0) + time.perf_counter() - started, 3)
        return states

    def counted_read(self, memory, ids):
        counts["decoder steps"] = counts.get("decoder steps", 0) + 1
        started = time.perf_counter()
        states = read(self, memory, ids)
        counts["decoder s"] = round(counts.get("decoder s", 0) + time.perf_counter() - started, 3)
        return states

    FiD.encode, FiD.read = counted_encode, counted_read
    return counts


def ours(top_k: int | None):
    def system(folder, dtype, device):
        from pyterrier_lit import LiT5Distill

        return LiT5Distill(folder, window_size=100, top_k=top_k, dtype=dtype, device=device).order

    return system


def one_at_a_time(folder, dtype, device):
    from transformers.modeling_outputs import BaseModelOutput

    from pyterrier_lit.models.checkpoints import Folder
    from pyterrier_lit.models.devices import choose_dtype
    from pyterrier_lit.models.t5 import read_t5

    t5 = read_t5(Folder(folder), torch.device(device), choose_dtype(dtype, torch.device(device)))

    @torch.inference_mode()
    def rank(queries, passages):
        for query, ranking in zip(queries, passages, strict=True):
            texts = [f"Search Query: {query} Passage: [{i}] {t} Relevance Ranking: " for i, t in enumerate(ranking, 1)]
            rows = [[*ids[:149], 1] for ids in t5.pieces(texts)]
            ids = torch.tensor([row + [0] * (150 - len(row)) for row in rows], device=device)
            states = t5.network.encoder(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state
            t5.network.generate(
                decoder_start_token_id=0,
                encoder_outputs=BaseModelOutput(states.reshape(1, -1, states.shape[-1])),
                attention_mask=(ids != 0).long().reshape(1, -1),
                do_sample=False, min_new_tokens=ANSWER, max_new_tokens=ANSWER,
            )  # fmt: skip

    return rank


def rank_llm(folder, dtype, device):
    from rank_llm.data import Candidate, Query, Request
    from rank_llm.rerank.listwise.rank_fid import RankFiDDistill

    reranker = RankFiDDistill(folder, context_size=150, window_size=100, stride=50, precision=dtype, device=device)
    reranker._answer_maxlength = ANSWER + 1
    reranker._llm.generation_config.min_length = ANSWER + 1
    reranker._tokenizer.decode = lambda ids, **options: (
        ""
    )  # random weights write pieces that the small vocabulary lacks

    def rank(queries, passages):
        for query, ranking in zip(queries, passages, strict=True):
            candidates = [Candidate(str(i), 1 / (i + 1), {"contents": text}) for i, text in enumerate(ranking)]
            reranker.rerank_batch([Request(Query(query, "1"), candidates)], rank_end=len(candidates))

    return rank


SYSTEMS = {
    "ours": ours(None),
    "ours, top_k=10": ours(10),
    "library's T5, one query at a time": one_at_a_time,
    "rank_llm": rank_llm,
}

if __name__ == "__main__":
    main()
