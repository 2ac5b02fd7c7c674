"""Data-parallel training on two processes, with DDP or with FSDP2.

    torchrun --nproc-per-node 2 examples/two_processes.py [ddp|fsdp] [inductor|eager]

Runs on CPUs (gloo) and on GPUs (nccl). Every process reads its own part of the data and draws its own rows; the options have
to be the same everywhere, and are compared.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

STEPS, BATCH, WIDTH = 40, 64, 64


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def parallel(model: nn.Sequential, kind: str, options: dict[str, object]) -> nn.Module:
    """DDP: compile around the wrapper. FSDP2: compile and shard block by block."""
    if kind == "ddp":
        return torch.compile(DistributedDataParallel(model), backend="wtacrs", options=options)  # type: ignore[return-value]
    for block in model:
        block.compile(backend="wtacrs", options=options)
        fully_shard(block)
    return fully_shard(model)


def main(kind: str = "ddp", inner: str = "inductor") -> None:
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    device = "cuda" if cuda else "cpu"
    torch.manual_seed(0)  # the same weights and task everywhere
    model = nn.Sequential(*(Block() for _ in range(2))).to(device)
    task = torch.randn(WIDTH, WIDTH, device=device) / WIDTH**0.5
    options = {"ratio": 0.3, "min_rows": 1, "min_bytes": 0, "inner": inner}
    trained = parallel(model, kind, options)
    optimizer = torch.optim.Adam(trained.parameters(), lr=3e-3)

    torch.manual_seed(1 + dist.get_rank())  # other data on every rank
    losses = []
    for _ in range(STEPS):
        x = torch.randn(BATCH, WIDTH, device=device)
        loss = (trained(x) - torch.tanh(x @ task)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach()
        dist.all_reduce(mean)
        losses.append(float(mean) / dist.get_world_size())
    if dist.get_rank() == 0:
        print(
            f"{kind}: loss of the first five steps {sum(losses[:5]) / 5:.3f}, of the last five {sum(losses[-5:]) / 5:.3f}"
        )
    dist.barrier()  # nobody leaves while another one still talks to it
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
