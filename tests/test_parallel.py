"""Two processes over gloo: DDP, FSDP2, accelerate, diverged options, tensor parallelism."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from wtacrs_fx import PositionNorms, SampleNorms, distributed, rng
from wtacrs_fx.config import Config
from wtacrs_fx.errors import RankError

from helpers import Transformer, gradients, transformer_batch

TESTS = Path(__file__).parent


def two_ranks(task, folder):
    """Results of a function of ``parallel_worker.py`` on ranks 0 and 1."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    env = {
        **os.environ,
        "PYTHONPATH": str(TESTS),
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, str(TESTS / "parallel_worker.py"), task]
    ranks = [
        subprocess.Popen(
            [*command, str(r), str(folder)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for r in (0, 1)
    ]
    try:
        outputs = [p.communicate(timeout=150)[0] for p in ranks]
    finally:
        for p in ranks:
            p.kill()
    assert all(p.returncode == 0 for p in ranks), "\n".join(o[-3000:] for o in outputs)
    return [torch.load(folder / f"{r}.pt") for r in (0, 1)]


def expected(width=64):
    """Mean over the two ranks' batches of the exact gradients."""
    torch.manual_seed(0)
    model = Transformer(width=width, layers=2)
    both = [gradients(model, *transformer_batch(seed=r, width=width)) for r in (0, 1)]
    return {n: (both[0][n] + both[1][n]) / 2 for n in both[0]}


def agree(results, width=64):
    for result in results:
        for name, want in expected(width).items():
            torch.testing.assert_close(
                result["grads"][name], want, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.long
@pytest.mark.works_with("Parallelism", "DDP, with DDPOptimizer's buckets", "yes; a graph per bucket")
def test_ddp(tmp_path):
    results = two_ranks('ddp:{"buckets": 2, "width": 192}', tmp_path)
    agree(results, width=192)
    assert results[0]["graphs"] > 1, "the model is split at buckets"
    assert len(results[0]["sampled"]) == 12, results[0]["sampled"]


@pytest.mark.long
@pytest.mark.works_with(
    "Parallelism", "DDP against one process, in distribution", "the mean is exact, errors of two ranks average out"
)
def test_ddp_is_unbiased_at_half_of_the_rows(tmp_path):
    first, second = two_ranks('ddp_noise:{"draws": 40}', tmp_path)
    slopes = first["projections"]
    assert slopes.shape[1] > 20
    assert (slopes.std(0) > 1e-3).sum() == 12, "weights of 12 layers are sampled"
    error = slopes.std(0) / len(slopes) ** 0.5 + 1e-5
    assert ((slopes.mean(0) - 1) / error).abs().max() < 5
    torch.testing.assert_close(first["together"], second["together"], rtol=0, atol=0)
    expected = (first["alone"] + second["alone"]) / 4  # of the mean of two independent estimates
    difference = first["together"] - expected
    assert difference.mean().abs() < 5 * difference.std() / len(difference) ** 0.5
    assert difference.std() / len(difference) ** 0.5 < 0.1 * expected.mean(), "enough draws to tell"


@pytest.mark.long
@pytest.mark.works_with("Parallelism", "DDP with norms of gradients", "each rank keeps those of its own examples")
@pytest.mark.parametrize("arguments", ["{}", '{"buckets": 2, "width": 192}'], ids=["one", "buckets"])
def test_ddp_keeps_the_norms_of_its_own_examples(arguments, tmp_path):
    for rank, result in enumerate(two_ranks(f"ddp_norms:{arguments}", tmp_path)):
        together, alone = result["together"], result["alone"]
        assert (result["graphs"][0] > result["graphs"][1]) == ("buckets" in arguments)
        assert len(together["tables"]) == 12
        assert together["tables"].keys() == alone["tables"].keys()
        mine = range(8 * rank, 8 * rank + result["examples"])
        for site, table in together["tables"].items():
            torch.testing.assert_close(table, alone["tables"][site], equal_nan=True, msg=lambda m, s=site: f"{s}: {m}")
            seen = (table.float().nan_to_num() > 0).any(1).nonzero().flatten().tolist()
            assert seen == list(mine), f"{site}: examples of this rank and of no other"
        torch.testing.assert_close(together["means"], alone["means"])


@pytest.mark.long
@pytest.mark.works_with("Parallelism", "DDP with `padding`", "yes, in every bucket that is given the mask itself")
@pytest.mark.parametrize("derived", [False, True])
def test_ddp_with_padding(derived, tmp_path):
    results = two_ranks(f'ddp_padding:{{"derived": {str(derived).lower()}}}', tmp_path)
    for result in results:
        assert result["graphs"] == 3
        assert set(result["verdicts"].values()) == {"zero"}
        assert (len(result["verdicts"]) >= 11) != derived, "the first bucket is one layer, before any attention"
        without = [w for w in result["warnings"] if "this part of the model has no such input" in w]
        assert len(without) == (2 if derived else 1)
        for name, grad in result["grads"].items():
            want = (results[0]["exact"][name] + results[1]["exact"][name]) / 2
            torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.long
@pytest.mark.works_with("Parallelism", "FSDP2: `fully_shard` per block, the blocks or the model compiled", "yes")
@pytest.mark.parametrize("whole", [False, True])
def test_fsdp2(whole, tmp_path):
    results = two_ranks('fsdp:{"whole": true}' if whole else "fsdp", tmp_path)
    agree(results)
    assert {"q", "up", "down"} <= {name.rpartition(".")[2] for name in results[0]["sampled"]}


@pytest.mark.long
@pytest.mark.works_with("Parallelism", "Hugging Face accelerate", "yes, by `model.compile` before `prepare`")
def test_accelerate(tmp_path):
    results = two_ranks("accelerate", tmp_path)
    agree(results)
    assert results[0]["keys"] == []
    assert len(results[0]["sampled"]) == 12


@pytest.mark.long
@pytest.mark.works_with("Parallelism", "`accelerate launch`", "yes")
def test_accelerate_launch(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    env = {**os.environ, "PYTHONPATH": str(TESTS), "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", port]
    worker = [str(TESTS / "parallel_worker.py"), "accelerate", "-", str(tmp_path)]
    done = subprocess.run([*launch, *worker], env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    results = [torch.load(tmp_path / f"{r}.pt") for r in (0, 1)]
    agree(results)
    assert len(results[0]["sampled"]) == 12


@pytest.mark.long
@pytest.mark.works_with("Parallelism", "accelerate with FSDP2, the blocks or the model compiled", "yes")
@pytest.mark.parametrize("whole", [False, True])
def test_accelerate_fsdp2(whole, tmp_path):
    results = two_ranks('accelerate_fsdp:{"whole": true}' if whole else "accelerate_fsdp", tmp_path)
    agree(results)
    assert results[0]["kind"].startswith("FSDP")
    assert {"q", "up", "down"} <= {name.rpartition(".")[2] for name in results[0]["sampled"]}
    assert results[0]["keys"] == [n for n, _ in Transformer().named_parameters()], "checkpoints are the plain model's"


@pytest.mark.long
@pytest.mark.works_with("Parallelism", "DTensors made inside of a compiled function, of plain parameters", "yes")
def test_dtensors_inside_of_the_graph(tmp_path):
    for result in two_ranks("from_local", tmp_path):
        assert result["message"] == ""
        torch.testing.assert_close(result["grads"], result["exact"], rtol=1e-4, atol=1e-5)
        assert "exact" not in result["decisions"]


@pytest.mark.long
@pytest.mark.works_with("Parallelism", "ranks with one seed", "each rank draws rows of its own")
def test_ranks_draw_apart(tmp_path):
    a, b = (r["sampled"] for r in two_ranks("draws", tmp_path))
    for mine, other in zip(a, b):
        assert (mine - other).abs().max() > 1e-3


def test_rank_0_draws_as_a_single_process(monkeypatch):
    torch.manual_seed(3)
    alone = [rng.next_seed(), rng.next_seed(11)]
    seeds = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for rank in (0, 1, 2):
        rng._private.clear()
        torch.manual_seed(3)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        seeds.append([rng.next_seed(), rng.next_seed(11)])
    rng._private.clear()
    assert seeds[0][0] == alone[0]
    assert len({s for pair in seeds for s in pair}) == 6
    assert all(0 <= s < 2**63 for pair in seeds for s in pair)


@pytest.mark.long
@pytest.mark.works_with(
    "Parallelism", "options that differ between ranks", "an error that names the ranks and the option"
)
def test_diverged_options(tmp_path):
    first, second = two_ranks("diverged", tmp_path)
    assert first["message"] == ""
    assert re.search(
        r"rank 1 compiles with ratio=0\.5, rank 0 compiled the same parameters with ratio=0\.3", second["message"]
    )


def test_options_are_compared_in_order(monkeypatch):
    """Two sets of options for one model, as in a comparison, are no divergence; a third that only one rank has is."""
    store = torch.distributed.HashStore()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed.private, "default_store", lambda: store, raising=False)
    inputs = [nn.Parameter(torch.ones(2))]
    for rank in (0, 1):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        for ratio in (0.3, 0.5, 0.3, 0.5):
            distributed.check_ranks(Config(ratio=ratio, verbose=bool(rank), seed=rank), ["w"], inputs)
    distributed.check_ranks(Config(ratio=0.7), ["w"], inputs)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    with pytest.raises(RankError, match=r"rank 0 compiles with ratio=0\.6, rank 1 .* ratio=0\.7"):
        distributed.check_ranks(Config(ratio=0.6), ["w"], inputs)
    distributed.check_ranks(Config(ratio=0.9), ["other"], inputs)


def test_objects_among_the_options_are_compared_by_class():
    """Every rank makes its own norm source, somewhere in its memory."""
    found = [
        distributed.options_of(Config(norms=SampleNorms(examples=9), inductor={"pass": object()})) for _ in range(2)
    ]
    assert found[0] == found[1]
    assert "SampleNorms" in found[0]["norms"]
    assert distributed.options_of(Config(norms=PositionNorms()))["norms"] != found[0]["norms"]


@pytest.mark.long
@pytest.mark.works_with("Parallelism", "tensor parallelism (DTensor)", "refused, with what to do")
def test_tensor_parallelism_is_refused(tmp_path):
    for result in two_ranks("tensor_parallel", tmp_path):
        assert re.search(
            r"is a DTensor with placements .*Compile such modules with backend='inductor'", result["message"]
        )


@pytest.mark.long
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_example(kind, tmp_path):
    example = TESTS.parent / "examples" / "two_processes.py"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(example),
        kind,
        "eager",
    ]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, last = map(float, re.search(r"first five steps ([\d.]+), of the last five ([\d.]+)", done.stdout).groups())
    assert last < 0.7 * first
