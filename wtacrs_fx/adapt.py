"""Graphs that choose their ratios themselves: measured while they are trained, and compiled again where that changes them.

A training graph of a Backend with ``noise`` or ratio="auto" is first compiled with one ratio everywhere, in a version that
reports its noise (:mod:`wtacrs_fx.measured`). After some backwards ratios are chosen, and the graph is compiled once more,
from the graph that Dynamo has traced: Dynamo itself does not notice. Every ``recalibrate`` runs the first version takes over
for as many steps, and where ratios have changed a new version is compiled, ``recompilations`` times at most.

With ``center_rows`` what is measured of the batch's own variance is the part that sampling estimates, without that of the mean
row: the budget is then kept more strictly.
"""

import contextlib
import copy
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from wtacrs_fx.choose import CHANGE, Calibration, choose, differ
from wtacrs_fx.config import Config
from wtacrs_fx.errors import BudgetError, WtacrsWarning
from wtacrs_fx.inductor import like_compiled
from wtacrs_fx.ledger import Ledger
from wtacrs_fx.measured import Measurement
from wtacrs_fx.private import FakeTensor, TracingContext, tracing

BACKWARDS = 4
"""Measured before ratios are chosen. On batches of 32 sequences one gives a layer's ratio to about 20 %."""

SETTLE = 10
"""Runs before the first measurement where rows have a history (``norms``, ``padding``): as many as running means take."""

Build = Callable[[Config, Sequence[Any], Measurement | None], tuple[Callable[..., Any], Ledger | None]]
"""``build(config, inputs, meter)`` -> the compiled graph, and its ledger if there is one."""


class Traced:
    """The inputs of a graph that Dynamo has just traced, such that it can be compiled again when they are gone."""

    def __init__(self, inputs: Sequence[Any]) -> None:
        self.context: Any = TracingContext.try_get()
        self.inputs = [self._fake(x) for x in inputs]
        """Fake tensors, and sizes as they are."""

    def _fake(self, x: Any) -> Any:
        if self.context is None or not isinstance(x, Tensor) or isinstance(x, FakeTensor):
            return x
        return self.context.fake_mode.from_tensor(
            x, symbolic_context=self.context.tensor_to_context.get(x), trace=False
        )

    @contextlib.contextmanager
    def again(self, guards: set[Any]) -> Iterator[None]:
        """Compile inside. Conditions on sizes that the compilation adds come into ``guards``: Dynamo will not check them."""
        before, context = self._conditions(), copy.copy(self.context)
        if context is not None:
            context.ddp_optimizer_ctx = None  # (a count of the buckets that were compiled with this graph)
        devices = sorted({x.device.index or 0 for x in self.inputs if isinstance(x, Tensor) and x.is_cuda})
        with tracing(context), torch.random.fork_rng(devices):
            yield
        guards |= self._conditions() - before

    def _conditions(self) -> set[Any]:
        sizes = self.context and self.context.fake_mode and self.context.fake_mode.shape_env
        return {guard.expr for guard in sizes.guards} if sizes else set()

    def holds(self, guards: set[Any], values: Sequence[Any]) -> bool:
        """Whether inputs meet such conditions."""
        sizes = {x.node.expr: v for x, v in zip(self.inputs, values) if isinstance(x, torch.SymInt)}
        return all(bool(g.xreplace(sizes) == True) for g in guards)  # noqa: E712  (sympy's true is no bool)


class Adaptive:
    """One graph.

    Args:
        config: of the Backend.
        build: see :data:`Build`.
        inputs: examples, from Dynamo.
        publish: receives every choice.
    """

    def __init__(
        self, config: Config, build: Build, inputs: Sequence[Any], publish: Callable[[Calibration], None]
    ) -> None:
        self.config, self.build, self.publish = config, build, publish
        self.traced = Traced(inputs)
        self.meter = Measurement(config.estimator)
        self.measuring, self.ledger = build(config.measuring(), inputs, self.meter)
        """Of the version in force."""
        self.chosen: Callable[..., Any] | None = None
        self.guards: set[Any] = set()
        self.ratios: dict[str, float] = {}
        """In force, where they were chosen."""
        self.left = config.recompilations
        self.runs = 0
        """Of the graph, since ratios were chosen last."""
        self.is_measuring = True
        """(Of a graph without a backward nothing is ever measured.)"""
        self.wait = SETTLE if config.has_state else 0

    def callable(self) -> Callable[..., Any]:
        """What Dynamo is given."""

        def run(*args: Any) -> Any:
            values = args[0] if len(args) == 1 and isinstance(args[0], list) else args
            return self._version(values)(*args)

        return like_compiled(run, self.measuring)

    def _version(self, values: Sequence[Any]) -> Callable[..., Any]:
        self.runs += 1
        self.meter.open = self.is_measuring and self.runs > self.wait
        if self.is_measuring and self.meter.count >= BACKWARDS:
            self._choose()
        elif not self.is_measuring and self.left and self.runs > self.config.recalibrate:
            self.meter.sites.clear()
            self.is_measuring, self.runs, self.wait = True, 0, 0
        fits = self.chosen is not None and not self.is_measuring and self.traced.holds(self.guards, values)
        return self.chosen if fits and self.chosen is not None else self.measuring

    def _choose(self) -> None:
        """End a measurement: ratios, and a new version of the graph if they have changed."""
        self.is_measuring, self.runs, self.meter.open = False, 0, False
        draws = self.meter.draws()
        if self.config.noise is not None and any(math.isnan(d.batch_noise) for d in draws):
            self.left = 0
            warnings.warn(
                f"wtacrs: noise={self.config.noise!r}: batches of one sequence do not show the variance between sequences, so "
                f"that nothing is measured and ratio={self.config.first_ratio:g} stays. Use batches of two and more, or "
                "ratio='auto'.",
                WtacrsWarning,
                stacklevel=2,
            )
            return
        while self.left:
            early = {e.module for e in self.ledger.entries if e.decision == "early"} if self.ledger else set()
            for draw in draws:  # (what was late in the first version may be early in a later one)
                draw.late = draw.late and early.isdisjoint(draw.modules)
            found = choose(draws, ratio=self.config.first_ratio, noise=self.config.noise)
            before = {m: self.ratios.get(m, 1.0) if self.chosen else self.config.first_ratio for m in found.ratios}
            if not differ(found.ratios, before, CHANGE):
                break
            self.left -= 1
            if not self._compile(found):
                break
        self.publish(found)

    def _compile(self, found: Calibration) -> bool:
        """A version with these ratios; whether it can be used."""
        guards: set[Any] = set()
        try:
            with self.traced.again(guards):
                chosen, ledger = self.build(self.config.with_ratios(found.ratios), self.traced.inputs, None)
        except BudgetError as error:
            self.left = 0
            warnings.warn(
                f"wtacrs: the ratios that were measured do not fit into the memory budget, and those in force stay. {error}",
                WtacrsWarning,
                stacklevel=2,
            )
            return False
        self.chosen, self.ledger, self.guards, self.ratios = chosen, ledger, guards, found.ratios
        if all(ratio == 1 for ratio in found.ratios.values()):
            warnings.warn(
                f"wtacrs: noise={self.config.noise!r}: every layer of this graph would be noisier at any ratio below 1, and "
                "trains exactly. A larger noise, or round_bits=8 in place of rows, saves memory.",
                WtacrsWarning,
                stacklevel=2,
            )
        if self.config.verbose:
            print(found.table(), file=sys.stderr)
        return True
