"""models.vector_lm: the logits equal the reference's, alone and in padded batches; half precision stays close."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from pe import ARRAYS, FOLDER, WINDOWS, ids_of, prompt, vectors_of

from pyterrier_lit import PERank
from pyterrier_lit.decoding import in_turn
from pyterrier_lit.models.vector_lm import VectorLM, _cache_argument
from pyterrier_lit.pe_rank import constrained


@pytest.fixture(scope="module")
def ranker():
    return PERank(str(FOLDER / "checkpoint"), device="cpu").load()


@torch.inference_mode()
def test_all_golden_windows_in_one_padded_batch_give_the_same_logits_and_orders(ranker):
    reader = ranker.network.read(
        [ids_of(ranker, window) for window in WINDOWS], [vectors_of(window) for window in WINDOWS]
    )
    logits = reader.start()
    for step in range(5):
        for row, window in enumerate(WINDOWS):
            expected = ARRAYS[f"w{window['i']}.step_logits"][step]
            assert np.abs(logits[row, : len(expected)].numpy() - expected).max() < 1e-4
        logits = reader.read(torch.tensor([[window["permutation"][step]] for window in WINDOWS]))[:, -1]
    orders, broken = constrained(ranker, [prompt(ranker, window) for window in WINDOWS])
    assert not any(broken)
    for order, window in zip(orders, WINDOWS, strict=True):
        canonical, n = window["canonical"], len(window["candidates"])
        assert [canonical[j] for j in order[: n - 1]] == [canonical[j] for j in window["permutation"][:-1]]


def test_rope_keeps_its_base_and_its_precision():
    for dtype in ("float32", "bfloat16", "float16"):
        body = PERank(str(FOLDER / "checkpoint"), device="cpu", dtype=dtype).load().network.body
        frequencies = body.rotary_emb.inv_freq
        assert frequencies.dtype == torch.float32
        assert frequencies.tolist() == pytest.approx([1e6 ** (-2 * i / 8) for i in range(4)], rel=1e-6)
        assert {parameter.dtype for parameter in body.parameters()} == {getattr(torch, dtype)}


@pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 0.2), ("float16", 0.05)])
@torch.inference_mode()
def test_half_precision_stays_close_when_fed_the_picks_of_the_reference(dtype, tolerance):
    ranker = PERank(str(FOLDER / "checkpoint"), device="cpu", dtype=dtype).load()
    for window in WINDOWS:
        reader = ranker.network.read([ids_of(ranker, window)], [vectors_of(window)])
        logits = reader.start()
        for step, picked in enumerate(window["permutation"]):
            difference = np.abs(logits[0].numpy() - ARRAYS[f"w{window['i']}.step_logits"][step]).max()
            assert 0 < difference < tolerance
            logits = reader.read(torch.tensor([[picked]]))[:, -1]


def test_positions_are_counted_from_the_first_real_token(ranker):
    short, long = WINDOWS[2], WINDOWS[1]
    reader = ranker.network.read([ids_of(ranker, short), ids_of(ranker, long)], [vectors_of(short), vectors_of(long)])
    common = reader.cache.get_seq_length()
    padding = len(long["input_ids"]) - len(short["input_ids"])
    assert common > 5
    assert reader.mask[0].tolist() == [1] * common + [0] * padding + [1] * (len(short["input_ids"]) - common)
    first, last = short["positions"][0]
    assert reader.positions[0, padding:].tolist() == list(range(first + common, last + 1))
    reader.start()
    for step in (1, 2):
        reader.read(torch.tensor([[0], [0]]))
        assert reader.positions.tolist() == [[short["positions"][step]], [long["positions"][step]]]


@torch.inference_mode()
def test_another_process_reads_on_with_a_pickled_network(ranker, tmp_path):
    (tmp_path / "network").write_bytes(pickle.dumps(ranker.network))
    code = f"""
import pathlib, pickle, torch
network = pickle.loads(pathlib.Path({str(tmp_path / "network")!r}).read_bytes())
ones = torch.ones(1, 1, dtype=torch.long)
network(network.body.get_input_embeddings()(ones), ones, ones - 1)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_cache_that_the_library_does_not_use_is_an_error(ranker, monkeypatch):
    """If transformers renamed the cache argument, the old name would be ignored. Each step would forget the prompt."""
    reader = ranker.network.read([ids_of(ranker, WINDOWS[0])], [vectors_of(WINDOWS[0])])
    reader.start()
    forward = ranker.network.body.forward

    def forgetful(**inputs):
        return forward(**{name: value for name, value in inputs.items() if name not in ("cache", "past_key_values")})

    monkeypatch.setattr(ranker.network.body, "forward", forgetful)
    with pytest.raises(RuntimeError, match=r"the cache of MistralModel holds 1 tokens after \d+ were read"):
        reader.read(torch.tensor([[0]]))


def test_a_model_whose_cache_has_no_known_name_is_an_error():
    class Renamed:
        def forward(self, inputs_embeds, memory=None):
            pass

    with pytest.raises(RuntimeError, match="Renamed of this version of transformers has no cache argument"):
        _cache_argument(Renamed)


