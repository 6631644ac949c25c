"""Losses: pure functions of (scores, targets) that return a scalar. This module does not deal with texts or models.

The scores s and the targets t are tensors of shape (Q, N): Q queries with up to N passages each. In the formulas, s_i
is the score and t_i is the target of passage i of a query. Higher values are better. `mask` is a boolean tensor (Q, N)
that is true where there is a passage. If `mask` is None, every query has N passages. Values outside the mask have no
effect.

Some losses are means over pairs of passages (i, j). The two passages of a pair have the same query, and t_i is higher
than t_j. A query without a pair contributes nothing to these losses. If no query has a pair, these losses are 0.

Rank-DistiLLM is arXiv 2405.07920; its original code is in the library lightning-ir. PE-Rank is arXiv 2406.14848.
"""

import torch
import torch.nn.functional as F

Mask = torch.Tensor | None  # boolean (Q, N), or None if every query has N passages


def ranknet(scores: torch.Tensor, targets: torch.Tensor, mask: Mask = None, temperature: float = 1.0) -> torch.Tensor:
    """RankNet: the mean of log(1 + exp(-T (s_i - s_j))) over the pairs in the batch. T is `temperature`.

    Sources: Burges et al., ICML 2005; Rank-DistiLLM. The formula printed in Rank-DistiLLM has the wrong sign and a sum
    over the pairs. This function takes the mean, as lightning-ir does.
    """
    return _mean(F.softplus(-temperature * _differences(_filled(scores, mask))), _better(targets, mask))


def weighted_ranknet(scores: torch.Tensor, targets: torch.Tensor, mask: Mask = None) -> torch.Tensor:
    """RankNet with larger weights for pairs near the top of the teacher's ranking. In the teacher's ranking, the
    passages are sorted by target, and passages with equal targets keep their order. r_i = 1, 2, ... is the rank of
    passage i in this ranking. The loss is the mean over the pairs in the batch of::

        log(1 + exp(-(s_i - s_j))) / (r_i + r_j)

    Source: FIRST, arXiv 2406.15657, section 3.2. The formula in the paper is a sum. The paper's code takes the mean
    over the pairs of each query; this function takes the mean over the pairs of the batch.
    """
    inside = _inside(scores, mask)
    rank = 1 + _order(targets, inside).argsort(dim=1).to(scores.dtype)
    weights = 1 / (rank[:, :, None] + rank[:, None])
    return _mean(F.softplus(-_differences(_filled(scores, mask))) * weights, _better(targets, mask))


def margin_mse(scores: torch.Tensor, targets: torch.Tensor, mask: Mask = None) -> torch.Tensor:
    """Margin-MSE: the mean of ((s_i - s_j) - (t_i - t_j))^2 over the pairs in the batch.

    Source: Hofstätter et al., arXiv 2010.02666. In that paper, a training example is a query with one pair. This
    function uses all pairs of each query, as lightning-ir does.
    """
    differences = _differences(_filled(scores, mask)) - _differences(_filled(targets, mask))
    return _mean(differences.square(), _better(targets, mask))


def mse(scores: torch.Tensor, targets: torch.Tensor, mask: Mask = None) -> torch.Tensor:
    """MSE: the mean of (s_i - t_i)^2 over all passages in the batch. The student learns the teacher's scores
    themselves. Of the losses in this module, only this loss changes if a constant is added to all scores of a query.

    Source: Hinton et al., arXiv 1503.02531, section 2.1.
    """
    inside = _inside(scores, mask)
    return _mean((_filled(scores, mask) - _filled(targets, mask)).square(), inside)


def adr_mse(scores: torch.Tensor, targets: torch.Tensor, mask: Mask = None, temperature: float = 1.0) -> torch.Tensor:
    """Approximate discounted rank MSE: the mean of (p_i - r_i)^2 / log2(r_i + 1) over all passages in the batch.

    r_i = 1, 2, ... is the teacher's rank of passage i, as in `weighted_ranknet`. p_i is the approximate rank of passage
    i by score. T is `temperature`::

        p_i = 1 + sum over j != i of sigmoid((s_j - s_i) / T)

    Source: Rank-DistiLLM, appendix B. The formula for p_i in that paper does not give a rank. The formula used here is
    from Qin et al., 2010. The loss in the paper is a sum over the passages. This function takes the mean, and computes
    the weights 1 / log2(r_i + 1) in float32, as lightning-ir does.
    """
    inside = _inside(scores, mask)
    pairs = inside[:, :, None] & inside[:, None]  # (Q, i, j)
    higher = (-_differences(_filled(scores, mask)) / temperature).sigmoid()
    approximate = 0.5 + torch.where(pairs, higher, 0).sum(2)  # the sum includes sigmoid(0) = 0.5 for the pair (i, i)
    rank = 1 + _order(targets, inside).argsort(dim=1)
    weight = 1 / torch.log2(rank.float() + 1)
    return _mean((approximate - rank).square() * weight, inside)


