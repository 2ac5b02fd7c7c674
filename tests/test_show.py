"""Debug aids: the printed graph, and what a pass has changed."""

import io
from collections import Counter

import pytest
import torch
from torch import nn
from torch.fx import symbolic_trace
from torch.fx.experimental.proxy_tensor import make_fx

import wtacrs_fx
from wtacrs_fx.passes.watch import structural_diff

from helpers import SMALL, Transformer, gradients, transformer_batch


def printed(gm) -> dict[str, str]:
    """Node name -> its line, blanks collapsed."""
    file = io.StringIO()
    wtacrs_fx.print_graph(gm, file)
    lines = [" ".join(line.split()) for line in file.getvalue().splitlines()]
    assert lines[0] == "node op shape dtype bytes kind site decision"
    return {line.split()[0]: line for line in lines[2:]}


def test_traced_and_rewritten():
    traced = symbolic_trace(nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 32)))
    before = printed(traced)
    assert before["_0"] == "_0 call_module ? ? ? activation"
    gm = wtacrs_fx.rewrite(traced, torch.randn(256, 64), **{**SMALL, "exclude": "2"})
    after = printed(gm)
    assert after["_0"] == "_0 wtacrs.linear.default 256x32 float32 32.0 KiB activation 0 early"
    assert after["_2"] == "_2 call_module 256x32 float32 32.0 KiB activation 2 exact (excluded by '2')"
    assert after["_0_weight"] == "_0_weight get_attr 32x64 float32 8.0 KiB weight"


def test_joint_graph():
    w, x = torch.randn(16, 16, requires_grad=True), torch.randn(64, 16)
    gm = make_fx(lambda w, x: torch.autograd.grad((torch.cos(x) @ w).square().sum(), (w,)))(w, x)
    lines = printed(wtacrs_fx.rewrite_joint(gm, **SMALL))
    sites = [line for line in lines.values() if line.endswith("w_1 early")]
    assert len(sites) == 1
    assert " gradient " in sites[0]
    assert lines["w_1"] == "w_1 placeholder 16x16 float32 1.0 KiB weight"
    assert any(" view gradient" in line for line in lines.values())


def test_no_graph():
    with pytest.raises(TypeError, match="not Linear"):
        wtacrs_fx.print_graph(nn.Linear(2, 2))


def test_structural_diff():
    assert structural_diff(Counter(a=2, b=1), Counter(a=2, b=1)) == ""
    assert structural_diff(Counter(a=2, b=1), Counter(a=3, c=1)) == "nodes 3 -> 4\n  a 2 -> 3\n  b 1 -> 0\n  c 0 -> 1"


def test_verbose_2_says_what_each_pass_did(capsys):
    model, batch = Transformer(layers=1), transformer_batch()
    compiled = torch.compile(model, backend=wtacrs_fx.Backend(inner="eager", verbose=2, **SMALL))
    gradients(model, *batch, call=compiled)
    said = capsys.readouterr().err
    assert "wtacrs pass sample: nodes" in said
    assert "wtacrs.select_rows.default 0 -> " in said
    assert "wtacrs pass recompute: nothing changed" in said
    assert "saved for backward" in said

    wtacrs_fx.rewrite(symbolic_trace(model), verbose=2, **SMALL)
    assert "wtacrs pass sample_products: nodes" in (said := capsys.readouterr().err)
    assert "wtacrs.linear.default 0 -> 6" in said
    wtacrs_fx.rewrite(symbolic_trace(model), verbose=True, **SMALL)
    assert "wtacrs pass" not in capsys.readouterr().err
