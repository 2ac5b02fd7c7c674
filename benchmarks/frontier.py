"""Measured peak of activations against step time: eager, Inductor, checkpointing, micro-batches and wtacrs.

    python -m wtacrs_fx.benchmarks.frontier --families bert llama --layers 6 --batch-size 16 --out benchmarks/results
    python -m wtacrs_fx.benchmarks.frontier --render benchmarks/results

All arms of a configuration share their parameters and are timed alternately in one process; compare medians. Every
configuration becomes a JSON file under ``frontier/``; the table and the plot are made from all files there.

Gradients are compared for one seed. Those of biases and normalisations are exact in every arm of wtacrs, so they
prove that the backward has seen the dropout masks of the forward. So does, in every arm and against no other arm, the slope
of the loss along them, which is compared with a difference of losses for that seed.
"""

import argparse
import copy
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor.compile_fx import compile_fx
from torch.fx import GraphModule

from wtacrs_fx import Backend, measure
from wtacrs_fx.benchmarks import frontier_report
from wtacrs_fx.benchmarks.families import FAMILIES, Batch
from wtacrs_fx.benchmarks.options import add_shape, memory_budget

SEED = 1
"""For which gradients are compared."""

CHANGE = 0.01
"""Of the loss, to the first order, for which a slope is measured: losses in float32 are known to about 1e-6."""

NO_GRADIENT = 1e-13
"""Mean square below which a gradient is zero but for rounding of floating point: biases of keys have 4e-15 in bfloat16, all
others of these models at least 8e-10."""


