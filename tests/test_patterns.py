"""Training patterns: what people do around a compiled model, and what it does to the draws.

Most tests keep every row (``ratio=0.9999`` of few rows), so that draws, kept rows and scales are all in the graphs and the
gradients are exact all the same: a wrong pairing of rows or graphs shows as a wrong gradient.
"""

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.functional import gelu
from torch.utils.checkpoint import checkpoint

from wtacrs_fx import Backend
from wtacrs_fx.estimators import ESTIMATORS

from helpers import SMALL, Block, Recorder, Transformer, calls, gradients, transformer_batch

KEEP_ALL = {"ratio": 0.9999, "inner": "eager", **SMALL}
HALF = {"ratio": 0.5, "inner": "eager", **SMALL}


def close(got, expected):
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def sampled(backend):
    """The training graphs of a backend, each of which must sample something."""
    assert backend.ledgers
    assert all(x.count("exact") < len(x.entries) for x in backend.ledgers)
    return len(backend.ledgers)


@pytest.mark.works_with("Training", "gradient accumulation", "yes")
@pytest.mark.parametrize("budget", [None, "1GiB"])
def test_gradient_accumulation(budget):
    model, batches = Transformer(layers=1), [transformer_batch(seed=s) for s in range(3)]
    backend = Backend(**{**KEEP_ALL, "memory_budget": budget})
    compiled = torch.compile(model, backend=backend)

    def accumulate(call):
        model.zero_grad()
        for b in batches:
            (call(*b) / 3).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    expected = accumulate(model)
    close(accumulate(compiled), expected)
    assert sampled(backend) == 1


@pytest.mark.works_with("Training", "micro-batches", "each draws afresh")
def test_micro_batches_draw_afresh():
    """The same batch twice: two draws, whose errors are as little alike as those of two steps."""
    model, batch = Transformer(layers=1), transformer_batch()
    compiled = torch.compile(model, backend=Backend(**HALF))
    exact = gradients(model, *batch)
    errors = []
    for _ in range(40):
        g = gradients(model, *batch, call=compiled)
        errors.append(torch.cat([(g[n] - exact[n]).flatten() for n in sorted(g) if n.endswith("up.weight")]))
    e = torch.nn.functional.normalize(torch.stack(errors), dim=1)
    consecutive = (e[1:] * e[:-1]).sum(1)
    assert (consecutive < 0.9).all()
    assert abs(consecutive.mean()) < 5 * consecutive.std() / len(consecutive) ** 0.5


@pytest.mark.works_with("Training", "several forwards before one backward", "yes, in any order")
@pytest.mark.parametrize("budget", [None, "1GiB"])
def test_several_forwards_before_one_backward(budget):
    model, (a, b) = Transformer(layers=1), (transformer_batch(seed=1), transformer_batch(seed=2))

    def both(call):
        return lambda: call(*a) + 2 * call(*b)

    compiled = torch.compile(model, backend=Backend(**{**KEEP_ALL, "memory_budget": budget}))
    close(gradients(model, call=both(compiled)), gradients(model, call=both(model)))
    half = torch.compile(model, backend=Backend(**HALF))
    twice = gradients(model, call=lambda: half(*a) - half(*a))
    assert twice["blocks.0.up.weight"].abs().max() > 1e-4, "the two forwards drew different rows"


def test_backward_in_another_order_than_forward():
    model, (a, b) = Transformer(layers=1), (transformer_batch(seed=1), transformer_batch(seed=2))
    compiled = torch.compile(model, backend=Backend(**KEEP_ALL))
    expected = [gradients(model, *x) for x in (a, b)]
    first, second = compiled(*a), compiled(*b)
    for loss, want in ((second, expected[1]), (first, expected[0])):
        close(gradients(model, call=lambda loss=loss: loss), want)


@pytest.mark.works_with("Training", "a module called twice", "yes")
@pytest.mark.parametrize("budget", [None, "1GiB"])
def test_module_called_twice(budget):
    block = Block()
    backend = Backend(**{**KEEP_ALL, "memory_budget": budget})

    def loss(x):
        return block(block(x) * 0.5).square().mean()

    x, _ = transformer_batch()
    close(gradients(block, x, call=torch.compile(loss, backend=backend)), gradients(block, x, call=loss))
    assert sampled(backend) == 1


