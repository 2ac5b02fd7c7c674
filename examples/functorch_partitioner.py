"""The partitioner in functorch's own pipeline, and a joint graph that you trace yourself.

    python examples/functorch_partitioner.py

For those who compile graphs themselves: AOTAutograd traces forward and backward together, the partitioner cuts them apart,
and ``wtacrs_fx.partitioner`` is a drop-in for the one that comes with torch.
"""

import torch
from functorch.compile import aot_module, make_boxed_compiler
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import wtacrs_fx


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 8))
    x = torch.randn(1024, 64)

    # 1. functorch: a compiler gets the two graphs. This one prints what the forward hands to the backward.
    def show(gm: torch.fx.GraphModule, example_inputs: list) -> object:
        outputs = gm.graph.output_node().args[0]
        shapes = [tuple(v.meta["val"].shape) for v in outputs if isinstance(v, torch.fx.Node)]
        print(f"graph of {len(gm.graph.nodes)} nodes returns {shapes}")
        return gm.forward

    partition_fn = wtacrs_fx.partitioner(ratio=0.1, memory_budget=None)
    compiled = aot_module(model, fw_compiler=make_boxed_compiler(show), partition_fn=partition_fn)
    compiled(x).square().mean().backward()
    print(partition_fn.ledgers[-1].table())

    # 2. Forward and gradients in one graph, traced by make_fx: no partition, no autograd when it runs.
    names, params = zip(*model.named_parameters())

    def step(params: tuple[torch.Tensor, ...], x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        loss = torch.func.functional_call(model, dict(zip(names, params)), (x,)).square().mean()
        return loss, *torch.autograd.grad(loss, params)

    joint = make_fx(step)(params, x)
    sampled = wtacrs_fx.rewrite_joint(joint, ratio=0.1)
    print(sampled.meta["wtacrs_ledger"].table())
    with torch.no_grad():
        exact, estimate = joint(params, x), sampled(params, x)
    torch.testing.assert_close(estimate[0], exact[0])
    for name, a, b in zip(names, exact[1:], estimate[1:]):
        print(f"{name}: relative difference {(a - b).norm() / a.norm():.1e}")


if __name__ == "__main__":
    main()
