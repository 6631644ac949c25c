"""Trains a bi-encoder on rankings for 5,815 queries, and makes a cross-encoder of it (`towers.py`): does nDCG@10 rise?

    python experiments/student.py [--output FOLDER] [--seeds 1] [--share 1.0] [--test COLLECTION ...] [--record]

The bi-encoder is all-MiniLM-L6-v2. It is trained (`bi_encoder.py`) on these rankings:

* For 28 queries of DL19, the passages of five first stages are ranked by the reciprocal rank fusion of 28 runs of large
  language models.
* For DL22, BM25's first 100 passages are ranked by a sum of two scores: MiniLM's cosine and splade-tiny's score, each
  standardised within the query. The same holds for questions of WikiQA and TREC QA, and for sentences of passages, over
  the passages of DL19 and DL22.
* For training queries of NFCorpus and for 150 queries of Cranfield, BM25's first 100 passages are ranked by the same
  sum, to which 2 is added for passages that are labelled relevant.

With several seeds, one bi-encoder is trained for each seed, and the mean of their weights is the final one (model
soups, arXiv 2203.05482). Averaging works because all seeds begin with the same weights. Once the first call has written
the training data, further seeds can be trained in calls of their own, also at the same time. The cross-encoder adds
matches of word pieces to the cosine. Word pieces match if they have the same stem. The importance of a word piece is
the idf of its stem in the passages of DL19 and DL22. The cross-encoder is not trained further. It is tested on DL21 and
Vaswani, whose queries, judgements and texts no seed has seen, and on the test queries of NFCorpus. The script needs
../shared/data and ../shared/models. A call that is interrupted trains only the seeds that were not finished.
"""

import argparse
import re
import sys
import tempfile
import time
from pathlib import Path

import bi_encoder
import encoders
import measured
import pandas as pd
import torch
import torch.nn.functional as F
import towers
import transformers
from first_stages import silence
from papers import SHARED
from real_teachers import DEPTH, report, sentences, similarity, tested

sys.path += [str(SHARED)]
import load as shared

from pyterrier_lit import CrossEncoder

SPLADE = SHARED.parent / "models" / "splade-tiny"
TIMES = {"dl19": 8, "dl22": 3, "cranfield": 3}  # collection -> how often each of its queries is repeated
HELD_OUT = {"dl19": 15, "cranfield": 75}  # number of queries that are not in the training data, for trials
SENTENCES = 3_000  # number of passages of which one sentence becomes a query
FUSION = 10  # the constant of reciprocal rank fusion
STEMMER = "porter2"
LABEL = 2.0  # added to the score of a relevant passage; other scores have a standard deviation of at most 2
LENGTHS = {"query_length": 32, "doc_length": 128}  # maximum lengths in tokens, in the test
STEPS = 240  # for each seed; 128 query-passage pairs a step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "student")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--share", type=float, default=1.0, help="share of the training steps, for a short trial")
    parser.add_argument("--test", nargs="*", default=["dl21", "vaswani", "nfcorpus"])
    measured.add_option(parser)
    arguments = parser.parse_args()
    output = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    lists, minilm = taught(output), encoders.minilm()
    places = [output / f"seed {seed}" for seed in arguments.seeds]
    for seed, place in zip(arguments.seeds, places, strict=True):
        if not place.exists():
            started = time.monotonic()
            bi_encoder.train(minilm, lists, int(STEPS * arguments.share), seed).save_pretrained(place)
            print(f"seed {seed}: {time.monotonic() - started:.0f} s", flush=True)
    name = f"trained as a bi-encoder, matches of stems, seeds {', '.join(map(str, arguments.seeds))}"
    trained = [transformers.BertModel.from_pretrained(place, add_pooling_layer=False) for place in places]
    student = made(mean(trained), output / "bi-encoder")
    for collection in arguments.test:
        question = f"Does a cross-encoder that begins as a bi-encoder become better, on {collection}?"
        report(tested({name: student}, collection, output / collection), question, arguments.record)


