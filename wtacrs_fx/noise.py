"""How noisy an estimate of a weight gradient is, beside the noise that the batch itself has: pure functions of tensors.

With rows h_i of the input and g_i of the gradient, an estimate from k of M rows by importances ``w_i`` has the variance
``E|G' - G|^2 = sum_i (1/pi_i - 1) |h_i|^2 |g_i|^2`` or a formula like it (:func:`variance`). SGD has a variance of its own,
since the batch is a draw of B sequences: ``B / (B - 1) (sum_s |G_s|^2 - |G|^2 / B)`` for the gradients ``G_s`` of the
sequences (:func:`batch_variance`). Noise that is small beside that one does not change training; the comparison is that of
Wang et al., "VCAS: Variance Controlled Adaptive Sampling", ICLR 2024 (arXiv 2310.05515), section 5.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from wtacrs_fx.estimators import inclusion_probability, sanitize, winner_count


def variance(estimator: str, importance: Tensor, squares: Tensor, k: int) -> Tensor:
    """``E|G' - G|^2`` of an estimator, up to terms of order ``|G|^2 / k``, which are left out: an upper bound, and a close one
    where rows' gradients point in different directions.

    crs: ``sum_i |x_i|^2 / (k p_i)``. wta_crs: ``(1 - P_C) / (k - |C|) sum_(i not in C) |x_i|^2 / p_i`` (Liu et al.,
    section 3.1). systematic: ``sum_i (1 / pi_i - 1) |x_i|^2``, which takes the draws of different rows for independent.

    Args:
        estimator: "crs", "wta_crs" or "systematic".
        importance: [M], what the rows are chosen by.
        squares: [M], ``|x_i|^2 = |h_i|^2 |g_i|^2``.
        k: rows kept.

    Returns: float64 []; 0 for k >= M.

    Raises: ValueError: an estimator that has a bias or is unknown.
    """
    squares = squares.to(torch.float64)
    if estimator not in ("crs", "wta_crs", "systematic"):
        raise ValueError(f"estimator={estimator!r}: expected 'crs', 'wta_crs' or 'systematic', which have no bias.")
    if k >= importance.shape[-1]:
        return squares.new_zeros(())
    w = sanitize(importance)
    if estimator == "systematic":
        pi = inclusion_probability(w, k)
        return _where_possible(squares, 1 - pi, pi).sum()
    if estimator == "crs":
        return w.sum() / k * _where_possible(squares, torch.ones_like(w), w).sum()
    w, order = w.sort(descending=True, stable=True)
    winners = winner_count(w, k)
    rest = torch.where(torch.arange(len(w), device=w.device) < winners, 0.0, w)
    terms = _where_possible(squares[order], (rest > 0).to(w.dtype), w)
    return (rest.sum() / (k - winners) * terms.sum()).squeeze(-1)


def _where_possible(squares: Tensor, numerator: Tensor, probability: Tensor) -> Tensor:
    possible = probability > 0
    return torch.where(possible, squares * numerator / torch.where(possible, probability, 1.0), 0.0)


def sequence_squares(h: Tensor, g: Tensor, sequences: int) -> Tensor:
    """``|G_s|^2`` of every sequence's own weight gradient ``G_s = g_s^T h_s``, float64 [sequences].

    From the Gram matrices, ``<h_s h_s^T, g_s g_s^T>``, where a sequence is short beside the features, or else from G_s.

    Args: h [M, D], g [M, O], with the M rows of the sequences one behind the other; sequences divides M.
    """
    length, d, o = len(h) // sequences, h.shape[1], g.shape[1]
    found = []
    for hs, gs in zip(h.float().split(length), g.float().split(length)):
        gram = length * (d + o) < d * o
        product = (hs @ hs.T) * (gs @ gs.T) if gram else (gs.T @ hs).square()
        found.append(product.sum(dtype=torch.float64))
    return torch.stack(found)


def batch_variance(squares: Tensor, total: Tensor) -> Tensor:
    """Variance of a batch's gradient sum, unbiased for sequences drawn independently.

    Args: squares [B], ``|G_s|^2``; total [], ``|sum_s G_s|^2``. B is at least 2. Returns: float64 [], may be negative.
    """
    b = len(squares)
    return b / (b - 1) * (squares.to(torch.float64).sum() - total.to(torch.float64) / b)


def smallest_within(curve: Sequence[float], grid: Sequence[float], bound: float) -> float:
    """The least ratio of an ascending grid whose noise is at most ``bound``; 1 if none."""
    return next((r for r, noise in zip(grid, curve) if noise <= bound), 1.0)


def allocate(
    curves: Sequence[Sequence[float]], costs: Sequence[float], grid: Sequence[float], budget: float
) -> list[float]:
    """Ratios of least total noise whose cost is at most a budget: ``min sum_s N_s(r_s)`` with ``sum_s c_s r_s <= budget``.

    Every site starts at the grid's least ratio, and the step of the most noise saved per cost comes first. On convex curves
    (their lower hull is used) that is the optimum up to one step. With ``N_s = W_s^2 / (r_s M_s)`` behind the winners it is
    ``k`` proportional to ``W / sqrt(bytes of a row)``.

    Args:
        curves: per site the noise at every ratio of the grid.
        costs: per site the cost of ratio 1 (bytes, or FLOPs).
        grid: ascending ratios.
        budget: in the unit of the costs.
    """
    hulls = [lower_hull(grid, curve) for curve in curves]
    ratios = [grid[0]] * len(curves)
    spent = sum(c * r for c, r in zip(costs, ratios))
    steps = [
        ((curve[a] - curve[b]) / (max(c, 1e-300) * (grid[b] - grid[a])), i, a, b)
        for i, (curve, c, hull) in enumerate(zip(curves, costs, hulls))
        for a, b in itertools.pairwise(hull)
    ]
    stopped = set()
    for _, i, a, b in sorted(steps, key=lambda s: (-s[0], s[2])):
        extra = costs[i] * (grid[b] - grid[a])
        if i in stopped or spent + extra > budget * (1 + 1e-9):
            stopped.add(i)
            continue
        ratios[i], spent = grid[b], spent + extra
    return ratios


def lower_hull(x: Sequence[float], y: Sequence[float]) -> list[int]:
    """Indices of the lower convex hull, by Andrew's monotone chain."""
    hull: list[int] = []
    for i in range(len(x)):
        while len(hull) > 1 and (y[hull[-1]] - y[hull[-2]]) * (x[i] - x[hull[-2]]) >= (y[i] - y[hull[-2]]) * (
            x[hull[-1]] - x[hull[-2]]
        ):
            hull.pop()
        hull.append(i)
    return hull
