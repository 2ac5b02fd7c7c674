"""How noisy the sampled weight gradients of a running graph are, measured from the rows it keeps anyway.

A graph that measures is one that samples: nothing is computed exactly. The backward knows ``|h_i|`` and ``|g_i|`` of all rows,
so that the variance that any ratio would add follows (:func:`wtacrs_fx.noise.variance`). The batch's own variance is that
between the gradients of its sequences, of which there are estimates ``G'_s`` from the kept rows. Sampling adds the variance of
the draw to their squares, which is known, and is subtracted::

    E[B / (B - 1) (sum_s |G'_s|^2 - |G'|^2 / B)] = batch_variance + V,     V = variance(k rows, as drawn)

(exact where draws of different rows are independent; ``sum_s V_s = V`` is used, and B / (B - 1) (V - V / B) = V).
"""

import math
import operator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from wtacrs_fx.choose import GRID, Draw
from wtacrs_fx.noise import variance
from wtacrs_fx.passes.policy import rows_kept

CHUNK = 2048
"""Kept rows whose products with all others are held at once: 64 MiB of float32 at 8192 kept rows."""


@dataclass
class _Site(Draw):
    """What was measured of one product, summed over its backwards. The batch's own noise is NaN for batches of one sequence,
    which show nothing of it. Of an early product both curves are those of what its rows were chosen by."""

    count: int = 0
    """Backwards."""


@dataclass
class Measurement:
    """Of one graph.

    Args: estimator, of the draws.
    """

    estimator: str
    sites: dict[tuple[str, ...], dict[str, _Site]] = field(default_factory=dict)
    """Modules that share a draw -> name of a product -> what was measured."""
    open: bool = True
    """Whether products are recorded."""

    @property
    def count(self) -> int:
        """Backwards in which every product was measured."""
        return min((s.count for members in self.sites.values() for s in members.values()), default=0)

    def record(
        self,
        modules: tuple[str, ...],
        site: str,
        norms: Tensor,
        importance: Tensor,
        squared: Tensor,
        h: Tensor,
        g: Tensor,
        rows: Tensor,
        length: int,
        late: bool,
    ) -> None:
        """One product of one backward; arguments as those of ``wtacrs::measure_rows``, with h [k, D] and g [k, O]. A backward
        with values that are not finite (an overflow under loss scaling) is left out. Waits for the device."""
        if not self.open:
            return
        m, k = len(norms), len(rows)
        squares = norms.double().square() * squared.double()
        kinds = (importance, norms) if late else (importance,)
        curve = [variance(self.estimator, w, squares, int(rows_kept(m, ratio))) for w in kinds for ratio in GRID]
        drawn = variance(self.estimator, importance, squares, k)
        inside, total = sequence_sums(h, g, rows // (length or 1))
        *values, drawn_, inside_, total_ = torch.stack([*curve, drawn, inside, total]).tolist()
        if not math.isfinite(sum(values) + drawn_ + inside_ + total_):
            return
        found = self.sites.setdefault(modules, {}).setdefault(site, _Site(modules))
        found.true = list(map(operator.add, found.true, values))
        found.early = list(map(operator.add, found.early, values[len(GRID) :])) if late else found.true
        b = m // length if length else m
        found.batch_noise += b / (b - 1) * (inside_ - total_ / b) - drawn_ if b > 1 else math.nan
        found.norm += total_ - drawn_
        found.bytes, found.flops = m * h.shape[1] * h.element_size(), 2 * m * h.shape[1] * g.shape[1]
        found.count, found.late = found.count + 1, late

    def draws(self) -> list[Draw]:
        """What was measured, for :func:`wtacrs_fx.choose.choose`; sums over the backwards of every draw's products."""
        result = []
        for modules, members in self.sites.items():
            sites = list(members.values())
            early, true = ([sum(at) for at in zip(*curves)] for curves in zip(*((s.early, s.true) for s in sites)))
            draw = Draw(modules, early=early, true=true, late=all(s.late for s in sites), bytes=sites[0].bytes)
            draw.batch_noise = sum(s.batch_noise for s in sites)
            draw.norm, draw.flops = sum(s.norm for s in sites), sum(s.flops for s in sites)
            result.append(draw)
        return result


def sequence_sums(h: Tensor, g: Tensor, sequence: Tensor) -> tuple[Tensor, Tensor]:
    """``sum_s |G_s|^2`` and ``|sum_s G_s|^2`` for ``G_s = sum_(j in s) g_j h_j^T``, float64 [].

    Args: h [k, D], g [k, O], sequence int64 [k]. By the Gram matrices: ``<G_s, G_s> = sum_ij <h_i, h_j> <g_i, g_j>``.
    """
    h, g = h.float(), g.float()
    inside = total = h.new_zeros((), dtype=torch.float64)
    for a, b, s in zip(h.split(CHUNK), g.split(CHUNK), sequence.split(CHUNK)):
        gram = (a @ h.T) * (b @ g.T)
        total = total + gram.sum(dtype=torch.float64)
        inside = inside + torch.where(s[:, None] == sequence, gram, 0.0).sum(dtype=torch.float64)
    return inside, total