def made(encoder: transformers.BertModel, folder: Path) -> CrossEncoder:
    """The cross-encoder of a bi-encoder. The bi-encoder is saved in the folder."""
    encoder.save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoders.minilm())
    tokenizer.save_pretrained(folder)
    texts = pd.concat([shared.docs("dl19"), shared.docs("dl22")]).text.drop_duplicates()
    passages = shared.docs("dl22").text.sample(320, random_state=0).tolist()
    stem = stems(tokenizer)
    return towers.begin(str(folder), passages, idf(texts.tolist(), stem, tokenizer), stem, **LENGTHS)


def stems(tokenizer: transformers.PreTrainedTokenizerFast) -> torch.Tensor:
    """For each word piece, the id of the first word piece with the same stem (V,). A piece that is not a word is its
    own stem."""
    from pyterrier_pisa import tokenize

    first: dict[str, int] = {}
    found = []
    for number, name in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))):
        stem = "".join(tokenize(name, STEMMER)) if name.isalpha() else name
        found.append(first.setdefault(stem or name, number))
    return torch.tensor(found)


def idf(texts: list[str], stem: torch.Tensor, tokenizer: transformers.PreTrainedTokenizerFast) -> torch.Tensor:
    """The inverse document frequency of each word piece's stem (V,), as in BM25. It is 0 for punctuation and for
    special tokens. stem: as `stems` returns it."""
    frequency = torch.zeros(len(tokenizer))
    for ids in tokenizer(texts, truncation=False)["input_ids"]:
        frequency[stem[ids].unique()] += 1
    frequency = frequency[stem]
    values = torch.log(1 + (len(texts) - frequency + 0.5) / (frequency + 0.5))
    names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    values[[not any(map(str.isalnum, name)) for name in names]] = 0
    values[tokenizer.all_special_ids] = 0
    return values


def held_out(collection: str) -> list[str]:
    return shared.topics(collection).qid.sample(HELD_OUT[collection], random_state=0).tolist()


def mean(models: list[transformers.BertModel]) -> transformers.BertModel:
    """Set the first model's weights to the mean of all models' weights, and return the first model."""
    weights = [model.state_dict() for model in models]
    models[0].load_state_dict({name: torch.stack([each[name] for each in weights]).mean(0) for name in weights[0]})
    return models[0]


def taught(output: Path) -> pd.DataFrame:
    """The training data: a result frame with the teachers' scores, without passages whose text is in DL21. The frame is
    computed once and kept in `output`."""
    file = output / "taught.parquet"
    if not file.exists():
        lists = pd.concat([of_language_models(), of_encoders()], ignore_index=True)
        lists[~lists.text.isin(set(shared.docs("dl21").text))].to_parquet(file)
    return pd.read_parquet(file)


def of_language_models() -> pd.DataFrame:
    """The queries of DL19 that are not held out, with the passages of five first stages: BM25, BM25 with RM3, SPLADE++,
    TAS-B and ada2. The score of a passage is the reciprocal rank fusion of 28 runs of large language models."""
    names = [name for name in shared.files("dl19") if re.search("teachers/(rank|gpt)", name)]
    runs = pd.concat([shared.run("dl19", name) for name in names])
    fused = runs.assign(score=1 / (FUSION + 1 + runs["rank"])).groupby(["qid", "docno"], as_index=False).score.sum()
    fused["rank"] = fused.groupby("qid").score.rank(ascending=False, method="first").astype(int) - 1
    found = fused.merge(shared.topics("dl19"), on="qid").merge(shared.docs("dl19"), on="docno")
    return repeated(found[~found.qid.isin(held_out("dl19"))], TIMES["dl19"])


