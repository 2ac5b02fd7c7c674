"""Predicted peak against predicted time, for exact and for sampled training, before anything runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate
from torch import nn
from torch.fx import GraphModule

from wtacrs_fx.config import Config
from wtacrs_fx.errors import ReportError
from wtacrs_fx.ledger import Prediction
from wtacrs_fx.passes.partition import explore
from wtacrs_fx.tracing import NO_TRAINING_GRAPH, Batch, FakeRun, look_at
from wtacrs_fx.units import format_bytes

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
    """Whether ``memory_budget`` of the options leads to this plan. (No plan is, where there is no budget and all is rounded
    that can be.)"""


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


def frontier(model: nn.Module, batch: Batch, *, points: int = POINTS, **options: Any) -> Frontier:
    """Trace a model for training, plan its first graph for a range of peaks, exactly and sampled, and train nothing.

    All tensors are fake: nothing runs.

    Args:
        model: in the mode in which it is trained.
        batch: keyword arguments (a mapping), positional arguments (a sequence), or the one argument.
        points: how many plans per arm to look for. Those of the highest and of the least peak, and the chosen one, are
            always there; equal ones are there once.
        options: the fields of :class:`wtacrs_fx.Config`.

    Raises:
        ValueError: ``points`` is not positive, or (a ReportError) the model has no training graph.
        TypeError, ValueError: as Config does.
    """
    if points < 1:
        raise ValueError(f"points={points!r}: expected a positive number of plans per arm.")
    config = Config.from_options(options)

    def look(joint: GraphModule, joint_inputs: Any, **kwargs: Any) -> tuple[None, Frontier]:
        exact, plans = explore(joint, config, points, joint_inputs=joint_inputs, **kwargs)
        return None, Frontier(exact, tuple(Point(arm, p.peak, p.seconds, p.held, chosen) for arm, p, chosen in plans))

    found = look_at(FakeRun.of(model, batch), config, look)
    if not found:
        raise ReportError(NO_TRAINING_GRAPH)
    return found[0]
