"""What each of two processes of ``tests/test_parallel.py`` runs: ``python parallel_worker.py TASK RANK FOLDER``."""

import copy
import json
import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from test_padding import Masked, masked_batch
from torch import nn

import wtacrs_fx
from wtacrs_fx import Backend, PositionNorms, SampleNorms, WtacrsWarning, ledgers, sample_ids
from wtacrs_fx.norm_state import RowState

from helpers import SMALL, Transformer, gradients, transformer_batch

KEEP_ALL = {"ratio": 0.9999, "inner": "eager", **SMALL}


def model_and_batch(rank, width=64):
    torch.manual_seed(0)
    return Transformer(width=width, layers=2), transformer_batch(seed=rank, width=width)


def grads(model):
    full = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {n: (g.full_tensor() if hasattr(g, "full_tensor") else g).clone() for n, g in full.items()}


def ddp(rank, buckets, width):
    model, batch = model_and_batch(rank, width)
    wrapped = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=buckets)
    backend = Backend(**KEEP_ALL)
    compiled = torch.compile(wrapped, backend=backend)
    compiled(*batch).backward()
    names = sorted({e.module for x in backend.ledgers for e in x.entries if e.decision != "exact"})
    return {"grads": grads(model), "graphs": len(backend.ledgers), "sampled": names}


def ddp_noise(rank, draws):
    """Draws: squared errors and projections of DDP's gradients, and squared errors of one process on this rank's batch."""
    model, batch = model_and_batch(rank)
    twin = copy.deepcopy(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    wrapped(*batch).backward()
    exact = [[p.grad.clone() for p in model.parameters()]]
    exact.append(list(gradients(twin, *batch).values()))
    found = {"projections": [], "together": [], "alone": []}
    compiled = [torch.compile(m, backend=Backend(**{**KEEP_ALL, "ratio": 0.5})) for m in (wrapped, twin)]
    for _ in range(draws):
        for name, module, call, want in zip(("together", "alone"), (model, twin), compiled, exact):
            got = list(gradients(module, *batch, call=call).values())
            found[name].append(float(sum((a - b).square().sum() for a, b in zip(got, want))))
            if name == "together":
                products = [float((a * b).sum() / b.square().sum()) for a, b in zip(got, want)]
                found["projections"].append([p for p, b in zip(products, want) if float(b.norm()) > 1e-4])
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in found.items()}


def ddp_norms(rank, buckets=25, width=64):
    """What a rank's norm source knows after two steps under DDP, and after the same two steps of one process alone."""
    model, batch = model_and_batch(rank, width)
    twin = copy.deepcopy(model)
    known, graphs = [], []
    for module in (nn.parallel.DistributedDataParallel(model, bucket_cap_mb=buckets), twin):
        source = SampleNorms(examples=16)
        backend = Backend(**{**KEEP_ALL, "ratio": 0.9, "norms": source, "late": "exact"})
        call = torch.compile(module, backend=backend)
        torch.manual_seed(3)
        for _ in range(2):
            with sample_ids(range(8 * rank, 8 * rank + len(batch[0]))):
                call(*batch).backward()
        tables = {site.removeprefix("module."): table.data for site, table in source.tables.items()}
        means = {site.removeprefix("module."): mean for site, mean in source.position.mean.items()}
        known.append({"tables": tables, "means": means})
        graphs.append(len(backend.ledgers))
    return {"together": known[0], "alone": known[1], "examples": len(batch[0]), "graphs": graphs}


def ddp_padding(rank, derived):
    """Two buckets, the string backend, ``padding``: the second bucket is given the batch's mask, or one made of it."""
    torch.manual_seed(0)
    model, (x, target, mask) = Masked(width=192, layers=2), masked_batch()
    model.derived = derived
    x, target = transformer_batch(seed=rank, width=192)
    twin, source = copy.deepcopy(model), PositionNorms()
    options = {**KEEP_ALL, "padding": "attention_mask", "norms": source, "late": "exact"}
    wrapped = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=2)
    call, before = torch.compile(wrapped, backend="wtacrs", options=options), len(ledgers())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            model.zero_grad()
            call(x, target, mask).backward()
    return {
        "grads": grads(model),
        "exact": gradients(twin, x, target, mask),
        "graphs": len(ledgers()) - before,
        "verdicts": {site: trial.verdict for site, trial in RowState.of(source).padding.items()},
        "warnings": [str(w.message) for w in caught if isinstance(w.message, WtacrsWarning)],
    }


