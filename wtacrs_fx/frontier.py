"""Predicted peak against predicted time, for exact and for sampled training, before anything runs."""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from torch.fx import GraphModule

from wtacrs_fx.backend import Partitioner, dynamo_names
from wtacrs_fx.config import Config
from wtacrs_fx.inductor import compile_inductor
from wtacrs_fx.ledger import Prediction, format_bytes
from wtacrs_fx.passes.partition import explore

POINTS = 12


@dataclass(frozen=True)
class Point:
    """One plan."""

    arm: str
    """"exact" or "sampled"."""
    peak: int
    """Predicted bytes of activations at most alive at once, gradients of parameters left out."""
    seconds: float
    """Predicted time of a step; only ratios are meant."""
    held: int
    """Bytes held between forward and backward."""
    chosen: bool = False
    """Whether ``memory_budget`` of the options leads to this plan."""


@dataclass(frozen=True)
class Frontier:
    """Plans of least predicted time, from keeping everything down to the least peak, for the first training graph of a model
    (the only one, if the model has no graph break)."""

    exact: Prediction
    """The partition that Inductor makes by default."""
    points: tuple[Point, ...]

    def table(self) -> str:
        """One line per plan, peaks and times as shares of the exact default's."""
        rows = [
            (
                p.arm,
                format_bytes(p.peak),
                f"{p.peak / max(1, self.exact.peak):.2f}",
                f"{p.seconds / max(1e-30, self.exact.seconds):.2f}",
                format_bytes(p.held),
                "<- chosen" if p.chosen else "",
            )
            for p in self.points
        ]
        headers = ("arm", "predicted peak", "/exact", "time/exact", "held", "")
        return tabulate(rows, headers, disable_numparse=True)

    def plot(self, path: str | Path) -> None:
        """Write a picture of it. Raises ImportError without matplotlib (the extra ``plot``)."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        for arm, marker in (("exact", "o"), ("sampled", "s")):
            points = [p for p in self.points if p.arm == arm]
            x = [p.peak / max(1, self.exact.peak) for p in points]
            y = [p.seconds / max(1e-30, self.exact.seconds) for p in points]
            axes.plot(x, y, marker=marker, label=arm)
            for p, a, b in zip(points, x, y):
                if p.chosen:
                    axes.plot([a], [b], marker="*", markersize=16, color="black", label="chosen")
        axes.set(xlabel="predicted peak of activations / exact", ylabel="predicted time of a step / exact")
        axes.legend()
        figure.savefig(path)


def frontier(
    model: nn.Module, batch: "Mapping[str, Any] | Sequence[Any] | torch.Tensor", *, points: int = POINTS, **options: Any
) -> Frontier:
    """Trace a model for training, plan its first graph for a range of peaks, exactly and sampled, and train nothing.

    Nothing of that graph runs. If the model has a graph break, what comes before the first training graph does.

    Args:
        model: in the mode in which it is trained.
        batch: keyword arguments (a mapping), positional arguments (a sequence), or the one argument.
        points: plans per arm at most.
        options: the fields of :class:`wtacrs_fx.Config`.

    Raises:
        ValueError: ``points`` is not positive, or the model has no training graph.
        TypeError, ValueError: as Config does.
    """
    if points < 1:
        raise ValueError(f"points={points!r}: expected a positive number of plans per arm.")
    config = Config.from_options(options)
    found: list[Frontier] = []

    def backend(gm: GraphModule, inputs: Sequence[Any]) -> Any:
        return compile_inductor(gm, inputs, _Explorer(config, dynamo_names(gm), points, found), None)

    args: Sequence[Any] = () if isinstance(batch, Mapping) else (batch,) if isinstance(batch, torch.Tensor) else batch
    try:
        torch.compile(model, backend=backend)(*args, **(batch if isinstance(batch, Mapping) else {}))
    except Exception:  # Dynamo wraps _Stop
        if not found:
            raise
    if not found:
        raise ValueError(
            "no training graph was traced: call model.train(), enable gradients, and let the model return what the loss is "
            "computed from."
        )
    return found[0]


class _Stop(Exception):
    """Ends a compilation behind its partition."""


class _Explorer(Partitioner):
    """Looks at a training graph where a partitioner would partition it, and ends the compilation there."""

    def __init__(self, config: Config, names: Sequence[str | None], points: int, found: list[Frontier]) -> None:
        super().__init__(config, names)
        self.points, self.found = points, found
        self.id = uuid.uuid4().hex

    def __call__(self, gm: GraphModule, joint_inputs: Any, **kwargs: Any) -> tuple[GraphModule, GraphModule]:
        exact, plans = explore(gm, self.config, self.points, joint_inputs=joint_inputs, names=self.names, **kwargs)
        points = tuple(Point(arm, p.peak, p.seconds, p.held, chosen) for arm, p, chosen in plans)
        self.found.append(Frontier(exact, points))
        raise _Stop

    def uuid(self) -> str:
        """Another one for every exploration: no graph in any cache fits, and the graph is traced."""
        return self.id
