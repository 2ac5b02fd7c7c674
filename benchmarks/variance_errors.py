"""Squared errors of estimated weight gradients, from the rows of a layer's input and of its output's gradient.

With S_i the total scale of row i in a draw, the error of ``sum_i S_i g_i h_i^T`` is ``E = sum_i v_i g_i h_i^T``, v = S - 1, so

    |E|^2 = v^T K v,      K = (G G^T) * (H H^T)  [M, M],      |G^T H|^2 = 1^T K 1,

and many draws cost one product with K each. Rounded rows add, for every kept slot j, ``s_j^2 |g_j|^2 r_j`` with r_j the
expected squared rounding error of row j: roundings are independent of each other and of the draw.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from wtacrs_fx.directions import limit
from wtacrs_fx.estimators import ESTIMATORS, Uniform, sanitize, winner_count
from wtacrs_fx.norms import floored
from wtacrs_fx.passes.center import FORM
from wtacrs_fx.rng import short_uniform
from wtacrs_fx.rounding import Format, dequantise, number_count, quantise, written_bytes

AS_IS = 16
"""Bits of rows that are not rounded: those of training in bfloat16."""

BITS = (AS_IS, 8, 4)

DIRECTIONS = (16, 32)
"""Principal directions that are taken out."""

INDEX_BYTES = 8
"""Of every kept row."""


@dataclass(frozen=True)
class Layer:
    """What one linear layer does in one step: input h [M, D], gradient g [M, O] of its output, float32; rows of equal
    ``sequence`` [M] belong to one example."""

    h: Tensor
    g: Tensor
    sequence: Tensor

    @property
    def real(self) -> Tensor:
        """Rows that have a gradient [M]; the others are padding."""
        return self.g.square().sum(1) > 0

    def centred(self, directions: int = 0) -> "Layer":
        """With the mean input over rows that have a gradient subtracted, and so many principal directions, whose coefficients
        are rounded to 8 bits: the rest of ``sum g (h - mean - a B)^T + (sum g) mean^T + (sum g a) B`` is exact."""
        mean = self.h[self.real].mean(0, keepdim=True)
        rest = self.h - mean
        if directions := limit(directions, self.h.shape[1]):
            basis = torch.ops.wtacrs.principal_directions(self.h, mean, self.real.float(), directions)
            exact = (rest @ basis.T).T.contiguous()
            written = quantise(exact, short_uniform(torch.tensor([0]), 0, number_count(exact.shape)), FORM)
            rest = rest - dequantise(written, exact.shape, exact.dtype, FORM).T @ basis
        return Layer(rest, self.g, self.sequence)

    def kernel(self) -> Tensor:
        """K [M, M]."""
        return (self.g @ self.g.T) * (self.h @ self.h.T)


def row_bytes(width: int, bits: int) -> int:
    """Bytes of one kept row of so many features, with its index and scales."""
    if bits == AS_IS:
        return 2 * width + INDEX_BYTES
    some, more = (written_bytes((n, width), Format(bits, scale_bits=16)) for n in (64, 65))
    return more - some + INDEX_BYTES  # (random numbers of columns are those of all rows)


def rows_for(bytes_of: int, width: int, bits: int, rows: int, besides: int = 0) -> int:
    """How many rows in so many bits, and so many bytes besides, fit into the bytes of ``bytes_of`` rows as they are; at most
    all."""
    return max(1, min(rows, (bytes_of * row_bytes(width, AS_IS) - besides) // row_bytes(width, bits)))


def bytes_besides(rows: int, width: int, mean: bool, directions: int) -> int:
    """Of what is held for the exact part: a mean row, directions, and their coefficients."""
    directions = limit(directions, width)
    return (4 * width if mean else 0) + (4 * directions * width + written_bytes((directions, rows), FORM)) * (
        directions > 0
    )


def rounding_error(h: Tensor, bits: int, draws: int = 2) -> Tensor:
    """Expected squared rounding error of every row [M], from ``draws`` roundings; 0 for rows as they are."""
    total = torch.zeros(len(h))
    if bits == AS_IS:
        return total
    form = Format(bits, scale_bits=16)
    for i in range(draws):
        numbers = short_uniform(torch.tensor([i]), i, number_count(h.shape))
        total += (dequantise(quantise(h, numbers, form), h.shape, h.dtype, form) - h).square().sum(1) / draws
    return total


def generator(draws: int, seed: int) -> Uniform:
    """Random numbers for so many draws at once."""
    source = torch.Generator().manual_seed(seed)
    return lambda stream, n: torch.rand(draws, n, generator=source, dtype=torch.float64)


def by_sequence(uniform: Uniform, sequence: Tensor) -> Uniform:
    """Numbers that put the rows of a sequence next to each other, sequences and rows in random order: systematic sampling
    then takes from every sequence its share of rows, up to one."""
    count = int(sequence.max()) + 1

    def stratified(stream: int, n: int) -> Tensor:
        numbers = uniform(stream, n)
        if stream != 0:
            return numbers
        rank = uniform(2, count).argsort(-1)
        return (rank[:, sequence] + numbers) / count

    return stratified


def draw_errors(
    kernel: Tensor, importance: Tensor, k: int, estimator: str, uniform: Uniform, draws: int
) -> tuple[float, Tensor]:
    """Mean of ``v^T K v`` over the draws, and the mean of the summed squares of every row's scales [M]."""
    rows, scale = ESTIMATORS[estimator](importance.expand(draws, -1), k, uniform)
    v = torch.full((draws, kernel.shape[0]), -1.0).scatter_add_(1, rows, scale)
    squares = torch.zeros(draws, kernel.shape[0]).scatter_add_(1, rows, scale.square())
    return float(((v @ kernel) * v).sum() / draws), squares.mean(0)


