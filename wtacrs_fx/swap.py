"""Sampled linear layers without any tracing: nn.Linear modules change their class, and back."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef, WeakIdKeyDictionary

from wtacrs_fx.config import Config
from wtacrs_fx.config_checks import refuse_all_rows
from wtacrs_fx.errors import WtacrsWarning
from wtacrs_fx.functional import RowSampler, refuse_tracing
from wtacrs_fx.passes.policy import excluded
from wtacrs_fx.passes.products import FROZEN, REPLACED, unusual


def swap_linears(model: nn.Module, **options: Any) -> list[str]:
    """Let the linear layers of a model keep sampled rows of their inputs, in place: for code that nothing can trace.

    Every module whose class is exactly ``nn.Linear`` becomes a :class:`SampledLinear`; it stays the same object, with its
    parameters, hooks and names, so optimizers and checkpoints do not notice. Layers that are called with the same tensor
    share one draw (not inside of torch.compile). In eval mode and without gradients they are exact.
    :func:`restore_linears` is the way back.

    Args:
        model: any module.
        options: fields of :class:`wtacrs_fx.Config`: ratio, estimator, min_rows, min_bytes, include, exclude, seed.

    Returns: names of the layers that were swapped. Excluded names are not; nor, with a warning that says why, are layers with
        sparse, quantised, integer, complex or wrapped weights, or with a ``forward`` of their own.

    Raises:
        TypeError: ``model`` is no module, or an unknown option.
        ValueError: a layer was swapped, or the model rewritten, before; an option outside of its range.
    """
    config = Config.from_options(options)
    config.refuse_state("swap_linears()")
    refuse_all_rows(config, "swap_linears()")
    if not isinstance(model, nn.Module):
        raise TypeError(f"swap_linears() takes a torch.nn.Module, not {type(model).__name__}.")
    modules = dict(model.named_modules())
    if swapped := [name for name, m in modules.items() if isinstance(m, SampledLinear)]:
        raise ValueError(f"layer {swapped[0]!r} was swapped already; call wtacrs_fx.restore_linears(model) first.")
    if any(isinstance(m, RowSampler) for m in modules.values()):
        raise ValueError(
            "this module was rewritten already: its graph calls no nn.Linear. Swap the model it was made of."
        )
    linears = {name: m for name, m in modules.items() if type(m) is nn.Linear}
    admitted = {n: m for n, m in linears.items() if not excluded(n, config)}
    left = {n: reason for n, m in admitted.items() if (reason := _why_exact(m))}
    chosen = {n: m for n, m in admitted.items() if n not in left}
    draws = SharedDraws()
    for name, module in chosen.items():
        sampler = RowSampler(config, module=name).train(
            module.training
        )  # (may refuse the options: nothing is changed then)
        module.__class__ = SampledLinear
        module.wtacrs_sampler = sampler
        object.__setattr__(module, "wtacrs_draws", draws)
    if left:
        reasons = ", ".join(f"{name!r} ({reason})" for name, reason in left.items())
        warnings.warn(f"wtacrs: layers that stay exact: {reasons}.", WtacrsWarning, stacklevel=2)
    if not chosen:
        names = ", ".join(linears) or "there is none"
        warnings.warn(f"wtacrs: no linear layer was swapped. Layers: {names}.", WtacrsWarning, stacklevel=2)
    return list(chosen)


def restore_linears(model: nn.Module) -> list[str]:
    """Undo :func:`swap_linears`: every SampledLinear is an nn.Linear again. Returns the names of the layers.

    Raises: ValueError if a layer has changed its class since, as torch's parametrizations make it.
    """
    swapped = {name: m for name, m in model.named_modules() if isinstance(m, SampledLinear)}
    for name, module in swapped.items():
        if type(module) is not SampledLinear:
            raise ValueError(
                f"layer {name!r} has become a {type(module).__name__} since it was swapped. Undo that first "
                "(torch.nn.utils.parametrize.remove_parametrizations)."
            )
    for module in swapped.values():
        del module.wtacrs_sampler, module.wtacrs_draws
        object.__setattr__(module, "__class__", nn.Linear)
    return list(swapped)


def _why_exact(module: nn.Linear) -> str:
    if "forward" in vars(module):
        return REPLACED
    reason = unusual(module.weight)
    return "" if reason == FROZEN else reason  # it may be trained later


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
        refuse_tracing(input)
        kept, rows = self.wtacrs_draws.draw(self.wtacrs_sampler, input, self.weight)
        output: Tensor = torch.ops.wtacrs.linear(input, self.weight, self.bias, kept, rows)
        return output
