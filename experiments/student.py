"""Does a cross-encoder that begins as a bi-encoder (`towers.py`) become better than it, from lists of 343 queries?

    python experiments/student.py [--output FOLDER] [--seeds 1] [--share 1.0] [--test COLLECTION ...] [--record]

It begins as all-MiniLM-L6-v2 and learns from scores (KL), each standardised within the query: on DL19 the mean log rank
in 23 rankings of large language models; for questions of WikiQA and TREC QA over DL22's passages the sum of MiniLM's
cosines and splade-tiny's scores, each standardised too; on DL22 that and the log rank of SPLADE++. Ten queries of DL19
are held out: training ends with the weights that rank them best. Each seed is a student. They are tested on DL21 and
Vaswani, and on 60 queries of NFCorpus, of which no query, no judgement and no text was seen. Needs ../shared/data and
../shared/models. A run that was stopped resumes: training from its last saved state, a test from its last whole run.
"""

import argparse
import math
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import encoders
import measured
import numpy as np
import pandas as pd
import tokenizers
import torch
import torch.nn.functional as F
import towers
import transformers
from first_stages import silence
from ir_measures import RR, nDCG
from profiles import SHARED
from real_teachers import similarity, tested

sys.path += [str(SHARED)]
import load as shared

from pyterrier_lit import CrossEncoder
from pyterrier_lit.batching import like_lengths, padded
from pyterrier_lit.training import Distil

SPLADE = SHARED.parent / "models" / "splade-tiny"
NEAR = 50  # of BM25 and SPLADE++, where MiniLM's vectors are needed
ABSENT = 150  # the rank of a passage that a list of 100 has not got
TIMES = {"dl19": 8, "dl22": 3, "questions": 1}  # how often a query is there
QUESTIONS = 250  # of WikiQA and TREC QA
HELD_OUT, VALIDATED = 10, 20  # queries of DL19 on which students are measured while they learn; passages of each
FROZEN = 4  # layers
LENGTHS = {"query_length": 24, "doc_length": 48}  # in training
LEARNING = {
    "loss": "kl", "loss_options": {"temperature": 0.7}, "n_passages": 12, "sampling": "log_random", "batch_size": 4,
    "micro_batch": 4, "learning_rate": 1e-4, "warmup": 8, "schedule": "cosine", "clip": 1.0, "precision": "float32",
    "verbose": False, "every": 15, "patience": 3,
}  # fmt: skip
STEPS = 60
READ = {"query_length": 32, "doc_length": 128}  # in the test
QUERIES = {"nfcorpus": 60}  # drawn; of the others all


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "student")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--share", type=float, default=1.0, help="of the steps, to try it")
    parser.add_argument("--test", nargs="*", default=["dl21", "vaswani", "nfcorpus"])
    measured.add_option(parser)
    arguments = parser.parse_args()
    output = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    places = {"untrained": output / "untrained"}
    if not places["untrained"].exists():
        passages = shared.docs("dl22").text.sample(320, random_state=0).tolist()
        towers.begin(encoders.minilm(), passages).save(places["untrained"])
    for seed in arguments.seeds:
        place = places[f"seed {seed}"] = output / f"seed {seed}"
        if not place.exists():
            started = time.monotonic()
            learned(
                CrossEncoder(str(places["untrained"]), **LENGTHS), taught(output), seed, arguments.share, output
            ).save(place)
            print(f"seed {seed}: {time.monotonic() - started:.0f} s", flush=True)
    for collection in arguments.test:
        students = {name: CrossEncoder(str(place), **READ) for name, place in places.items()}
        n = QUERIES.get(collection)
        table = tested(students, collection, output / collection, n)
        print(table.to_string(index=False, float_format="{:.3f}".format, na_rep=""), flush=True)
        if arguments.record:
            found = measured.from_experiment(table, n or len(shared.topics(collection)), [nDCG @ 10, RR @ 10])
            measured.record(f"Does a cross-encoder that begins as a bi-encoder become better, on {collection}?", found)


def learned(student: CrossEncoder, lists: pd.DataFrame, seed: int, share: float, output: Path) -> CrossEncoder:
    body = student.load().network.body
    for part in (body.embeddings, *body.encoder.layer[:FROZEN]):
        part.requires_grad_(False)
    judged = shared.qrels("dl19")
    held_out = judged.qid.drop_duplicates().sample(HELD_OUT, random_state=0)
    valid = shared.res("dl19", "run.bm25.txt", VALIDATED)
    lists = repeated(lists[~lists.qid.isin(held_out)])
    Distil(
        student, lists[["qid", "docno", "score"]], steps=int(STEPS * share), seed=seed,
        folder=output / f"training of seed {seed}", **LEARNING,
    ).fit(lists, None, valid[valid.qid.isin(held_out)], judged[judged.qid.isin(held_out)])  # fmt: skip
    return student


def taught(output: Path) -> pd.DataFrame:
    """Result frames whose scores are the teachers', standardised within the query; computed once."""
    file = output / "taught.parquet"
    if not file.exists():
        lists = pd.concat([of_language_models().assign(of="dl19"), of_encoders()], ignore_index=True)
        lists.assign(score=standard(lists.score, lists.qid)).to_parquet(file)
    return pd.read_parquet(file)


