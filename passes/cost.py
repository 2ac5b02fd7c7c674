"""What a node costs: FLOPs by torch's own formulas, bytes by its tensors, seconds by a roofline of the device."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

import wtacrs_fx.ops  # noqa: F401  (registers the custom ops)
from wtacrs_fx.directions import ITERATIONS, SAMPLE
from wtacrs_fx.passes.sizes import hint
from wtacrs_fx.private import OpOverload

aten = torch.ops.aten


def flops(node: Node) -> int:
    """Floating-point operations of a matrix product, convolution or fused attention; 0 for anything else."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return 0
    packet = node.target.overloadpacket
    if packet is aten._scaled_dot_product_flash_attention_for_cpu:  # not among torch's formulas
        return sdpa_flop_count(*(_shape(a) for a in node.args[:3]))
    if packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return sdpa_backward_flop_count(*(_shape(a) for a in node.args[:4]))
    if packet is torch.ops.wtacrs.principal_directions:
        (found, width), (rows, _) = _shape(node), _shape(node.args[0])
        return 2 * min(rows, SAMPLE) * width * found * (1 + 2 * ITERATIONS)
    if packet not in flop_registry:
        return 0
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: _signature(n.meta["val"]))
    return _by_formula(packet, _signature(args), _signature(tuple(kwargs.items())), _signature(node.meta["val"]))


@functools.lru_cache(maxsize=4096)
def _by_formula(packet: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Torch's formula, once per signature: the layers of a network repeat each other."""
    args, kwargs, out = (_tensors(x) for x in (args, kwargs, out))
    return int(flop_registry[packet](*args, **dict(kwargs), out_val=out))


def launches(node: Node) -> int:
    """How many kernels' worth of fixed cost a node has. Choosing rows is a dozen small operations (a sort, prefix sums,
    searches), 0.3 ms for 2048 rows on two cores; on a GPU two kernels, and the time to launch them. Finding directions is three
    times some eight."""
    if node.target is torch.ops.wtacrs.principal_directions.default:
        return 24
    return 12 if node.target is torch.ops.wtacrs.select_rows.default else 1


def nbytes(node: Node) -> int:
    """Bytes of the node's own tensors (all of them for a node that returns several)."""
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else (value,)
    return sum(hint(v.numel()) * v.dtype.itemsize for v in values if isinstance(v, torch.Tensor))


@dataclass(frozen=True)
class Roofline:
    """FLOPs and bytes per second of a device, for weighing recomputation against matrix products. Only ratios of
    predicted times are used."""

    flops: float
    bandwidth: float
    launch: float = 0.0
    """Seconds that a kernel costs in any case."""

    def seconds(self, flops: float, moved: float, launches: int = 0) -> float:
        """Time of work with so many FLOPs that moves so many bytes: a kernel is bound by one of the two."""
        return max(flops / self.flops, moved / self.bandwidth) + launches * self.launch


def roofline(device: torch.device, dtype: torch.dtype) -> Roofline:
    """Of what multiprocessors can do in a cycle, and of the memory's clock, for a CUDA device; for a CPU two cores' worth of
    vector units and memory.

    On a machine that does not have the device (a prediction made elsewhere) it is that of an H100.
    """
    if device.type != "cuda":
        return Roofline(flops=1.0e11, bandwidth=1.5e10, launch=3.0e-5)
    if not torch.cuda.is_available():
        return Roofline(flops=6.0e14 if dtype.itemsize == 2 else 3.0e14, bandwidth=2.6e12, launch=4.0e-6)
    from wtacrs_fx.private import get_gpu_dram_gbps

    properties = torch.cuda.get_device_properties(device)
    clock = 1e3 * getattr(properties, "clock_rate", 1.7e6)
    flops = properties.multi_processor_count * clock * _flops_per_cycle(properties.major, properties.minor, dtype)
    return Roofline(0.7 * flops, 0.8e9 * get_gpu_dram_gbps(), launch=4.0e-6)


def _flops_per_cycle(major: int, minor: int, dtype: torch.dtype) -> int:
    """Of one multiprocessor, dense, by compute capability (NVIDIA's architecture whitepapers).

    Torch's own figure is a thousandth where it does not know the device's name: it hands MHz to a function that wants
    kHz (torch 2.11 to 2.14).
    """
    of_servers = minor == 0 and major >= 8
    if dtype.itemsize == 2:
        return {7: 1024, 8: 2048 if of_servers else 1024, 9: 4096, 10: 8192}.get(major, 1024)
    if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 and major >= 8:
        return {8: 1024 if of_servers else 512, 9: 2048, 10: 4096}.get(major, 512)
    if dtype == torch.float32:
        return 128 if major == 7 or (major, minor) == (8, 0) else 256
    return 128 if of_servers else 4


@dataclass(frozen=True)
class _Tensor:
    """Sizes and type of a tensor: what a formula looks at."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def _signature(value: Any) -> Any:
    """The value with tensors as their descriptions, symbols as the example's numbers and lists as tuples, so hashable."""
    if isinstance(value, torch.Tensor):
        return _Tensor(tuple(hint(s) for s in value.shape), value.dtype)
    if isinstance(value, (tuple, list)):
        return tuple(map(_signature, value))
    return hint(value) if isinstance(value, torch.SymInt) else value


def _tensors(value: Any) -> Any:
    """Back again: tensors without data."""
    if isinstance(value, _Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    return tuple(map(_tensors, value)) if isinstance(value, tuple) else value


def _shape(node: Any) -> torch.Size:
    return torch.Size(hint(s) for s in node.meta["val"].shape)
