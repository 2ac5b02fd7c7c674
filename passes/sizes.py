"""Sizes of tensors that may be symbolic, looked at without a guard: a guard would compile the graph again for other sizes."""

from collections.abc import Iterable, Sequence

import torch
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols


def hint(size: "int | torch.SymInt") -> int:
    """A size as an int: the example's value where the size is symbolic."""
    if isinstance(size, torch.SymInt):
        example = size.node.hint
        return 4096 if example is None else int(example)
    return int(size)


def is_unbacked(size: "int | torch.SymInt") -> bool:
    """Whether a size is known only when the graph runs, since it depends on the values of tensors."""
    return isinstance(size, torch.SymInt) and bool(free_unbacked_symbols(size))


def is_symbolic(sizes: Iterable["int | torch.SymInt"]) -> bool:
    """Whether any of them is known only for the example."""
    return any(isinstance(size, torch.SymInt) for size in sizes)


def same_sizes(a: Sequence["int | torch.SymInt"], b: Sequence["int | torch.SymInt"]) -> bool:
    """Whether they are equal for every value of their symbols, as far as their terms show."""
    return [str(size) for size in a] == [str(size) for size in b]
