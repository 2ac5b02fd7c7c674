"""Checks of options: each raises an error that names the value and what was expected."""

import contextlib
import difflib
import fnmatch
import math
from collections.abc import Mapping
from typing import Any, TypeVar

from wtacrs_fx.units import parse_bytes

T = TypeVar("T")

LEAST_SHARE = 0.02
"""Of rows that ratio="auto" gives a layer."""

OUTPUT_HEADS = (
    "*lm_head",
    "*classifier",
    "*classifier.*",
    "*score",
    "*qa_outputs",
    "*embed_out",
    "proj_out",
    "cls.*",
    "head",
    "heads.*",
    "*.head",
    "*_head",
)
"""Names that output heads go by in Hugging Face, timm and torchvision models."""


def as_patterns(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = (value,)
    if not isinstance(value, (tuple, list)) or not all(isinstance(p, str) for p in value):
        raise TypeError(
            f"{name}={value!r}: expected a pattern or a list of patterns over module names, e.g. '*.query'."
        )
    return tuple(value)


def as_ratios(value: Any) -> float | str | dict[str, float]:
    expected = "a number with 0 < ratio <= 1, such as 0.3"
    if isinstance(value, str):
        return _as_auto(value)
    if not isinstance(value, Mapping):
        check_number("ratio", value, float, lambda r: 0 < r <= 1, f"{expected}, or a dict of such numbers by module")
        return value
    if not value or not all(isinstance(p, str) for p in value):
        raise TypeError(
            f"ratio={value!r}: expected {expected}, or a dict of them by pattern, e.g. {{'*.query': 0.1, '*': 0.3}}."
        )
    for pattern, share in value.items():
        check_number(f"ratio[{pattern!r}]", share, float, lambda r: 0 < r <= 1, expected)
    return dict(value)


def as_bits(value: Any, choices: tuple[int, ...]) -> int | dict[str, int | None] | None:
    """A dict without any bits becomes None."""
    expected = f"None or one of {', '.join(map(str, choices))} (bits)"
    if not isinstance(value, Mapping):
        if value is not None:
            check_number("round_bits", value, int, lambda b: b in choices, expected)
        return value
    if not value or not all(isinstance(p, str) for p in value):
        raise TypeError(
            f"round_bits={value!r}: expected {expected}, or a dict of them by pattern, e.g. {{'*.mlp.*': 4, '*': 8}}."
        )
    asked = {pattern: bits for pattern, bits in value.items() if bits is not None}
    for pattern, bits in asked.items():
        check_number(f"round_bits[{pattern!r}]", bits, int, lambda b: b in choices, expected)
    return dict(value) if asked else None


def first_match(patterns: Mapping[str, T], name: str) -> T | None:
    """Of the first pattern that matches a module's name."""
    return next((value for pattern, value in patterns.items() if fnmatch.fnmatchcase(name, pattern)), None)


def _as_auto(value: str) -> str:
    """ "auto" -> "auto:0.3"."""
    name, _, share = value.partition(":")
    with contextlib.suppress(ValueError):
        if name == "auto" and LEAST_SHARE <= float(share or 0.3) < 1:
            return f"auto:{float(share or 0.3):g}"
    error = ValueError if name == "auto" else TypeError
    raise error(
        f"ratio={value!r}: expected a number, a dict, or as a text 'auto' or 'auto:0.2', which spreads 0.2 of the "
        f"rows (at least {LEAST_SHARE}) over the layers."
    )


def check_adaptive(config: Any) -> None:
    """Options about measured noise, and those that it excludes."""
    for name in ("recalibrate", "recompilations"):
        check_number(name, getattr(config, name), int, lambda n: n >= 1, "an integer >= 1")
    ratio, noise = config.ratio, config.noise
    auto = isinstance(ratio, str)
    if noise is not None:
        check_number("noise", noise, float, lambda n: 0 < n < 1e3, "a share of the batch's own variance, such as 0.05")
        if auto:
            raise ValueError(
                f"ratio={ratio!r} and noise={noise!r}: give one of the two, a budget of rows or one of noise."
            )
        if isinstance(ratio, Mapping) or ratio == 1:
            raise ValueError(
                f"noise={noise!r} with ratio={ratio!r}: expected one number below 1, the share of rows in the steps in which "
                "noise is measured."
            )
    if noise is None and not auto:
        return
    if config.attention:
        raise ValueError(
            "attention=True: only the noise of weight gradients is measured; leave it out, or noise and ratio='auto'."
        )
    if config.estimator == "topk":
        raise ValueError("estimator='topk': it has a bias, which no share of the variance bounds; choose another one.")


def as_inductor_options(value: Any) -> dict[str, Any]:
    if value == ():
        return {}
    if not isinstance(value, Mapping):
        raise TypeError(f"inductor={value!r}: expected a dict of Inductor options, e.g. {{'max_autotune': True}}.")
    if "custom_partitioner_fn" in value:
        raise ValueError(
            "inductor={'custom_partitioner_fn': ...}: wtacrs is itself the partitioner; remove this option, or call "
            "wtacrs_fx.partitioner(...) from your own."
        )
    return dict(value)


def check_budget(value: Any) -> None:
    expected = (
        "None, 'auto', a float in (0, 1] (share of the exact peak), or bytes as an int or a string such as '12GiB'"
    )
    if value is None or value == "auto":
        return
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError(f"memory_budget={value!r}: expected {expected}.")
    if isinstance(value, str):
        try:
            number: float = parse_bytes(value)
        except ValueError as error:
            raise ValueError(f"memory_budget={value!r}: expected {expected}.") from error
    else:
        number = value
    if isinstance(value, float) and not 0 < value <= 1:
        raise ValueError(f"memory_budget={value!r}: expected {expected}.")
    if isinstance(value, int) and 0 < value < 1024:
        raise ValueError(
            f"memory_budget={value!r}: an int is a number of bytes, and this is less than 1 KiB; a share of the exact peak is "
            f"a float, {float(value)}."
        )
    if not number > 0:
        raise ValueError(f"memory_budget={value!r}: expected {expected}.")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, choices))}.{hint}")


