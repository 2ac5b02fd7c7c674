"""Linear layers swapped in place: what changes, what does not, and the way back."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.fx import symbolic_trace
from torch.utils.checkpoint import checkpoint

import wtacrs_fx
from wtacrs_fx import WtacrsWarning, measure
from wtacrs_fx.swap import SampledLinear

from helpers import SMALL, Block, Moments, Transformer, gradients, transformer_batch


class Untraceable(nn.Module):
    """Control flow on data, which no tracer follows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        return (self.b(h) if float(h.detach().sum()) > -1e9 else h).square().sum()


def swap(model: nn.Module, **options) -> list[str]:
    return wtacrs_fx.swap_linears(model, **{**SMALL, **options})


def test_swapped_and_restored():
    model, x = Untraceable(), torch.randn(64, 16)
    layers, keys, parameters = [model.a, model.b], list(model.state_dict()), [*model.parameters()]
    exact, loss = gradients(model, x), model(x)
    assert swap(model, ratio=0.3) == ["a", "b"]
    assert [type(m) for m in layers] == [SampledLinear] * 2
    assert (list(model.state_dict()), [id(p) for p in model.parameters()]) == (keys, [id(p) for p in parameters])
    assert torch.equal(model(x), loss)
    sampled = gradients(model, x)
    torch.testing.assert_close(sampled["a.bias"], exact["a.bias"])
    assert not torch.equal(sampled["a.weight"], exact["a.weight"])
    assert wtacrs_fx.restore_linears(model) == ["a", "b"]
    assert [type(m) for m in layers] == [nn.Linear] * 2
    assert list(dict(model.named_modules())) == ["", "a", "b"]
    assert all(torch.equal(v, exact[k]) for k, v in gradients(model, x).items())


def test_unbiased_and_exact_with_all_rows():
    model, x = Untraceable(), torch.randn(64, 16)
    exact = gradients(model, x)
    swap(model, ratio=0.9999)
    torch.testing.assert_close(gradients(model, x), exact, rtol=1e-5, atol=1e-5)
    wtacrs_fx.restore_linears(model)
    swap(model, ratio=0.4)
    moments = Moments()
    for _ in range(300):
        moments.add(gradients(model, x))
    for key, value in exact.items():
        assert moments.z(key, value).square().mean().sqrt() < 1.4, key


def test_eval_is_exact():
    model, x = Untraceable(), torch.randn(64, 16)
    exact = gradients(model, x)
    swap(model, ratio=0.3)
    model.eval()
    torch.testing.assert_close(gradients(model, x), exact)
    with torch.no_grad():
        model.train()(x)


def held(model: nn.Module, *args) -> int:
    with measure.held(model) as count:
        result = model(*args)
    assert result.requires_grad
    return count.bytes


def test_layers_that_read_one_tensor_share_its_rows():
    """q, k and v read 128 rows of 64 numbers; 32 rows and their indices are kept once, not three times."""
    model, (x, _) = Block(), transformer_batch()
    exact = held(model, x)
    swap(model, ratio=0.25, include=["q", "k", "v"])
    assert exact - held(model, x) == (128 - 32) * 64 * 4 - 32 * 8
    draws = []
    for layer in (model.q, model.k, model.v):
        layer.wtacrs_sampler.register_forward_hook(lambda *args: draws.append(args))
    y = model(x)
    assert len(draws) == 1
    y.sum().backward()


def test_a_draw_is_not_used_for_a_tensor_that_was_modified():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            x.add_(1)
            return (y * self.b(x)).sum()

    model, x = Net(), torch.randn(40, 8)
    exact = gradients(model, x, call=lambda x: (model.a(x) * model.b(x + 1)).sum())
    swap(model, ratio=0.9999)
    torch.testing.assert_close(gradients(model, x.clone()), exact, rtol=1e-5, atol=1e-5)


def test_a_draw_is_forgotten_with_its_input():
    model = nn.Linear(8, 8)
    swap(model)
    x = torch.randn(40, 8)
    y = model(x)
    assert len(model.wtacrs_draws._draws) == 1
    del x, y
    assert len(model.wtacrs_draws._draws) == 0


