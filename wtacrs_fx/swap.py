"""Sampled linear layers without any tracing: nn.Linear modules change their class, and back."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef, WeakIdKeyDictionary

from wtacrs_fx.config import Config
from wtacrs_fx.errors import WtacrsWarning
from wtacrs_fx.functional import RowSampler
from wtacrs_fx.passes.policy import excluded
from wtacrs_fx.passes.products import FROZEN, unusual


def swap_linears(model: nn.Module, **options: Any) -> list[str]:
    """Let the linear layers of a model keep sampled rows of their inputs, in place: for code that nothing can trace.

    Every module whose class is exactly ``nn.Linear`` becomes a :class:`SampledLinear`; it stays the same object, with its
    parameters, hooks and names, so optimizers and checkpoints do not notice. Layers that are called with the same tensor
    share one draw (not inside of torch.compile). In eval mode and without gradients they are exact.
    :func:`restore_linears` is the way back.

    Args:
        model: any module.
        options: fields of :class:`wtacrs_fx.Config`: ratio, estimator, min_rows, min_bytes, include, exclude, seed.

    Returns: names of the layers that were swapped. Sparse and quantised weights, and excluded names, are not.

    Raises:
        TypeError: ``model`` is no module, or an unknown option.
        ValueError: a layer was swapped before; an option outside of its range.
    """
    config = Config.from_options(options)
    if not isinstance(model, nn.Module):
        raise TypeError(f"swap_linears() takes a torch.nn.Module, not {type(model).__name__}.")
    modules = dict(model.named_modules())
    if swapped := [name for name, m in modules.items() if isinstance(m, SampledLinear)]:
        raise ValueError(f"layer {swapped[0]!r} was swapped already; call wtacrs_fx.restore_linears(model) first.")
    linears = {name: m for name, m in modules.items() if type(m) is nn.Linear}
    chosen = {n: m for n, m in linears.items() if not excluded(n, config) and unusual(m.weight) in ("", FROZEN)}
    draws = SharedDraws()
    for module in chosen.values():
        module.__class__ = SampledLinear
        module.wtacrs_sampler = RowSampler(config).train(module.training)
        object.__setattr__(module, "wtacrs_draws", draws)
    if not chosen:
        names = ", ".join(linears) or "there is none"
        warnings.warn(f"wtacrs: no linear layer was swapped. Layers: {names}.", WtacrsWarning, stacklevel=2)
    return list(chosen)


def restore_linears(model: nn.Module) -> list[str]:
    """Undo :func:`swap_linears`: every SampledLinear is an nn.Linear again. Returns the names of the layers."""
    swapped = {name: m for name, m in model.named_modules() if isinstance(m, SampledLinear)}
    for module in swapped.values():
        del module.wtacrs_sampler, module.wtacrs_draws
        object.__setattr__(module, "__class__", nn.Linear)
    return list(swapped)


class SharedDraws:
    """The latest draw of every tensor, so that layers that read one input share its rows.

    A draw is remembered as long as autograd keeps its rows and the input is alive: the next step draws afresh. It is not used
    for a tensor that was modified since. Copies start empty.
    """

    def __init__(self) -> None:
        self._draws: Any = WeakIdKeyDictionary()

    def draw(self, sampler: RowSampler, input: Tensor, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What ``sampler(input, weight)`` returned for this input before, or returns now."""
        if torch.compiler.is_compiling() or not sampler.wanted(weight):
            return sampler(input, weight)
        device = input.device.type
        state = (input._version, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        known, *drawn = self._draws.get(input, (None,))
        alive = [ref() for ref in drawn]
        if known == state and None not in alive:
            return alive[0], alive[1]
        kept, rows = sampler(input, weight)
        if kept is not None and rows is not None:
            self._draws[input] = state, TensorWeakRef(kept), TensorWeakRef(rows)
        return kept, rows

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return SharedDraws, ()


class SampledLinear(nn.Linear):
    """An nn.Linear whose weight gradient comes from sampled rows of its input. Made by :func:`swap_linears`."""

    wtacrs_sampler: RowSampler
    wtacrs_draws: SharedDraws

    def forward(self, input: Tensor) -> Tensor:
        kept, rows = self.wtacrs_draws.draw(self.wtacrs_sampler, input, self.weight)
        output: Tensor = torch.ops.wtacrs.linear(input, self.weight, self.bias, kept, rows)
        return output