class Tied(nn.Module):
    """Embedding and output head share a weight, and two layers share another."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(32, 64)
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
        self.b.weight = self.a.weight
        self.out = nn.Linear(64, 32, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids):
        h = self.embed(ids)
        h = h + self.b(gelu(self.a(h)))
        return nn.functional.cross_entropy(self.out(h).flatten(0, 1), ids.flatten())


@pytest.mark.works_with("Training", "tied weights", "yes")
@pytest.mark.parametrize("budget", [None, "1GiB"])
def test_tied_weights(budget):
    model, ids = Tied(), torch.randint(0, 32, (8, 16))
    backend = Backend(**{**KEEP_ALL, "memory_budget": budget})
    close(gradients(model, ids, call=torch.compile(model, backend=backend)), gradients(model, ids))
    assert sampled(backend) == 1


@pytest.mark.works_with("Training", "frozen layers", "yes; they are no sites")
@pytest.mark.parametrize("frozen", ["blocks.0", "blocks.1", "blocks.0.up", "blocks.1.ln1"])
def test_frozen_layers(frozen):
    model, batch = Transformer(), transformer_batch()
    model.get_submodule(frozen).requires_grad_(False)
    backend = Backend(**KEEP_ALL)
    close(gradients(model, *batch, call=torch.compile(model, backend=backend)), gradients(model, *batch))
    assert not any(e.module.startswith(frozen) for e in backend.ledger.entries), "nothing frozen is a site"


@pytest.mark.works_with("Training", "layers frozen and thawed while training", "yes")
def test_layers_frozen_and_thawed_while_training():
    model, batch = Transformer(layers=2), transformer_batch()
    compiled = torch.compile(model, backend=Backend(**KEEP_ALL))
    for frozen in (False, True, False):
        model.blocks[0].requires_grad_(not frozen)
        close(gradients(model, *batch, call=compiled), gradients(model, *batch))


@pytest.mark.works_with("Training", "`eval()`, `no_grad`, `inference_mode` between steps", "yes, exact")
def test_no_grad_and_eval_inside_of_training():
    model, batch = Transformer(layers=1, dropout=0.1), transformer_batch()
    backend = Backend(**KEEP_ALL)
    model.compile(backend=backend)
    model(*batch).backward()
    model.eval()
    exact = float(copy.deepcopy(model)(*batch).detach())
    with torch.no_grad():
        torch.testing.assert_close(float(model(*batch)), exact)
    with torch.inference_mode():
        torch.testing.assert_close(float(model(*batch)), exact)
    model.train()
    with torch.no_grad():
        model(*batch)
    model(*batch).backward()
    assert sampled(backend) == 1, "evaluation makes no training graph, and training goes on with its own"


@pytest.mark.works_with("Training", "`no_grad` inside of the model", "yes")
def test_no_grad_inside_of_the_graph():
    model = Transformer()
    x, target = transformer_batch()

    def loss(x, target):
        with torch.no_grad():
            teacher = model.blocks[0](x)
        return (model.blocks[0](x) - 0.5 * teacher).square().mean() + model.blocks[1](teacher).square().mean()

    backend = Backend(**KEEP_ALL)
    close(
        gradients(model, x, target, call=torch.compile(loss, backend=backend)), gradients(model, x, target, call=loss)
    )
    sampled(backend)


@pytest.mark.works_with("Training", '`retain_graph=True`, `inner="eager"`', "yes; the same draw again")
def test_retain_graph_repeats_the_draw():
    """Two backwards of one forward are the same estimate twice: rows are a function of what the forward saved."""
    model, batch = Transformer(layers=1), transformer_batch()
    compiled = torch.compile(model, backend=Backend(**HALF))
    loss = compiled(*batch)
    parameters = list(model.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    second = torch.autograd.grad(loss, parameters)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.long
@pytest.mark.works_with(
    "Training", "`retain_graph=True` with Inductor", "yes; PyTorch's error where it donates buffers"
)
def test_retain_graph_with_inductor():
    model, batch = Transformer(layers=1), transformer_batch()
    loss = torch.compile(model, backend=Backend(**{**HALF, "inner": "inductor"}))(*batch)
    parameters = list(model.parameters())
    first = [g.clone() for g in torch.autograd.grad(loss, parameters, retain_graph=True)]
    torch.testing.assert_close(first, list(torch.autograd.grad(loss, parameters)), rtol=0, atol=0)


@pytest.mark.works_with("Training", "gradient clipping", "yes")
def test_gradient_clipping():
    model, batch = Transformer(layers=1), transformer_batch()
    compiled = torch.compile(model, backend=Backend(**KEEP_ALL))
    norms = []
    for call in (model, compiled):
        model.zero_grad()
        call(*batch).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1))
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-4, atol=0)


@pytest.mark.works_with("Training", "averaged copies (`AveragedModel`)", "yes")
@pytest.mark.parametrize("in_place", [False, True])
def test_ema_copy(in_place):
    model, batch = Transformer(layers=1), transformer_batch()
    backend = Backend(**KEEP_ALL)
    compiled = model if in_place else torch.compile(model, backend=backend)
    if in_place:
        model.compile(backend=backend)
    ema = torch.optim.swa_utils.AveragedModel(compiled, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        compiled(*batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update_parameters(compiled)
    with torch.no_grad():
        torch.testing.assert_close(ema(*batch), ema.module(*batch))
        assert float(compiled(*batch)) < float(ema(*batch)) < float(Transformer(layers=1)(*batch)) + 1
    assert sampled(backend) == 1


@pytest.mark.works_with("Training", "deep copies of a compiled model", "yes")
def test_deep_copies_train_apart():
    model, batch = Transformer(layers=1), transformer_batch()
    compiled = torch.compile(model, backend=Backend(**KEEP_ALL))
    compiled(*batch).backward()
    model.zero_grad()
    twin = copy.deepcopy(compiled)
    with torch.no_grad():
        twin._orig_mod.blocks[0].up.weight.mul_(2)
    expected = gradients(copy.deepcopy(twin._orig_mod), *batch)
    close(gradients(twin._orig_mod, *batch, call=twin), expected)
    assert all(p.grad is None for p in model.parameters())
    close(gradients(model, *batch, call=compiled), gradients(model, *batch))


@pytest.mark.works_with("Training", "two models, two sets of options, one process", "yes")
def test_two_models_with_two_sets_of_options():
    a, b, batch = Transformer(layers=1), Transformer(layers=1), transformer_batch()
    ours = [torch.compile(m, backend="wtacrs", options={**HALF, "ratio": r}) for m, r in ((a, 0.2), (b, 0.9999))]
    exact = [gradients(m, *batch) for m in (a, b)]
    for _ in range(2):
        first, second = (gradients(m, *batch, call=c) for m, c in zip((a, b), ours))
        close(second, exact[1])
        assert (first["blocks.0.up.weight"] - exact[0]["blocks.0.up.weight"]).abs().max() > 1e-4


@pytest.mark.works_with("Training", "`compile` of submodules", "yes")
def test_submodules_and_functions():
    model, (x, target) = Transformer(), transformer_batch()
    expected = gradients(model, x, target)
    backend = Backend(**KEEP_ALL)
    for block in model.blocks:
        block.compile(backend=backend)
    close(gradients(model, x, target), expected)
    assert 1 <= sampled(backend) <= 2
    names = {e.module for e in backend.ledger.entries}
    assert "up" in names, f"names are those of the submodule: {names}"


@pytest.mark.works_with("Training", "`fullgraph=True`", "yes")
def test_fullgraph():
    model, batch = Transformer(layers=1, dropout=0.1), transformer_batch()
    backend = Backend(**KEEP_ALL)
    torch.compile(model, backend=backend, fullgraph=True)(*batch).backward()
    assert sampled(backend) == 1


@pytest.mark.long
@pytest.mark.works_with("Training", "`mode='reduce-overhead'` on a CPU", "as without it: there are no CUDA graphs")
def test_reduce_overhead_on_a_cpu():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)), torch.randn(256, 64)
    backend = Backend(**{**KEEP_ALL, "inner": "inductor"})

    def loss(call):
        return lambda: call(x).square().mean()

    compiled = torch.compile(model, backend=backend, mode="reduce-overhead")
    for _ in range(2):
        close(gradients(model, call=loss(compiled)), gradients(model, call=loss(model)))
    assert sampled(backend) == 1


@pytest.mark.works_with("Training", "compiled autograd", "yes")
@pytest.mark.parametrize("budget", [None, "1GiB"])
def test_compiled_autograd(budget):
    """The backward is called inside of the compiled function, and is captured by a compiler of its own."""
    model, batch = Transformer(layers=1), transformer_batch()
    expected = gradients(model, *batch)
    backend = Backend(**{**KEEP_ALL, "memory_budget": budget})
    counters.clear()
    with torch._dynamo.config.patch(compiled_autograd=True):

        @torch.compile(backend=backend)
        def step():
            model(*batch).backward()

        model.zero_grad()
        step()
    close({n: p.grad.clone() for n, p in model.named_parameters()}, expected)
    sampled(backend)
    assert counters["compiled_autograd"]["captures"] == 1


@pytest.mark.works_with("Training", "optimizer steps in the backward (hooks of parameters)", "yes")
def test_optimizer_in_backward():
    """``register_post_accumulate_grad_hook``: a parameter is changed while the backward is still running."""
    model, batch = Transformer(layers=1), transformer_batch()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend=Backend(**KEEP_ALL))

    def step(p):
        with torch.no_grad():
            p -= 0.1 * p.grad
        p.grad = None

    for m in (model, twin):
        for p in m.parameters():
            p.register_post_accumulate_grad_hook(step)
    for _ in range(2):
        compiled(*batch).backward()
        twin(*batch).backward()
    for (n, p), q in zip(model.named_parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=n)


@pytest.mark.works_with("Training", "module hooks", "yes")
def test_module_hooks():
    model, batch = Transformer(), transformer_batch()
    seen = []
    model.blocks[0].up.register_forward_hook(lambda m, i, o: o * 0.5)
    model.blocks[1].register_full_backward_hook(lambda m, gi, go: seen.append(1))
    expected = gradients(model, *batch)
    close(gradients(model, *batch, call=torch.compile(model, backend=Backend(**KEEP_ALL))), expected)
    assert seen == [1, 1], "once in each of the two backwards"


@pytest.mark.works_with("Training", "gradients of inputs", "exact")
def test_gradients_of_inputs():
    """Adversarial training, prompt tuning: the input's gradient is exact."""
    model, (x, target) = Transformer(layers=1), transformer_batch()
    compiled = torch.compile(model, backend=Backend(**HALF))
    got, expected = (torch.autograd.grad(f(x.requires_grad_(), target), x)[0] for f in (compiled, model))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.works_with(
    "Training",
    "CUDA graphs, `mode='reduce-overhead'`",
    "every replay draws afresh (on an H100); nothing waits for the device",
)
@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
def test_nothing_waits_for_the_device(estimator):
    """Meta tensors have no values: an estimator that asked for one, or for a shape that depends on one, would raise."""
    importance = torch.empty(64, device="meta")
    rows, scale = ESTIMATORS[estimator](
        importance, 16, lambda stream, n: torch.empty(n, device="meta", dtype=torch.float64)
    )
    assert rows.shape == scale.shape == (16,)
    recorder = Recorder(estimator=estimator, ratio=0.5)
    model = Transformer(layers=1)
    gradients(model, *transformer_batch(), call=torch.compile(model, backend=recorder))
    graphs = [*recorder.forward, *recorder.backward]
    assert sum(calls(g, torch.ops.wtacrs.select_rows.default) for g in graphs) > 0
    for waits in (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.nonzero.default,
        torch.ops.aten.item.default,
    ):
        assert not any(calls(g, waits) for g in graphs)


