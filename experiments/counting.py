"""Counts the FLOPs and parameters of the papers' networks from their shapes, for the papers' headline figures. Nothing
is measured, and no weights or texts are read.

transformers builds the networks on torch's meta device, and PyTorch's FLOP counter runs them there. A prompt of LiT5
has 150 tokens, including padding. For the other rerankers, the numbers of tokens are means over BM25's first 100
passages for DL19.
"""

import functools
from collections.abc import Callable

import compare
import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    ElectraConfig,
    ElectraForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutput

# size -> hidden size, inner size, heads, layers
T5 = {"base": (768, 2048, 12, 12), "large": (1024, 2816, 16, 24), "xl": (2048, 5120, 32, 24)}
ELECTRA = {"base": (768, 3072, 12, 12), "large": (1024, 4096, 16, 24)}
PASSAGES, WINDOWS = 100, 9  # windows of 20 passages with a stride of 10
PAIR_TOKENS = 95  # BERT tokens of a query-passage pair of DL19 (maximum lengths: query 32, passage 256)
ORDER_PIECES = 132  # T5 tokens of the numbers 1 to 100, without the end token
TEXT_TOKENS, TEXT_ANSWER = (
    19_724,
    90,
)  # Mistral v1 tokens of rank_llm's prompts for a query of DL19, and of an answer ("[1] > [2] ...")
VECTOR_TOKENS, VECTOR_ANSWER = 2_942, 20  # tokens of PE-Rank's prompts for a query, and of an answer
QUERIES = {"dl19": 43, "dl20": 54, "dl21": 53, "dl22": 76}