def test_two_steps_on_one_tensor_draw_twice():
    """The batch is the same object in the next step: its old rows must not be used again."""
    model, x = nn.Linear(16, 16), torch.randn(64, 16)
    swap(model, ratio=0.3)
    first, second = (gradients(model, x, call=lambda x: model(x).square().sum()) for _ in range(2))
    assert not torch.equal(first["weight"], second["weight"])


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(clone):
    model, x = Transformer(layers=1), transformer_batch()
    swap(model, ratio=0.3)
    twin = clone(model)
    assert twin.blocks[0].q.wtacrs_draws is twin.blocks[0].k.wtacrs_draws
    assert twin.blocks[0].q.wtacrs_draws is not model.blocks[0].q.wtacrs_draws
    results = []
    for module in (model, twin):
        torch.manual_seed(3)
        results.append(gradients(module, *x))
    assert all(torch.equal(v, results[1][k]) for k, v in results[0].items())


def test_in_a_checkpoint_region_and_compiled():
    model, (x, _) = Block(), transformer_batch()
    exact = gradients(model, x, call=lambda x: model(x).square().sum())
    swap(model, ratio=0.9999)
    again = gradients(model, x, call=lambda x: checkpoint(model, x, use_reentrant=False).square().sum())
    torch.testing.assert_close(again, exact, rtol=1e-4, atol=1e-4)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        gradients(model, x, call=lambda x: compiled(x).square().sum()), exact, rtol=1e-4, atol=1e-4
    )


def test_autocast_holds_low_precision_rows():
    model, x = nn.Linear(16, 8), torch.randn(64, 16)
    swap(model, ratio=0.25)
    with torch.autocast("cpu", torch.bfloat16):
        assert held(model, x) == 16 * 16 * 2 + 16 * 8


class TestNotSwapped:
    def test_names(self):
        assert swap(Transformer(layers=1), exclude=["*.q", "classifier"]) == [
            f"blocks.0.{n}" for n in ("k", "v", "o", "up", "down")
        ]

    def test_subclasses_and_sparse_weights(self):
        class Mine(nn.Linear):
            pass

        model = nn.Sequential(Mine(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
        model[1].weight = nn.Parameter(model[1].weight.to_sparse())
        with pytest.warns(WtacrsWarning, match=r"stay exact: '1' \(weight has layout torch.sparse_coo\)"):
            assert swap(model) == ["2"]

    def test_a_forward_of_its_own(self):
        model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(64, 8)
        plain = model[0].forward
        model[0].forward = lambda x: 2 * plain(x)
        before = model(x)
        with pytest.warns(WtacrsWarning, match=r"'0' \(the module's forward was replaced\)"):
            assert swap(model) == ["1"]
        assert torch.equal(model(x), before)

    def test_a_rewritten_module(self):
        gm = wtacrs_fx.rewrite(symbolic_trace(nn.Sequential(nn.Linear(8, 8))), **SMALL)
        with pytest.raises(ValueError, match="rewritten already"):
            swap(gm)

    def test_parametrized_since(self):
        model = nn.Sequential(nn.Linear(8, 8))
        swap(model)
        nn.utils.parametrizations.weight_norm(model[0])
        with pytest.raises(ValueError, match=r"ParametrizedSampledLinear.*remove_parametrizations"):
            wtacrs_fx.restore_linears(model)
        nn.utils.parametrize.remove_parametrizations(model[0], "weight")
        assert wtacrs_fx.restore_linears(model) == ["0"]
        assert type(model[0]) is nn.Linear

    def test_nothing_warns_with_the_names(self):
        with pytest.warns(WtacrsWarning, match="no linear layer was swapped. Layers: 0"):
            assert swap(nn.Sequential(nn.Linear(8, 8)), include="*.query") == []

    def test_twice_is_refused(self):
        model = nn.Sequential(nn.Linear(8, 8))
        swap(model)
        with pytest.raises(ValueError, match=r"layer '0' was swapped already; call wtacrs_fx.restore_linears"):
            swap(model)

    def test_no_module(self):
        with pytest.raises(TypeError, match="not function"):
            wtacrs_fx.swap_linears(lambda x: x)
