"""models.attention: matrix products give the numbers of the fused kernel, alone and in a model of transformers."""

import pytest
import torch
import torch.nn.functional as F
import transformers

from pyterrier_lit.models import attention
from pyterrier_lit.models.attention import FEW, FEW_WITH_SHARED_KEYS, attend, attention_weights, use_for_few_queries
from pyterrier_lit.models.vector_lm import _cache_argument


@pytest.fixture
def fused(monkeypatch):
    """A list with the number of queries in each call of the fused kernel."""
    calls, kernel = [], F.scaled_dot_product_attention

    def counted(query, *arguments, **named):
        calls.append(query.shape[2])
        return kernel(query, *arguments, **named)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    return calls


@pytest.mark.parametrize("dtype, tolerance", [("float32", 5e-6), ("bfloat16", 0.02)])
@pytest.mark.parametrize("kind", ["none", "boolean", "added"])
@pytest.mark.parametrize("scale", [None, 1.0])
def test_few_queries_give_what_the_fused_kernel_gives(fused, dtype, tolerance, kind, scale):
    torch.manual_seed(0)
    query, keys, values = (torch.randn(2, 3, n, 8).to(getattr(torch, dtype)) for n in (FEW, 50, 50))
    seen = torch.rand(2, 1, FEW, 50) > 0.3
    added = torch.randn(2, 3, FEW, 50).masked_fill(~seen, float("-inf")).to(query.dtype)
    mask = {"none": None, "boolean": seen, "added": added}[kind]
    ours = attend(query, keys, values, mask, scale)
    assert not fused and ours.dtype == query.dtype
    theirs = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
    assert (ours - theirs).abs().max() < tolerance


def test_many_queries_and_other_dtypes_take_the_fused_kernel(fused):
    for m, dtype in ((FEW + 1, torch.float32), (1, torch.float64)):
        query, keys = torch.randn(1, 2, m, 8, dtype=dtype), torch.randn(1, 2, 20, 8, dtype=dtype)
        attend(query, keys, keys)
    assert fused == [FEW + 1, 1]


def test_a_query_that_sees_nothing_is_not_nan():
    query, keys = torch.randn(1, 1, 2, 8), torch.randn(1, 1, 20, 8)
    assert attention_weights(query, keys, torch.zeros(1, 1, 2, 20, dtype=torch.bool)).isfinite().all()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("padding", [0, 3])
@torch.inference_mode()
def test_a_language_model_reads_few_tokens_as_it_reads_them_all(fused, groups, padding):
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4 // groups, sliding_window=None,
    )  # fmt: skip
    model = transformers.MistralModel(config).eval()
    ids = torch.randint(50, (2, 30))
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[0, :padding] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    whole = model(input_ids=ids, attention_mask=mask, position_ids=positions).last_hidden_state
    use_for_few_queries(model)
    assert model.config._attn_implementation == attention.NAME
    fused.clear()
    name, cache, parts = _cache_argument(transformers.MistralModel), None, []
    for start, stop in ((0, 20), (20, 21), (21, 25), (25, 30)):
        read = model(
            input_ids=ids[:, start:stop], attention_mask=mask[:, :stop], position_ids=positions[:, start:stop],
            use_cache=True, **{name: cache},
        )  # fmt: skip
        cache = read[name]
        parts.append(read.last_hidden_state)
    inside = mask.bool()
    torch.testing.assert_close(torch.cat(parts, 1)[inside], whole[inside], atol=1e-5, rtol=1e-4)
    most = FEW if groups == 1 else FEW_WITH_SHARED_KEYS
    assert set(fused) == {m for m in (20, 1, 4, 5) if m > most}
