"""Small models and the tools that the tests share."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import boxed_nop
from torch._inductor.compile_fx import select_decomp_table
from torch.fx import GraphModule

from wtacrs_fx.backend import Partitioner, dynamo_names
from wtacrs_fx.config import Config
from wtacrs_fx.ledger import Ledger
from wtacrs_fx.passes.joint_graph import copy_joint

SMALL = {"min_rows": 1, "min_bytes": 0, "memory_budget": None}
"""Options that admit the tiny layers of the tests."""


SIZE = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 64}
LLAMA = {**SIZE, "num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": 0}
"""Of the configs of Hugging Face."""


class Recorder:
    """An eager-inner backend that keeps the graphs: before (joint), after (forward, backward)."""

    def __init__(self, **options: Any) -> None:
        self.config = Config.from_options({**SMALL, **options})
        self.joint: list[GraphModule] = []
        self.forward: list[GraphModule] = []
        self.backward: list[GraphModule] = []
        self.ledgers: list[Ledger] = []
        self.partitioners: list[Partitioner] = []

    def __call__(self, gm: GraphModule, example_inputs: Any) -> Callable[..., Any]:
        partition_fn = Partitioner(self.config, dynamo_names(gm))
        self.partitioners.append(partition_fn)

        def record(joint: GraphModule, inputs: Any, **kwargs: Any) -> tuple[GraphModule, GraphModule]:
            self.joint.append(copy_joint(joint)[0])
            forward, backward = partition_fn(joint, inputs, **kwargs)
            self.forward.append(forward)
            self.backward.append(backward)
            self.ledgers = partition_fn.ledgers
            return forward, backward

        compile_aot = aot_autograd(
            fw_compiler=boxed_nop, bw_compiler=boxed_nop, decompositions=select_decomp_table, partition_fn=record
        )
        return compile_aot(gm, example_inputs)

    @property
    def ledger(self) -> Ledger:
        return self.ledgers[-1]


class Block(nn.Module):
    """A pre-norm transformer block with attention written out."""

    def __init__(self, width: int = 64, heads: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width, bias=False)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        y = self.ln1(x)
        q, k, v = (f(y).view(b, t, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        attention = (q @ k.transpose(-1, -2) * (d // self.heads) ** -0.5).softmax(-1) @ v
        x = x + self.drop(self.o(attention.transpose(1, 2).reshape(b, t, d)))
        return x + self.drop(self.down(nn.functional.gelu(self.up(self.ln2(x)))))


class Transformer(nn.Module):
    """Two blocks and a classification head over 4 classes, mean-pooled; returns the loss."""

    def __init__(self, width: int = 64, layers: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, dropout=dropout) for _ in range(layers))
        self.classifier = nn.Linear(width, 4)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.classifier(x.mean(1)), target)


def transformer_batch(batch: int = 8, length: int = 16, width: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, length, width, generator=g)
    x = x * torch.rand(batch, length, 1, generator=g).exp()  # rows of different norms
    return x, torch.randint(0, 4, (batch,), generator=g)


def gradients(model: nn.Module, *args: Any, call: Callable[..., Tensor] | None = None) -> dict[str, Tensor]:
    """Gradients of a scalar loss by parameter name; ``.grad`` is left empty."""
    model.zero_grad(set_to_none=True)
    (model if call is None else call)(*args).backward()
    result = {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return result


class Experts(nn.Module):
    """One weight per expert: a batched product, not a matrix one."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 16, 16) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(torch.cos(x) @ self.w).sum()


class Moments:
    """Mean of repeated gradients and its standard error, per element, in float64."""

    def __init__(self) -> None:
        self.n = 0
        self.total: dict[str, Tensor] = {}
        self.square: dict[str, Tensor] = {}
        self.vectors: dict[str, list[Tensor]] = {}
        """Every draw of what has one dimension."""

    def add(self, grads: Mapping[str, Tensor]) -> None:
        self.n += 1
        for name, grad in grads.items():
            g = grad.double()
            self.total[name] = self.total.get(name, 0) + g
            self.square[name] = self.square.get(name, 0) + g * g
            if g.dim() == 1:
                self.vectors.setdefault(name, []).append(g)

    def mean(self, name: str) -> Tensor:
        return self.total[name] / self.n

    def standard_error(self, name: str) -> Tensor:
        variance = (self.square[name] / self.n - self.mean(name) ** 2).clamp(min=0) * self.n / (self.n - 1)
        return (variance / self.n).sqrt()

    def z(self, name: str, exact: Tensor) -> Tensor:
        """z-score of every element's mean; 0 where nothing varies and the mean is exact up to rounding."""
        difference = self.mean(name) - exact.double()
        floor = 1e-6 * exact.double().abs().max() + 1e-30
        return difference / (self.standard_error(name) + floor)

    def largest_rms(self, name: str, sigmas: float = 5.0) -> float:
        """What the root mean square of the z-scores may be by chance. Where the noise lies in r directions of about equal size,
        r their mean square is 1 with a standard deviation of sqrt(2 / r); ``r = tr(C)^2 / tr(C^2)`` for the correlations C of
        a vector's elements. Of matrices: 1.5."""
        if name not in self.vectors:
            return 1.5
        x = torch.stack(self.vectors[name])
        x = (x - x.mean(0)) / (x.std(0) + 1e-300)
        products = x @ x.T
        r = products.trace() ** 2 / products.square().sum()
        return float((1 + sigmas * (2 / r).sqrt()).sqrt())


def calls(graph_module: GraphModule, target: Any) -> int:
    """How many nodes call ``target``."""
    return len(graph_module.graph.find_nodes(op="call_function", target=target))
