"""The standalone pass, for forward graphs: products become ``torch.ops.wtacrs.linear`` and ``.matmul``.

Before and after, in a graph from ``torch.fx.symbolic_trace``::

    fc1 = call_module[fc1](x)                       wtacrs_0 = call_module[wtacrs.0](x, fc1.weight, fc2.weight)
                                                    kept, rows = wtacrs_0[0], wtacrs_0[1]
                                             ->     fc1 = wtacrs.linear(x, fc1.weight, fc1.bias, kept, rows)
    fc2 = linear(x, fc2.weight, None)               fc2 = wtacrs.linear(x, fc2.weight, None, kept, rows)

``wtacrs.0`` is a :class:`wtacrs_fx.functional.RowSampler`: products of one operand share it, and with it the draw, unless
something is changed in place between them. It decides about size, gradients and training when it is called, so that shapes
need not be known here.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from wtacrs_fx.config import Config
from wtacrs_fx.functional import RowSampler
from wtacrs_fx.passes.mutation import count_mutations, value_key
from wtacrs_fx.passes.products import Product, behind_transposes, is_t_attribute, tensor_of

aten, wtacrs = torch.ops.aten, torch.ops.wtacrs

SAMPLERS = "wtacrs"
"""Name of the submodule that holds the samplers of a rewritten graph; with underscores where the model has that name."""


@dataclass
class SampledProducts:
    """What :func:`sample_products` did."""

    rewritten: int = 0
    draws: dict[tuple[Node, bool], Node] = field(default_factory=dict)
    """(product's node, whether of its right operand) -> the call of the sampler that draws for it."""


def sample_products(gm: GraphModule, products: Sequence[Product], config: Config) -> SampledProducts:
    """Rewrite the products that have no reason to stay as they are; a graph without any is untouched."""
    chosen = [p for p in products if not p.reason]
    if not chosen:
        return SampledProducts()
    rewriter = _Rewriter(gm, config)
    for product in chosen:
        rewriter.rewrite(product)
        if isinstance(product.right, Node) and not product.right.users:
            gm.graph.erase_node(product.right)  # a transpose of the weight
    gm.graph.lint()
    gm.recompile()
    return SampledProducts(len(chosen), rewriter.called)


class _Rewriter:
    def __init__(self, gm: GraphModule, config: Config) -> None:
        self.gm, self.graph, self.config = gm, gm.graph, config
        self.mutations = count_mutations(gm)
        self.position = {n: i for i, n in enumerate(gm.graph.nodes)}
        self.draws: dict[tuple, tuple[Node, tuple[Node, Node]]] = {}
        self.called: dict[tuple[Node, bool], Node] = {}
        self.samplers = nn.ModuleList()
        self.path = SAMPLERS
        while hasattr(gm, self.path):
            self.path += "_"
        gm.add_module(self.path, self.samplers)

    def rewrite(self, product: Product) -> None:
        """Change one product where it stands; its operands' samplers are called before it, or were at an earlier product."""
        node = product.node
        with self.graph.inserting_before(node):
            right = self._value(product.right)
            bias = None if product.bias is None else self._value(product.bias)
            draws = [self._draw(product, bool(c)) if on else (None, None) for c, on in enumerate(product.sampled)]
            plain = product.beta == 1 and product.alpha == 1 and product.sampled == (True, False)
            if product.transposed or (product.is_matrix and plain):
                weight = right if product.transposed else self._transposed(right)
                self._become(node, wtacrs.linear.default, product.left, weight, bias, *draws[0])
            elif bias is None:
                self._become(node, wtacrs.matmul.default, product.left, right, *draws[0], *draws[1])
            else:
                new = self.graph.call_function(wtacrs.matmul.default, (product.left, right, *draws[0], *draws[1]))
                self._add(node, product, bias, new)

    def _add(self, node: Node, product: Product, bias: Node, new: Node) -> None:
        """``beta * bias + alpha * new``, as ``addmm`` has it: with beta = 0 the bias is not read (it may be uninitialised),
        and under autocast it is cast to the product's type."""
        if product.beta == 0:
            self._become(node, torch.mul, new, product.alpha)
            return
        bias = self.graph.call_method("type_as", (bias, new))
        scaled = bias if product.beta == 1 else self.graph.call_function(torch.mul, (bias, product.beta))
        self._become(node, torch.add, scaled, new, alpha=product.alpha)

    def _transposed(self, matrix: Node) -> Node:
        """Undo a transpose where there is one."""
        if matrix.target in (torch.t, "t", aten.t.default) or is_t_attribute(matrix):
            return matrix.all_input_nodes[0]
        return self.graph.call_function(torch.t, (matrix,))

    def _become(self, node: Node, target: Any, *args: Any, **kwargs: Any) -> None:
        node.op, node.target, node.args, node.kwargs = "call_function", target, args, kwargs

    def _draw(self, product: Product, columns: bool) -> tuple[Node, Node]:
        operand = product.operand(columns)
        assert isinstance(operand, Node)
        partner = self._partner(product, columns)
        key = self._group(product, operand, columns)
        if key in self.draws:
            call, both = self.draws[key]
            available = self._before(partner, call)
            if available is not None:
                call.args = (*call.args, available)
                self.called[product.node, columns] = call
                return both
        name = f"{self.path}.{len(self.samplers)}"
        self.samplers.append(RowSampler(self.config, columns, product.module).train(self.gm.training))
        weight = partner if isinstance(partner, Node) else self.graph.get_attr(partner)
        call = self.graph.call_module(name, (operand, weight))
        both = (
            self.graph.call_function(operator.getitem, (call, 0)),
            self.graph.call_function(operator.getitem, (call, 1)),
        )
        self.position[call] = self.position[product.node]
        self.draws[key] = call, both
        self.called[product.node, columns] = call
        return both

    def _group(self, product: Product, operand: Node, columns: bool) -> tuple:
        """Products of equal group read the same numbers in the same way: their draw is one. (Not in attention, see
        :func:`wtacrs_fx.passes.policy.draw_group`.)"""
        partner = tensor_of(self.gm, product.operand(not columns))
        flat: Any = product.is_matrix or (partner.dim() == 2 if partner is not None else product.node)
        flat = product.node if product.is_attention else flat
        when = self.mutations[product.node]
        return (value_key(operand, self.mutations), when, columns, flat)

    def _partner(self, product: Product, columns: bool) -> "Node | str":
        """The other factor; of a transposed weight with two dimensions the weight itself, which earlier calls can read too."""
        partner = product.operand(not columns)
        root = behind_transposes(partner) if isinstance(partner, Node) else partner
        value = tensor_of(self.gm, root)
        if not (product.is_matrix or (value is not None and value.dim() == 2)):
            root = partner  # its leading dimensions matter, and a transpose may have moved them
        return str(root.target) if isinstance(root, Node) and root.op == "get_attr" else root

    def _before(self, partner: "Node | str", call: Node) -> Node | None:
        """The partner where it can be read by an earlier call; None if it is computed later."""
        if isinstance(partner, str):
            with self.graph.inserting_before(call):
                return self.graph.get_attr(partner)
        known = partner.op == "placeholder" or self.position.get(partner, len(self.position)) < self.position[call]
        return partner if known else None

    def _value(self, value: "Node | str") -> Node:
        return self.graph.get_attr(value) if isinstance(value, str) else value