WAITING = ("aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::masked_select")


@pytest.mark.parametrize(
    "options",
    [{}, {"estimator": "wta_crs", "round_bits": 8, "row_bits": 8}, {"center_rows": True, "attention": True}],
    ids=lambda o: "+".join(o) or "defaults",
)
def test_no_op_of_ours_reads_a_value(options):
    """A step under the profiler, which sees inside of custom ops. Only the seed is read: from the CPU generator's state, and,
    where it is on the CPU itself, to make keys of it."""
    model, batch = Transformer(layers=1), transformer_batch()
    compiled = torch.compile(model, backend=Backend(**{**HALF, **options}))
    compiled(*batch).backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        compiled(*batch).backward()
    events = profile.events()
    assert any(e.name == "wtacrs::select_rows" for e in events)

    def inside_of(event, name):
        return event is not None and (event.name == name or inside_of(event.cpu_parent, name))

    reads = [e for e in events if e.name in WAITING]
    assert any(inside_of(e, "wtacrs::draw_seed") for e in reads), "the profiler sees them"
    ours = ("wtacrs::draw_seed", "wtacrs::short_uniform")
    assert not [e.name for e in reads if not any(inside_of(e, name) for name in ours)]


@pytest.mark.works_with("Training", "`torch.utils.checkpoint` and `save_on_cpu` around compiled blocks", "yes")
@pytest.mark.parametrize("around", ["checkpoint", "reentrant", "save_on_cpu"])
def test_hooks_on_saved_tensors_around_compiled_blocks(around):
    """The compiled forward runs twice, and draws twice: all that the backward reads has to come from one of the two."""
    torch.manual_seed(0)
    model, (x, target) = Transformer(dropout=0.2), transformer_batch()
    x.requires_grad_(around == "reentrant")

    def call_of(blocks):
        def call():
            torch.manual_seed(1)  # the masks of dropout
            with torch.autograd.graph.save_on_cpu() if around == "save_on_cpu" else contextlib.nullcontext():
                h = x
                for block in blocks:
                    h = (
                        block(h)
                        if around == "save_on_cpu"
                        else checkpoint(block, h, use_reentrant=around == "reentrant")
                    )
                return nn.functional.cross_entropy(model.classifier(h.mean(1)), target)

        return call

    ours, exact = Backend(**KEEP_ALL), Backend(**{**KEEP_ALL, "ratio": 1.0})
    got, want = ([torch.compile(b, backend=backend) for b in model.blocks] for backend in (ours, exact))
    close(gradients(model, call=call_of(got)), gradients(model, call=call_of(want)))
    sampled(ours)
