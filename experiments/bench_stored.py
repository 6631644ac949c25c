"""Measures the memory that training takes beyond the model, with a stored run and with a data frame. Run by hand.

    python experiments/bench_stored.py [--rows 1000000 2000000 4000000] [--pe-rank 1000000 2000000]
                                       [--frame 100000 200000] [--record]

The runs are generated. They have 100 passages per query, and docnos of up to seven digits as in MS MARCO. Each docno
selects one of 10,000 texts. The student is a cross-encoder with random weights, or the small PE-Rank with its encoder.
Each training has three steps. Its candidates and the teacher's ranking come from the same run. Each training runs in a
process of its own. The result is the peak memory of this process, minus the peak memory of a training on a run of one
query.
"""

import argparse
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import measured
import pandas as pd

QUESTION = "How much memory does training on a stored run take?"
DEPTH = 100
PASSAGES = 8_841_823  # number of passages in MS MARCO
SOURCES = ("stored run", "stored run, PE-Rank", "frame")
PE_RANK = Path(__file__).parent / "tiny" / "pe-rank"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[1_000_000, 2_000_000, 4_000_000])
    parser.add_argument(
        "--pe-rank", type=int, nargs="*", default=[1_000_000, 2_000_000], help="rows of a stored run for PE-Rank"
    )
    parser.add_argument("--frame", type=int, nargs="*", default=[100_000, 200_000], help="rows of a data frame")
    parser.add_argument("--one", nargs=3, metavar=("SOURCE", "FOLDER", "ROWS"), help="train once, in this process")
    measured.add_option(parser)
    arguments = parser.parse_args()
    if arguments.one:
        source, folder, rows = arguments.one
        print(*trained(source, Path(folder), int(rows)))
        return
    found = []
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder) / "model")
        for source, sizes in zip(SOURCES, (arguments.rows, arguments.pe_rank, arguments.frame), strict=True):
            if not sizes:
                continue
            (alone, _), *others = (in_its_process(source, Path(folder), rows) for rows in (DEPTH, *sizes))
            for rows, (peak, seconds) in zip(sizes, others, strict=True):
                values = {
                    "MB at the peak beyond one query": (peak - alone) / 1e6,
                    "bytes a row": (peak - alone) / rows,
                    "CPU seconds": seconds,
                }
                found += [
                    {"setting": f"{source}, {rows:,} rows", "n": rows // DEPTH, "measure": name, "value": value}
                    for name, value in values.items()
                ]
                for row in found[-len(values) :]:
                    print(f"{row['setting']:30} {row['measure']:35} {row['value']:12.1f}", flush=True)
            found.append({"setting": f"{source}, one query", "n": 1, "measure": "MB at the peak", "value": alone / 1e6})
    if arguments.record:
        measured.record(QUESTION, found)


def in_its_process(source: str, folder: Path, rows: int) -> tuple[float, float]:
    write_run(folder / f"{rows}.run", rows)
    command = [sys.executable, __file__, "--one", source, str(folder), str(rows)]
    peak, seconds = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-2:]
    return float(peak), float(seconds)


def write_run(path: Path, rows: int) -> None:
    chosen = random.Random(rows)
    with open(path, "w") as file:
        for query in range(rows // DEPTH):
            for rank, docno in enumerate(chosen.sample(range(PASSAGES), DEPTH), 1):
                file.write(f"{query} Q0 {docno} {rank} {20 - chosen.random() - rank / 10:.4f} bm25\n")


def write_model(folder: Path) -> None:
    import transformers

    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(str(number) for number in range(100))]
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in words))
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    transformers.BertModel(transformers.BertConfig(vocab_size=len(words), **size)).save_pretrained(folder)


class Texts(Mapping[str, str]):
    """A mapping from any docno to a text: one of 10,000 passages of 60 words, followed by the docno."""

    def __init__(self) -> None:
        chosen = random.Random(0)
        self.texts = [" ".join(map(str, chosen.choices(range(100), k=60))) for _ in range(10_000)]

    def __getitem__(self, docno: str) -> str:
        return f"{self.texts[int(docno) % len(self.texts)]} {docno}"

    def __iter__(self) -> Any:
        return map(str, range(PASSAGES))

    def __len__(self) -> int:
        return PASSAGES

    def __contains__(self, docno: object) -> bool:
        return True


class Topics(Texts):
    def __getitem__(self, qid: str) -> str:
        return f"the query of number {qid}"


def trained(source: str, folder: Path, rows: int) -> tuple[int, float]:
    """Train once, in this process. Returns the peak memory of this process in bytes, and the CPU seconds of the
    training."""
    import torch

    from pyterrier_lit import CrossEncoder, PERank
    from pyterrier_lit.training import Distil, StoredRun
    from pyterrier_lit.training.data import read_run

    torch.manual_seed(0)
    student: CrossEncoder | PERank
    settings: dict[str, Any] = {"steps": 3, "batch_size": 8, "verbose": False}
    if source == "stored run, PE-Rank":
        student = PERank(str(PE_RANK), device="cpu")
        settings |= {"largest": 8}
    else:
        student = CrossEncoder.from_backbone(str(folder / "model"), device="cpu")
        settings |= {"n_passages": 8, "sampling": "random", "loss": "kl"}
    path, started = folder / f"{rows}.run", time.process_time()
    learns, texts, topics = Distil(student, path, **settings), Texts(), Topics()
    if source == "frame":
        frame: pd.DataFrame = read_run(path)
        learns.fit(frame.assign(query=[*map(topics.get, frame["qid"])], text=[*map(texts.get, frame["docno"])]))
    else:
        learns.fit(StoredRun(path, topics, texts))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, time.process_time() - started


if __name__ == "__main__":
    main()