def fsdp(rank, whole=False):
    from torch.distributed.fsdp import fully_shard

    model, batch = model_and_batch(rank)
    backend = Backend(**KEEP_ALL)
    for block in model.blocks:
        if not whole:
            block.compile(backend=backend)
        fully_shard(block)
    fully_shard(model)
    call = torch.compile(model, backend=backend) if whole else model
    call(*batch).backward()
    names = sorted({e.module for x in backend.ledgers for e in x.entries if e.decision != "exact"})
    return {"grads": grads(model), "graphs": len(backend.ledgers), "sampled": names}


def draws(rank):
    """The error of each rank's own gradient on the same batch from the same seed, without any averaging."""
    errors = []
    for seed in (None, 7):
        torch.manual_seed(0)
        model, batch = Transformer(layers=1), transformer_batch()
        torch.manual_seed(5)
        torch._dynamo.reset()
        torch.compile(model, backend=Backend(**{**KEEP_ALL, "ratio": 0.3, "seed": seed}))(*batch).backward()
        errors.append(model.blocks[0].up.weight.grad.clone())
    return {"sampled": errors}


def diverged(rank):
    model, batch = model_and_batch(rank)
    if rank == 1:
        dist.barrier()
    message = ""
    try:
        torch.compile(model, backend=Backend(**{**KEEP_ALL, "ratio": 0.3 + 0.2 * rank}))(*batch).backward()
    except Exception as error:
        message = str(error)
    if rank == 0:
        dist.barrier()
    torch._dynamo.reset()  # verbose and seed may differ
    torch.compile(Transformer(layers=1), backend=Backend(**{**KEEP_ALL, "seed": rank}))(*batch).backward()
    return {"message": message}


def tensor_parallel(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model, batch = model_and_batch(0)
    mesh = init_device_mesh("cpu", (2,))
    for block in model.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    try:
        torch.compile(model, backend=Backend(**KEEP_ALL))(*batch).backward()
    except Exception as error:
        return {"message": str(error)}
    return {"message": "", "grads": grads(model)}


def accelerate(rank):
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    model, batch = model_and_batch(rank)
    backend = Backend(**KEEP_ALL)
    model.compile(backend=backend)
    accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(bucket_cap_mb=1)])
    wrapped = accelerator.prepare(model)
    accelerator.backward(wrapped(*batch))
    state = accelerator.unwrap_model(wrapped).state_dict()
    return {
        "grads": grads(model),
        "graphs": len(backend.ledgers),
        "sampled": [e.module for e in backend.ledger.entries if e.decision != "exact"],
        "keys": [k for k in state if "_orig_mod" in k],
    }


def accelerate_fsdp(rank, whole=False):
    """accelerate's own way to FSDP2. On CPUs it would choose DDP, so that its state is told to be of the other kind."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType

    model, batch = model_and_batch(rank)
    backend = Backend(**KEEP_ALL)
    for module in [model] if whole else model.blocks:
        module.compile(backend=backend)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Block"],
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    vars(accelerator.state).update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
    wrapped, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    accelerator.backward(wrapped(*batch))
    names = sorted({e.module for x in backend.ledgers for e in x.entries if e.decision != "exact"})
    kind = type(wrapped).__name__
    return {"grads": grads(wrapped), "sampled": names, "kind": kind, "keys": list(accelerator.get_state_dict(wrapped))}


def from_local(rank):
    """DTensors that are made inside of the graph, of plain parameters."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    layer = nn.Linear(64, 64, bias=False)
    x = transformer_batch(seed=rank)[0]

    def loss(x):
        rows = DTensor.from_local(torch.tanh(x.flatten(0, 1)), mesh, [Shard(0)])
        weight = DTensor.from_local(layer.weight, mesh, [Replicate()], run_check=False)
        return torch.tanh(rows @ weight.t()).to_local().square().sum()

    def gradient(call):
        layer.zero_grad()
        call(x).backward()
        return layer.weight.grad.clone()

    exact, backend = gradient(loss), Backend(**KEEP_ALL)
    try:
        got = gradient(torch.compile(loss, backend=backend))
    except Exception as error:
        return {"message": str(error)}
    names = [e.decision for x in backend.ledgers for e in x.entries]
    return {"message": "", "grads": {"w": got}, "exact": {"w": exact}, "decisions": names}


def main(task, rank, folder):
    """``rank``: a number, or "-" where a launcher has set the environment."""
    if rank == "-":
        rank = os.environ["RANK"]
    else:
        os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    name, _, arguments = task.partition(":")
    dist.init_process_group("gloo")
    result = globals()[name](int(rank), **json.loads(arguments or "{}"))
    torch.save(result, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    assert wtacrs_fx
    main(*sys.argv[1:])
