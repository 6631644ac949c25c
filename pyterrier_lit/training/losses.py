"""Losses: pure functions of (scores, targets) that give one number. Knows no texts and no models.

Scores s and targets t are (Q, N): Q queries with N passages, higher is better. `mask` (Q, N) is true where there is a
passage, None where every list has N; what stands outside it changes nothing. Losses over pairs take nothing from a list
without any (one passage, or ties alone), and are 0 when no list has one.
"""

import torch
import torch.nn.functional as F

Mask = torch.Tensor | None


def ranknet(scores: torch.Tensor, targets: torch.Tensor, mask: Mask = None, temperature: float = 1.0) -> torch.Tensor:
    """Mean over all pairs of the batch with t_i > t_j of log(1 + exp(-T (s_i - s_j))). Ties make no pair.

    Source: Burges et al., ICML 2005; Rank-DistiLLM, whose printed sign is the wrong way round; a mean as in
    lightning-ir, where the paper prints a sum.
    """
    return _mean(F.softplus(-temperature * _differences(_filled(scores, mask))), _better(targets, mask))


def weighted_ranknet(scores: torch.Tensor, targets: torch.Tensor, mask: Mask = None) -> torch.Tensor:
    """RankNet whose pairs weigh more the higher they stand: mean over all pairs of the batch with t_i > t_j of::

        log(1 + exp(-(s_i - s_j))) / (r_i + r_j)
        r_i = 1, 2, ... by targets, ties by positions           the teacher's rank

    Source: FIRST, arXiv 2406.15657, section 3.2, which prints a sum, and its code, which takes the mean over the pairs
    of each list.
    """
    inside = _inside(scores, mask)
    rank = 1 + _order(targets, inside).argsort(dim=1).to(scores.dtype)
    weights = 1 / (rank[:, :, None] + rank[:, None])
    return _mean(F.softplus(-_differences(_filled(scores, mask))) * weights, _better(targets, mask))


def margin_mse(scores: torch.Tensor, targets: torch.Tensor, mask: Mask = None) -> torch.Tensor:
    """Mean over all pairs of the batch with t_i > t_j of ((s_i - s_j) - (t_i - t_j))^2.

    Source: Hofstätter et al., arXiv 2010.02666, over all pairs of a list as in lightning-ir.
    """
    differences = _differences(_filled(scores, mask)) - _differences(_filled(targets, mask))
    return _mean(differences.square(), _better(targets, mask))


def mse(scores: torch.Tensor, targets: torch.Tensor, mask: Mask = None) -> torch.Tensor:
    """Mean over all passages of the batch of (s_i - t_i)^2: the student learns a teacher's scores themselves.

    Unlike the others it asks for the teacher's scale too. Source: Hinton et al., arXiv 1503.02531, section 2.1, where
    matching the logits is the limit of high temperatures.
    """
    inside = _inside(scores, mask)
    return _mean((_filled(scores, mask) - _filled(targets, mask)).square(), inside)


def adr_mse(scores: torch.Tensor, targets: torch.Tensor, mask: Mask = None, temperature: float = 1.0) -> torch.Tensor:
    """Approximate discounted rank MSE: mean over all passages of the batch of (p_i - r_i)^2 / log2(r_i + 1), with::

        p_i = 1 + sum over j != i of sigmoid((s_j - s_i) / T)   the approximate rank
        r_i = 1, 2, ... by targets, ties by positions           the teacher's rank

    Source: Rank-DistiLLM, appendix B, whose printed p_i is no rank (this is that of Qin et al., 2010); a mean as in
    lightning-ir, where the paper prints a sum. The weight is float32 as there.
    """
    inside = _inside(scores, mask)
    pairs = inside[:, :, None] & inside[:, None]  # (Q, i, j)
    higher = (-_differences(_filled(scores, mask)) / temperature).sigmoid()
    approximate = 0.5 + torch.where(pairs, higher, 0).sum(2)  # the pair of i with itself adds the other half
    rank = 1 + _order(targets, inside).argsort(dim=1)
    weight = 1 / torch.log2(rank.float() + 1)
    return _mean((approximate - rank).square() * weight, inside)


def lce(scores: torch.Tensor, targets: torch.Tensor, mask: Mask = None) -> torch.Tensor:
    """Localised contrastive estimation, InfoNCE: mean over queries of -log softmax(s) at the passage with the
    highest target.

    Among several with that target it is the first one. Source: Gao et al., ECIR 2021; Rank-DistiLLM, stage 1.
    """
    inside = _inside(scores, mask)
    return F.cross_entropy(scores.masked_fill(~inside, float("-inf")), _order(targets, inside)[:, 0])


def kl(scores: torch.Tensor, targets: torch.Tensor, mask: Mask = None, temperature: float = 1.0) -> torch.Tensor:
    """Mean over queries of KL(softmax(t / T) || softmax(s)): the targets are a teacher's scores.

    Source: Hinton et al., arXiv 1503.02531; with T = 1 equal to lightning-ir's.
    """
    inside = _inside(scores, mask)
    teacher = (targets / temperature).to(scores.dtype).masked_fill(~inside, float("-inf")).log_softmax(1)
    return _divergence(teacher, scores.masked_fill(~inside, float("-inf")).log_softmax(1), inside).sum(1).mean()


