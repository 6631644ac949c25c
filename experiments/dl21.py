"""Trains a small PE-Rank and a small LiT5-Distill for DL21 by the recipes of `tiny/`. Their training data have the
passages of DL21, but not the queries of DL21.

    python experiments/dl21.py [NAME ...] [--output FOLDER] [--share 1.0] [--record]

PE-Rank's passage encoder is all-MiniLM-L6-v2 (MiniLM), not a smaller encoder as in `tiny/`. `tiny/mistral.py` sets the
initial weights of PE-Rank's language model, and `tiny/lit5.py` those of the LiT5-Distill. The passages are those of
DL19, DL21 and DL22. The training queries are those of DL19, DL22, WikiQA and TREC QA, and sentences from the passages.
BM25 retrieves the candidates. As in `tiny/`, the teacher's score is MiniLM's cosine plus a small share of BM25's score.
In training, MiniLM reads at most 98 tokens of a passage, and a prompt of LiT5-Distill has at most 96 tokens. The
students are tested on the queries of DL21 with BM25's first 100 passages. The script needs ../shared/data.
"""

import argparse
import functools
import sys
import tempfile
import time
from pathlib import Path

import measured
import transformers
from real_teachers import PIECES, SENTENCES, material, report, tested

sys.path += [str(Path(__file__).parent / "tiny")]
import mistral
from make import (
    BM25_SHARE,
    SEED,
    Material,
    centred,
    lit5_distill,
    taught_pe_rank,
    vocabulary,
    word_vectors,
    write_language_model,
    write_tokenizer,
)

from pyterrier_lit import LiT5Distill, PERank


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"students to train: {', '.join(STUDENTS)}; default: both")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "dl21")
    parser.add_argument("--share", type=float, default=1.0, help="share of the training steps, for a short trial")
    measured.add_option(parser)
    arguments = parser.parse_args()
    names = arguments.names or [*STUDENTS]
    for name in names:
        place = arguments.output / name
        if not place.exists():
            started = time.monotonic()
            transformers.set_seed(SEED)
            with tempfile.TemporaryDirectory() as folder:
                STUDENTS[name](training_data(), Path(folder), arguments.share).save(place)
            print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
    students = {name: KINDS[name](str(arguments.output / name), device="cpu", verbose=True) for name in names}
    question = "How good are small listwise rerankers that have read the passages of DL21?"
    report(tested(students, "dl21"), question, arguments.record)


@functools.cache
def training_data() -> Material:
    passages = ("dl19", "dl22", "dl21")
    return material(*passages, asked=("dl19", "dl22"), n_sentences=SENTENCES, bm25=BM25_SHARE)


def pe_rank(material: Material, folder: Path, share: float) -> PERank:
    words, _ = vocabulary(material, PIECES, mistral.PROMPT_WORDS)
    write_tokenizer(words, folder)
    of_minilm = centred(material, [word.removeprefix("##") for word in words], mistral.WIDTH)
    added = word_vectors(folder, material.texts, of_minilm.texts, of_minilm.words, int(5_000 * share))
    write_language_model(folder / "lm", words, added)
    return taught_pe_rank(
        material, folder / "lm", material.minilm, of_minilm.texts, int(2_000 * share),
        middle=of_minilm.middle, directions=of_minilm.directions,
    )  # fmt: skip


STUDENTS = {"pe-rank": pe_rank, "lit5-distill": functools.partial(lit5_distill, size=PIECES)}
KINDS = {"pe-rank": PERank, "lit5-distill": LiT5Distill}

if __name__ == "__main__":
    main()
