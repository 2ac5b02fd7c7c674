"""Norm sources: what is known in the forward about the norms of gradient rows that the backward is going to make.

The importance of least variance of row i is ``|h_i| |g_i|`` (Liu et al., arXiv 2305.15265, section 3), and ``g_i`` is not
known where early sites choose their rows. A source estimates ``|g_i|`` from what earlier backwards have shown. The estimate
is floored (:func:`floored`), so that every row stays possible: wrong norms cost variance and never the mean.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

NORMS = ("activation", "position", "sample")
"""Names that the option ``norms`` knows."""

FLOOR = 0.05
"""Least norm of a row, in means over the batch's rows. Rows believed to have no gradient then take at most 5 % of the draws,
and one that has a gradient all the same has a scale of at most 20 times that of uniform sampling. On MiniLM, 32x48 tokens of
reviews, norms of "sample" 8 steps old, 0.3 of the rows: error 0.177 without a floor, 0.181 at 0.01, 0.196 at 0.05, 0.245 at
0.2; with the padding known 0.177 at all of them, or a little less."""

WRAPPED = "module."
"""What DistributedDataParallel puts before the names of a model's modules."""

RATE = 0.1
"""Share of the newest batch in a running mean: the mean is over about 19 batches, so that the noise of one batch averages out
and the drift of training does not. The first ten batches count equally. (Errors at 0.03, 0.1 and 0.3 were within 2 %.)"""


@dataclass(frozen=True)
class Rows:
    """The rows of one site in one forward: ``count`` of them, ``count // length`` sequences one after the other."""

    count: int
    length: int
    """Rows per sequence; 0 if the graph does not show any (an input that is [M, D] from the start)."""
    device: torch.device
    ids: tuple[int, ...] | None = None
    """The batch's training examples, from :func:`wtacrs_fx.sample_ids`; None if unknown."""
    mask: Tensor | None = None
    """bool [count], False where a row is padding; None if unknown."""
    copies: dict[torch.device, Tensor] = field(default_factory=dict, compare=False)
    """The ids on a device, int64; shared by the sites of one forward."""

    def ids_on(self, device: torch.device) -> Tensor:
        """The ids as int64 [n], copied without waiting for the device."""
        if device not in self.copies:
            ids = torch.tensor(self.ids, dtype=torch.int64, pin_memory=device.type == "cuda")
            self.copies[device] = ids.to(device, non_blocking=True)
        return self.copies[device]


class NormSource:
    """Interface of a norm source, and the base class of those here. Write your own and give it as ``norms=MySource()``.

    A source is the state of a training run: it lives as long as the Backend (or the user's variable), and its two methods are
    called from compiled graphs. They must not wait for the device.
    """

    kind = "own"
    """Name in the ledger and in checkpoints."""
    wants_ids = False
    """Whether the user is warned once when ids are missing."""

    def begin(self, sites: Sequence[str], ids: tuple[int, ...] | None) -> None:
        """A forward begins that will ask about these sites. Raise ValueError here for ids that cannot be right."""

    def read(self, site: str, rows: Rows) -> Tensor | None:
        """In the forward: estimates of ``|g_i|`` up to a common factor, float32 [rows.count] on ``rows.device``; None if
        nothing is known yet, which makes all equal. Values that are not finite, or negative, count as the mean.

        Args: site, the module's name and its widths, such as "blocks.0.up:64x256", with "#2" if it is called twice and "@1"
        if the graph runs for a second module; rows, which they are.
        """
        raise NotImplementedError

    def record(self, site: str, rows: Rows, norms: Tensor) -> None:
        """In the backward: the true norms, float32 [rows.count]."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: tensors on the CPU, and plain values."""
        return {"kind": self.kind}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a checkpoint. Raises ValueError: it is another kind's."""
        if state.get("kind") != self.kind:
            raise ValueError(f"a checkpoint of norms={state.get('kind')!r} was given to norms={self.kind!r}.")
        rows = vars(self).get("_row_state")
        if rows is not None:  # (which model comes first is seen anew: the old one may be there still)
            rows.owners.clear()


class NamedNorms(NormSource):
    """Stands for a source where only its kind counts: in what is compiled, and in keys of caches, there is no state."""

    def __init__(self, kind: str) -> None:
        self.kind = kind