class Variant(NamedTuple):
    """An estimator, and what is done besides."""

    estimator: str
    mean: bool = False
    """The mean row (of rows that have a gradient) as a control variate."""
    stratified: bool = False
    """By sequence."""
    padding: bool = False
    """Rows without a gradient are known, and have probability zero."""
    directions: int = 0
    """So many principal directions besides the mean."""


VARIANTS: Mapping[str, Variant] = {
    "crs": Variant("crs"),
    "wta_crs": Variant("wta_crs"),
    "topk": Variant("topk"),
    "systematic": Variant("systematic"),
    "systematic, mean": Variant("systematic", mean=True),
    "systematic, mean, padding": Variant("systematic", mean=True, padding=True),
    "systematic, by sequence": Variant("systematic", stratified=True),
    **{f"systematic, {n} directions": Variant("systematic", mean=True, padding=True, directions=n) for n in DIRECTIONS},
}


def layer_errors(
    layer: Layer, gradient_norms: Mapping[str, Tensor], ratios: tuple[float, ...], draws: int, seed: int
) -> dict[str, float]:
    """Relative squared errors "variant/source/ratio/rows/bits", where rows is "rows" (``ratio`` of all) or "bytes" (as many
    as the bytes of those rows hold in so many bits).

    Args:
        layer: one layer in one step.
        gradient_norms: norm source -> what it takes for the norms of the gradient's rows [M].
        ratios: shares of rows.
        draws: of every estimator.
        seed: of the draws.
    """
    layers = {(False, 0): layer} | {(True, n): layer.centred(n) for n in (0, *DIRECTIONS)}
    kernels = {taken_out: x.kernel() for taken_out, x in layers.items()}
    whole = float(kernels[False, 0].double().sum())
    noise = {
        (taken_out, bits): x.g.square().sum(1) * rounding_error(x.h, bits) / whole
        for taken_out, x in layers.items()
        for bits in BITS
    }
    rows, width = layer.h.shape
    result: dict[str, float] = {}
    for name, (estimator, mean, stratified, padding, directions) in VARIANTS.items():
        taken_out = (mean, directions)
        norms = layers[taken_out].h.norm(dim=1)
        besides = bytes_besides(rows, width, mean, directions)
        for source, guess in gradient_norms.items():
            known = guess if source == "true" else floored(guess, layer.real if padding else None).float()
            weights = norms * known * (layer.real if padding else 1)
            for ratio in ratios:
                k = math.ceil(ratio * rows)
                found: dict[int, tuple[float, Tensor]] = {}
                for bits in BITS:
                    fit = rows_for(k, width, bits, rows, besides)
                    for kind, count in (("rows", k), ("bytes", fit)):
                        if count not in found:
                            uniform = generator(draws, seed)
                            uniform = by_sequence(uniform, layer.sequence) if stratified else uniform
                            error, squares = draw_errors(kernels[taken_out], weights, count, estimator, uniform, draws)
                            found[count] = error / whole, squares
                        error, squares = found[count]
                        rounding = float(squares @ noise[taken_out, bits])
                        result[f"{name}/{source}/{ratio:g}/{kind}/{bits}"] = error + rounding
    return result


def condition(importance: Tensor, k: int) -> tuple[int, float]:
    """|C| of WTA-CRS and the mass of C: the paper's variance bound is below that of CRS if the mass is above |C| / k
    (Liu et al., theorem 2)."""
    w, _ = sanitize(importance).sort(descending=True)
    winners = int(winner_count(w, k))
    return winners, float(w[:winners].sum() / w.sum())
