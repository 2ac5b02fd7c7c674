"""The products of rewritten modules: opcheck, gradcheck, unbiasedness, what autograd keeps."""

import pytest
import torch
from torch import Tensor, nn
from torch.library import opcheck

from wtacrs_fx import Config, measure, rng
from wtacrs_fx.functional import RowSampler

from helpers import SMALL, Moments

ops = torch.ops.wtacrs


def tensor(*shape: int, dtype: torch.dtype = torch.float64, grad: bool = True) -> Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_(grad)


def keep(matrix: Tensor, k: int, estimator: str = "systematic") -> tuple[Tensor, Tensor]:
    return ops.keep_rows(matrix.detach(), ops.draw_seed(matrix.device), 0, k, estimator)


LINEAR = {
    "matrix": lambda: (tensor(6, 4), tensor(3, 4), tensor(3)),
    "batched": lambda: (tensor(2, 5, 4), tensor(3, 4), tensor(3)),
    "vector": lambda: (tensor(4), tensor(3, 4), tensor(3)),
    "no bias": lambda: (tensor(6, 4), tensor(3, 4), None),
    "frozen weight": lambda: (tensor(6, 4), tensor(3, 4, grad=False), tensor(3)),
    "no input gradient": lambda: (tensor(6, 4, grad=False), tensor(3, 4), tensor(3)),
    "complex": lambda: (tensor(6, 4, dtype=torch.complex128), tensor(3, 4, dtype=torch.complex128), None),
    "wide bias": lambda: (tensor(6, 4), tensor(3, 4), tensor(6, 3)),
}
MATMUL = {
    "matrices": ((6, 4), (4, 3)),
    "weight on the right": ((2, 5, 4), (4, 3)),
    "weight on the left": ((3, 4), (2, 4, 5)),
    "heads": ((2, 3, 5, 4), (2, 3, 4, 6)),
    "vector on the right": ((2, 5, 4), (4,)),
    "vector on the left": ((4,), (2, 4, 5)),
    "vectors": ((4,), (4,)),
    "broadcast": ((2, 1, 5, 4), (3, 4, 2)),
}


def all_rows(left: Tensor, right: Tensor) -> list[Tensor | None]:
    """Both operands drawn with k = M, as RowSampler would, so that the sampled gradient is the exact one."""
    config = Config(**SMALL, ratio=0.9999)
    draws = RowSampler(config)(left, right), RowSampler(config, columns=True)(right, left)
    return [*draws[0], *draws[1]]


class TestOpcheck:
    @pytest.mark.parametrize("shape", [(20, 5), (3, 20, 5), (2, 3, 20, 5)])
    @pytest.mark.parametrize("estimator", ["crs", "wta_crs", "systematic", "topk"])
    def test_keep_rows(self, shape, estimator):
        for k in (1, 7, 20, 30):
            opcheck(ops.keep_rows.default, (torch.randn(shape), torch.tensor([3]), 0, k, estimator))

    def test_keep_rows_of_a_transposed_bfloat16_matrix(self):
        opcheck(
            ops.keep_rows.default, (torch.randn(5, 20, dtype=torch.bfloat16).t(), torch.tensor([3]), 0, 7, "wta_crs")
        )

    @pytest.mark.parametrize("name", LINEAR)
    @pytest.mark.parametrize("sampled", [False, True])
    def test_linear(self, name, sampled):
        x, w, b = LINEAR[name]()
        opcheck(ops.linear.default, (x, w, b, *(RowSampler(Config(**SMALL, ratio=0.5))(x, w) if sampled else ())))

    @pytest.mark.parametrize("name", MATMUL)
    @pytest.mark.parametrize("sampled", [False, True])
    def test_matmul(self, name, sampled):
        left, right = (tensor(*s) for s in MATMUL[name])
        opcheck(ops.matmul.default, (left, right, *(all_rows(left, right) if sampled else ())))