def of_encoders() -> pd.DataFrame:
    """BM25's first 100 passages for five kinds of queries: those of DL22, questions and sentences over the passages of
    DL19 and DL22, the training queries of NFCorpus, and the queries of Cranfield that are not held out. The score of a
    passage is the sum of MiniLM's and splade-tiny's scores, each standardised within the query. For NFCorpus and
    Cranfield, LABEL is added to the score of a relevant passage. Queries for which BM25 finds at most eight passages
    are left out."""
    of_dl22 = shared.res("dl22", "run.bm25.txt", DEPTH)
    passages = pd.concat([shared.docs("dl19"), shared.docs("dl22")]).drop_duplicates("docno").drop_duplicates("text")
    made = pd.DataFrame({"query": sentences(passages.text.tolist(), SENTENCES, seed=0)})
    made["qid"] = "sentence" + made.index.astype(str)
    questions = pd.concat([shared.topics("wikiqa"), shared.topics("trecqa"), made]).drop_duplicates("query")
    of_train = shared.qrels("nfcorpus", "qrels.train.txt")
    asked = shared.topics("nfcorpus", "queries.all.tsv")
    of_nfcorpus = retrieved(asked[asked.qid.isin(of_train.qid)], shared.docs("nfcorpus"))
    of_cranfield, judged = (
        frame[~frame.qid.isin(held_out("cranfield"))].assign(qid="cranfield" + frame.qid)
        for frame in (shared.res("cranfield"), shared.qrels("cranfield"))
    )
    qrels = pd.concat([of_train, judged])
    found = pd.concat([of_dl22, retrieved(questions, passages), of_nfcorpus, of_cranfield], ignore_index=True)
    found["score"] = sum(
        standard(pd.Series(scores, found.index), found.qid)
        for scores in (similarity(found["query"], found["text"]), products(found))
    )
    label = found[["qid", "docno"]].merge(qrels, on=["qid", "docno"], how="left").label.fillna(0)
    found["score"] += LABEL * (label.to_numpy() > 0)
    found = found.groupby("qid").filter(lambda rows: len(rows) > 8)
    dl22, cranfield = found.qid.isin(of_dl22.qid), found.qid.isin(of_cranfield.qid)
    return pd.concat(
        [
            repeated(found[dl22], TIMES["dl22"]),
            repeated(found[cranfield], TIMES["cranfield"]),
            found[~(dl22 | cranfield)],
        ]
    )


def retrieved(asked: pd.DataFrame, passages: pd.DataFrame) -> pd.DataFrame:
    """BM25's first 100 passages of each query, with texts."""
    with tempfile.TemporaryDirectory() as folder, silence():
        from pyterrier_pisa import PisaIndex

        index = PisaIndex(folder, text_field="text", stemmer=STEMMER, overwrite=True)
        index.index(passages.to_dict("records"))
        run = index.bm25(num_results=DEPTH)(asked.assign(query=asked["query"].str.replace(r"[^\w\s]", " ", regex=True)))
    return run[["qid", "docno", "score", "rank"]].merge(asked, on="qid").merge(passages, on="docno")


def standard(scores: pd.Series, qids: pd.Series) -> pd.Series:
    of_query = scores.groupby(qids)
    return (scores - of_query.transform("mean")) / (of_query.transform("std") + 1e-9)


def repeated(frame: pd.DataFrame, times: int) -> pd.DataFrame:
    return pd.concat([frame.assign(qid=frame.qid + f"#{i}") for i in range(times)])


@torch.inference_mode()
def products(frame: pd.DataFrame) -> list[float]:
    """splade-tiny's score of each passage for its query. The weights of a passage are computed only for the tokens to
    which the query expands."""
    model = transformers.BertForMaskedLM.from_pretrained(SPLADE).eval()
    head, decoder = model.cls.predictions.transform, model.cls.predictions.decoder
    texts = [*frame["query"], *frame["text"]]
    states = {text: head(found) for text, found in bi_encoder.states(model.bert, SPLADE, texts, 128)}

    def weights(text: str, pieces: torch.Tensor | slice) -> torch.Tensor:
        return F.linear(states[text], decoder.weight[pieces], decoder.bias[pieces]).amax(0).relu().log1p()

    scores = pd.Series(0.0, frame.index)
    for query, rows in frame.groupby("query", sort=False):
        asked = weights(query, slice(None))
        pieces = asked.nonzero()[:, 0]
        scores[rows.index] = [float(asked[pieces] @ weights(text, pieces)) for text in rows["text"]]
    return scores.tolist()


if __name__ == "__main__":
    main()
