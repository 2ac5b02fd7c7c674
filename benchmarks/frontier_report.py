"""Table, plot and verdicts of what :mod:`wtacrs_fx.benchmarks.frontier` measured."""

import json
from pathlib import Path
from typing import Any

from tabulate import tabulate

Arms = dict[str, dict[str, Any]]

BOUNDS = (1.0, 0.82)
"""Step times, relative to Inductor's default, for which the least peak is reported."""


def write(folder: Path) -> str:
    """Write ``frontier.md`` and ``frontier.png`` from all files in ``folder/frontier``; returns the text."""
    results = [json.loads(path.read_text()) for path in sorted((folder / "frontier").glob("*.json"))]
    if not results:
        raise FileNotFoundError(f"{folder / 'frontier'}: no results; run this script with --families first.")
    text = render(results)
    (folder / "frontier.md").write_text(text)
    plot(results, folder / "frontier.png")
    return text


def render(results: list[dict[str, Any]]) -> str:
    """One section per configuration."""
    sections = [
        "# Peak of activations against step time\n\n"
        "Memory in units of one [tokens, hidden] float32 tensor. Held: bytes that autograd keeps for the backward. Act. peak: "
        "largest sum of live bytes of a step without parameters and their gradients alive at that moment. Peak: with those "
        "gradients. Resident: how far the resident set rose. Held and act. peak of micro-batches are those of one. '/ind.': "
        "ratio to Inductor's default in the same run; step times are medians. Predicted: predicted act. peak over the "
        "measured one. Matrix error: median relative squared error of one draw of the layers' weight gradients; vector error: "
        "largest one of the gradients of biases and normalisations, which are exact in every arm of wtacrs (not compared "
        "where dropout draws other masks). Slope error: relative difference between the slope of the loss along these "
        "gradients and a difference of two losses for the same seed; empty where it was not measured."
    ]
    sections += [section(r) for r in results]
    return "\n\n".join(sections) + "\n"


def section(result: dict[str, Any]) -> str:
    """Table and verdicts of one configuration."""
    arms: Arms = result["arms"]
    base, unit = arms["inductor"], result["unit_bytes"]
    rows: list[tuple[str, ...]] = []
    for name, r in arms.items():
        if "error" in r:
            rows.append((name, f"failed: {r['error'][:60]}"))
            continue
        predicted = r.get("predicted")
        rows.append(
            (
                name,
                *(
                    _memory(r.get(f"{key}_bytes"), base[f"{key}_bytes"], unit)
                    for key in ("held", "activation_peak", "peak", "resident")
                ),
                f"{r['median']:.3g}",
                f"{r['median'] / base['median']:.2f}",
                f"{predicted['peak'] / r['activation_peak_bytes']:.2f}"
                if predicted and "activation_peak_bytes" in r
                else "",
                f"{r['matrix_error']:.1e}" if "matrix_error" in r else "",
                f"{r['vector_error']:.0e}" if "vector_error" in r else "",
                f"{r['slope_error']:.0e}" if "slope_error" in r else "",
            )
        )
    headers = (
        "arm", "held /ind.", "act. peak /ind.", "peak /ind.", "resident /ind.", "step s", "/ind.", "predicted", "matrix error",
        "vector error", "slope error",
    )  # fmt: skip
    environment = ", ".join(f"{k} {v}" for k, v in result["environment"].items())
    title = f"## {_title(result)} tokens" + (", on a GPU" if result.get("device") == "cuda" else "")
    table = tabulate(rows, headers, tablefmt="github", disable_numparse=True)
    return f"{title}\n\n{environment}.\n\n{table}\n\n" + "\n".join(f"- {v}" for v in verdicts(arms))


def verdicts(arms: Arms) -> list[str]:
    """The least peak within each time bound, and the exact arms that no arm of wtacrs beats in both peak and time."""
    done = _with_peak(arms)
    base = done["inductor"]
    lines = []
    for bound in BOUNDS:
        for kind, ours in (("wtacrs", True), ("others", False)):
            fits = {n: r for n, r in done.items() if _is_ours(n) is ours and r["median"] <= bound * base["median"]}
            if fits:
                name = min(fits, key=lambda n: fits[n]["activation_peak_bytes"])
                r = fits[name]
                factor = base["activation_peak_bytes"] / r["activation_peak_bytes"]
                lines.append(
                    f"step at most {bound:g} of Inductor's, {kind}: {name}, act. peak {factor:.1f} times lower, step "
                    f"{r['median'] / base['median']:.2f}, held {r['held_bytes'] / base['held_bytes']:.2f}"
                )
            else:
                lines.append(f"step at most {bound:g} of Inductor's, {kind}: none")
    lines.append("exact arms that no arm of wtacrs beats in both: " + (", ".join(unbeaten(done)) or "none"))
    return lines


def unbeaten(arms: Arms) -> list[str]:
    """Arms of others for which no arm of wtacrs is faster at an equal or lower peak of activations."""
    ours = [r for n, r in arms.items() if _is_ours(n)]
    return [
        n
        for n, r in arms.items()
        if not _is_ours(n)
        and not any(
            o["activation_peak_bytes"] <= r["activation_peak_bytes"] and o["median"] < r["median"] for o in ours
        )
    ]


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """One panel per configuration: peak of activations against step time, both relative to Inductor's default."""
    from matplotlib.figure import Figure

    columns = min(2, len(results))
    figure = Figure(figsize=(6 * columns, 4 * -(-len(results) // columns)), layout="constrained")
    panels = figure.subplots(-(-len(results) // columns), columns, squeeze=False).flatten()
    for axes, result in zip(panels, results):
        arms = _with_peak(result["arms"])
        base = arms["inductor"]
        series: dict[str, list[tuple[float, float]]] = {}
        for name, r in arms.items():
            point = (r["activation_peak_bytes"] / base["activation_peak_bytes"], r["median"] / base["median"])
            series.setdefault(_series(name), []).append(point)
        for name, points in series.items():
            style = "-" if name.startswith("wtacrs") else "--"
            axes.plot(*zip(*sorted(points)), style, marker="o" if style == "-" else "x", label=name)
        axes.set(
            title=_title(result) + (", GPU" if result.get("device") == "cuda" else ""),
            xlabel="peak of activations / Inductor",
            ylabel="step time / Inductor",
        )
        axes.legend(fontsize="small")
    for axes in panels[len(results) :]:
        axes.set_visible(False)
    figure.savefig(path, dpi=110)


def _with_peak(arms: Arms) -> Arms:
    """Without those that failed or were timed only."""
    return {n: r for n, r in arms.items() if "activation_peak_bytes" in r}


def _title(result: dict[str, Any]) -> str:
    autocast = f", autocast to {result['autocast']}" if result.get("autocast") else ""
    return f"{result['family']}, {result['layers']} layers{autocast}, {result['batch_size']}x{result['length']}"


def _is_ours(name: str) -> bool:
    return name.startswith("wtacrs")


def _series(name: str) -> str:
    if _is_ours(name):
        return name.partition(" budget")[0]
    if "micro" in name or name == "inductor + checkpoint":
        return "inductor, micro-batches" if "micro" in name else name
    return "eager" if name.startswith("eager") else "inductor, budgets"


def _memory(value: int | None, base: int | None, unit: int) -> str:
    if value is None or not base:
        return ""
    return f"{value / unit:.1f} {value / base:.2f}"
