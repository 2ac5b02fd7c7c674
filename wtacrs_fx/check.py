"""``wtacrs_fx.check``: are the gradients of this model on this batch unbiased, how noisy, and are the bytes as said?"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from wtacrs_fx import measure
from wtacrs_fx.backend import Backend
from wtacrs_fx.config import Config
from wtacrs_fx.errors import ReportError
from wtacrs_fx.tracing import NO_TRAINING_GRAPH, Batch, call, can_train, own_errors, starts
from wtacrs_fx.units import format_bytes

DRAWS = 40

MAX_NORMAL = 4.366
"""A mean further than this from the exact gradient, in units of a known standard error, is no chance: of 100 layers one in
about 800 checks has one. The standard error is itself estimated: see :func:`max_z`."""

SECOND_ORDER = 0.05
"""Squared bias in units of the squared noise of one draw that rounding may have: where one rounded tensor is two factors of
a product, and where fused attention reads rounded operands. More is a fault. Largest measured on two-layer models: see the
README."""

NO_GRADIENT = 1e-12
"""Mean square of a gradient, as a share of the largest of the model, that is zero but for floating point (biases of keys,
and in front of a BatchNorm)."""

TOLERANCE = 1e-3
"""Relative, of gradients that no sample touches: rounding of another order of operations, in float32."""

ROUNDING = 1e-6
"""Added to the standard error, for gradients that hardly vary."""


def max_z(draws: int) -> float:
    """The bound of a z-score, as improbable by Student's t of ``draws - 1`` degrees of freedom as :data:`MAX_NORMAL` is by the
    normal distribution (approximation of Wallace, 1959, which is too wide below five draws): 5 at 40 draws, 18 at 6."""
    n = draws - 1
    return math.sqrt(n * math.expm1((MAX_NORMAL * (8 * n + 3) / (8 * n + 1)) ** 2 / n))


@dataclass(frozen=True)
class Layer:
    """A sampled weight gradient, or any gradient where tensors are rounded, over all draws."""

    module: str
    """Of a sampled product; of any other gradient the parameter."""
    decision: str
    """"early" or "late", or "rounded" for a parameter that is no sampled product's."""
    kept: str
    error: float
    """Mean of ||G' - G||^2 / ||G||^2, for G' a draw and G the exact gradient."""
    cosine: float
    """Mean of the cosine of the angle between G' and G."""
    z: float
    """Of the bias along G: in units of its standard error."""
    bias: float
    """Along G: mean of <G', G> / ||G||^2 - 1, which is 0 if G' is unbiased."""
    squared_bias: float
    """||E[G'] - G||^2 / ||G||^2, from the scalar product of the means of both halves of the draws, whose mean has no share
    of the noise; it may come out negative."""

    @property
    def standard_error(self) -> float:
        """Of the bias along G."""
        return self.bias / self.z if self.z else 0.0


