"""All of the memory that training takes, and the largest batch that fits: parameters, gradients, optimizer, activations."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from wtacrs_fx.config import Config
from wtacrs_fx.eager_trace import eager_step
from wtacrs_fx.errors import ReportError
from wtacrs_fx.ledger import Ledger, Prediction
from wtacrs_fx.passes.partition import many_graphs
from wtacrs_fx.report import partition_ledger
from wtacrs_fx.tracing import Batch, FakeRun
from wtacrs_fx.units import format_bytes, parse_bytes

OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "sgd-momentum": lambda p: torch.optim.SGD(p, momentum=0.9),
    "adafactor": torch.optim.Adafactor,
}

BLOCK = 256
"""Elements that share one float32 scale in the 8-bit states of bitsandbytes (Dettmers et al., arXiv 2110.02861)."""

MIN_8BIT = 4096
"""Tensors of fewer elements than this have 32-bit states there."""

ARMS = ("eager", "inductor", "wtacrs")


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of one training setup. Nothing is added for the allocator's fragmentation and the CUDA context."""

    arm: str
    parameters: int
    """With buffers."""
    gradients: int
    optimizer: int
    saved: int
    """Activations held between forward and backward."""
    transient: int
    """What the largest moment of a step has in activations and temporaries above ``saved``."""
    step_peak: int
    """Largest sum of activations, temporaries and those gradients of parameters that exist at that moment."""

    @property
    def total(self) -> int:
        """At the worst moment of a step: less than the sum of the parts, because gradients come while activations go."""
        return self.parameters + self.optimizer + max(self.step_peak, self.gradients)


def optimizer_bytes(parameters: "list[Tensor]", name: str, *, eight_bit: bool = False) -> int:
    """Bytes of an optimizer's state after its first step, from torch's own optimizer on meta tensors.

    With ``eight_bit`` the floating-point states that are as large as their parameter take 1 byte per element and a float32
    per :data:`BLOCK` elements, those of parameters under :data:`MIN_8BIT` elements 4 bytes, as in bitsandbytes.

    Raises: ReportError: an unknown optimizer.
    """
    if name not in OPTIMIZERS:
        raise ReportError(f"optimizer={name!r}: expected one of {', '.join(OPTIMIZERS)}.")
    copies = [nn.Parameter(torch.empty_like(p, device="meta")) for p in parameters if p.requires_grad]
    if not copies:
        return 0
    optimizer = OPTIMIZERS[name](copies)
    for p in copies:
        p.grad = torch.empty_like(p)
    if name == "adafactor":
        states = [_adafactor_state(p) for p in copies]
    else:
        optimizer.step()
        states = [list(filter(_is_tensor, optimizer.state[p].values())) for p in copies]
    total = 0
    for p, state in zip(copies, states):
        for t in state:
            whole = eight_bit and t.numel() == p.numel() and t.is_floating_point()
            if whole and p.numel() >= MIN_8BIT:
                total += t.numel() + 4 * math.ceil(t.numel() / BLOCK)
            else:
                total += t.numel() * (4 if whole else t.dtype.itemsize)
    return total
