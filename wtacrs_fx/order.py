"""Let Inductor run the kernels of a planned graph where the graph has them."""

from typing import Any

from wtacrs_fx.private import WeakDep, custom_graph_pass

SchedulerPass: Any = getattr(custom_graph_pass, "CustomSchedulerPass", custom_graph_pass.CustomGraphPass)
"""What Inductor's cache takes the identity of a pass from; before torch 2.13 it is the class for passes on FX graphs."""


class GraphOrder(SchedulerPass):
    """Runs before Inductor fuses: every kernel waits for the library call (matrix product, fused attention) in front of it,
    and every library call for the kernels in front of it. Kernels between two library calls are fused as ever.

    Without it Inductor fuses any two kernels of equal shape that read something in common, also where library calls lie
    between them: the dropout masks of all layers, or a softmax that is computed again and the softmax's gradient. That
    saves reads, but everything they read and write is then in memory at once, where a plan counts on each tensor from its
    place in the graph on.
    """

    def __call__(self, nodes: list[Any]) -> list[Any]:
        """Add dependencies to Inductor's scheduler nodes, which are in graph order. They stand for order alone
        (``is_fake``) and keep no buffer alive. Where a node reads a result it waits for it anyway, and with a second
        dependency Inductor would not let it write over what it reads."""
        call: list[str] = []
        kernels: list[str] = []
        for node in nodes:
            read = {dependency.name for dependency in node.read_writes.reads}
            for name in [*call, *kernels] if node.is_extern() else call:
                if name in read:
                    continue
                node.add_fake_dep(WeakDep(name, mutating_buf=node.get_name(), is_fake=True))
            result = list(node.get_buffer_names())[:1]
            if node.is_extern():
                call, kernels = result or call, []
            else:
                kernels += result
        if nodes:
            nodes[0].scheduler.compute_ancestors()
        return nodes

    def uuid(self) -> bytes:
        """Identity for Inductor's caches: this source."""
        return custom_graph_pass.get_hash_for_files((__file__,))
