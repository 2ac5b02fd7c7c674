"""Names of a Dynamo graph's inputs and modules."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from wtacrs_fx.ledger import Ledger
from wtacrs_fx.passes.sites import clean_module_path


class Argument(str):
    """Name of a batch argument, such as ``attention_mask``; that of a parameter or buffer is a plain ``str``."""

    __slots__ = ()


def dynamo_names(gm: GraphModule) -> list[str | None]:
    """For every input of a Dynamo graph: a parameter's or buffer's name such as ``encoder.0.query.weight``, the
    :class:`Argument` that the user passed, or None (a size, what an earlier graph has left)."""
    return [_name(node) for node in gm.graph.find_nodes(op="placeholder")]


ROOT = r"[LG](\[[^\]]*\])+"
"""What Dynamo calls the module whose code it compiles: ``L['self']``, or ``L['___stack0']`` behind a graph break."""


def paths_in_model(gm: GraphModule, inputs: Sequence[Any], model: nn.Module) -> dict[str, str]:
    """Path of a module in a Dynamo graph -> that in the model, where they differ.

    Where a graph breaks inside of a module, Dynamo compiles the code of that module, and all paths begin there: ``up``, not
    ``blocks.3.up``. The inputs are the model's own parameters, whose names are known::

        L['self'].up.weight is blocks.3.up.weight   ->   L['self'] is blocks.3

    A product with a weight of the compiled module itself has the parameter's name for a path, which is in the result too.
    """
    names = {id(t): name for name, t in (*model.named_parameters(), *model.named_buffers())}
    roots: dict[str, str] = {}
    found: dict[str, str] = {}
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), inputs):
        path = _path(node)
        owner, below, root = names.get(id(value), "").rpartition(".")[0], clean_module_path(path), re.search(ROOT, path)
        if root and owner and f".{owner}".endswith(f".{below}" if below else ""):
            roots.setdefault(root[0], owner.removesuffix(below).rstrip("."))
            if not below:
                found[str(_name(node))] = owner
    for module in gm.modules():
        for node in module.graph.nodes if isinstance(module, GraphModule) else ():
            root = re.search(ROOT, path := _path(node))
            above, below = roots.get(root[0], "") if root else "", clean_module_path(path)
            if above and below:
                found[below] = f"{above}.{below}"
    return found


def renamed(ledger: Ledger, paths: Mapping[str, str]) -> Ledger:
    """A ledger with other paths for some modules."""

    def moved(rows: Iterable[Any], field: str = "module") -> tuple[Any, ...]:
        return tuple(replace(r, **{field: paths.get(getattr(r, field), getattr(r, field))}) for r in rows)

    lists: dict[str, Any] = {name: moved(getattr(ledger, name)) for name in ("entries", "tensors", "compressed")}
    return replace(ledger, **lists, handed=moved(ledger.handed, "site")) if paths else ledger


def _path(node: Node) -> str:
    """Dynamo's, of the innermost module; empty in the code of the compiled function itself."""
    stack = node.meta.get("nn_module_stack")
    return str(next(reversed(stack.values()))[0]) if stack else ""


def _name(node: Node) -> str | None:
    member = re.search(r"_(?:parameters|buffers)_(?P<name>\w+?)_?$", str(node.target))
    if member is None:
        return _argument(node)
    stack = node.meta.get("nn_module_stack")
    owner = clean_module_path(next(reversed(stack.values()))[0]) if stack else ""
    return f"{owner}.{member['name']}".lstrip(".")


def _argument(node: Node) -> Argument | None:
    """``L['kwargs']['attention_mask']`` -> ``attention_mask``."""
    source: Any = getattr(getattr(node, "_dynamo_source", None), "name", None)
    path = source() if callable(source) else source or ""
    keys = re.findall(r"\['(\w+)'\]|\.([A-Za-z]\w*)", str(path))
    return Argument(next(filter(None, keys[-1]))) if keys else None
