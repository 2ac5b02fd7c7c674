"""Names of a Dynamo graph's inputs."""

import re
from typing import Any

from torch.fx import GraphModule, Node

from wtacrs_fx.passes.sites import clean_module_path


class Argument(str):
    """Name of a batch argument, such as ``attention_mask``; that of a parameter or buffer is a plain ``str``."""

    __slots__ = ()


def dynamo_names(gm: GraphModule) -> list[str | None]:
    """For every input of a Dynamo graph: a parameter's or buffer's name such as ``encoder.0.query.weight``, the
    :class:`Argument` that the user passed, or None (a size, what an earlier graph has left)."""
    return [_name(node) for node in gm.graph.find_nodes(op="placeholder")]


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
