"""``wtacrs_fx.check``: are the gradients of this model on this batch unbiased, how noisy, and are the bytes as said?"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wtacrs_fx.backend import Backend
from wtacrs_fx.check_result import TOLERANCE, Check, Layer
from wtacrs_fx.config import Config
from wtacrs_fx.errors import ReportError
from wtacrs_fx.layer_bytes import Step, Watched
from wtacrs_fx.ledger import Entry
from wtacrs_fx.private import FakeTensor
from wtacrs_fx.rounding_errors import rounded_tensors
from wtacrs_fx.tracing import (
    NO_TRAINING_GRAPH,
    Batch,
    arguments,
    call,
    can_train,
    compile_apart,
    original,
    own_errors,
    starts,
)

DRAWS = 40

NO_GRADIENT = 1e-12
"""Mean square of a gradient, as a share of the largest of the model, that is zero but for floating point (biases of keys,
and in front of a BatchNorm)."""

NO_DIGITS = 0.1
"""Share of its square by which a gradient changes with the last digits, beyond which it is zero but for floating point: of
biases of keys in 16 bits."""

NUDGED = 1 + 2.0**-7
"""What the loss is multiplied by to see that: gradients follow, and their digits are others. (The least step of bfloat16: where
a backward is not linear in gradients, as one that clips them, no more than that of it is taken for floating point.)"""

ROUNDING = 1e-6
"""Added to the standard error, for gradients that hardly vary."""


def check(model: nn.Module, batch: Batch, *, draws: int = DRAWS, **options: Any) -> Check:
    """Train a model for one step many times on one batch, and compare its gradients with the exact ones.

    The exact gradients are those of the same backend with ratio 1, from the same random state, so that dropout is the same.
    Gradients in ``.grad`` are cleared; nothing else of the model is changed but what its forward changes.

    Args:
        model, batch: real ones, on their device, as for :func:`wtacrs_fx.report`.
        draws: how many samples; at least 2.
        options: the fields of :class:`wtacrs_fx.Config`. With ``seed`` None it is 0: rows must differ where dropout must not.

    Raises:
        ReportError: fewer than 2 draws, nothing is trained or sampled, the batch is on another device, the model has no values.
    """
    if draws < 2:
        raise ReportError(f"draws={draws}: expected at least 2, since a standard error is computed.")
    model, batch = original(model), arguments(batch)
    can_train(model, batch)
    if empty := [n for n, p in model.named_parameters() if p.is_meta or isinstance(p, FakeTensor)]:
        raise ReportError(
            f"{empty[0]} has no values, and a check computes: give a model with weights, or use wtacrs_fx.report."
        )
    config = Config.from_options(options)
    config = dataclasses.replace(config, seed=0 if config.seed is None else config.seed)
    backend = Backend(config)
    exact_arm, arm = Watched(Backend(config.exact()), model), Watched(backend, model)
    with own_errors(), torch.random.fork_rng():
        compiled_exact = compile_apart(model, exact_arm)
        exact, held_exact = _step(compiled_exact, exact_arm, model, batch)
        nudged, _ = _step(compiled_exact, exact_arm, model, batch, NUDGED)
        digits = {n: _compare(nudged[n].double() / NUDGED, g)[0] for n, g in exact.items()}
        compiled = compile_apart(model, arm)
        grads, held = _step(compiled, arm, model, batch)
        ledgers = held.ledgers  # (of the first step: graphs that choose their ratios are compiled again)
        rounded = any(c.bits > 1 for g in ledgers for c in g.compressed)
        found_sites = [e for g in ledgers for e in g.entries if e.decision != "exact"]
        names = _names(model, exact)
        entries: dict[str, list[Entry]] = {}
        for e in found_sites:
            for n in () if _is_attention(e) else _parameters(e.module, names):
                entries.setdefault(n, []).append(e)
        attention = any(map(_is_attention, found_sites))
        if not found_sites and not rounded:
            tables = "\n".join(g.table() for g in ledgers) or NO_TRAINING_GRAPH
            raise ReportError(f"nothing is sampled or rounded, so there is nothing to check:\n{tables}")
        labels = _labels(entries)
        rows = {e.module: labels[n][0] for n, sites in entries.items() for e in sites}
        size = {n: float(g.double().square().mean()) for n, g in exact.items()}
        least = NO_GRADIENT * max(size.values())
        exact = {n: g for n, g in exact.items() if (size[n] > least and digits[n] < NO_DIGITS) or n in entries}
        if rounded or attention:  # (noise flows on, to all gradients before it)
            labels |= {n: (n, "rounded" if rounded else "attention", "") for n in exact if n not in labels}
        found: dict[str, _Draws] = {name: _Draws(exact[name]) for name in labels}
        untouched = 0.0
        for draw in range(draws):
            grads = grads if draw == 0 else _step(compiled, arm, model, batch)[0]
            for name, sums in found.items():
                sums.add(grads[name])
            rest = (math.sqrt(_compare(grads[n], g)[0]) for n, g in exact.items() if n not in found)
            untouched = max(untouched, *rest, 0.0)
        tensors = rounded_tensors(config, model, batch) if rounded else []
    return Check(
        layers=tuple(found[n].layer(*label, digits[n]) for n, label in labels.items()),
        rounded=rounded,
        padding=config.padding,
        refused=tuple(site for site, verdict in backend.padding.items() if verdict == "refused"),
        draws=draws,
        saved_bytes=held.bytes,
        predicted_bytes=held.predicted,
        held=held.by_layer(rows),
        saved_bytes_exact=held_exact.bytes,
        predicted_bytes_exact=held_exact.predicted,
        held_exact=held_exact.by_layer({}),
        tensors=tuple(tensors),
        untouched=untouched,
        tolerance=max(TOLERANCE, *(8 * torch.finfo(g.dtype).eps for g in exact.values())),
    )


def _step(
    compiled: Any, arm: Watched, model: nn.Module, batch: Batch, scale: float = 1.0
) -> tuple[dict[str, Tensor], Step]:
    """Gradients of ``scale`` times the loss by name and what is held, from the same random state every time."""
    torch.manual_seed(0)
    model.zero_grad(set_to_none=True)
    with arm.held() as held:
        roots = starts(call(compiled, batch))
    torch.autograd.backward(roots, [torch.full_like(r, scale) for r in roots])
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return grads, held


def _is_attention(entry: Entry) -> bool:
    """Whether a sampled product is attention's own: one matrix per head, and no parameter's gradient."""
    return len(entry.shape) == 3 and entry.shape[0] != 1


def _names(model: nn.Module, grads: Mapping[str, Tensor]) -> dict[str, str]:
    """All names of the parameters with a gradient -> those of ``grads``. Shared ones have several."""
    first = {p: n for n, p in model.named_parameters()}
    return {n: first[p] for n, p in model.named_parameters(remove_duplicate=False) if first[p] in grads}


def _parameters(module: str, names: Mapping[str, str]) -> list[str]:
    """Names of what the weight of a site is: the module's, or the site's own name where that is a parameter; or that of the one
    module inside whose weight is used from outside (``out_proj`` of ``nn.MultiheadAttention``); or the several parameters
    that the weight is computed from (``weight_norm``)."""
    inside = [n for n in names if n.startswith(f"{module}.") and n.endswith(".weight")]
    for name in (f"{module}.weight", module, "weight", *(inside if len(inside) == 1 else ())):
        if name in names:
            return [names[name]]
    prefixes = (f"{module}.parametrizations.weight.", f"{module}.weight_")
    if found := list(dict.fromkeys(names[n] for n in names if n.startswith(prefixes))):
        return found
    raise ReportError(f"{module} is sampled, and no parameter of that name has a gradient; leave it out by exclude.")


def _labels(entries: Mapping[str, Sequence[Entry]]) -> dict[str, tuple[str, str, str]]:
    """Parameter -> (module, decision, rows kept) of the products that make its gradient: several where modules share it, or
    where one is called more than once. Parameters of one module have their own names."""
    found = {}
    for name, sites in entries.items():
        columns = zip(*((e.module, e.decision, f"{e.kept}/{e.rows}") for e in sites))
        module, decision, kept = (", ".join(dict.fromkeys(column)) for column in columns)
        alone = sum(others[0].module == sites[0].module for others in entries.values()) == 1
        found[name] = module if alone else name, decision, kept
    return found


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

    def layer(self, module: str, decision: str, kept: str, digits: float) -> Layer:
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
            digits=digits,
        )
