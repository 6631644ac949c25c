"""experiments/counting.py: the networks have the papers' sizes, and the papers' claims follow from the counts."""

import counting
import pytest


def test_networks_have_the_papers_sizes():
    assert round(counting.parameters(counting.t5("base")) / 1e6) == 248  # T5 v1.1
    assert round(counting.parameters(counting.electra("base")) / 1e6) == 109


def test_flops_of_a_t5_are_those_of_its_products():
    width, inner, heads, layers = counting.T5["base"]
    length, passages, order = 10, counting.PASSAGES, counting.ORDER_PIECES + 3
    all_heads, total = heads * 64, passages * length
    encoder = layers * total * (2 * 4 * width * all_heads + 2 * 3 * width * inner + 2 * 2 * length * all_heads)
    decoder = layers * order * (2 * 6 * width * all_heads + 2 * 3 * width * inner + 2 * 2 * (order + total) * all_heads)
    states = layers * total * 2 * 2 * width * all_heads
    head = order * 2 * width * 32_128
    assert counting.lit5("base", tokens=length) * 1e12 == pytest.approx(encoder + decoder + states + head)


@pytest.mark.slow
def test_lit5s_ratio_and_figure_2_come_out():
    few, most = counting.language_model(counting.TEXT_TOKENS, counting.TEXT_ANSWER)
    assert few / counting.lit5("xl") < 7.4 < most / counting.lit5("xl") + 0.02
    assert round(counting.parameters(counting.mistral()) / 1e9, 2) == 7.24
    assert round(counting.parameters(counting.t5("xl")) / 1e9, 2) == 2.85
    figure = counting.figure2().set_index("model")
    assert figure["nDCG@10"].round(4).tolist() == [0.6098, 0.6377, 0.6520, 0.6486]
    assert figure["TFLOP"].round(1).tolist()[:3] == [3.2, 11.3, 42.0]


@pytest.mark.slow
def test_every_counted_claim_is_one_of_the_papers():
    found = counting.headlines()
    assert set(found["published"]) == {2.6, 7.4, 173, 24, 89, 95, 4.4} and found.notna().all(axis=None)