def of_language_models() -> pd.DataFrame:
    """DL19's passages of which a language model ranked a list of 100, by the mean of the logarithms of their ranks in
    all these lists; where a list has not got it, its rank is ABSENT."""
    names = [name for name in shared.files("dl19") if re.search(r"teachers/.*[.]k100[.]", name)]
    runs = [shared.run("dl19", name) for name in names if "zeroshot" not in name]
    ranks = pd.concat(runs).assign(above=lambda run: math.log(ABSENT) - np.log(run["rank"] + 1))
    found = ranks.groupby(["qid", "docno"], as_index=False).above.sum().rename(columns={"above": "score"})
    return with_texts(found, "dl19")


def of_encoders() -> pd.DataFrame:
    """DL22's first of BM25 and of SPLADE++, by its ranks too, and those of BM25 of questions over the same passages."""
    runs = {name: shared.run("dl22", f"run.{name}.txt") for name in ("bm25", "splade++ed")}
    near = pd.concat(run[run["rank"] < NEAR] for run in runs.values())[["qid", "docno"]].drop_duplicates()
    ranks = near.merge(runs["splade++ed"], on=["qid", "docno"], how="left")["rank"].fillna(ABSENT - 1) + 1
    of_dl22 = with_texts(near.assign(above=-np.log(ranks)), "dl22")
    passages = of_dl22[["docno", "text"]].drop_duplicates("docno")
    asked = pd.concat([shared.topics(name) for name in ("wikiqa", "trecqa")]).drop_duplicates("query")
    asked = asked.sample(QUESTIONS, random_state=0)
    with tempfile.TemporaryDirectory() as folder, silence():
        from pyterrier_pisa import PisaIndex

        index = PisaIndex(folder, text_field="text", stemmer="porter2", overwrite=True)
        index.index(passages.to_dict("records"))
        run = index.bm25(num_results=NEAR)(asked.assign(query=asked["query"].str.replace(r"[^\w\s]", " ", regex=True)))
    run = run[["qid", "docno"]].merge(asked, on="qid").merge(passages, on="docno")
    both = pd.concat([of_dl22.assign(of="dl22"), run.assign(of="questions")], ignore_index=True)
    each = [pd.Series(similarity(both["query"], both["text"])), pd.Series(products(both)), both.above]
    both["score"] = sum(standard(scores, both.qid).fillna(0) for scores in each)
    return both.drop(columns="above").groupby("qid").filter(lambda rows: len(rows) > 8)


def with_texts(frame: pd.DataFrame, collection: str) -> pd.DataFrame:
    """With query and text, and without the passages that DL21 has too."""
    docs = shared.docs(collection)
    docs = docs[~docs.text.isin(set(shared.docs("dl21").text))]
    return frame.merge(shared.topics(collection), on="qid").merge(docs, on="docno")


def repeated(lists: pd.DataFrame) -> pd.DataFrame:
    """Each query as often as its collection says, under other qids."""
    times = lists.of.map(TIMES)
    copies = [lists[times > i].assign(qid=lambda rows, i=i: rows.qid + f"#{i}") for i in range(max(TIMES.values()))]
    return pd.concat(copies, ignore_index=True)


def standard(scores: pd.Series, qids: pd.Series) -> pd.Series:
    of_query = scores.groupby(qids)
    return (scores - of_query.transform("mean")) / (of_query.transform("std") + 1e-9)


@torch.inference_mode()
def products(frame: pd.DataFrame) -> list[float]:
    """splade-tiny's score of each passage for its query: of the pieces alone that the query expands to."""
    model = transformers.BertForMaskedLM.from_pretrained(SPLADE).eval()
    head, decoder = model.cls.predictions.transform, model.cls.predictions.decoder
    states = {text: head(found) for text, found in read(model.bert, SPLADE, [*frame["query"], *frame["text"]])}

    def weights(text: str, pieces: torch.Tensor | slice) -> torch.Tensor:
        return F.linear(states[text], decoder.weight[pieces], decoder.bias[pieces]).amax(0).relu().log1p()

    scores = pd.Series(0.0, frame.index)
    for query, rows in frame.groupby("query", sort=False):
        asked = weights(query, slice(None))
        pieces = asked.nonzero()[:, 0]
        scores[rows.index] = [float(asked[pieces] @ weights(text, pieces)) for text in rows["text"]]
    return scores.tolist()


@torch.inference_mode()
def read(model: torch.nn.Module, folder: Path, texts: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Each text once, and its last states (L, d)."""
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(128)
    tokenizer.no_padding()
    distinct = list(dict.fromkeys(texts))
    ids = [encoding.ids for encoding in tokenizer.encode_batch(distinct)]
    for batch in like_lengths([len(row) for row in ids], 2_048):
        rows, mask = padded([ids[i] for i in batch])
        states = model(input_ids=rows, attention_mask=mask.long()).last_hidden_state
        yield from ((distinct[i], row[: len(ids[i])]) for i, row in zip(batch, states, strict=True))


if __name__ == "__main__":
    main()
