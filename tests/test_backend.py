"""The backend as a user meets it: by name, by object, with modes, caches and mistakes."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from functorch.compile import aot_function, make_boxed_compiler
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import wtacrs_fx
from wtacrs_fx import Backend, Config, WtacrsWarning, backend, private

from helpers import SMALL, Transformer, gradients, transformer_batch

TESTS = Path(__file__).parent


def run(code: str, cache: Path, **env: str) -> str:
    """Run Python code in a new process with its own compile cache; its last line of output. (Not in the cache: a
    folder that Inductor names by a hash, "z3", would be the module that torch asks for.)"""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "PYTHONPATH": str(TESTS), **env},
        cwd=TESTS,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()[-1]


TRAIN = """
    import json, sys, torch
    from torch._dynamo.utils import counters
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 64))
    assert "wtacrs_fx" not in sys.modules
    compiled = torch.compile(model, backend="wtacrs", options=json.loads({options!r}))
    torch.manual_seed(1)
    compiled(torch.randn(256, 64)).square().sum().backward()
    wtacrs_fx = sys.modules["wtacrs_fx"]
    print(json.dumps({{
        "aot": [counters["aot_autograd"]["autograd_cache_hit"], counters["aot_autograd"]["autograd_cache_miss"]],
        "fx": [counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"]],
        "gradient": model[0].weight.grad.double().abs().sum().item(),
        "ledger": [ledger.to_dict() for ledger in wtacrs_fx.ledgers()],
    }}))
"""


@pytest.mark.slow
@pytest.mark.works_with(
    "Caches", "warm start in a new process", "trains identically, with its ledger; a damaged ledger file is made again"
)
def test_by_name_without_import_and_caches_in_two_processes(tmp_path):
    def train(**options):
        return json.loads(run(TRAIN.format(options=json.dumps(options)), tmp_path))

    cold = train(ratio=0.3)
    warm = train(ratio=0.3)
    assert (cold["aot"], cold["fx"]) == ([0, 1], [0, 2])
    assert (warm["aot"], warm["fx"]) == ([1, 0], [2, 0])
    assert warm["gradient"] == cold["gradient"]
    assert len(cold["ledger"]) == 1
    assert cold["ledger"][0]["tensors"]
    assert warm["ledger"] == cold["ledger"], "restored though the passes did not run"

    other = train(ratio=0.4)
    assert (other["aot"], other["fx"]) == ([0, 1], [0, 2]), "one option changed: nothing stale is served"
    assert other["ledger"] != cold["ledger"]

    for path in (tmp_path / "wtacrs").glob("*.json"):
        path.write_text("{ not json")
    rebuilt = train(ratio=0.3)
    assert rebuilt["fx"] == [2, 0], "the compiled graphs are still good"
    assert rebuilt["ledger"] == cold["ledger"], "a damaged file is not trusted but made again"
    assert rebuilt["gradient"] == cold["gradient"]
    stored = [
        json.loads(path.read_text()) for path in (tmp_path / "wtacrs").glob("*.json") if path.read_text()[0] == "["
    ]
    assert stored == [cold["ledger"]], "and written again"


def test_uuid_covers_source_options_and_names(monkeypatch):
    def uuid(names=(), **options):
        return backend.Partitioner(Config(**options), names).uuid()

    assert uuid() == uuid()
    assert len({uuid(), uuid(ratio=0.2), uuid(["a.weight"]), uuid(inductor={"max_autotune": True})}) == 4
    with torch.autocast("cpu", torch.bfloat16):
        bfloat16 = uuid()
    with torch.autocast("cpu", torch.float16):
        float16 = uuid()
    assert len({uuid(), bfloat16, float16}) == 3
    before = uuid()
    monkeypatch.setattr(backend, "source_hash", lambda: "changed")
    assert uuid() != before
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    assert uuid() != before


def test_source_hash_covers_every_module():
    backend.source_hash.cache_clear()
    assert len(backend.source_hash()) == 64
    assert backend.source_hash() == backend.source_hash()


def test_ledger_object_and_global_list():
    model, batch = Transformer(), transformer_batch()
    ours = Backend(Config(inner="eager", **SMALL))
    with pytest.raises(RuntimeError, match="no training graph was compiled"):
        _ = ours.ledger
    gradients(model, *batch, call=torch.compile(model, backend=ours))
    assert ours.ledger is ours.ledgers[-1]
    assert wtacrs_fx.ledgers()[-1] is ours.ledger
    table = ours.ledger.table()
    assert "blocks.0.q" in table
    assert "shared" in table or "recomputed" in table
    assert "saved for backward: exact" in table
    assert wtacrs_fx.Ledger.from_dict(json.loads(json.dumps(ours.ledger.to_dict()))) == ours.ledger


def test_two_backends_do_not_mix():
    model, batch = Transformer(), transformer_batch()
    a, b = Backend(ratio=0.2, inner="eager", **SMALL), Backend(ratio=0.6, inner="eager", **SMALL)
    for ours in (a, b):
        torch._dynamo.reset()
        gradients(model, *batch, call=torch.compile(model, backend=ours))
    kept = [next(e.kept for e in x.ledger.entries if e.decision != "exact") for x in (a, b)]
    assert kept == [26, 77]
    assert len(a.ledgers) == len(b.ledgers) == 1


def test_verbose_prints_the_ledger(capsys):
    model, batch = Transformer(), transformer_batch()
    options = {"inner": "eager", "verbose": True, **SMALL}
    gradients(model, *batch, call=torch.compile(model, backend="wtacrs", options=options))
    assert "blocks.1.down" in capsys.readouterr().err


def test_unknown_option_by_name():
    model = torch.compile(nn.Linear(4, 4), backend="wtacrs", options={"ration": 0.3})
    with pytest.raises(BackendCompilerFailed, match="Did you mean 'ratio'"):
        model(torch.randn(2, 4))


def test_options_beside_an_object():
    model = torch.compile(nn.Linear(4, 4), backend=Backend(), options={"ratio": 0.3})
    with pytest.raises(BackendCompilerFailed, match=r"Backend\(ratio=...\)"):
        model(torch.randn(2, 4))


@pytest.mark.slow
def test_mode_is_translated(monkeypatch):
    seen = {}
    from torch._inductor import compile_fx

    original = compile_fx.compile_fx

    def spy(gm, inputs, config_patches=None, **kwargs):
        seen.update(config_patches or {})  # (it calls itself, without patches)
        return original(gm, inputs, config_patches=config_patches, **kwargs)

    monkeypatch.setattr(private, "compile_fx", spy, raising=False)  # (it may have been looked up before)
    model = torch.compile(nn.Linear(8, 8), backend="wtacrs", mode="max-autotune-no-cudagraphs")
    with pytest.warns(WtacrsWarning, match="below min_rows"):
        model(torch.randn(4, 8)).sum().backward()
    assert seen["max_autotune"] is True
    assert isinstance(seen["custom_partitioner_fn"], backend.Partitioner)


def test_unknown_mode_and_inductor_option():
    for kwargs, words in (
        ({"mode": "fastest"}, "Unrecognized mode"),
        ({"options": {"inductor": {"max_autotun": True}}}, "Unexpected optimization option"),
        ({"mode": "max-autotune", "backend": Backend(inner="eager")}, "inner='eager'"),
    ):
        torch._dynamo.reset()
        model = torch.compile(nn.Linear(4, 4), **{"backend": "wtacrs", **kwargs})
        with pytest.raises(BackendCompilerFailed, match=words):
            model(torch.randn(2, 4))


@pytest.mark.slow
def test_eval_and_no_grad_pass_through():
    model, (x, target) = Transformer(dropout=0.1), transformer_batch()
    ours = Backend(**SMALL)
    model.eval()
    exact = model(x, target)
    with torch.no_grad():
        out = torch.compile(model, backend=ours)(x, target)
    torch.testing.assert_close(out, exact)
    assert ours.ledgers == []


def test_train_then_eval_then_train():
    model, batch = Transformer(dropout=0.1), transformer_batch()
    ours = Backend(inner="eager", **SMALL)
    model.compile(backend=ours)
    model(*batch).backward()
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(*batch), model(*batch))
    model.train()
    model(*batch).backward()
    assert not any(name.startswith("_orig_mod") for name in model.state_dict())


def test_double_backward_is_a_clear_error():
    model, x = nn.Linear(16, 16), torch.randn(32, 16, requires_grad=True)
    compiled = torch.compile(lambda x: torch.sin(model(torch.cos(x))).sum(), backend=Backend(inner="eager", **SMALL))
    (grad,) = torch.autograd.grad(compiled(x), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("late", ["sample", "exact"])
def test_activations_that_are_not_finite(value, late):
    model, (x, target) = Transformer(), transformer_batch()
    x[0, 0, 0] = value
    compiled = torch.compile(model, backend=Backend(inner="eager", late=late, **SMALL))
    grads = gradients(model, x, target, call=compiled)
    assert not torch.isfinite(grads["blocks.0.q.weight"]).all(), "a loss scaler must see it"


def test_wrong_torch_version_warns_with_both(monkeypatch):
    backend.check_torch_version.cache_clear()
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    with pytest.warns(WtacrsWarning, match=r"tested with torch [\d. to]+, this is torch 2\.99\.0"):
        backend.check_torch_version()
    backend.check_torch_version.cache_clear()


def test_functorch_partitioner():
    """`partition_fn` of functorch's own entry point, without Dynamo: which inputs are weights is found from the graph."""
    w1, w2 = (nn.Parameter(torch.randn(32, 32) * 0.2) for _ in range(2))
    x = torch.randn(64, 32)

    def loss(x, w1, w2):
        return (torch.sin(x @ w1) @ w2).square().sum()

    exact = torch.autograd.grad(loss(x, w1, w2), (w1, w2))
    partition_fn = wtacrs_fx.partitioner(ratio=0.9999, **SMALL)
    nop = make_boxed_compiler(lambda gm, _: gm.forward)
    compiled = aot_function(loss, fw_compiler=nop, bw_compiler=nop, partition_fn=partition_fn)
    sampled = torch.autograd.grad(compiled(x, w1, w2), (w1, w2))
    assert partition_fn.ledgers[-1].count("exact") == 0
    assert len(partition_fn.ledgers[-1].entries) == 2
    torch.testing.assert_close(sampled, exact)


def test_dynamic_shapes_are_sampled_by_share():
    """One graph for every batch size; the rows kept follow the size."""
    model = Transformer()
    ours = Backend(ratio=0.5, inner="eager", **SMALL)
    compiled = torch.compile(model, backend=ours, dynamic=True)
    for batch in (4, 8, 13):
        x, t = transformer_batch(batch=batch)
        exact, sampled = gradients(model, x, t), gradients(model, x, t, call=compiled)
        torch.testing.assert_close(exact["blocks.0.ln1.weight"], sampled["blocks.0.ln1.weight"], rtol=1e-4, atol=1e-6)
        for name in ("blocks.0.up.weight", "blocks.1.o.weight"):
            slope = float((exact[name] * sampled[name]).sum() / exact[name].square().sum())
            assert 0.4 < slope < 1.8, f"{name}: {slope}"
    assert len(ours.ledgers) <= 2
    assert ours.ledger.count("exact") == 1
    assert any(isinstance(e.kept, str) for e in ours.ledger.entries), "symbols are shown as symbols"