@dataclass(frozen=True)
class Arm:
    """One way to train."""

    name: str
    backend: Any = "inductor"
    """None: eager."""
    torch_budget: float = 1.0
    """PyTorch's ``activation_memory_budget``."""
    checkpoint: bool = False
    """Whether transformers' gradient checkpointing is on, per block."""
    micro: int = 1
    """In how many micro-batches the batch is cut; their gradients are accumulated."""
    autocast: torch.dtype | None = None
    """What forwards compute in; None: in the type of the parameters."""
    mode: str | None = None
    """Of Inductor: "reduce-overhead" replays CUDA graphs, which hides what they allocate: such an arm is timed only."""

    @property
    def comparable(self) -> bool:
        """Whether it draws the dropout masks of Inductor's default."""
        return self.backend is not None and not self.checkpoint and self.micro == 1

    def build(self, model: nn.Module, batch: Batch) -> "Trained":
        """A twin of the model that shares its parameters, compiled for this arm."""
        twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})
        if self.checkpoint:
            enable: Any = getattr(twin, "activation_checkpointing_enable", twin.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        backend = self._inductor if self.backend == "inductor" else self.backend
        call = twin if backend is None else torch.compile(twin, backend=backend, dynamic=False, mode=self.mode)
        parts = [dict(zip(batch, p)) for p in zip(*(v.chunk(self.micro) for v in batch.values()))]
        return Trained(twin, call, parts, self.autocast)

    def _inductor(self, gm: GraphModule, inputs: Sequence[Any], mode: str | None = None) -> Any:
        """Inductor, as a backend of this arm's own: Dynamo would take the compiled code of another arm for a twin."""
        patches = torch._inductor.list_mode_options(mode) if mode else None
        with torch._functorch.config.patch(activation_memory_budget=self.torch_budget):
            return compile_fx(gm, inputs, config_patches=patches)


@dataclass(frozen=True)
class Trained:
    """A model and its (micro-)batches."""

    model: nn.Module
    call: Callable[..., Any]
    parts: Sequence[Batch]
    autocast: torch.dtype | None = None

    def loss(self, part: int = 0) -> Tensor:
        """Of one micro-batch."""
        device = next(self.model.parameters()).device.type
        with torch.autocast(device, self.autocast, enabled=self.autocast is not None):
            return self.call(**self.parts[part]).loss / len(self.parts)

    def backward(self) -> None:
        """Forward and backward of all micro-batches."""
        for part in range(len(self.parts)):
            self.loss(part).backward()

    def step(self) -> None:
        """The same, and the gradients thrown away."""
        self.backward()
        self.model.zero_grad(set_to_none=True)

    def memory(self) -> dict[str, int | None]:
        """Bytes, after one step that compiles. Held bytes and peak of activations are those of one micro-batch."""
        self.step()
        with measure.held(self.model) as held:
            loss = self.loss()
        held_bytes = held.bytes
        del loss
        peaks = measure.peaks(lambda: self.loss().backward(), self.model)
        device = next(self.model.parameters()).device.type
        return {
            "held_bytes": held_bytes,
            "activation_peak_bytes": peaks.activations,
            "peak_bytes": measure.peak_bytes(self.step, device) if len(self.parts) > 1 else peaks.total,
            "resident_bytes": measure.resident_step_bytes(self.step) if device == "cpu" else None,
        }

    def gradients(self) -> dict[str, Tensor]:
        """For one seed."""
        torch.manual_seed(SEED)
        self.backward()
        result = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad(set_to_none=True)
        return result


def slope_error(loss: Callable[[], Tensor], grads: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> float:
    """How far gradients are from the derivative of the loss that they are of.

    The loss changes by ``2 |g| s`` where the parameters go from ``-s g/|g|`` to ``s g/|g|``, to the third order in ``s``; the
    result is the relative error of that. Only vectors move: the gradients of matrices are estimates in some arms.

    Args:
        loss: of the parameters, in the state of the random generators that it is called in.
        grads: of the loss for :data:`SEED`, by the parameter's name.
        parameters: by name. They are as before afterwards.
    """
    moved = {n: (parameters[n], g) for n, g in grads.items() if g.dim() == 1}
    before = {n: p.detach().clone() for n, (p, _) in moved.items()}
    norm = torch.stack([g.double().square().sum() for _, g in moved.values()]).sum().sqrt()
    values = []
    for sign in (1, -1):
        for p, g in moved.values():
            p.data.add_((sign * CHANGE / norm / norm * g).to(p.dtype))
        torch.manual_seed(SEED)
        values.append(loss().detach().double())
        for n, (p, _) in moved.items():
            p.data.copy_(before[n])
    return abs(float((values[0] - values[1]) / (2 * CHANGE)) - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_shape(parser, layers=6, batch_size=16)
    parser.add_argument("--autocast", choices=("bfloat16", "float16"), help="compute in this type; float32 parameters")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.5, 0.3, 0.1])
    parser.add_argument("--budgets", nargs="+", default=["none", "0.5", "0.3", "auto"], help="memory_budget")
    parser.add_argument("--graphs", action="store_true", help="Inductor and wtacrs under CUDA graphs too, timed only")
    parser.add_argument("--micro", nargs="*", type=int, default=[], help="arms of wtacrs with micro-batches too")
    parser.add_argument(
        "--only", default=".*", help="arms whose name matches this pattern; the default is always there"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--render", type=Path, help="measure nothing; write table and plot of this folder again")
    args = parser.parse_args()
    for family in [] if args.render else args.families:
        torch._dynamo.reset()
        result = measure_family(family, args)
        folder = args.out / "frontier"
        folder.mkdir(parents=True, exist_ok=True)
        kind = [args.autocast] * bool(args.autocast) + ["cuda"] * (args.device == "cuda")
        name = "_".join([family, str(args.layers), f"{args.batch_size}x{args.length}", *kind])
        (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(frontier_report.write(args.render or args.out))


def arms(args: argparse.Namespace) -> list[Arm]:
    """Inductor's default first."""
    found = [
        Arm("eager", None),
        Arm("eager + checkpoint", None, checkpoint=True),
        *(Arm(f"inductor budget {b}", torch_budget=b) for b in (0.7, 0.5, 0.3, 0.1)),
        Arm("inductor + checkpoint", checkpoint=True),
        *(Arm(f"inductor, {m} micro-batches", micro=m) for m in (2, 4, 8)),
    ]
    for ratio in args.ratios:
        for text in args.budgets:
            for micro in (1, *args.micro):
                name = f"wtacrs {ratio:g} budget {text}" + (f", {micro} micro-batches" if micro > 1 else "")
                found.append(Arm(name, Backend(ratio=ratio, memory_budget=memory_budget(text)), micro=micro))
    chosen = [Arm("inductor"), *(a for a in found if re.search(args.only, a.name))]
    if args.graphs:
        plain = [a for a in chosen if a.micro == 1 and (a.name == "inductor" or isinstance(a.backend, Backend))]
        chosen += [_under_graphs(a) for a in plain]
    return [replace(a, autocast=args.autocast and getattr(torch, args.autocast)) for a in chosen]


def _under_graphs(arm: Arm) -> Arm:
    """The same arm under CUDA graphs, with a backend of its own."""
    backend = Backend(arm.backend.config) if isinstance(arm.backend, Backend) else arm.backend
    return replace(arm, name=f"{arm.name}, CUDA graphs", backend=backend, mode="reduce-overhead")


def measure_family(family: str, args: argparse.Namespace) -> dict[str, Any]:
    """All arms of one model: memory and gradients first, arm by arm, then times side by side."""
    torch.manual_seed(0)
    model, batch = FAMILIES[family](args.layers, args.batch_size, args.length)
    model.train().to(args.device)
    batch = {name: value.to(args.device) for name, value in batch.items()}
    config: Any = model.config
    hidden = config.d_model if family == "t5" else config.hidden_size
    results: dict[str, dict[str, Any]] = {}
    steps: dict[str, Callable[[], None]] = {}
    reference: dict[str, Tensor] = {}
    chosen = arms(args)
    with torch._dynamo.config.patch(recompile_limit=4 * len(chosen), accumulated_recompile_limit=10_000):
        for arm in chosen:
            print(f"{family}: {arm.name}", flush=True)
            try:
                trained = arm.build(model, batch)
                if arm.mode:
                    trained.step()
                    results[arm.name], steps[arm.name] = {}, trained.step
                    continue
                results[arm.name] = trained.memory()
                grads = trained.gradients()
                # (The first micro-batch draws what the loss of all draws later; in 16 bits a loss has three digits.)
                if arm.micro == 1 and not arm.autocast:
                    parameters = dict(trained.model.named_parameters())
                    results[arm.name]["slope_error"] = slope_error(trained.loss, grads, parameters)
                if arm.comparable:
                    reference = reference or grads
                    results[arm.name] |= errors(grads, reference)
            except Exception as error:
                results[arm.name] = {"error": str(error).strip().splitlines()[0][:200]}
                continue
            if isinstance(arm.backend, Backend):
                results[arm.name]["predicted"] = vars(arm.backend.ledger.predicted)
            steps[arm.name] = trained.step
            print({n: f"{v:.3g}" for n, v in results[arm.name].items() if isinstance(v, (int, float))}, flush=True)
        print(f"{family}: times", flush=True)
        warmup = 3 if args.device == "cuda" else 1
        for name, times in measure.alternate(steps, args.repeats, warmup, args.device).items():
            results[name] |= {"seconds": times.seconds, "median": times.median}
    return {
        "family": family,
        "layers": args.layers,
        "batch_size": args.batch_size,
        "length": args.length,
        "device": args.device,
        "autocast": args.autocast,
        "unit_bytes": args.batch_size * args.length * hidden * 4,
        "environment": measure.environment(),
        "arms": results,
    }


def errors(grads: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Relative squared errors ``|G' - G|^2 / |G|^2``: median over matrices inside layers, largest over all vectors
    but those without a gradient, such as the biases of keys (their errors are of rounding of floating point)."""
    matrices = {n: g for n, g in exact.items() if g.dim() == 2 and re.search(r"layer|block|\.h\.", n)}
    vectors = [measure.relative_error(grads, {n: g}) for n, g in exact.items() if g.dim() == 1 and has_gradient(g)]
    return {"matrix_error": measure.relative_error(grads, matrices), "vector_error": max(vectors, default=0.0)}


def has_gradient(grad: Tensor) -> bool:
    """Whether a gradient is more than rounding of floating point."""
    return float(grad.float().square().mean()) > NO_GRADIENT


if __name__ == "__main__":
    main()