def check_number(name: str, value: Any, kind: type, ok: Any, expected: str) -> None:
    allowed = (int, float) if kind is float else (int,)
    if isinstance(value, bool) or not isinstance(value, allowed):
        raise TypeError(f"{name}={value!r}: expected {expected}.")
    if not math.isfinite(value) or not ok(value):
        raise ValueError(f"{name}={value!r}: expected {expected}.")


def refuse_state(config: Any, entry: str) -> None:
    """See :meth:`wtacrs_fx.Config.refuse_state`."""
    if config.adapts:
        name = f"noise={config.noise!r}" if config.noise is not None else f"ratio={config.ratio!r}"
        raise ValueError(
            f"{name} with {entry}: noise is measured while a Backend's graphs are trained. Use torch.compile(model, "
            "backend='wtacrs', options=...), or measure before: ratio=wtacrs_fx.calibrate(model, batches, ...).ratios."
        )
    if config.has_state:
        name = f"norms={config.norms_kind!r}" if config.norms != "activation" else f"padding={config.padding!r}"
        raise ValueError(
            f"{name} with {entry}: what is known of gradients belongs to a Backend. Use torch.compile(model, "
            "backend='wtacrs', options=...), or leave the option out."
        )


def refuse_all_rows(config: Any, entry: str) -> None:
    """For ways in that round no whole tensors.

    Raises: ValueError: ``row_bits`` with ratio=1.
    """
    if config.all_rows_in_bits:
        raise ValueError(
            f"row_bits={config.row_bits} with ratio=1 and {entry}: no rows are drawn, and it rounds no other tensors. Use "
            "torch.compile(model, backend='wtacrs', options=...), or a ratio below 1."
        )


def refuse_unknown(options: Mapping[str, Any], known: list[str]) -> None:
    """Raises: TypeError: a key that is no option, with the nearest known name."""
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            raise TypeError(
                f"unknown wtacrs option {key!r}. {hint}Known options: {', '.join(known)}. "
                "Inductor's own options go under 'inductor', e.g. options={'inductor': {'max_autotune': True}}."
            )


def check_row_bits(row_bits: Any, choices: tuple[int, ...]) -> None:
    if row_bits is not None:
        check_number("row_bits", row_bits, int, lambda b: b in choices, "None or one of 8, 4 (bits)")


def check_padding(padding: Any) -> None:
    if padding is not None and not (isinstance(padding, str) and padding):
        raise TypeError(f"padding={padding!r}: expected None or the name of a batch argument, e.g. 'attention_mask'.")


def check_seed(seed: Any) -> None:
    if seed is not None:
        check_number("seed", seed, int, lambda s: -(2**63) <= s < 2**63, "None or an integer of at most 64 bits")


def check_flags(config: Any) -> None:
    for name in ("attention", "center_rows", "pack_masks", "round_fused_attention", "round_float64"):
        if not isinstance(getattr(config, name), bool):
            raise TypeError(f"{name}={getattr(config, name)!r}: expected True or False.")
    if not isinstance(config.verbose, bool) and config.verbose != 2:
        raise TypeError(f"verbose={config.verbose!r}: expected True, False or 2.")