def lce(scores: torch.Tensor, targets: torch.Tensor, mask: Mask = None) -> torch.Tensor:
    """Localised contrastive estimation (InfoNCE): the mean over queries of -log softmax(s) at the passage with the
    highest target.

    If several passages of a query have the highest target, the first of these passages is used. Sources: Gao et al.,
    ECIR 2021; Rank-DistiLLM, stage 1.
    """
    inside = _inside(scores, mask)
    return F.cross_entropy(scores.masked_fill(~inside, float("-inf")), _order(targets, inside)[:, 0])


def kl(scores: torch.Tensor, targets: torch.Tensor, mask: Mask = None, temperature: float = 1.0) -> torch.Tensor:
    """KL divergence: the mean over queries of KL(softmax(t / T) || softmax(s)). The targets are a teacher's scores. T
    is `temperature`.

    Source: Hinton et al., arXiv 1503.02531. They divide the student's scores by T as well. This function divides only
    the targets. With T = 1, this loss equals the KL divergence in lightning-ir.
    """
    inside = _inside(scores, mask)
    teacher = (targets / temperature).to(scores.dtype).masked_fill(~inside, float("-inf")).log_softmax(1)
    return _divergence(teacher, scores.masked_fill(~inside, float("-inf")).log_softmax(1), inside).sum(1).mean()


def list_mle(scores: torch.Tensor, targets: torch.Tensor, mask: Mask = None, reduction: str = "mean") -> torch.Tensor:
    """ListMLE: the negative log-likelihood of the teacher's ranking in the Plackett-Luce model. In the teacher's
    ranking, the passages are sorted by target, and passages with equal targets keep their order. The loss at rank i is
    -log softmax(s) at the passage of rank i. At this rank, s are the scores of the passages that are not yet ranked:
    those at rank i and below.

    Args:
        scores: (Q, N) if the passages have the same scores at all ranks. (Q, N, N) if there are new scores at each
            rank, as in PE-Rank: for each query and each rank, the scores of the N passages.
        reduction: "mean" averages the losses at the ranks of a query, and "sum" adds them. The result is the mean over
            the queries.

    Sources: Xia et al., ICML 2008; PE-Rank, stage 2.
    """
    logs, ranks = _stepwise(scores, targets, mask)
    return _over_ranks(-logs.diagonal(dim1=1, dim2=2), ranks, reduction)


def list_kl(
    scores: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor, mask: Mask = None, reduction: str = "sum"
) -> torch.Tensor:
    """KL divergence at each rank: KL(softmax(teacher) || softmax(scores)). At each rank, both softmaxes are over the
    passages that are not yet ranked, as in `list_mle`.

    Args:
        scores: the student's scores, in one of the shapes that `list_mle` accepts.
        teacher: the teacher's scores, in one of the shapes that `list_mle` accepts.
        targets: (Q, N). The passages are ranked from the highest target to the lowest.
        reduction: "sum" adds the divergences at the ranks of a query, and "mean" averages them. The result is the mean
            over the queries.

    Gradients flow into the student's scores and into the teacher's scores. Source: PE-Rank, stage 2. The code of
    PE-Rank uses the sum.
    """
    logs, ranks = _stepwise(scores, targets, mask)
    taught, _ = _stepwise(teacher, targets, mask)
    return _over_ranks(_divergence(taught, logs, logs.isfinite()).sum(2), ranks, reduction)