class PositionNorms(NormSource):
    """``norms="position"``: a running mean of ``|g|^2`` for every position of the sequence and site, over
    the batch's sequences.

    ``m_t <- m_t + r (mean over the batch of |g_t|^2 - m_t)`` with ``r = max(rate, 1 / (batches seen + 1))``; rows of padding
    and values that are not finite (overflows under loss scaling) are left out. A position not seen yet has the mean of the
    others. Where the graph shows no sequences, every row is a position.
    """

    kind = "position"

    def __init__(self, rate: float = RATE) -> None:
        if not 0 < rate <= 1:
            raise ValueError(f"rate={rate!r}: expected 0 < rate <= 1, the share of the newest batch.")
        self.rate = rate
        self.mean: dict[str, Tensor] = {}
        """Site -> float32 [longest sequence]."""
        self.seen: dict[str, Tensor] = {}
        """Site -> float32 [longest sequence], batches that had the position."""
        self.loaded: frozenset[str] | None = None

    def begin(self, sites: Sequence[str], ids: tuple[int, ...] | None) -> None:
        if rename := check_loaded(self.loaded, sites):
            self.mean, self.seen = ({rename(k): v for k, v in t.items()} for t in (self.mean, self.seen))
            self.loaded = frozenset(self.mean)

    def read(self, site: str, rows: Rows) -> Tensor | None:
        if site not in self.mean:
            return None
        length = rows.length or rows.count
        mean, seen = self._tables(site, length, rows.device)
        known = seen > 0
        typical = torch.where(known, mean, 0.0).sum() / known.sum().clamp(min=1)
        squared = torch.where(known, mean, typical)[:length]
        return squared.sqrt().repeat(rows.count // length)

    def record(self, site: str, rows: Rows, norms: Tensor) -> None:
        length = rows.length or rows.count
        squared = norms.float().square()
        valid = torch.isfinite(squared) if rows.mask is None else torch.isfinite(squared) & rows.mask
        count = valid.view(-1, length).sum(0)
        batch = torch.where(valid, squared, 0.0).view(-1, length).sum(0) / count.clamp(min=1)
        mean, seen = (t[:length] for t in self._tables(site, length, rows.device))
        rate = torch.where(count > 0, (1 / (seen + 1)).clamp(min=self.rate), 0.0)
        mean += rate * (batch - mean)
        seen += count > 0

    def _tables(self, site: str, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Both tables on the device and long enough."""
        for table in (self.mean, self.seen):
            old = table.get(site)
            if old is None or len(old) < length or old.device != device:
                new = torch.zeros(max(length, 0 if old is None else len(old)), device=device)
                if old is not None:
                    new[: len(old)] = old
                table[site] = new
        return self.mean[site], self.seen[site]

    def state_dict(self) -> dict[str, Any]:
        tables = ((name, getattr(self, name)) for name in ("mean", "seen"))
        return {**super().state_dict(), **{name: {k: v.cpu().clone() for k, v in t.items()} for name, t in tables}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        check_loaded(frozenset(state["mean"]), [*self.mean])  # (names are made to fit when a forward begins)
        self.mean, self.seen = ({k: v.clone() for k, v in state[name].items()} for name in ("mean", "seen"))
        self.loaded = frozenset(self.mean)


def check_loaded(loaded: "frozenset[str] | None", sites: Sequence[str]) -> Callable[[str], str] | None:
    """Refuse a checkpoint that has nothing to say about any of a graph's sites.

    Returns: how its names become this graph's, where one of the two ran in DistributedDataParallel; else None.

    Raises:
        ValueError: naming a site of either.
    """
    if not loaded or not sites or not loaded.isdisjoint(sites):
        return None
    for rename in (WRAPPED.__add__, lambda name: name.removeprefix(WRAPPED)):
        if not set(map(rename, loaded)).isdisjoint(sites):
            return rename
    near = difflib.get_close_matches(sites[0], loaded, n=1) or sorted(loaded)[:1]
    raise ValueError(
        f"the loaded gradient norms are those of another model: they have none of this graph's {len(sites)} sites, such as "
        f"{sites[0]!r} (they have {near[0]!r}; the numbers are the widths of input and output)."
    )


def floored(norms: Tensor, mask: Tensor | None = None) -> Tensor:
    """Norms that keep every row possible: at least :data:`FLOOR` times their mean, and 1 where all are zero.

    Args: norms, float [M], any values: those not finite, or negative, count as the mean; mask, bool [M]: rows that do not count
    for the mean. Returns: float64 [M], positive and finite.
    """
    n = norms.double()
    valid = torch.isfinite(n) & (n >= 0)
    counted = valid if mask is None else valid & mask
    mean = torch.where(counted, n, 0.0).sum() / counted.sum().clamp(min=1)
    n = torch.where(valid, n, mean).clamp(min=FLOOR * mean)
    return torch.where(mean > 0, n, 1.0)


def check_norms(value: Any) -> None:
    """Refuse what is no value of the option ``norms``. Raises: ValueError: an unknown name. TypeError: no NormSource."""
    if isinstance(value, str):
        if value not in NORMS:
            near = difflib.get_close_matches(value, NORMS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"norms={value!r}: expected one of {', '.join(map(repr, NORMS))}.{hint}")
    elif not isinstance(value, NormSource):
        raise TypeError(
            f"norms={value!r}: expected one of {', '.join(map(repr, NORMS))}, or an object of a class derived from "
            "wtacrs_fx.NormSource."
        )


def make_source(norms: "str | NormSource") -> NormSource | None:
    """The source behind an option's value: a new one for a name, the object itself, None for "activation"."""
    from wtacrs_fx.norm_cache import SampleNorms

    if not isinstance(norms, str):
        return norms
    made: Mapping[str, type[PositionNorms] | type[SampleNorms]] = {"position": PositionNorms, "sample": SampleNorms}
    return None if norms == "activation" else made[norms]()
