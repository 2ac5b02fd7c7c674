"""Random small networks for the fuzz test: a program is a list of (op, number), so that a failure can be kept as text."""

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

WIDTH, LENGTH = 16, 6
OPS = (
    "linear", "matmul", "einsum", "mlp", "shared", "twice", "frozen", "attention", "norm", "rms", "dropout", "gelu", "relu",
    "residual", "transpose", "flatten", "chunk", "bias", "batchnorm", "inplace", "conv1x1", "mean",
)  # fmt: skip
PROGRAMS = st.lists(st.tuples(st.sampled_from(OPS), st.integers(0, 3)), min_size=1, max_size=7)
Program = list[tuple[str, int]]


class Network(nn.Module):
    """Runs a program on [batch, LENGTH, WIDTH]; always ends in one trained linear layer and a scalar loss."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.parts = nn.ModuleDict()
        self.weights = nn.ParameterDict()
        for i, (op, number) in enumerate(program):
            self.add(f"{i}", op, number)
        self.last = nn.Linear(WIDTH, WIDTH)

    def add(self, key: str, op: str, number: int) -> None:
        linear = lambda n=WIDTH, m=WIDTH, bias=bool(number % 2): nn.Linear(n, m, bias=bias)  # noqa: E731
        layers = {
            "linear": lambda: [linear()],
            "twice": lambda: [linear()],
            "frozen": lambda: [linear().requires_grad_(False)],
            "mlp": lambda: [linear(WIDTH, 8 * (number + 1)), linear(8 * (number + 1), WIDTH)],
            "shared": lambda: [linear() for _ in range(2 + number % 2)],
            "attention": lambda: [linear() for _ in range(3)],
            "norm": lambda: [nn.LayerNorm(WIDTH)],
            "batchnorm": lambda: [nn.BatchNorm1d(WIDTH)],
            "dropout": lambda: [nn.Dropout(0.1 * (number + 1))],
            "residual": lambda: [linear()],
            "conv1x1": lambda: [nn.Conv1d(WIDTH, WIDTH, 1)],
        }
        if op in layers:
            self.parts[key] = nn.ModuleList(layers[op]())
        if op in ("matmul", "einsum"):
            self.weights[key] = nn.Parameter(torch.randn(WIDTH, WIDTH) * WIDTH**-0.5)
        if op in ("rms", "bias"):
            self.weights[key] = nn.Parameter(torch.ones(WIDTH) * 0.9)

    def forward(self, x: Tensor) -> Tensor:
        for i, (op, number) in enumerate(self.program):
            x = self.step(x, op, number, f"{i}")
        return torch.tanh(self.last(x)).square().mean() * 10

    def step(self, x: Tensor, op: str, number: int, key: str) -> Tensor:
        f = list(self.parts[key]) if key in self.parts else []
        w = self.weights.get(key)
        if op in ("linear", "frozen", "norm", "dropout"):
            return f[0](x)
        if op == "twice":
            return f[0](torch.sin(f[0](x)))
        if op == "residual":
            return x + f[0](torch.tanh(x))
        if op == "mlp":
            return f[1](nn.functional.gelu(f[0](x)))
        if op == "shared":
            return sum(torch.sin(layer(x)) for layer in f)
        if op == "attention":
            q, k, v = (layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in f)
            return ((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).flatten(2)
        if op == "batchnorm":
            return f[0](x.flatten(0, 1)).view_as(x)
        if op == "conv1x1":
            return f[0](x.transpose(1, 2)).transpose(1, 2)
        return pointwise(x, op, number, w)


def pointwise(x: Tensor, op: str, number: int, w: Tensor | None) -> Tensor:
    """Steps without layers."""
    steps = {
        "matmul": lambda: x @ w if number % 2 else x.reshape(-1, WIDTH).mm(w).view_as(x),
        "einsum": lambda: torch.einsum("btd,de->bte", x, w),
        "rms": lambda: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * w,
        "bias": lambda: x + w,
        "inplace": lambda: x.clone().mul_(1.5).sub_(0.1),
        "gelu": lambda: nn.functional.gelu(x),
        "relu": lambda: nn.functional.relu(x + 0.1),
        "transpose": lambda: torch.tanh(x.transpose(0, 1)).contiguous().transpose(0, 1),
        "flatten": lambda: torch.sin(x.reshape(-1, WIDTH)).reshape(x.shape),
        "chunk": lambda: torch.cat(list(reversed(x.chunk(2, dim=-1))), dim=-1) * 1.5,
        "mean": lambda: x - x.mean(1, keepdim=True),
    }
    return steps[op]()