@dataclass(frozen=True)
class Check:
    """What was measured, and the verdict."""

    layers: tuple[Layer, ...]
    draws: int
    saved_bytes: int
    """What autograd held for the compiled model."""
    predicted_bytes: int
    saved_bytes_exact: int
    """What it held for the same model compiled exactly."""
    predicted_bytes_exact: int
    untouched: float
    """Largest relative difference of a gradient that should be exact."""
    tolerance: float = TOLERANCE
    """Bound of ``untouched``."""
    rounded: bool = False
    """Whether tensors are rounded: then every gradient is a layer here, and a bias of second order is no fault."""

    padding: str | None = None
    """The option of that name."""
    refused: tuple[str, ...] = ()
    """Sites whose rows of padding have gradients."""

    @property
    def bound(self) -> float:
        """Of the z-scores."""
        return max_z(self.draws)

    @property
    def faults(self) -> list[str]:
        """What is wrong; empty if nothing is."""
        found = []
        biased = [layer.module for layer in self.layers if self._is_biased(layer)]
        if biased:
            found.append(f"the mean gradient is off (|z| > {self.bound:.3g}) in {', '.join(biased)}")
        if self.untouched > self.tolerance:
            found.append(f"a gradient that should be exact differs by {self.untouched:.1e} of its norm")
        if (self.saved_bytes, self.saved_bytes_exact) != (self.predicted_bytes, self.predicted_bytes_exact):
            found.append("the bytes held are not the predicted ones")
        if self.refused:
            found.append(
                f"padding={self.padding!r} is refused, since rows of padding have gradients, in {', '.join(self.refused)} "
                "(name them in padding_exclude)"
            )
        return found

    def _is_biased(self, layer: Layer) -> bool:
        return abs(layer.z) > self.bound and not (self.rounded and layer.bias**2 < SECOND_ORDER * layer.error)

    def table(self) -> str:
        """One line per layer, the bytes, and the verdict."""
        rows = [
            (
                x.module,
                x.decision,
                x.kept,
                f"{x.error:.2g}",
                f"{x.cosine:.3f}",
                f"{x.bias:+.1e} ± {x.standard_error:.0e}",
                f"{x.squared_bias:+.0e}",
                f"{x.z:+.1f}",
            )
            for x in self.layers
        ]
        headers = (
            "layer",
            "decision",
            "rows kept",
            "rel. squared error",
            "cosine",
            "bias along G",
            "squared bias",
            "z",
        )
        text = tabulate(rows, headers, disable_numparse=True)
        for name, measured, predicted in (
            ("exact", self.saved_bytes_exact, self.predicted_bytes_exact),
            ("sampled", self.saved_bytes, self.predicted_bytes),
        ):
            text += (
                f"\nsaved for backward, {name}: measured {format_bytes(measured)} ({measured} B), "
                f"predicted {format_bytes(predicted)} ({predicted} B)"
            )
        return f"{text}\n{self.verdict()}"

    def verdict(self) -> str:
        """In plain words."""
        if self.faults:
            return f"Not as it should be: {'; '.join(self.faults)}."
        worst = max(self.layers, key=lambda x: abs(x.z))
        share = self.saved_bytes / max(1, self.saved_bytes_exact)
        bytes_ = f"bytes as predicted ({share:.2f} of exact training's)"
        if abs(worst.z) <= self.bound:
            kind = "sampled or rounded" if self.rounded else "sampled"
            return (
                f"As it should be: {len(self.layers)} {kind} gradients without bias in {self.draws} draws (largest |z| "
                f"{abs(worst.z):.1f}, bound {self.bound:.3g}), the others exact, {bytes_}."
            )
        seen = [x for x in self.layers if abs(x.z) > self.bound]
        largest = max(seen, key=lambda x: x.bias**2 / x.error)
        return (
            f"As it should be: of {len(self.layers)} sampled or rounded gradients {len(seen)} have a bias of second order that "
            f"{self.draws} draws can tell, at most {abs(largest.bias / largest.error**0.5):.2g} of the noise of one draw "
            f"({largest.bias:+.1e} of {largest.module}), {bytes_}."
        )


def check(model: nn.Module, batch: Batch, *, draws: int = DRAWS, **options: Any) -> Check:
    """Train a model for one step many times on one batch, and compare its gradients with the exact ones.

    The exact gradients are those of the same backend with ratio 1, from the same random state, so that dropout is the same.
    Gradients in ``.grad`` are cleared; nothing else of the model is changed but what its forward changes.

    Args:
        model, batch: real ones, on their device, as for :func:`wtacrs_fx.report`.
        draws: how many samples; at least 2.
        options: the fields of :class:`wtacrs_fx.Config`. With ``seed`` None it is 0: rows must differ where dropout must not.

    Raises:
        ReportError: fewer than 2 draws, nothing is trained or sampled, or the batch is on another device.
    """
    if draws < 2:
        raise ReportError(f"draws={draws}: expected at least 2, since a standard error is computed.")
    can_train(model, batch)
    config = Config.from_options(options)
    config = dataclasses.replace(config, seed=0 if config.seed is None else config.seed)
    exact_backend, backend = Backend(config.exact()), Backend(config)
    with own_errors(), torch.random.fork_rng():
        exact, held_exact = _step(torch.compile(model, backend=exact_backend, dynamic=False), model, batch)
        compiled = torch.compile(model, backend=backend, dynamic=False)
        grads, held = _step(compiled, model, batch)
        rounded = any(c.bits > 1 for g in backend.ledgers for c in g.compressed)
        found_sites = [e for g in backend.ledgers for e in g.entries if e.decision != "exact"]
        entries = {_parameter(e.module, exact): e for e in found_sites}
        if not entries and not rounded:
            tables = "\n".join(g.table() for g in backend.ledgers) or NO_TRAINING_GRAPH
            raise ReportError(f"nothing is sampled or rounded, so there is nothing to check:\n{tables}")
        labels = {n: (e.module, e.decision, f"{e.kept}/{e.rows}") for n, e in entries.items()}
        size = {n: float(g.double().square().mean()) for n, g in exact.items()}
        least = NO_GRADIENT * max(size.values())
        exact = {n: g for n, g in exact.items() if size[n] > least or n in entries}
        if rounded:
            labels |= {n: (n, "rounded", "") for n in exact if n not in labels}
        found: dict[str, _Draws] = {name: _Draws(exact[name]) for name in labels}
        untouched = 0.0
        for draw in range(draws):
            grads = grads if draw == 0 else _step(compiled, model, batch)[0]
            for name, sums in found.items():
                sums.add(grads[name])
            rest = (math.sqrt(_compare(grads[n], g)[0]) for n, g in exact.items() if n not in found)
            untouched = max(untouched, *rest, 0.0)
    return Check(
        layers=tuple(found[n].layer(*label) for n, label in labels.items()),
        rounded=rounded,
        padding=config.padding,
        refused=tuple(site for site, verdict in backend.padding.items() if verdict == "refused"),
        draws=draws,
        saved_bytes=held,
        predicted_bytes=sum(g.saved_bytes for g in backend.ledgers),
        saved_bytes_exact=held_exact,
        predicted_bytes_exact=sum(g.saved_bytes_exact for g in exact_backend.ledgers),
        untouched=untouched,
        tolerance=max(TOLERANCE, *(8 * torch.finfo(g.dtype).eps for g in exact.values())),
    )


