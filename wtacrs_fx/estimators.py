"""Estimators of a sum of outer products from k of its M terms.

The weight gradient of a linear layer is ``G^T H = sum_i g_i h_i^T`` over the rows i (tokens) of its input ``H`` and
of the gradient ``G`` of its output. Each function here takes an importance ``w_i >= 0`` per row and returns k row
indices and scales such that ``sum_j scale_j g_{row_j} h_{row_j}^T`` estimates that sum. All but :func:`topk` are
unbiased: a row with ``w_i > 0`` has expected total scale 1. A row with ``w_i = 0`` is never used (unless all are).
An importance with leading dimensions (the heads of attention) is many draws at once: [..., M] gives [..., k], and the
random numbers have those leading dimensions too.

Every function is pure, makes no tensor whose shape depends on data, never waits for the device, and computes in
float64. The random numbers are an argument. Notation: ``p_i = w_i / sum(w)``; source: Liu et al., "Winner-Take-All
Column Row Sampling for Memory Efficient Adaptation of Language Model", NeurIPS 2023 (arXiv 2305.15265), section 3.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Uniform = Callable[[int, int], Tensor]
"""``uniform(stream, n)``: [..., n] independent float64 numbers in [0, 1); different streams are independent."""

NOT_FINITE = 1e9
"""Importance of a row that is not finite, where the largest finite one has 1. Float64 has digits left for the others."""

Selection = tuple[Tensor, Tensor]
"""(row index [k] int64, scale [k] float32)."""


def sanitize(importance: Tensor) -> Tensor:
    """Importance [M] of any floating dtype -> finite, non-negative float64 [M] with a positive sum.

    A row that is not finite (its gradient will not be finite either) counts as :data:`NOT_FINITE` times the largest
    finite row, so that it is kept and an overflow shows in the sampled gradient as it does in the exact one. Negative
    values count as zero; all zeros become all ones.
    """
    w = importance.detach().to(torch.float64)
    finite = torch.isfinite(w)
    w = torch.where(finite, w, 0.0).clamp(min=0.0)
    top = w.amax(-1, keepdim=True)
    w = w / torch.where(top > 0, top, 1.0)  # values are now at most 1: sums cannot overflow
    w = torch.where(finite, w, NOT_FINITE)
    return torch.where(w.sum(-1, keepdim=True) > 0, w, 1.0)


def crs(importance: Tensor, k: int, uniform: Uniform) -> Selection:
    """Column-row sampling: k draws with replacement, ``P(row = i) = p_i``, ``scale = 1 / (k p_i)``.

    Args: importance [M]; k rows to keep; uniform, see :data:`Uniform`. Returns: (rows [k] int64, scale [k] float32);
    for k >= M all M rows with scale 1. Source: Liu et al., section 2.2, equation 3 (Drineas et al., 2006).
    """
    if k >= importance.shape[-1]:
        return _all_rows(importance)
    w = sanitize(importance)
    cdf = w.cumsum(-1)
    rows = _search(cdf, uniform(0, k) * cdf[..., -1:])
    return rows, _scale(cdf[..., -1:], k * w.gather(-1, rows))


def wta_crs(importance: Tensor, k: int, uniform: Uniform) -> Selection:
    """Winner-take-all column-row sampling, the estimator of the paper.

    The |C| rows with the largest p are kept with scale 1; the other k - |C| slots are drawn with replacement from the
    rest, ``scale = (1 - P_C) / ((k - |C|) p_i)``, where ``P_C`` is the mass of C. The variance is at most that of CRS
    because |C| minimises ``(1 - P_C) / (k - |C|)`` over 0..k-1.

    Args: importance [M]; k rows to keep; uniform, see :data:`Uniform`. Returns: (rows [k] int64, scale [k] float32),
    winners first; for k >= M all M rows with scale 1. Source: Liu et al., section 3.1, equation 6 and theorem 2.
    """
    if k >= importance.shape[-1]:
        return _all_rows(importance)
    w, order = sanitize(importance).sort(descending=True, stable=True)
    cdf = w.cumsum(-1)
    winners = winner_count(w, k)
    taken = torch.where(winners > 0, cdf.gather(-1, (winners - 1).clamp(min=0)), 0.0)
    tail = cdf[..., -1:] - taken
    slot = torch.arange(k, device=w.device)
    drawn = _search(cdf, taken + uniform(0, k) * tail)
    is_winner = slot < winners
    position = torch.where(is_winner, slot, drawn)
    scale = torch.where(is_winner, 1.0, _scale(tail, (k - winners) * w.gather(-1, position)))
    return order.gather(-1, position), scale.to(torch.float32)


def winner_count(sorted_importance: Tensor, k: int) -> Tensor:
    """|C| of WTA-CRS: the c in 0..k-1 that minimises ``(1 - P_c) / (k - c)``, the smallest such c. int64 [..., 1].

    Args: sorted_importance [..., M] float64, descending, as from :func:`sanitize`. Source: Liu et al., theorem 2.
    """
    tails = _tails(sorted_importance, k)
    return (tails / (k - torch.arange(k, device=tails.device))).argmin(-1, keepdim=True)


def systematic(importance: Tensor, k: int, uniform: Uniform) -> Selection:
    """Systematic sampling with inclusion probabilities proportional to size, Horvitz-Thompson scale.

    ``pi_i = min(1, lambda w_i)`` with ``sum pi = k``; over the rows in random order, row i is kept if one of the points
    ``u, u + 1, ..., u + k - 1`` falls into its share of ``cumsum(pi)``; ``scale = 1 / pi_i``. The winners (pi = 1) fall
    out by themselves and no row is stored twice. Beyond the paper; see Saerndal, Swensson and Wretman, "Model Assisted
    Survey Sampling" (1992), section 3.6. The order is random because importances that repeat along the sequence would
    otherwise put the same position of every example in or out together.

    Args: importance [M]; k rows to keep; uniform, see :data:`Uniform`. Returns: (rows [k] int64, scale [k] float32);
    for k >= M all M rows with scale 1. Slots without a row (fewer than k rows have w > 0) have scale 0.
    """
    if k >= importance.shape[-1]:
        return _all_rows(importance)
    pi = inclusion_probability(sanitize(importance), k)
    order = uniform(0, pi.shape[-1]).argsort()
    cdf = pi.gather(-1, order).cumsum(-1)
    # Rounding: the sum is k up to 1e-13 if at least k rows are possible. Make it exact so that no slot falls off the end.
    total = cdf[..., -1:]
    cdf = torch.where(total > k - 0.5, cdf * (k / total), cdf)
    point = torch.arange(k, device=pi.device) + uniform(1, 1)
    rows = order.gather(-1, _search(cdf, point))
    scale = _scale(torch.ones((), dtype=torch.float64, device=pi.device), pi.gather(-1, rows))
    return rows, torch.where(point < cdf[..., -1:], scale, 0.0)


def inclusion_probability(w: Tensor, k: int) -> Tensor:
    """``pi_i = min(1, lambda w_i)`` with ``sum pi = min(k, number of w_i > 0)``. [..., M] float64 -> [..., M] float64.

    With c rows capped at 1, ``lambda_c = (k - c) / (mass of the rest)``; the right c is the smallest with
    ``lambda_c w_(c+1) <= 1``, found among all c in 0..k-1 at once.
    """
    top, _ = w.sort(descending=True)
    tails = _tails(top, k)
    left = k - torch.arange(k, device=w.device, dtype=torch.float64)
    fits = left * top[..., :k] <= tails
    c = torch.where(fits.any(-1, keepdim=True), fits.to(torch.uint8).argmax(-1, keepdim=True), k - 1)
    mass = tails.gather(-1, c)
    rate = torch.where(mass > 0, (k - c) / mass, torch.inf)  # no mass left: every possible row is kept
    return torch.where(w > 0, (rate * w).clamp(max=1.0), 0.0)


def topk(importance: Tensor, k: int, uniform: Uniform) -> Selection:
    """The k rows of largest importance with scale 1: **biased**, for comparison only.

    Args: importance [M]; k rows to keep; uniform is not used. Returns: (rows [k] int64, scale [k] float32 ones);
    for k >= M all M rows.
    """
    if k >= importance.shape[-1]:
        return _all_rows(importance)
    rows = sanitize(importance).topk(k).indices
    return rows, torch.ones_like(rows, dtype=torch.float32)


ESTIMATORS: dict[str, Callable[[Tensor, int, Uniform], Selection]] = {
    "crs": crs,
    "wta_crs": wta_crs,
    "systematic": systematic,
    "topk": topk,
}


def _all_rows(importance: Tensor) -> Selection:
    rows = torch.arange(importance.shape[-1], device=importance.device).expand(importance.shape).contiguous()
    return rows, torch.ones_like(rows, dtype=torch.float32)


def _tails(sorted_importance: Tensor, k: int) -> Tensor:
    """[..., k]: the mass of all but the c largest, for c in 0..k-1."""
    return sorted_importance.flip(-1).cumsum(-1).flip(-1)[..., :k]


def _search(cdf: Tensor, point: Tensor) -> Tensor:
    """First index with ``cdf > point``: never a row of zero mass, except beyond the end, where the last row stands in."""
    return torch.searchsorted(cdf, point, right=True).clamp(max=cdf.shape[-1] - 1)


def _scale(numerator: Tensor, denominator: Tensor) -> Tensor:
    """``numerator / denominator`` as float32, 0 where a slot has no row: the result is always finite."""
    possible = denominator > 0
    ratio = numerator / torch.where(possible, denominator, 1.0)
    return torch.where(possible, ratio, 0.0).clamp(max=torch.finfo(torch.float32).max).to(torch.float32)