class TestGradcheck:
    """Float64, every row kept: the formulas are the derivative."""

    @pytest.mark.parametrize("name", LINEAR)
    @pytest.mark.parametrize("sampled", [False, True])
    def test_linear(self, name, sampled):
        x, w, b = LINEAR[name]()

        def function(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
            return ops.linear(x, w, b, *(RowSampler(Config(**SMALL, ratio=0.9999))(x, w) if sampled else ()))

        torch.testing.assert_close(function(x, w, b), nn.functional.linear(x, w, b), rtol=0, atol=0)
        assert torch.autograd.gradcheck(function, (x, w, b))

    @pytest.mark.parametrize("name", MATMUL)
    @pytest.mark.parametrize("sampled", [False, True])
    def test_matmul(self, name, sampled):
        left, right = (tensor(*s) for s in MATMUL[name])

        def function(left: Tensor, right: Tensor) -> Tensor:
            return ops.matmul(left, right, *(all_rows(left, right) if sampled else ()))

        torch.testing.assert_close(function(left, right), left @ right, rtol=0, atol=0)
        assert torch.autograd.gradcheck(function, (left, right))

    def test_double_backward_is_refused(self):
        x, w, _ = LINEAR["matrix"]()
        (gradient,) = torch.autograd.grad(ops.linear(x, w).square().sum(), w, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


class TestUnbiased:
    """The mean over draws is the exact gradient, z-scores per element; products of heads have a draw per head."""

    def check(self, product, exact_gradients, draws: int = 600) -> None:
        moments = Moments()
        for _ in range(draws):
            moments.add(product())
        for name, exact in exact_gradients.items():
            z = moments.z(name, exact)
            assert moments.standard_error(name).max() > 0
            assert z.square().mean().sqrt() < 1.35, f"{name}: rms {z.square().mean().sqrt():.2f}"
            assert z.abs().max() < 6, name

    @pytest.mark.parametrize("estimator", ["crs", "wta_crs", "systematic"])
    def test_linear(self, estimator):
        x, w = tensor(60, 24), tensor(16, 24)
        sampler = RowSampler(Config(**SMALL, ratio=0.3, estimator=estimator))

        def gradient() -> dict[str, Tensor]:
            y = ops.linear(x, w, None, *sampler(x, w))
            return {"w": torch.autograd.grad(torch.cos(y).sum(), w)[0]}

        self.check(gradient, {"w": torch.autograd.grad(torch.cos(x @ w.T).sum(), w)[0]})

    @pytest.mark.parametrize("estimator", ["crs", "wta_crs", "systematic"])
    def test_matmul_per_head(self, estimator):
        left, right = tensor(2, 3, 20, 8), tensor(2, 3, 8, 16)
        config = Config(**SMALL, ratio=0.4, estimator=estimator)
        samplers = RowSampler(config), RowSampler(config, columns=True)

        def gradient() -> dict[str, Tensor]:
            z = ops.matmul(left, right, *samplers[0](left, right), *samplers[1](right, left))
            return dict(zip("lr", torch.autograd.grad(torch.cos(z).sum(), (left, right))))

        self.check(gradient, dict(zip("lr", torch.autograd.grad(torch.cos(left @ right).sum(), (left, right)))))

    def test_heads_are_drawn_independently(self):
        """Equal importances in every head: the rows of two heads agree no more often than by chance."""
        rows = [keep(torch.ones(64, 50, 2), 5, "crs")[1] for _ in range(20)]
        same = torch.stack([(r[0] == r[1:]).double().mean() for r in rows])
        assert abs(same.mean() - 1 / 50) < 5 * same.std() / 20**0.5 + 1e-3

    @pytest.mark.parametrize("estimator", ["crs", "wta_crs", "systematic", "topk"])
    def test_a_draw_of_many_is_many_draws(self, estimator):
        """[B, M] at once gives what every row gives alone with its own seed, also for zeros and values that are not finite."""
        importance, seed = torch.rand(5, 40), torch.tensor([7])
        importance[1], importance[2, 3], importance[3, 5:] = 0, torch.inf, 0
        rows, scale = ops.select_rows(importance, seed, 2, 9, estimator)
        for i, own in enumerate(rng.split(seed, 5).split(1)):
            alone = ops.select_rows(importance[i], own, 2, 9, estimator)
            torch.testing.assert_close((rows[i], scale[i]), alone, rtol=0, atol=0)


class TestKept:
    def held(self, x: Tensor, layer: nn.Linear, sampler: RowSampler) -> int:
        with measure.held(layer) as held:
            y = ops.linear(x, layer.weight, layer.bias, *sampler(x, layer.weight))
        assert y.requires_grad == any(p.requires_grad for p in layer.parameters())
        return held.bytes

    def test_rows_and_indices_and_nothing_else(self):
        x, layer = torch.randn(4, 50, 16), nn.Linear(16, 8)
        sampler = RowSampler(Config(**SMALL, ratio=0.25))
        assert self.held(x, layer, sampler) == 50 * 16 * 4 + 50 * 8
        assert self.held(x, layer, sampler.eval()) == 200 * 16 * 4

    def test_a_frozen_weight_draws_nothing(self):
        x, layer = torch.randn(200, 16), nn.Linear(16, 8)
        layer.weight.requires_grad_(False)
        torch.manual_seed(1)
        before = torch.get_rng_state()
        assert self.held(x, layer, RowSampler(Config(**SMALL, ratio=0.25))) == 0
        assert torch.equal(before, torch.get_rng_state())

    def test_without_gradients_nothing_is_drawn(self):
        x, layer = torch.randn(200, 16), nn.Linear(16, 8)
        with torch.no_grad():
            assert RowSampler(Config(**SMALL))(x, layer.weight) == (None, None)

    @pytest.mark.parametrize(
        ("operand", "options"),
        [
            (torch.ones(200, 16, dtype=torch.int64), {}),
            (torch.ones(200, 16, dtype=torch.complex64), {}),
            (torch.ones(16), {}),
            (torch.ones(200, 16), {"min_rows": 201}),
            (torch.ones(200, 16), {"min_bytes": 200 * 64 + 1}),
            (torch.ones(200, 16), {"ratio": 1.0}),
            (torch.ones(200, 16).to_sparse(), {}),
        ],
    )
    def test_exact_inputs(self, operand, options):
        assert RowSampler(Config(**{**SMALL, **options}))(operand, torch.ones(8, 16, requires_grad=True)) == (
            None,
            None,
        )

    def test_leading_dimensions_that_do_not_agree_stay_exact(self):
        sampler = RowSampler(Config(**SMALL))
        assert sampler(torch.randn(2, 1, 50, 8), tensor(2, 3, 8, 4)) == (None, None)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast_keeps_the_cast_rows(self, dtype):
        x, layer = torch.randn(200, 16), nn.Linear(16, 8)
        with torch.autocast("cpu", dtype):
            exact = layer(x)
            with measure.held(layer) as held:
                y = ops.linear(x, layer.weight, layer.bias, *RowSampler(Config(**SMALL, ratio=0.25))(x, layer.weight))
            assert held.bytes == 50 * 16 * 2 + 50 * 8
        assert torch.equal(exact, y)
        y.float().sum().backward()
        assert layer.weight.grad.dtype is torch.float32
