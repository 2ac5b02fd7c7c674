"""What a user should hear of a graph: where it differs from what was asked."""

import fnmatch
from collections import Counter

from wtacrs_fx.config import Config
from wtacrs_fx.ledger import Ledger
from wtacrs_fx.passes.policy import NO_RATIO


def complaints(ledger: Ledger, config: Config) -> list[str]:
    """What differs from what was asked: ``include`` without a match, a graph in which nothing is sampled or rounded."""
    names = sorted({e.module for e in ledger.entries})
    messages = []
    unmatched = [p for p in config.include if not fnmatch.filter(names, p)]
    if names and unmatched:
        shown = ", ".join(names[:20]) + (f", ... ({len(names)} in all)" if len(names) > 20 else "")
        messages.append(
            f"wtacrs: include={unmatched!r} matches no linear layer of this graph, so nothing is sampled for it. "
            f"Available names: {shown}."
        )
    unnamed = [e.module for e in ledger.entries if e.reason == NO_RATIO]
    if unnamed:
        messages.append(
            f"wtacrs: ratio has no pattern for {', '.join(unnamed[:20])}{', ...' * (len(unnamed) > 20)}: they stay exact. Add "
            "one, or '*' as the last."
        )
    if config.samples and ledger.count("exact") == len(ledger.entries):
        reasons = Counter(e.reason.partition(" (")[0] for e in ledger.entries)
        why = ", ".join(f"{n} {reason}" for reason, n in reasons.most_common()) or "it has no weight-gradient product"
        messages.append(
            f"wtacrs: nothing is sampled in this graph, it trains exactly: {why}. "
            "See the ledger; the options min_rows, min_bytes, include, exclude and late decide."
        )
    return [*messages, *_not_rounded(ledger, config)]


def _not_rounded(ledger: Ledger, config: Config) -> list[str]:
    """A graph in which nothing is rounded although that was asked for. (Under a budget ``round_bits`` is for what serves it,
    and where rows are kept there may be no need to.)"""
    if not config.rounds or ledger.rounded or ledger.sampled:
        return []
    if config.memory_budget is not None:
        if not config.all_rows_in_bits:
            return []
        return [
            f"wtacrs: row_bits={config.row_bits} with ratio=1: nothing is rounded in this graph, since memory_budget="
            f"{config.memory_budget!r} is served without. memory_budget=None rounds all that can be; a ratio below 1 keeps few "
            "rows."
        ]
    if any(isinstance(size, str) for t in ledger.tensors for size in t.shape):
        return [
            f"wtacrs: {config.bits_asked} has no effect in this graph, whose sizes are symbolic: only tensors are "
            "rounded whose rows have a known size, a multiple of four. Keep sizes the same (drop a last, smaller batch; pad to "
            "one length), or compile with dynamic=False, once for every size."
        ]
    if config.round_bits is None:
        return [
            f"wtacrs: row_bits={config.row_bits}: nothing is rounded in this graph. The options include, exclude, min_rows and "
            "min_bytes decide, and whether the backward reads the layers' inputs for anything else (round_bits rounds them for "
            "that)."
        ]
    return [
        f"wtacrs: {config.bits_asked}: nothing is rounded in this graph. The options round_include, round_exclude, "
        "round_fused_attention and min_bytes decide; float64 takes part with round_float64=True only."
    ]
