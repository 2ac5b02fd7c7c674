"""Ledgers beside Inductor's cache: on a warm start the passes do not run, and the report must not be empty."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule

from wtacrs_fx.files import replace_text
from wtacrs_fx.ledger import Ledger
from wtacrs_fx.private import cache_dir, functorch_config, inductor_config

if TYPE_CHECKING:
    from wtacrs_fx.backend import Partitioner


@contextlib.contextmanager
def ledger_of(
    gm: GraphModule, example_inputs: Sequence[Any], partition_fn: "Partitioner", rebuild: Callable[[], object]
) -> Iterator[None]:
    """Compile a graph inside. Ledgers made are stored; if none is made because the cache was warm, the stored ones are
    published. Where their file is damaged, ``rebuild`` runs the partitioner once more, and the file is replaced."""
    before = len(partition_fn.ledgers)
    path = _path(gm, example_inputs, partition_fn)
    yield
    if inductor_config.force_disable_caches:
        return
    if len(partition_fn.ledgers) == before:
        try:
            for ledger in _read(path):
                partition_fn.publish(ledger)
        except (ValueError, KeyError, TypeError, AttributeError):
            rebuild()
        else:
            return
    if made := partition_fn.ledgers[before:]:
        _write(path, [ledger.to_dict() for ledger in made])


def _path(gm: GraphModule, example_inputs: Sequence[Any], partition_fn: "Partitioner") -> Path:
    """A name made of all that the plan depends on: the graph, its inputs, the options, and torch's ambient state."""
    inputs = [
        (tuple(map(str, x.shape)), str(x.dtype), str(x.device), x.requires_grad)
        if isinstance(x, torch.Tensor)
        else str(x)
        for x in example_inputs
    ]
    ambient = (torch.is_grad_enabled(), functorch_config.activation_memory_budget)
    key = repr((partition_fn.uuid(), _texts(gm), inputs, ambient))
    return Path(cache_dir()) / "wtacrs" / f"{hashlib.sha256(key.encode()).hexdigest()}.json"


def _texts(gm: GraphModule) -> list[Any]:
    """Code of the graph and of those inside it (checkpoint regions), and what the user's code says of its nodes (a region's
    memory budget)."""
    graphs = (m for m in gm.modules() if isinstance(m, GraphModule))
    return [(m.code, [str(n.meta.get("custom")) for n in m.graph.nodes]) for m in graphs]


def _write(path: Path, data: Any) -> None:
    with contextlib.suppress(OSError):  # a cache that cannot be written is no reason to stop training
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(data))


def _read(path: Path) -> list[Ledger]:
    """The stored ledgers; none where there is no file. Raises ValueError, KeyError, TypeError or AttributeError if it is
    damaged."""
    try:
        text = path.read_text()
    except OSError:
        return []
    return [Ledger.from_dict(d) for d in json.loads(text)]