@functools.cache
def t5(size: str) -> PreTrainedModel:
    """A T5 v1.1, as in LiT5."""
    width, inner, heads, layers = T5[size]
    config = T5Config(
        vocab_size=32_128,
        d_model=width,
        d_ff=inner,
        num_heads=heads,
        num_layers=layers,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    model = _built(T5ForConditionalGeneration, config)
    model.lm_head = torch.nn.Linear(width, config.vocab_size, bias=False, device="meta")  # transformers 5 tied it
    return model


@functools.cache
def electra(size: str) -> PreTrainedModel:
    """An ELECTRA discriminator with a classification head, as in monoELECTRA."""
    width, inner, heads, layers = ELECTRA[size]
    return _built(
        ElectraForSequenceClassification,
        ElectraConfig(
            embedding_size=width,
            hidden_size=width,
            intermediate_size=inner,
            num_attention_heads=heads,
            num_hidden_layers=layers,
            num_labels=1,
        ),
    )


@functools.cache
def mistral() -> PreTrainedModel:
    """Mistral 7B, as in RankZephyr and PE-Rank."""
    return _built(MistralForCausalLM, MistralConfig(sliding_window=None))


def parameters(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@functools.cache
def lit5(size: str, tokens: int = 150) -> float:
    """TFLOP of LiT5-Distill-v2 for a query with 100 prompts of this many tokens. The encoder reads each prompt alone,
    and the decoder attends to all prompts."""
    model, width = t5(size), T5[size][0]
    texts, order = _ids(PASSAGES, tokens), _ids(1, ORDER_PIECES + 3)  # with the start and the end
    states = BaseModelOutput(torch.zeros(1, PASSAGES * tokens, width, device="meta"))
    return tflop(lambda: model.encoder(input_ids=texts)) + tflop(
        lambda: model(encoder_outputs=states, decoder_input_ids=order, use_cache=False)
    )


@functools.cache
def cross_encoder(size: str, tokens: int = PAIR_TOKENS) -> float:
    """TFLOP of monoELECTRA for 100 query-passage pairs of this many tokens."""
    mask = torch.zeros(PASSAGES, 1, tokens, tokens, device="meta")
    return tflop(lambda: electra(size)(_ids(PASSAGES, tokens), attention_mask=mask))


@functools.cache
def language_model(prompts: int, answer: int) -> tuple[float, float]:
    """A lower and an upper bound of the TFLOP of Mistral 7B for the 9 windows of a query, with a KV cache. For the
    upper bound, each token attends to its whole window. For the lower bound, each token attends only to earlier tokens.

    prompts: number of tokens of the nine prompts together. answer: number of tokens of one answer.
    """
    length = round(prompts / WINDOWS) + answer
    mask = torch.zeros(1, 1, length, length, device="meta")
    most = tflop(lambda: mistral()(_ids(1, length), attention_mask=mask, logits_to_keep=answer, use_cache=False))
    config = mistral().config
    attention = 4 * length**2 * config.hidden_size * config.num_hidden_layers / 1e12
    return WINDOWS * (most - attention / 2), WINDOWS * most


def headlines() -> pd.DataFrame:
    """A row for each ratio that a paper reports, with the ratio that follows from counting. Columns: paper, claim,
    published, unit, compares, counted, what was counted."""
    few, most = language_model(TEXT_TOKENS, TEXT_ANSWER)
    vectors, _ = language_model(VECTOR_TOKENS, VECTOR_ANSWER)
    large, base = cross_encoder("large"), cross_encoder("base")
    seven, xl = parameters(mistral()), parameters(t5("xl"))
    electras = [parameters(electra(size)) for size in ("large", "base")]
    counted = {
        ("LiT5", "parameters"): (f"{seven / xl:.2f}", f"{seven / 1e9:.2f} and {xl / 1e9:.2f} billion"),
        ("LiT5", "FLOPs a query"): (f"{few / lit5('xl'):.1f} to {most / lit5('xl'):.1f}", "padded to 150 tokens"),
        ("Rank-DistiLLM", "latency"): (f"{most / large:.0f} (large), {most / base:.0f} (base)", "FLOPs"),
        ("Rank-DistiLLM", "memory"): (
            ", ".join(f"{seven / n:.1f} ({size})" for n, size in zip(electras, ("large", "base"), strict=True)),
            "weights in 16 bits",
        ),
        ("Rank-DistiLLM", "parameters, monoT5-3B"): (f"{1 - electras[0] / xl:.0%}", "large; monoT5-3B as T5 v1.1 XL"),
        ("Rank-DistiLLM", "parameters, RankZephyr"): (f"{1 - electras[0] / seven:.0%}", "large"),
        ("PE-Rank", "latency"): (f"{few / vectors:.1f}", "FLOPs of the language model, vectors from an index"),
    }
    rows = [(paper, claim, *found) for (paper, claim), found in counted.items()]
    found = pd.DataFrame(rows, columns=["paper", "claim", "counted", "what was counted"])
    claims = compare.claims()[["paper", "claim", "value", "unit", "compares"]].rename(columns={"value": "published"})
    return claims.merge(found, on=["paper", "claim"])


def figure2() -> pd.DataFrame:
    """LiT5's figure 2: a row per model with its nDCG@10 over BM25, TFLOP per query and parameters in millions. The
    nDCG@10 is the mean over DL19 to DL22. The weight of a collection is its number of queries."""
    names = {f"castorini/LiT5-Distill-{size}-v2": size for size in T5}
    printed = compare.published(table="ecir_table1", first_stage="bm25", model=[*names, "RankZephyr 7B"])
    weights = printed["collection"].map(QUERIES)
    means = (printed["value"] * weights).groupby(printed["model"], sort=False).sum() / sum(QUERIES.values())
    costs = {name: (lit5(size), parameters(t5(size))) for name, size in names.items()}
    costs["RankZephyr 7B"] = (language_model(TEXT_TOKENS, TEXT_ANSWER)[1], parameters(mistral()))
    rows = [(name, mean, costs[name][0], costs[name][1] / 1e6) for name, mean in means.items()]
    return pd.DataFrame(rows, columns=["model", "nDCG@10", "TFLOP", "million parameters"])


def tflop(run: Callable[[], object]) -> float:
    """The number of multiplications and additions of a call, in 10^12."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops() / 1e12


def _built(kind: type, config: object) -> PreTrainedModel:
    config._attn_implementation = "eager"  # the counter sees its matrix products
    with torch.device("meta"):
        return kind(config).eval()


def _ids(rows: int, length: int) -> torch.Tensor:
    return torch.zeros(rows, length, dtype=torch.long, device="meta")