def list_mle(scores: torch.Tensor, targets: torch.Tensor, mask: Mask = None, reduction: str = "mean") -> torch.Tensor:
    """The likelihood of the target order, one rank after the other (Plackett and Luce): mean over queries of the mean
    (reduction="mean") or sum ("sum") over ranks i of::

        -log softmax(s_i over the passages not yet ranked) at the passage of rank i

    scores: (Q, N), or (Q, N, N) where row i holds the scores at rank i, as PE-Rank's decoder gives anew at each step.
    Ties are ranked in the order of their positions. Source: Xia et al., ICML 2008; PE-Rank, stage 2.
    """
    logs, ranks = _stepwise(scores, targets, mask)
    return _over_ranks(-logs.diagonal(dim1=1, dim2=2), ranks, reduction)


def list_kl(
    scores: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor, mask: Mask = None, reduction: str = "sum"
) -> torch.Tensor:
    """Mean over queries of the sum or mean over ranks of KL(teacher || student), each over the passages not yet ranked.

    scores, teacher: as `list_mle` takes them; the gradient reaches both. Source: PE-Rank, stage 2; a sum in its code.
    """
    logs, ranks = _stepwise(scores, targets, mask)
    taught, _ = _stepwise(teacher, targets, mask)
    return _over_ranks(_divergence(taught, logs, logs.isfinite()).sum(2), ranks, reduction)


def decayed_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, mask: Mask = None, decay: float = 0.95
) -> torch.Tensor:
    """Mean over all tokens of the batch of -log softmax(logits) at the label; token t of an answer weighs decay^t.

    logits: (B, T, V). labels: (B, T). mask: (B, T). decay=1 is the ordinary cross-entropy of a writer.
    Source: LiT and Lean, ECIR 2025, section 3, which does not say how the weights are normalised: here by their sum.
    """
    inside = _inside(labels, mask)
    weights = decay ** torch.arange(labels.shape[1], device=labels.device) * inside
    losses = F.cross_entropy(logits.float().mT, labels.masked_fill(~inside, 0), reduction="none")
    return (losses * weights).sum() / weights.sum().clamp_min(1e-9)


def _inside(values: torch.Tensor, mask: Mask) -> torch.Tensor:
    return torch.ones_like(values, dtype=torch.bool) if mask is None else mask.bool()


def _filled(values: torch.Tensor, mask: Mask) -> torch.Tensor:
    """Zero outside the mask, where there may be anything."""
    return values if mask is None else values.masked_fill(~mask.bool(), 0)


def _differences(values: torch.Tensor) -> torch.Tensor:
    """(Q, N) -> v_i - v_j (Q, N, N)"""
    return values[:, :, None] - values[:, None]


def _better(targets: torch.Tensor, mask: Mask) -> torch.Tensor:
    """(Q, N) -> (Q, i, j), whether i and j are passages and i's target is higher."""
    inside = _inside(targets, mask)
    return (_differences(_filled(targets, mask)) > 0) & inside[:, :, None] & inside[:, None]


def _order(targets: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """Positions by descending target, ties as they stand; what is not inside comes last."""
    last = _filled(targets, inside).min() - 1
    return targets.masked_fill(~inside, last).argsort(dim=1, descending=True, stable=True)


def _mean(values: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    return torch.where(where, values, 0).sum() / where.sum().clamp_min(1)


def _divergence(teacher: torch.Tensor, student: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Elementwise terms of KL from logarithms; 0 outside, where both may be -inf."""
    teacher, student = teacher.masked_fill(~where, 0), student.masked_fill(~where, 0)
    return torch.where(where, teacher.exp() * (teacher - student), 0)


def _stepwise(scores: torch.Tensor, targets: torch.Tensor, mask: Mask) -> tuple[torch.Tensor, torch.Tensor]:
    """log softmax at each rank over the passages not yet ranked, (Q, rank, passages by rank), -inf on the others; and
    which ranks (Q, N) there are."""
    inside = _inside(targets, mask)
    order = _order(targets, inside)
    scores = scores if scores.ndim == 3 else scores[:, None].expand(-1, scores.shape[1], -1)
    scores = scores.masked_fill(~(inside[:, None] & inside[:, :, None]), 0)
    by_rank = scores.gather(2, order[:, None].expand_as(scores))
    ranks = inside.gather(1, order)
    left = torch.ones_like(by_rank, dtype=torch.bool).triu() & ranks[:, None]
    outside = ~left & ranks[:, :, None]  # rows that are no rank stay as they are: nothing reads them
    return by_rank.masked_fill(outside, float("-inf")).log_softmax(2), ranks


def _over_ranks(values: torch.Tensor, ranks: torch.Tensor, reduction: str) -> torch.Tensor:
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r}; wanted 'mean' or 'sum' over the ranks of a list")
    total = torch.where(ranks, values, 0).sum(1)
    return (total / ranks.sum(1).clamp_min(1) if reduction == "mean" else total).mean()
