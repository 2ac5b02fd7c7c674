"""The ledger of finished work on a joint graph."""

from dataclasses import replace

from wtacrs_fx.ledger import Ledger
from wtacrs_fx.passes.account import build_ledger, fused_entry, packed_entries, rounded_entries
from wtacrs_fx.passes.bits import sources
from wtacrs_fx.passes.budget import parts
from wtacrs_fx.passes.notes import notes_of
from wtacrs_fx.passes.policy import view_base
from wtacrs_fx.passes.saved import Held, saved_list
from wtacrs_fx.passes.sever import saved_tensors
from wtacrs_fx.passes.sites import fused_attention
from wtacrs_fx.passes.work import Work


def ledger_of(work: Work) -> Ledger:
    """Sites, tensors, plan and predictions of the best partition."""
    exact, now = (saved_tensors(p[0], work.num_fwd_outputs) for p in (work.exact, work.best))
    ledger = build_ledger(work.plan, work.done, exact, now, work.in_memory)
    held = [
        Held(r.tensor, r.form.bits, work.done.rounded.written[r.tensor], [f.reader for f in r.factors])
        for r in work.roundings
    ]
    held += [Held(p.mask, 1, (p.packed,), ()) for p in work.packed]
    before = {view_base(n).name for n in exact}
    relieved = {n.name for r in work.roundings for n in sources(r, before)}
    listed, handed = saved_list(
        work.plan, work.done, work.exact, work.best, work.num_fwd_outputs, work.in_memory, held, relieved
    )
    fused = fused_attention(work.joint.graph, work.kinds) if work.config.attention else []
    return replace(
        ledger,
        entries=(*ledger.entries, *map(fused_entry, fused)),
        tensors=tuple(listed),
        handed=tuple(handed),
        notes=notes_of(work),
        compressed=(*rounded_entries(work.roundings, work.done.rounded), *packed_entries(work.packed)),
        predicted_exact=work.prediction,
        predicted=work.predicted(),
        parts=tuple(parts(work.recomputation, work.reasons)) if work.recomputation else (),
        recomputed=len(work.recomputed),
    )
