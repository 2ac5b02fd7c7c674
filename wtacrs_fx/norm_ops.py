"""The ops by which compiled graphs ask for, and report, the norms of gradient rows.

``begin_rows`` runs once per forward, ``known_importance`` once per draw in the forward, ``record_rows`` once per sampled
product in the backward. The result of ``record_rows`` is the index by which the gradient is gathered, so that no pass can
drop it or run it elsewhere. In graphs that measure, ``measure_rows`` stands between the gathered gradient and its product.
"""

import torch
from torch import Tensor

from wtacrs_fx import norm_state

_OUTSIDE = (torch.Tag.cudagraph_unsafe,)  # they read Python state: a CUDA graph would replay what it was


@torch.library.custom_op(
    "wtacrs::begin_rows", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded, torch.Tag.cudagraph_unsafe)
)
def begin_rows(sites: str, device: torch.device) -> Tensor:
    """The number of this forward, int64 [1] on ``device`` (the CPU, so that reading it waits for nothing); ``sites``, one a
    line, are those it will ask about (none where it only measures). 0 outside of a Backend's graphs: nothing is
    known then, and nothing recorded."""
    return torch.full((1,), norm_state.begin(sites.splitlines()), dtype=torch.int64, device=device)


@begin_rows.register_fake
def _(sites: str, device: torch.device) -> Tensor:
    return torch.empty((1,), dtype=torch.int64, device=device)


@torch.library.custom_op("wtacrs::known_importance", mutates_args=(), tags=_OUTSIDE)
def known_importance(token: Tensor, norms: Tensor, mask: Tensor | None, sites: str, length: int) -> Tensor:
    """Importance of rows by what is known of their gradients.

    Args:
        token: from ``begin_rows``.
        norms: [M], floating point, ``|h_i|``.
        mask: bool [M], False where a row is padding, or None.
        sites: names, one a line, of the sites that share the input.
        length: rows per sequence, 0 if unknown.

    Returns: float64 [M], not normalised.
    """
    found = norm_state.find(token)
    if found is None:
        return norms.to(torch.float64, copy=True)
    state, call = found
    return state.importance(call, norms, mask, sites.split("\n"), length)


@known_importance.register_fake
def _(token: Tensor, norms: Tensor, mask: Tensor | None, sites: str, length: int) -> Tensor:
    return torch.empty_like(norms, dtype=torch.float64)


@torch.library.custom_op("wtacrs::record_rows", mutates_args=(), tags=_OUTSIDE)
def record_rows(token: Tensor, squared: Tensor, mask: Tensor | None, rows: Tensor, site: str) -> Tensor:
    """Report the squared norms of the gradient rows of a site, [M]; returns a copy of ``rows``, int64 [k].

    Args: token, mask as above; the gradient is gathered by the result.
    """
    found = norm_state.find(token)
    if found is not None:
        state, call = found
        state.record(call, squared, mask, site)
    return rows.clone()


@record_rows.register_fake
def _(token: Tensor, squared: Tensor, mask: Tensor | None, rows: Tensor, site: str) -> Tensor:
    return torch.empty_like(rows)


@torch.library.custom_op("wtacrs::measure_rows", mutates_args=(), tags=_OUTSIDE)
def measure_rows(
    token: Tensor,
    norms: Tensor,
    importance: Tensor,
    squared: Tensor,
    h_rows: Tensor,
    h_dim: int,
    g_rows: Tensor,
    g_dim: int,
    rows: Tensor,
    draw: str,
    site: str,
    length: int,
    late: bool,
) -> Tensor:
    """Report a sampled product to what measures its noise (:mod:`wtacrs_fx.measured`); returns a copy of ``g_rows``.

    Args:
        token: from ``begin_rows``.
        norms, importance, squared: [M], ``|h_i|``, what the rows were chosen by, and ``|g_i|^2``.
        h_rows, g_rows: kept rows of H, scaled, and of the gradient, along ``h_dim`` and ``g_dim``.
        rows: int64 [k], which they are.
        draw: modules that share the draw, one a line; site: the product's name.
        length: rows per sequence, 0 if unknown.
        late: whether the rows were chosen in the backward.
    """
    found = norm_state.find(token)
    if found is not None and (meter := found[1].meter) is not None:
        h, g = (x if dim == 0 else x.mT for x, dim in ((h_rows, h_dim), (g_rows, g_dim)))
        meter.record(tuple(draw.split("\n")), site, norms, importance, squared, h, g, rows, length, late)
    return g_rows.clone()


@measure_rows.register_fake
def _(
    token: Tensor,
    norms: Tensor,
    importance: Tensor,
    squared: Tensor,
    h_rows: Tensor,
    h_dim: int,
    g_rows: Tensor,
    *rest: object,
) -> Tensor:
    return g_rows.clone()
