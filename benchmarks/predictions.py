"""Predicted against measured peak of activations, on eight kinds of models.

    python -m wtacrs_fx.benchmarks.predictions --out benchmarks/results

The measured peak is the largest sum of live bytes of the allocator during a step, without gradients of parameters. Every
model becomes a JSON file under ``predictions/``, and a model that has one is not measured again; the table is made from all.
"""

import argparse
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from wtacrs_fx import Backend, measure
from wtacrs_fx.benchmarks.families import VOCABULARY
from wtacrs_fx.benchmarks.options import memory_budget
from wtacrs_fx.presets import build

_NARROW = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_key_value_heads": 3,
    "num_hidden_layers": 4,
}
_OPT = {
    "hidden_size": 768,
    "ffn_dim": 3072,
    "num_attention_heads": 12,
    "word_embed_proj_dim": 768,
    "num_hidden_layers": 4,
}
_TOKENS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "decoder_start_token_id": 0}
MODELS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "bert": ("bert-base", {"num_hidden_layers": 4}),
    "gpt2": ("gpt2", {"n_layer": 4, "loss_type": "ForCausalLM", **_TOKENS}),
    "t5": ("t5-base", {"num_layers": 2, "num_decoder_layers": 2}),
    "llama": ("llama-3.2-1b", _NARROW),
    "opt": ("opt-1.3b", _OPT),
    "qwen2": ("qwen2.5-7b", _NARROW),
    "vit": ("vit-base", {"num_hidden_layers": 4}),
    "whisper": ("whisper-small", {"encoder_layers": 2, "decoder_layers": 2, "max_source_positions": 200, **_TOKENS}),
}
"""Preset, and what makes it four layers of hidden size 768."""

ARMS = ("inductor", "none", "0.5", "0.3", "auto")
"""Exact training, and values of ``memory_budget``."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--ratio", type=float, default=0.1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    folder = args.out / "predictions"
    folder.mkdir(parents=True, exist_ok=True)
    for name in args.models:
        path = folder / f"{name}_{args.batch_size}x{args.length}_{args.device}.json"
        if not path.exists():
            path.write_text(json.dumps(measure_model(name, args), indent=1) + "\n")
    text = render([json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))])
    (args.out / "predictions.md").write_text(text)
    print(text)


def measure_model(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Peaks of one model, measured and predicted, under all budgets."""
    preset, overrides = MODELS[name]
    shape = {} if name == "vit" else {"vocab_size": VOCABULARY}
    torch.manual_seed(0)
    model, batch = build(
        preset,
        batch_size=args.batch_size,
        length=args.length,
        overrides={**overrides, **shape},
        device=args.device,
    )
    if (
        "loss_type" in overrides
    ):  # (transformers looks at the class's name alone, and warns, which would break the graph)
        model.loss_type = overrides["loss_type"]
    measured: dict[str, int] = {}
    predicted: dict[str, int] = {}
    for arm in ARMS:
        print(f"{name}: {arm}", flush=True)
        torch._dynamo.reset()
        backend: Any = "inductor"
        if arm != "inductor":
            backend = Backend(ratio=args.ratio, memory_budget=memory_budget(arm))
        step = functools.partial(_step, torch.compile(model, backend=backend, dynamic=False), batch)
        step()
        measured[arm] = measure.peaks(step, model).activations
        if isinstance(backend, Backend):
            exact, now = backend.ledger.predicted_exact, backend.ledger.predicted
            assert exact
            assert now
            predicted |= {"inductor": exact.peak, arm: now.peak}
    return {
        "model": name,
        "batch_size": args.batch_size,
        "length": args.length,
        "device": args.device,
        "ratio": args.ratio,
        "environment": measure.environment(),
        "arms": {arm: {"measured": measured[arm], "predicted": predicted[arm]} for arm in ARMS},
    }


def _step(call: Callable[..., Any], batch: Mapping[str, Tensor]) -> None:
    call(**batch).loss.backward()


def render(results: list[dict[str, Any]]) -> str:
    """One line per model: predicted over measured peak, and the measured peak over that of exact training."""
    rows = [
        (
            f"{r['model']}, {r['batch_size']}x{r['length']}{', GPU' * (r.get('device') == 'cuda')}",
            *(
                f"{a['predicted'] / a['measured']:.2f} ({a['measured'] / r['arms']['inductor']['measured']:.2f})"
                for a in (r["arms"][arm] for arm in ARMS)
            ),
        )
        for r in results
    ]
    worst = max(abs(a["predicted"] / a["measured"] - 1) for r in results for a in r["arms"].values())
    environments = sorted({", ".join(f"{k} {v}" for k, v in r["environment"].items()) for r in results})
    ratios = ", ".join(sorted({f"{r['ratio']:g}" for r in results}))
    return (
        "# Predicted peak of activations\n\n"
        f"Predicted over measured peak, and in brackets the measured peak over that of exact training. Ratio {ratios}; "
        "four layers, hidden size 768; the memory budget of each column is its title. "
        f"{'; '.join(environments)}.\n\n"
        + tabulate(rows, ("model", *ARMS), tablefmt="github", disable_numparse=True)
        + f"\n\nLargest deviation: {100 * worst:.1f} %.\n"
    )


if __name__ == "__main__":
    main()
