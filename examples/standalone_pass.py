"""The standalone pass: trace a model, rewrite the graph, train it in plain eager.

    python examples/standalone_pass.py

There is no compiler here: the rewritten graph is a module like any other, whose linear layers keep sampled rows of their
inputs for the weight gradient.
"""

import torch
from torch import nn

import wtacrs_fx


def held_bytes(module: nn.Module, x: torch.Tensor) -> int:
    """Bytes of distinct storages that autograd keeps for the backward, parameters left out."""
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = module(x).square().mean()
    total = sum(size for key, size in storages.items() if key not in weights)
    del loss
    return total


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 8))
    x = torch.randn(1024, 64)

    traced = torch.fx.symbolic_trace(model)
    print("before:")
    wtacrs_fx.print_graph(traced)

    # With the example input it is known what other ops save: the input of a layer behind a ReLU or tanh, which save their
    # output, would be in memory in any case and stays exact. GELU saves its input, so here every layer is sampled.
    sampled = wtacrs_fx.rewrite(traced, x, ratio=0.1)
    print("\nafter:")
    wtacrs_fx.print_graph(sampled)
    print()
    print(sampled.meta["wtacrs_ledger"].table())

    print(f"\nreally held: {held_bytes(traced, x)} bytes before, {held_bytes(sampled, x)} after")

    # The parameters are the model's own, so its optimizer and its checkpoints are too.
    exact, mean = [], []
    for module, gradients in ((traced, exact), *[(sampled, mean)] * 200):
        model.zero_grad()
        module(x).square().mean().backward()
        gradients.append(model[2].weight.grad.clone())
    error = (torch.stack(mean).mean(0) - exact[0]).norm() / exact[0].norm()
    one = (mean[0] - exact[0]).norm() / exact[0].norm()
    print(f"relative error of one sampled gradient {one:.2f}, of the mean of 200 {error:.2f}")

    sampled.eval()  # exact from here on
    model.zero_grad()
    sampled(x).square().mean().backward()
    torch.testing.assert_close(model[2].weight.grad, exact[0])


if __name__ == "__main__":
    main()