def _step(compiled: Any, model: nn.Module, batch: Batch) -> tuple[dict[str, Tensor], int]:
    """Gradients by name and bytes held, from the same random state every time."""
    torch.manual_seed(0)
    model.zero_grad(set_to_none=True)
    with measure.held(model) as held:
        roots = starts(call(compiled, batch))
    held_bytes = held.bytes
    torch.autograd.backward(roots, [torch.ones_like(r) for r in roots])
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return grads, held_bytes


def _parameter(module: str, grads: Mapping[str, Tensor]) -> str:
    """Name of the weight of a site: the module's, or the site's own name where that is a parameter; or that of the one module
    inside whose weight is used from outside (``out_proj`` of ``nn.MultiheadAttention``)."""
    inside = [n for n in grads if n.startswith(f"{module}.") and n.endswith(".weight")]
    for name in (f"{module}.weight", module, "weight", *(inside if len(inside) == 1 else ())):
        if name in grads:
            return name
    raise ReportError(f"{module} is sampled, and no parameter of that name has a gradient; leave it out by exclude.")


def _compare(found: Tensor, exact: Tensor) -> tuple[float, float, float]:
    """Relative squared error, cosine, and the projection <G', G> / ||G||^2."""
    g, h = exact.double().flatten(), found.double().flatten()
    norm = float(g @ g)
    if norm == 0.0:
        return float(h @ h), 1.0, 1.0
    dot = float(g @ h)
    return float((h - g) @ (h - g)) / norm, dot / math.sqrt(norm * max(float(h @ h), 1e-300)), dot / norm


class _Draws:
    """Draws of one gradient: what each has in common with the exact one, and their sums, of every other draw apart."""

    def __init__(self, exact: Tensor) -> None:
        self.exact = exact
        self.numbers: list[tuple[float, float, float]] = []
        self.halves = [torch.zeros_like(exact, dtype=torch.float64) for _ in range(2)]

    def add(self, grad: Tensor) -> None:
        self.halves[len(self.numbers) % 2] += grad.double() - self.exact.double()
        self.numbers.append(_compare(grad, self.exact))

    def layer(self, module: str, decision: str, kept: str) -> Layer:
        errors, cosines, projections = (torch.tensor(x, dtype=torch.float64) for x in zip(*self.numbers))
        n = len(self.numbers)
        bias = float(projections.mean()) - 1
        product = float((self.halves[0] * self.halves[1]).sum()) / ((n + 1) // 2 * (n // 2))
        return Layer(
            module=module,
            decision=decision,
            kept=kept,
            error=float(errors.mean()),
            cosine=float(cosines.mean()),
            bias=bias,
            z=bias / (float(projections.std()) / math.sqrt(n) + ROUNDING),
            squared_bias=product / max(float(self.exact.double().square().sum()), 1e-300),
        )
