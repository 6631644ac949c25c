"""Makes the work that bench.py gives to the systems: models with random weights, queries and passages in a folder.

The cross-encoders and T5 have the sizes of published models. The language model of PE-Rank is smaller than the
published one. The texts come from a collection. Small tokenizers from `tiny/` and from the tests replace the published
ones.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import corpora
import first_stages
import torch
import transformers

TINY = Path(__file__).parent / "tiny"
GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
ENCODERS = {
    "BERT-base": {},
    "MiniLM": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
}
T5_BASE = {
    "vocab_size": 32128, "d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12, "num_decoder_layers": 12,
    "num_heads": 12, "feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False, "decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
MISTRAL = {
    "vocab_size": 32_000, "hidden_size": 512, "intermediate_size": 1792, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 2, "rope_theta": 1e6, "initializer_range": 0.05,
}  # fmt: skip
PROMPT_TOKENS = 108.8  # mean number of tokens of a LiT5 prompt on TREC DL 2019, with T5's own vocabulary
# Mean number of tokens of a passage with Mistral's vocabulary, estimated from the prompts of rank_llm: for a query of
# DL19, these prompts (9 windows of 20 passages) have 19,724 tokens
PASSAGE_TOKENS = 100


def make(kind: str, size: str, dtype: str, queries: list[str], passages: list[list[str]], folder: Path) -> None:
    """Write a model (config, weights, tokenizer) and work.json (the queries and passages) into an empty folder."""
    torch.manual_seed(0)
    match kind:
        case "cross-encoder":
            make_classifier(folder, ENCODERS[size])
        case "lit5-distill" | "lit5-score":
            passages = make_t5(folder, queries, passages)
        case "pe-rank":
            passages = make_language_model(folder, queries, passages)
    work: dict[str, Any] = {"kind": kind, "dtype": dtype, "queries": queries, "passages": passages}
    (folder / "work.json").write_text(json.dumps(work))


def read(data: str, queries: int, passages: int, scratch: Path) -> tuple[list[str], list[list[str]]]:
    """The first `queries` queries of a collection that have `passages` passages, and the texts of these passages. The
    passages are the first ones of the collection's run. If the collection has no run, BM25 retrieves the passages, but
    only for the first 4 * `queries` topics. Raises ValueError if fewer than `queries` queries with enough passages are
    found."""
    collection = corpora.load(data)
    loader = collection.text_loader()
    if collection.run is None:
        bm25 = first_stages.bm25(collection, scratch / "index.pisa", passages, overwrite=True)
        frame = (bm25 % passages >> loader)(collection.get_topics().iloc[: 4 * queries])
    else:
        frame = loader(collection.get_results().query("rank < @passages"))
    lists = [ranking for _, ranking in frame.sort_values(["qid", "rank"]).groupby("qid") if len(ranking) == passages]
    if len(lists) < queries:
        raise ValueError(f"{data} has {len(lists)} queries with {passages} passages; wanted {queries}")
    return [each["query"].iloc[0] for each in lists[:queries]], [each["text"].tolist() for each in lists[:queries]]


def make_classifier(folder: Path, shape: dict[str, int]) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY / "cross-encoder")
    config = transformers.BertConfig(**shape, vocab_size=len(tokenizer), num_labels=1, initializer_range=0.06)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.model_max_length = 512
    tokenizer.save_pretrained(folder)


def make_t5(folder: Path, queries: list[str], passages: list[list[str]]) -> list[list[str]]:
    """Write a T5-base. Returns the passages, shortened so that the prompts have PROMPT_TOKENS tokens on average with
    the tests' vocabulary."""
    network = transformers.T5ForConditionalGeneration(transformers.T5Config(**T5_BASE))
    network.to(torch.bfloat16).save_pretrained(folder)
    shutil.copy(GOLDEN / "lit5" / "tiny-random" / "spiece.model", folder)
    from pyterrier_lit.models.t5 import SentencePieces

    pieces = SentencePieces((folder / "spiece.model").read_bytes())

    def lengths(query: str, texts: list[str]) -> list[int]:
        prompts = [f"Search Query: {query} Passage: [1] {text} Relevance Ranking: " for text in texts]
        return [min(len(ids) + 1, 150) for ids in pieces(prompts)]

    return cut(queries, passages, lengths, PROMPT_TOKENS)


def cut(
    queries: list[str], passages: list[list[str]], lengths: Callable[[str, list[str]], list[int]], wanted: float
) -> list[list[str]]:
    """Shorten all passages to the same share of their characters, so that the mean of the lengths is `wanted`.

    lengths: a function that takes a query and its passages, and returns a length in tokens for each passage.
    """
    low, high = 0.0, 1.0
    for _ in range(12):  # halves the interval that contains the share
        share = (low + high) / 2
        left = [[text[: int(len(text) * share)] for text in ranking] for ranking in passages]
        found = [length for query, texts in zip(queries, left, strict=True) for length in lengths(query, texts)]
        low, high = (share, high) if sum(found) / len(found) < wanted else (low, share)
    return left


def make_language_model(folder: Path, queries: list[str], passages: list[list[str]]) -> list[list[str]]:
    """Write a Mistral for PE-Rank and a BERT that encodes passages. Without embeddings, the Mistral is about 70 times
    as large as the BERT. For Mistral-7B and Jina's encoder, this factor is about 60. Returns the passages, shortened so
    that they have PASSAGE_TOKENS tokens on average with the tests' vocabulary."""
    transformers.MistralForCausalLM(transformers.MistralConfig(**MISTRAL)).save_pretrained(folder)
    shutil.copy(GOLDEN / "pe_rank" / "checkpoint" / "tokenizer.model", folder)
    fields = json.loads((GOLDEN / "pe_rank" / "checkpoint" / "tokenizer_config.json").read_text())
    fields["added_tokens_decoder"] = {id: token for id, token in fields["added_tokens_decoder"].items() if int(id) < 3}
    fields["additional_special_tokens"] = []
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    config = transformers.BertConfig(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512, initializer_range=0.2
    )
    transformers.BertModel(config).save_pretrained(folder / "encoder")
    shutil.copy(GOLDEN / "pe_rank" / "encoder" / "vocab.txt", folder / "encoder")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return cut(queries, passages, lambda _, texts: [len(ids) for ids in tokenizer(texts)["input_ids"]], PASSAGE_TOKENS)