def decayed_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, mask: Mask = None, decay: float = 0.95
) -> torch.Tensor:
    """Weighted cross-entropy. The loss of a token is -log softmax(logits) at the token's label. The result is the
    weighted mean over all tokens in the batch. The token at position t of a sequence (t = 0, 1, ...) has the weight
    decay^t.

    Args:
        logits: (B, T, V), for B sequences of T tokens and a vocabulary of V tokens.
        labels: (B, T), the token ids to predict.
        mask: (B, T), true where there is a token. None means that every sequence has T tokens.
        decay: the weight of a token divided by the weight of the token before it. With decay=1, the loss is the
            ordinary cross-entropy of a language model.

    Source: LiT and Lean, ECIR 2025, section 3. The paper does not state how the weights are normalised. This function
    divides the weights by their sum.
    """
    inside = _inside(labels, mask)
    weights = decay ** torch.arange(labels.shape[1], device=labels.device) * inside
    losses = F.cross_entropy(logits.float().mT, labels.masked_fill(~inside, 0), reduction="none")
    return (losses * weights).sum() / weights.sum().clamp_min(1e-9)


def _inside(values: torch.Tensor, mask: Mask) -> torch.Tensor:
    return torch.ones_like(values, dtype=torch.bool) if mask is None else mask.bool()


def _filled(values: torch.Tensor, mask: Mask) -> torch.Tensor:
    return values if mask is None else values.masked_fill(~mask.bool(), 0)


def _differences(values: torch.Tensor) -> torch.Tensor:
    """(Q, N) -> (Q, N, N), the differences v_i - v_j of the values of each query."""
    return values[:, :, None] - values[:, None]


def _better(targets: torch.Tensor, mask: Mask) -> torch.Tensor:
    """(Q, N) -> boolean (Q, N, N). Entry (i, j) of a query is true if i and j are passages and the target of i is
    higher than the target of j."""
    inside = _inside(targets, mask)
    return (_differences(_filled(targets, mask)) > 0) & inside[:, :, None] & inside[:, None]


def _order(targets: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """Return the positions (Q, N) of the passages in descending order of target. Positions with equal targets keep
    their order. Positions outside the mask come last."""
    last = _filled(targets, inside).min() - 1
    return targets.masked_fill(~inside, last).argsort(dim=1, descending=True, stable=True)


def _mean(values: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    return torch.where(where, values, 0).sum() / where.sum().clamp_min(1)


def _divergence(teacher: torch.Tensor, student: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Return the terms of KL(teacher || student), one per element of the tensors. `teacher` and `student` hold
    log-probabilities. A term is 0 if `where` is false for its element."""
    teacher, student = teacher.masked_fill(~where, 0), student.masked_fill(~where, 0)
    return torch.where(where, teacher.exp() * (teacher - student), 0)


def _stepwise(scores: torch.Tensor, targets: torch.Tensor, mask: Mask) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two tensors. The first tensor (Q, N, N) holds the log softmax over the passages that are not yet ranked,
    for each query and each rank. Its last dimension has the passages in the order of their ranks. Passages that are
    already ranked have -inf. The second tensor (Q, N) is a mask: for a query with n passages, the mask is true at the
    first n ranks. `scores` is (Q, N) or (Q, N, N), as in `list_mle`."""
    inside = _inside(targets, mask)
    order = _order(targets, inside)
    scores = scores if scores.ndim == 3 else scores[:, None].expand(-1, scores.shape[1], -1)
    scores = scores.masked_fill(~(inside[:, None] & inside[:, :, None]), 0)
    by_rank = scores.gather(2, order[:, None].expand_as(scores))
    ranks = inside.gather(1, order)
    left = torch.ones_like(by_rank, dtype=torch.bool).triu() & ranks[:, None]
    outside = ~left & ranks[:, :, None]  # rows after the last rank of a query are not used
    return by_rank.masked_fill(outside, float("-inf")).log_softmax(2), ranks


def _over_ranks(values: torch.Tensor, ranks: torch.Tensor, reduction: str) -> torch.Tensor:
    """Reduce `values` (Q, N) to the sum or the mean over the ranks of each query. Return the mean of the results over
    the queries. `ranks` (Q, N) is the mask that `_stepwise` returns. Raises ValueError if `reduction` is neither "mean"
    nor "sum"."""
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r}; wanted 'mean' or 'sum' over the ranks of a list")
    total = torch.where(ranks, values, 0).sum(1)
    return (total / ranks.sum(1).clamp_min(1) if reduction == "mean" else total).mean()
