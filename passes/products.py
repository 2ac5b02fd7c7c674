"""Find the products of a forward graph, whatever they are called, and decide which of them are sampled."""

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from wtacrs_fx.config import Config
from wtacrs_fx.passes.kinds import Kind
from wtacrs_fx.passes.policy import excluded, too_small
from wtacrs_fx.passes.sites import TRANSPOSES, site_name
from wtacrs_fx.passes.sizes import hint

aten = torch.ops.aten

FROZEN = "weight needs no gradient"
REPLACED = "the module's forward was replaced"

_LINEAR = (nn.functional.linear, aten.linear.default)
_ADDED = (torch.addmm, torch.baddbmm, aten.addmm.default, aten.baddbmm.default, "addmm", "baddbmm")
_MATMUL = (
    *(torch.matmul, torch.mm, torch.bmm, operator.matmul, aten.matmul.default, aten.mm.default, aten.bmm.default),
    *("matmul", "mm", "bmm"),
)
_TRANSPOSES = (*TRANSPOSES, torch.t, torch.transpose, "t", "transpose", "permute")

_ARGUMENTS = {
    _LINEAR: (("input",), ("weight",), ("bias",)),
    _ADDED: (("input", "self"), ("mat1", "batch1"), ("mat2", "batch2")),
    _MATMUL: (("input", "self", "tensor1"), ("other", "mat2", "tensor2")),
}


@dataclass(frozen=True)
class Product:
    """``node`` computes ``beta * bias + alpha * left @ right``; if ``transposed``, right is a weight [O, D] as in a linear
    layer, and the product is with its transpose."""

    node: Node
    left: Node
    right: "Node | str"
    """A node, or the path of an attribute where a module was called."""
    bias: "Node | str | None"
    transposed: bool = False
    beta: Any = 1
    alpha: Any = 1
    sampled: tuple[bool, ...] = (False, False)
    """Whether rows of left, right stand in for them: those that depend on the batch."""
    is_attention: bool = False
    """Whether both operands depend on the batch, so that gradients flow on to earlier layers."""
    module: str = ""
    reason: str = ""
    """Why the product is left as it is; empty if it is rewritten."""

    def operand(self, columns: bool) -> "Node | str":
        return self.right if columns else self.left

    @property
    def is_matrix(self) -> bool:
        """Whether the weight surely has two dimensions: a linear layer's, or one by its form."""
        return self.transposed or (self.bias is not None and "baddbmm" not in str(self.node.target))


def find_products(gm: GraphModule, kinds: Mapping[Node, Kind], config: Config) -> list[Product]:
    """All products of a forward graph with a decision, in graph order.

    Args:
        gm: forward graph; sizes are used where ``meta["val"]`` is there.
        kinds: from :func:`wtacrs_fx.passes.kinds.classify`.
        config: include, exclude, ratio, min_rows, min_bytes, attention.
    """
    found = (_as_written(node, gm) for node in gm.graph.nodes)
    return [_decide(p, gm, kinds, config) for p in found if p is not None]


def linear_weights(gm: GraphModule) -> list[Node]:
    """Placeholders that are the weight of a linear layer by the way they are used: parameters of a functional call."""
    found = (_as_written(node, gm) for node in gm.graph.nodes)
    matrices = [p.right for p in found if p is not None and p.is_matrix and isinstance(p.right, Node)]
    roots = [behind_transposes(n) for n in matrices]
    return [n for n in roots if n.op == "placeholder"]


def tensor_of(gm: GraphModule, value: "Node | str") -> "Tensor | None":
    """The tensor of an attribute, or a node's fake value; None if neither is known."""
    if isinstance(value, str) or value.op == "get_attr":
        path = value if isinstance(value, str) else str(value.target)
        owner, _, name = path.rpartition(".")
        found = getattr(gm.get_submodule(owner), name, None)
    else:
        found = value.meta.get("val")
    return found if isinstance(found, Tensor) else None


def _as_written(node: Node, gm: GraphModule) -> Product | None:
    """The product that a node computes, whatever it is called."""
    if node.op == "call_module":
        return _of_module(node, gm.get_submodule(str(node.target)))
    for targets, names in _ARGUMENTS.items():
        if node.op in ("call_function", "call_method") and node.target in targets and "out" not in node.kwargs:
            values = [_argument(node, i, aliases) for i, aliases in enumerate(names)]
            if targets is _LINEAR:
                product = Product(node, values[0], values[1], values[2], transposed=True)
            elif targets is _ADDED:
                beta, alpha = (node.kwargs.get(name, 1) for name in ("beta", "alpha"))
                product = Product(node, values[1], values[2], values[0], beta=beta, alpha=alpha)
            else:
                product = Product(node, values[0], values[1], None)
            return product if isinstance(product.left, Node) and isinstance(product.right, Node) else None
    return None


