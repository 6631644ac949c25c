"""Losses: the reference's numbers (golden/cross_encoder, golden/pe_rank), numbers worked out by hand, and what masks
and ties do."""

import math

import numpy as np
import pytest
import torch
from conftest import GOLDEN

from pyterrier_lit.training import losses

ARRAYS = np.load(GOLDEN / "cross_encoder" / "losses.npz")
CASES = sorted({name.split("/")[0] for name in ARRAYS.files})
REFERENCE = {  # name in lightning-ir -> our function
    "RankNet": losses.ranknet,
    "RankNet_T2": lambda s, t: losses.ranknet(s, t, temperature=2.0),
    "RankNet_T0.5": lambda s, t: losses.ranknet(s, t, temperature=0.5),
    "ApproxRankMSE_log2": losses.adr_mse,
    "ApproxRankMSE_log2_T0.1": lambda s, t: losses.adr_mse(s, t, temperature=0.1),
    "InfoNCE_LCE": losses.lce,
    "KLDivergence": losses.kl,
    "SupervisedMarginMSE": losses.margin_mse,
}
OVER_LISTS = [
    losses.ranknet,
    losses.weighted_ranknet,
    losses.margin_mse,
    losses.adr_mse,
    losses.lce,
    losses.kl,
    losses.list_mle,
]


def log(x):
    return math.log(x)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", REFERENCE)
@pytest.mark.parametrize("precision, rel, atol", [("f64", 1e-9, 1e-9), ("f32", 1e-5, 1e-4)])
def test_value_and_gradient_are_the_references(case, name, precision, rel, atol):
    dtype = torch.float64 if precision == "f64" else torch.float32
    scores = torch.tensor(ARRAYS[f"{case}/scores"], dtype=dtype, requires_grad=True)
    targets = torch.tensor(ARRAYS[f"{case}/targets"])
    loss = REFERENCE[name](scores, targets if targets.ndim == 2 else targets.amax(-1))
    loss.backward()
    assert loss.item() == pytest.approx(float(ARRAYS[f"{case}/{name}/{precision}/loss"]), rel=rel, abs=rel)
    assert np.abs(scores.grad.numpy() - ARRAYS[f"{case}/{name}/{precision}/grad"]).max() < atol * max(1, loss.item())


@pytest.mark.parametrize("k", [0, 1, 2])
def test_list_mle_is_pe_ranks(k):
    arrays = np.load(GOLDEN / "pe_rank" / "arrays.npz")
    logits, ranking = torch.tensor(arrays[f"loss{k}.logits"]), torch.tensor(arrays[f"loss{k}.ranking"])
    targets = torch.empty_like(ranking).scatter_(
        1, ranking - ranking.min(), torch.arange(ranking.shape[1], 0, -1).expand_as(ranking)
    )
    assert losses.list_mle(logits, targets).item() == pytest.approx(float(arrays[f"loss{k}.loss"]), abs=1e-5)


@pytest.mark.parametrize(
    "loss, scores, targets, expected",
    [
        (losses.ranknet, [[1.0, 3.0]], [[1, 0]], log(1 + math.exp(2))),
        (losses.ranknet, [[1.0, 3.0, 0.0]], [[1, 0, 0]], (log(1 + math.exp(2)) + log(1 + math.exp(-1))) / 2),
        (
            losses.weighted_ranknet,
            [[1.0, 3.0, 0.0]],
            [[3, 2, 1]],
            (log(1 + math.exp(2)) / 3 + log(1 + math.exp(-1)) / 4 + log(1 + math.exp(-3)) / 5) / 3,
        ),
        (losses.margin_mse, [[1.0, 3.0]], [[5, 2]], (1 - 3 - (5 - 2)) ** 2),
        (losses.mse, [[1.0, 3.0]], [[5, 2]], ((1 - 5) ** 2 + (3 - 2) ** 2) / 2),
        # equal scores: both passages have the rank 1.5, and the targets have the ranks 1 and 2
        (losses.adr_mse, [[0.0, 0.0]], [[2, 1]], (0.25 / 1 + 0.25 / math.log2(3)) / 2),
        (losses.lce, [[0.0, log(3)]], [[0, 1]], -log(3 / 4)),
        (losses.kl, [[0.0, 0.0]], [[log(3), 0.0]], 3 / 4 * log(3 / 2) + 1 / 4 * log(1 / 2)),
        (losses.list_mle, [[log(2), 0.0, 0.0]], [[3, 2, 1]], (-log(2 / 4) - log(1 / 2) - log(1)) / 3),
        (lambda s, t: losses.list_mle(s, t, reduction="sum"), [[log(2), 0.0, 0.0]], [[1, 2, 3]], log(4) + log(3)),
    ],
)
def test_values_worked_out_by_hand(loss, scores, targets, expected):
    assert loss(torch.tensor(scores), torch.tensor(targets)).item() == pytest.approx(expected, rel=1e-5)


def test_the_better_passage_pulls_up():
    """The formula of RankNet that Rank-DistiLLM prints has the wrong sign."""
    for loss in OVER_LISTS:
        scores = torch.zeros(1, 3, requires_grad=True)
        loss(scores, torch.tensor([[3.0, 2.0, 1.0]])).backward()
        assert scores.grad[0, 0] < 0 < scores.grad[0, 2], loss


