"""What two checkouts of this package take for the same work on a CPU: in turns, random weights. Run by hand.

    git worktree add ../before COMMIT
    python experiments/bench_cpu.py ../shared/data/dl19 ../before [--work lit5-base ...] [--repeat 3] [--record]

Each checkout has a process of its own with one thread, and a turn counts the CPU seconds of that process: so neither
what else the machine does nor its mood at some minute favours one. The least of the turns counts. The texts are those
of the first query of a folder: those of LiT5 cut as bench_lit5.py says, the others whole.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import measured
import torch

TINY = Path(__file__).parent / "tiny"
QUESTION = "How much faster is one checkout than another on one core?"
ENCODERS = {
    "bert-base": {},
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
}
LANGUAGE_MODEL = {
    "vocab_size": 1000, "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 8,
    "num_attention_heads": 16, "num_key_value_heads": 4,
}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with docs.jsonl.gz, queries.tsv and run.bm25.txt")
    parser.add_argument("before", type=Path, help="a checkout to compare this one with; 'serve' is for its processes")
    parser.add_argument("--work", nargs="+", choices=list(WORK), default=list(WORK))
    parser.add_argument("--repeat", type=int, default=3)
    measured.add_option(parser)
    arguments = parser.parse_args()
    if str(arguments.before) == "serve":
        return serve(arguments.data)
    checkouts = {"before": arguments.before, "now": Path(__file__).parents[1]}
    rows = []
    for work in arguments.work:
        processes = {name: start(arguments.data, folder, work) for name, folder in checkouts.items()}
        turns = [{name: ask(process) for name, process in processes.items()} for _ in range(arguments.repeat)]
        for process in processes.values():
            process.communicate()
        seconds = {name: min(turn[name] for turn in turns) for name in checkouts}
        print(f"{work:24} {seconds['before']:7.2f} s {seconds['now']:7.2f} s", end="")
        print(f" {seconds['before'] / seconds['now']:6.2f} x", flush=True)
        values = {f"CPU seconds, {name}": value for name, value in seconds.items()}
        values["times as fast"] = seconds["before"] / seconds["now"]
        rows += [{"setting": work, "n": arguments.repeat, "measure": name, "value": values[name]} for name in values]
    if arguments.record:
        torch.set_num_threads(1)  # as the processes had it
        measured.record(QUESTION, rows)


def start(data: Path, checkout: Path, work: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(checkout.resolve()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(data), "serve", "--work", work]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen(command, env=environment, text=True, **pipes)
    ask(process)  # the first turn loads and warms up
    return process


def ask(process: subprocess.Popen) -> float:
    process.stdin.write("\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def serve(data: Path) -> None:
    """Do the work once for every line that comes in, and print the CPU seconds that it took."""
    torch.set_num_threads(1)
    (work,) = sys.argv[sys.argv.index("--work") + 1 :]
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        sys.stdin.readline()
        run = WORK[work](data, Path(folder))
        print(0.0, flush=True)
        for _ in sys.stdin:
            started = time.process_time()
            run()
            print(time.process_time() - started, flush=True)


def lit5(top_k: int | None) -> Callable[[Path, Path], Callable]:
    """A window of 100 passages by a LiT5-Distill of T5-base's size in bfloat16."""

    def prepare(data, folder):
        from bench_lit5 import make_model, read

        from pyterrier_lit import LiT5Distill

        make_model(folder)
        queries, passages = read(data, 1, folder)
        reranker = LiT5Distill(str(folder), window_size=100, top_k=top_k, dtype="bfloat16", device="cpu")
        reranker.order(queries, [passages[0][:5]])
        return lambda: reranker.order(queries, passages)

    return prepare


def cross_encoder(name: str, dtype: str, pairs: int) -> Callable[[Path, Path], Callable]:
    """Pairs by a BERT of some size."""

    def prepare(data, folder):
        from bench_lit5 import read_whole
        from transformers import BertConfig, BertModel

        from pyterrier_lit import CrossEncoder

        queries, passages = read_whole(data, 1)
        reranker = CrossEncoder(str(TINY / "cross-encoder"), query_length=32, doc_length=256, device="cpu", dtype=dtype)
        torch.manual_seed(0)
        config = BertConfig(**ENCODERS[name], vocab_size=reranker.load().network.body.config.vocab_size)
        body = BertModel(config, add_pooling_layer=False)
        network = type(reranker.load().network)(body).to(getattr(torch, dtype)).eval()
        reranker.load().network = network
        reranker.score(queries, [passages[0][:2]])
        return lambda: reranker.score(queries, [passages[0][:pairs]])

    return prepare


def language_model(data: Path, folder: Path) -> Callable:
    """Twenty steps after two prompts of 400 tokens by a Mistral of 1,024 x 8 in bfloat16, as PE-Rank writes."""
    from transformers import MistralConfig, MistralModel

    from pyterrier_lit.models.vector_lm import VectorLM, projector

    torch.manual_seed(0)
    body = MistralModel(MistralConfig(**LANGUAGE_MODEL, sliding_window=None))
    network = VectorLM(body, projector("identity", 1024, 1024), placeholder=0).to(torch.bfloat16).eval()
    prompts = torch.randint(1, 1000, (2, 400))
    prompts[:, 100:120] = 0

    def run():
        reader = network.read(prompts.tolist(), [torch.randn(20, 1024), torch.randn(20, 1024)])
        reader.start()
        for symbol in range(20):
            reader.read(torch.tensor([[symbol], [symbol]]))

    return run


WORK: dict[str, Callable[[Path, Path], Callable]] = {
    "lit5-base, top_k=10": lit5(10),
    "lit5-base": lit5(None),
    "pe-rank's language model": language_model,
    **{
        f"{name}, {dtype}": cross_encoder(name, dtype, 30 if name == "bert-base" else 100)
        for name in ENCODERS
        for dtype in ("float32", "bfloat16")
    },
}

if __name__ == "__main__":
    main()
