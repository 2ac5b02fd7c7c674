"""The report before training: bytes as measured, tables, files, and what it refuses."""

import pytest
import torch
from small_presets import small
from torch import nn

import wtacrs_fx
from wtacrs_fx.backend import Partitioner, dynamo_names
from wtacrs_fx.benchmarks import measure
from wtacrs_fx.config import Config
from wtacrs_fx.inductor import compile_inductor
from wtacrs_fx.presets import PRESETS
from wtacrs_fx.tracing import uncompiled

from helpers import SMALL

FAMILIES = {p.model_type: name for name, p in PRESETS.items()}
"""One preset of each: those of a family differ in sizes, which :func:`small` overrides."""


def held(model: nn.Module, batch, **options) -> int:
    """What autograd holds for a compiled model, everything as with Inductor but its code generation."""
    torch._dynamo.reset()
    config = Config.from_options(options)

    def backend(gm, inputs):
        partition_fn = Partitioner(config, dynamo_names(gm))
        return compile_inductor(gm, inputs, partition_fn, None, compile_graph=uncompiled)

    with measure.held(model) as count:
        output = torch.compile(model, backend=backend)(**batch)
    assert output.loss.requires_grad
    return count.bytes


@pytest.mark.parametrize("preset", [FAMILIES[f] for f in FAMILIES])
def test_every_column_is_what_autograd_holds(preset):
    options = {"ratio": 0.3, **SMALL}
    ledger = wtacrs_fx.report(*small(preset), **options)
    model, batch = small(preset, device="cpu")
    with measure.held(model) as count:
        output = model(**batch)
    assert output.loss.requires_grad
    assert count.bytes == ledger.saved_bytes_eager
    assert held(model, batch, **options) == ledger.saved_bytes
    assert held(model, batch, **{**options, "ratio": 1.0}) == ledger.saved_bytes_exact
    for field, total in zip(
        ("bytes_eager", "bytes_exact", "bytes_now"),
        (ledger.saved_bytes_eager, ledger.saved_bytes_exact, ledger.saved_bytes),
    ):
        assert sum(getattr(t, field) for t in ledger.tensors) == total