def test_the_shared_words_end_before_the_last_token_and_before_any_vector(ranker):
    network, at = ranker.network, ranker.network.placeholder
    assert network._common([[5, 6, 7], [5, 6, 7]]) == [5, 6]  # shorter than the shortest prompt
    assert network._common([[5, 6, 7], [5, 6, 7, 8]]) == [5, 6]
    assert network._common([[5, at, 7], [5, at, 7]]) == [5]
    assert network._common([[5, 6, 7]]) == network._common([[5, 6], [6, 5]]) == []


def read_from(network, prompts, vectors):
    """For each prompt, the logits of two steps."""
    reader = network.read(prompts, vectors)
    first = reader.start()
    second = reader.read(torch.zeros(len(prompts), 1, dtype=torch.long))[:, -1]
    return [torch.cat([a[:n], b[:n]]) for a, b, n in zip(first, second, map(len, vectors), strict=True)]


WINDOWED = {
    "mistral": {"sliding_window": 12},
    "gemma2": {"sliding_window": 12, "head_dim": 8},
    "qwen2": {"sliding_window": 12, "use_sliding_window": True, "max_window_layers": 1},
    "phi3": {"sliding_window": 12, "pad_token_id": 0},
    "gpt_oss": {"sliding_window": 12, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
    "llama4_text": {"attention_chunk_size": 12, "head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 48},
    "llama": {},
    "gpt2": {},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 48},
}


def random_network(kind):
    torch.manual_seed(0)
    size = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 256}
    config = transformers.AutoConfig.for_model(kind, **size, **more, **WINDOWED[kind])
    body = transformers.AutoModel.from_config(config).eval()
    for parameter in body.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return VectorLM(body, torch.nn.Identity(), 59)


@pytest.mark.parametrize("kind", WINDOWED)
@torch.inference_mode()
def test_a_prompt_is_read_alike_alone_and_in_company_whatever_its_model_attends_to(kind):
    """Sliding-window attention counts padding between tokens as tokens. Models with such attention therefore share no
    common prefix."""
    network = random_network(kind)
    prompts = [[*range(1, 10), 59, 7, 59, *range(20, 20 + n), 4] for n in (3, 25, 14)]
    vectors = list(torch.nn.functional.normalize(torch.randn(3, 2, 32), dim=2))
    together = read_from(network, prompts, vectors)
    for prompt_ids, vector, logits in zip(prompts, vectors, together, strict=True):
        torch.testing.assert_close(read_from(network, [prompt_ids], [vector])[0], logits, atol=1e-3, rtol=1e-3)
    assert (network.read(prompts, vectors).cache is None) == (kind not in ("llama", "gpt2", "opt"))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
@torch.inference_mode()
def test_what_a_row_takes_back_is_as_if_it_had_not_been_read(kind):
    """After each pass, each row keeps its own number of vectors. The next pass continues after these vectors."""
    network = random_network(kind)
    prompts = [[*range(1, 10), *[59] * 9, *range(20, 20 + n), 4] for n in (3, 25, 14)]
    vectors = list(torch.nn.functional.normalize(torch.randn(3, 9, 32), dim=2))
    named = torch.randint(9, (3, 20), generator=torch.Generator().manual_seed(0))
    alone, together = (network.read(prompts, vectors) for _ in range(2))
    first = alone.start(), together.start()
    torch.testing.assert_close(*first)
    expected = torch.cat([alone.read(named[:, t : t + 1]) for t in range(20)], 1)
    assert len(together.costs) == 4
    length, at = together.cache.get_seq_length(), [0, 0, 0]
    for width, kept in ((4, [3, 1, 3]), (2, [1, 2, 1]), (5, [5, 2, 2]), (1, [1, 1, 1]), (3, [0, 3, 1]), (4, [2, 2, 4])):
        tokens = torch.stack([row[start : start + width] for row, start in zip(named, at, strict=True)])
        wrong = torch.arange(width) >= torch.tensor(kept)[:, None]
        logits = together.read(torch.where(wrong, 8 - tokens, tokens))
        for row, (start, count) in enumerate(zip(at, kept, strict=True)):
            close = {"atol": 1e-3, "rtol": 1e-3}
            torch.testing.assert_close(logits[row, :count], expected[row, start : start + count], **close)
        together.keep(kept)
        at = [start + count for start, count in zip(at, kept, strict=True)]
        length += max(kept)
        assert together.cache.get_seq_length() == together.mask.shape[1] == length


@torch.inference_mode()
def test_a_model_that_minds_gaps_is_asked_for_one_token_a_pass(monkeypatch):
    network = random_network("mistral")
    reader = network.read([[1, 2, 59, 59, 59, 59, 4]] * 2, list(torch.randn(2, 4, 32)))
    widths, read = [], reader.read
    monkeypatch.setattr(reader, "read", lambda tokens: widths.append(tokens.shape[1]) or read(tokens))
    orders, _ = in_turn(reader, [[i] for i in range(4)], [4, 3], [4, 4])
    assert reader.costs == (1.0,) and widths == [1, 1] and [len(order) for order in orders] == [3, 2]


@torch.inference_mode()
def test_one_prompt_alone_is_drafted_for_too():
    network = random_network("llama")
    reader = network.read([[1, 2, 59, 59, 4]], [torch.randn(2, 32)])
    reader.start()
    assert len(reader.costs) == 4