@pytest.mark.parametrize("loss", [*OVER_LISTS, losses.mse])
def test_what_stands_outside_the_mask_changes_nothing(loss):
    torch.manual_seed(0)
    scores, targets = torch.randn(2, 5, dtype=torch.float64), torch.tensor([[5.0, 1, 3, 2, 4], [2, 1, 3, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    results = []
    for noise in (0.0, 1e6, float("nan")):
        asked = scores.masked_fill(~mask, noise).requires_grad_(True)
        value = loss(asked, targets.masked_fill(~mask, noise), mask)
        value.backward()
        results.append((value.item(), asked.grad.tolist()))
        assert asked.grad[~mask].tolist() == [0, 0]
    assert results[0] == results[1] == results[2]


def test_mse_is_numpys_with_its_gradient_and_each_passage_weighs_the_same():
    chance = np.random.default_rng(3)
    s, t, n = chance.normal(size=(4, 7)), chance.normal(size=(4, 7)) * 9, np.array([7, 1, 4, 6])
    mask = np.arange(7) < n[:, None]
    scores = torch.tensor(s, requires_grad=True)
    loss = losses.mse(scores, torch.tensor(t), torch.tensor(mask))
    loss.backward()
    assert loss.item() == pytest.approx(((s - t)[mask] ** 2).mean(), rel=1e-12)
    assert np.abs(scores.grad.numpy() - np.where(mask, 2 * (s - t) / n.sum(), 0)).max() < 1e-12


@pytest.mark.parametrize("loss", [losses.lce, losses.kl, losses.list_mle])
def test_lists_of_unequal_length_weigh_the_same(loss):
    long, short = torch.tensor([[0.3, -1.0, 2.0]]), torch.tensor([[1.0, 0.5]])
    targets = torch.tensor([[1.0, 3, 2], [1, 2, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    together = loss(torch.tensor([[0.3, -1.0, 2.0], [1.0, 0.5, 7.0]]), targets, mask)
    apart = (loss(long, targets[:1]) + loss(short, targets[1:, :2])) / 2
    assert together.item() == pytest.approx(apart.item(), rel=1e-6)


@pytest.mark.parametrize("loss", OVER_LISTS)
def test_a_single_passage_has_nothing_to_learn_from(loss):
    scores = torch.tensor([[3.0]], requires_grad=True)
    value = loss(scores, torch.tensor([[1.0]]))
    value.backward()
    assert value.item() == pytest.approx(0) and scores.grad.tolist() == [[0]]


@pytest.mark.parametrize("loss", [losses.ranknet, losses.weighted_ranknet, losses.margin_mse])
def test_ties_make_no_pair(loss):
    scores = torch.tensor([[3.0, 1.0, 2.0]], requires_grad=True)
    value = loss(scores, torch.tensor([[1.0, 1.0, 1.0]]))
    value.backward()
    assert value.item() == 0 and scores.grad.tolist() == [[0, 0, 0]]
    assert loss(scores, torch.tensor([[2.0, 1.0, 1.0]])).item() > 0


@pytest.mark.parametrize("loss", [losses.adr_mse, losses.list_mle])
def test_ties_are_ranked_as_they_stand(loss):
    scores = torch.tensor([[3.0, 1.0, 2.0]])
    assert loss(scores, torch.tensor([[1.0, 1.0, 1.0]])) == loss(scores, torch.tensor([[3.0, 2.0, 1.0]]))


@pytest.mark.parametrize("loss", OVER_LISTS)
def test_a_shift_of_all_scores_changes_nothing(loss):
    torch.manual_seed(0)
    scores, targets = torch.randn(3, 6, dtype=torch.float64), torch.randint(0, 4, (3, 6)).double()
    assert loss(scores, targets).item() == pytest.approx(loss(scores + 7, targets).item(), rel=1e-9)


def test_list_mle_reads_the_scores_of_each_rank_from_its_own_row():
    targets = torch.tensor([[1.0, 2.0, 3.0]])  # best first, the passages are 2, 1, 0
    by_rank = torch.tensor([[[0.0, 0, log(2)], [0, log(3), 99], [0, 99, 99]]])
    assert losses.list_mle(by_rank, targets, reduction="sum").item() == pytest.approx(log(4 / 2) + log(4 / 3))


def test_list_kl_is_zero_between_equals_and_worked_out_by_hand():
    targets = torch.tensor([[2.0, 1.0]])
    equal, taught = torch.zeros(1, 2), torch.tensor([[log(3), 0.0]])
    assert losses.list_kl(taught, taught + 5, targets).item() == pytest.approx(0, abs=1e-6)
    expected = 3 / 4 * log(3 / 2) + 1 / 4 * log(1 / 2)  # at the first rank; 0 at the second
    assert losses.list_kl(equal, taught, targets).item() == pytest.approx(expected)
    assert losses.list_kl(equal, taught, targets, reduction="mean").item() == pytest.approx(expected / 2)


def test_decayed_cross_entropy_weighs_later_tokens_less():
    logits = torch.tensor([[[0.0, 0.0], [0.0, log(3)]]])
    labels = torch.tensor([[0, 1]])
    first, second = -log(1 / 2), -log(3 / 4)
    assert losses.decayed_cross_entropy(logits, labels, decay=0.5).item() == pytest.approx((first + 0.5 * second) / 1.5)
    assert losses.decayed_cross_entropy(logits, labels, decay=1.0).item() == pytest.approx((first + second) / 2)
    masked = losses.decayed_cross_entropy(logits, torch.tensor([[0, -100]]), torch.tensor([[1, 0]]).bool())
    assert masked.item() == pytest.approx(first)


def test_an_unknown_reduction_is_named():
    with pytest.raises(ValueError, match="reduction='max'; wanted 'mean' or 'sum'"):
        losses.list_mle(torch.zeros(1, 2), torch.zeros(1, 2), reduction="max")