def _of_module(node: Node, module: nn.Module) -> Product | None:
    """A called nn.Linear or Hugging Face's Conv1D. Exactly these: a subclass may do anything."""
    path, kind = str(node.target), type(module)
    input, weight = _argument(node, 0, ("input", "x")), f"{path}.weight"
    if is_quantised(module):
        return Product(node, input, weight, None, transposed=True, module=path, reason="weight is quantised")
    is_conv1d = kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"
    if kind is not nn.Linear and not is_conv1d:
        return None
    bias = f"{path}.bias" if module.bias is not None else None
    hooks = any(getattr(module, f"_{when}_hooks") for when in ("forward", "forward_pre", "backward", "backward_pre"))
    reason = "module has hooks" if hooks else REPLACED if "forward" in vars(module) else ""
    return Product(node, input, weight, bias, transposed=kind is nn.Linear, module=path, reason=reason)


def is_quantised(module: nn.Module) -> bool:
    """Whether a module is one of torch's own quantised linear layers, whose weight is no tensor."""
    return type(module).__module__.startswith("torch.ao.nn.quantized") and type(module).__name__ == "Linear"


def _argument(node: Node, index: int, names: Iterable[str]) -> Any:
    if index < len(node.args):
        return node.args[index]
    return next((node.kwargs[n] for n in names if n in node.kwargs), None)


def _decide(product: Product, gm: GraphModule, kinds: Mapping[Node, Kind], config: Config) -> Product:
    """Which operands are sampled, the module's name, and whether the product is rewritten at all."""
    left, right = product.left, product.right
    sampled = tuple(isinstance(v, Node) and kinds[v] is Kind.ACTIVATION for v in (left, right))
    weight = right if sampled[0] else left
    root: Any = behind_transposes(weight) if isinstance(weight, Node) else weight
    name = root if isinstance(root, str) else str(root.target) if root.op in ("get_attr", "placeholder") else ""
    module = product.module or site_name(product.node, name)
    product = replace(product, sampled=sampled, is_attention=all(sampled), module=module)
    if product.reason:
        return product
    if sampled == (False, False):
        reason = "no operand depends on the batch"
    elif sampled == (True, True) and (not config.attention or product.transposed):
        reason = "both operands depend on the batch" + ("" if product.transposed else "; attention=False")
    else:
        parameter = tensor_of(gm, root) if isinstance(root, str) or root.op == "get_attr" else None
        reason = unusual(parameter) or excluded(module, config) or _size_reason(product, gm, config)
    return replace(product, reason=reason)


def unusual(weight: "Tensor | None") -> str:
    """Why a weight's product stays exact; empty for a dense floating-point parameter, and where the weight is not known."""
    if weight is None:
        return ""
    if weight.layout is not torch.strided:
        return f"weight has layout {weight.layout}"
    if weight.is_quantized or not weight.is_floating_point():
        return f"weight has dtype {weight.dtype}"
    if type(weight) not in (Tensor, nn.Parameter):
        return f"weight is a {type(weight).__name__}"
    return "" if weight.requires_grad else FROZEN


def _size_reason(product: Product, gm: GraphModule, config: Config) -> str:
    """Where sizes are known: why they leave the product exact. Else the sampler finds out."""
    reasons = []
    for columns, sampled in enumerate(product.sampled):
        value = tensor_of(gm, product.operand(bool(columns))) if sampled else None
        if not sampled or value is None:
            continue
        if not value.is_floating_point():
            return f"operand has dtype {value.dtype}"
        shape = draw_shape(product, value, bool(columns), gm)
        reasons.append(too_small(shape[-2], value.numel() * value.element_size(), config) if shape else "vector")
    return reasons[0] if reasons and all(reasons) else ""


def draw_shape(product: Product, value: Tensor, columns: bool, gm: GraphModule) -> tuple[int, ...]:
    """Shape of the matrix or matrices that rows are drawn from, [..., M, D]; empty for a vector."""
    shape = [hint(s) for s in value.shape]
    if len(shape) < 2:
        return ()
    if columns:
        shape[-2:] = shape[:-3:-1]
    partner = tensor_of(gm, product.operand(not columns))
    if product.is_matrix or (partner is not None and partner.dim() == 2):
        return (torch.Size(shape[:-1]).numel(), shape[-1])
    return tuple(shape)


def behind_transposes(node: Node) -> Node:
    """What the node is the transpose of, or the node itself."""
    while (node.target in _TRANSPOSES or is_t_attribute(node)) and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def is_t_attribute(node: Node) -> bool:
    """Whether the node is ``matrix.T`` or ``.mT``, as symbolic tracing writes it."""
    return node.target is getattr and node.args[1] in ("T", "mT")
