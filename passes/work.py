"""One joint graph on its way to a partition: what was found in it, the best cut so far, and the next attempt."""

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch.fx import GraphModule, Node

import wtacrs_fx.norm_ops
import wtacrs_fx.ops  # noqa: F401  (register the custom ops)
from wtacrs_fx.config import Config
from wtacrs_fx.ledger import Prediction
from wtacrs_fx.passes.account import saved_bytes
from wtacrs_fx.passes.bits import decide_roundings, name_bits, rounds_for, rows_or_bits, substitutes, worthwhile
from wtacrs_fx.passes.budget import Partition, Uncut, make_planner, memory_options, peak_place, predict, roofline_of
from wtacrs_fx.passes.collapse import collapse
from wtacrs_fx.passes.convolutions import split_convolutions
from wtacrs_fx.passes.costly import spread_costly
from wtacrs_fx.passes.defer import defer_codes, share_exponentials
from wtacrs_fx.passes.draws import Draws
from wtacrs_fx.passes.dropout import draw_masks
from wtacrs_fx.passes.factors import find_factors, rounded_types, share
from wtacrs_fx.passes.invariants import check_draws, check_partition
from wtacrs_fx.passes.joint_graph import copy_joint, padding_placeholder, parameter_names, weight_placeholders
from wtacrs_fx.passes.kinds import Kind, classify
from wtacrs_fx.passes.layouts import relaid_weights
from wtacrs_fx.passes.liveness import MemoryOptions
from wtacrs_fx.passes.meet_budget import meet_budget
from wtacrs_fx.passes.pack import Packed, held_bytes, pack_masks, saved_by_packing
from wtacrs_fx.passes.planner import Planner
from wtacrs_fx.passes.plans import Plan
from wtacrs_fx.passes.policy import Action, Decision, decide, needed_whole, retreat, settle, view_base
from wtacrs_fx.passes.recompute import protect_draws, protect_readers_of_mutated, recompute, take_user_regions
from wtacrs_fx.passes.round import Rounding, round_factors
from wtacrs_fx.passes.sample import Sampled, sample
from wtacrs_fx.passes.seeds import split_seeds
from wtacrs_fx.passes.sever import Severed, saved_tensors
from wtacrs_fx.passes.sites import CONTRACTIONS, Site, find_sites, gradient_outputs
from wtacrs_fx.passes.unfold import unfold_late_sums
from wtacrs_fx.passes.watch import watch
from wtacrs_fx.private import fx_graph_cse


@dataclass
class Work:
    """The best partition of a joint graph so far, and what it takes to try another."""

    joint: GraphModule
    num_fwd_outputs: int
    cut: Callable[..., Partition]
    config: Config
    kinds: Mapping[Node, Kind]
    sites: Sequence[Site]
    weights: set[str]
    """Names of the placeholders that are parameters or buffers."""
    users: set[Node]
    """What the user's own checkpoint regions recompute."""
    exact: Partition
    plan: list[Decision]
    done: Sampled = field(default_factory=Sampled)
    recomputation: Plan | None = None
    reasons: Sequence[str] = ()
    """For the plan's choices."""
    recomputed: set[Node] = field(default_factory=set)
    starts: dict[Node, str] = field(default_factory=dict)
    """Tensors from which recomputation starts, and what for."""
    uncut: Uncut | None = None
    roundings: list[Rounding] = field(default_factory=list)
    spared: tuple[int, int] = (0, 0)
    """Tensors that have more bits than the options ask for, and tensors that are kept as they are, since the memory budget has
    room for them."""
    packed: list[Packed] = field(default_factory=list)
    collapsed: int = 0
    """Gradients in whose chain the activations meet first."""
    padding: Node | None = None
    """Placeholder of the mask of rows that are no padding."""
    known: tuple[Partition, Prediction] | None = None
    """What is predicted of a partition."""

    @classmethod
    def prepare(
        cls,
        joint: GraphModule,
        num_fwd_outputs: int,
        cut: Callable[..., Partition],
        config: Config,
        names: Sequence[str | None],
        static: Sequence[int] | None,
    ) -> "Work":
        """Find the sites, decide about them, and make the exact partition."""
        joint.graph.eliminate_dead_code()
        joint.graph = fx_graph_cse(joint.graph)  # one node per value, so that sites that share an input share its node
        protect_draws(joint.graph)
        protect_readers_of_mutated(joint.graph, num_fwd_outputs)
        exact = cut(copy_joint(joint)[0], num_fwd_outputs)
        users = take_user_regions(joint.graph)
        with watch("split_convolutions", joint.graph, config.verbose):
            split_convolutions(joint.graph, config)
        weights = weight_placeholders(joint.graph, num_fwd_outputs, static)
        kinds = classify(joint.graph, weights)
        admitted = {n for n in joint.graph.nodes if config.rounds and rounds_for(n, config)}
        collapsed = collapse(joint.graph, kinds, rounded_types(config), admitted) if admitted else 0
        grads = gradient_outputs(joint.graph, num_fwd_outputs, weights)
        sites = find_sites(joint.graph, kinds, grads, parameter_names(joint.graph, names), config.attention)
        plan = decide(sites, config)
        return cls(
            joint,
            num_fwd_outputs,
            cut,
            config,
            kinds,
            sites,
            {n.name for n in weights},
            users,
            exact,
            plan,
            recomputed=users,
            collapsed=collapsed,
            padding=padding_placeholder(joint.graph, names, config.padding, sites),
        )

    def __post_init__(self) -> None:
        self.best = self.exact
        self.device = roofline_of(self.joint.graph)
        relaid = relaid_weights(self.exact[0], self.weights) if self.config.inner == "inductor" else set()
        self.relaid: set[str] = relaid
        self.in_memory = self.weights - self.relaid
        self.packs = self.config.min_bytes if self.config.pack_masks else None  # the size of masks that will be
        options = memory_options(self.config)
        self.prediction = predict(self.exact, self.num_fwd_outputs, self.in_memory, options, self.device)

    @property
    def has_products(self) -> bool:
        """Whether the backward has any matrix product or convolution."""
        return any(kind is Kind.GRADIENT and node.target in CONTRACTIONS for node, kind in self.kinds.items())

    def run(self) -> None:
        """Cut with everything late; decide on recomputation; settle."""
        budget = self.config.memory_budget is not None
        if budget or self.users or any(d.action is not Action.EXACT for d in self.plan):
            self.cut_as_planned()
            if budget:
                vars(self).update(vars(meet_budget(self)))
            else:
                self.settle_sites()
        if self.config.rounds and not budget:
            self.round_saved()
        if self.best is self.exact:
            self.best = copy_joint(self.exact[0])[0], copy_joint(self.exact[1])[0]
        if self.config.pack_masks:
            self.packed = pack_masks(*self.best, self.num_fwd_outputs, self.config.min_bytes)
            self.known = None
        check_partition(*self.best, self.plan, self.done, self.num_fwd_outputs)
        check_draws(self.joint, *self.best)
        for module in self.best:
            with watch("draw_masks", module.graph, self.config.verbose):
                draw_masks(module.graph)
            with watch("split_seeds", module.graph, self.config.verbose):
                split_seeds(module.graph)
            module.recompile()  # once for all changes

    def settle_sites(self) -> None:
        """Revise the sites in the light of the last cut, and cut again as often as that changes something."""
        needed = needed_whole(self.plan, self.kinds) | self.starts
        revised, changed = settle(self.plan, self._saved(), needed, self.config, self.recomputed)
        if self.recomputed != self.users:
            self.plan = revised
            self.best, self.done, _ = self._attempt(revised)
        else:
            self._improve(revised, changed)
        self._improve(*retreat(self.plan, {n.name for n in self.best[1].graph.nodes}, self.config))

    def _roundings(self, plan: Sequence[Decision]) -> list[Rounding]:
        """Of what the last cut saves for products with gradients, when sites are sampled as planned."""
        types, fused = rounded_types(self.config), self.config.round_fused_attention
        factors = find_factors(self.joint.graph.nodes, self.kinds, types=types, fused_attention=fused)
        exact = self.recomputed | self.starts.keys()
        return decide_roundings(share(factors, self.kinds, types), plan, self._saved(), exact, self.config)

    def round_saved(self, chosen: Mapping[str, int] | None = None) -> None:
        """Round the tensors chosen by name to so many bits (None: all that can be, as the options say), revise the sites, and
        take back what did not pay."""
        before, work = self._saved(), copy.copy(self)
        work.plan = rows_or_bits(self.plan, self.config)
        roundings = self._roundings(work.plan)
        if chosen is not None:
            roundings = [r.at(chosen[r.tensor.name]) for r in roundings if r.tensor.name in chosen]
        if not roundings:
            return
        work._cut_again(work.plan, roundings)
        work._cut_again(settle(work.plan, work._saved(), {}, self.config, self.recomputed)[0], roundings)
        paid = worthwhile(work.roundings, before, work._saved(), functools.partial(held_bytes, packs=self.packs))
        read = {f.reader for r in paid for f in r.factors}
        early = {d.site.node for d in self.plan if d.action is Action.EARLY} - read
        work._cut_again([old if old.site.node in early else new for old, new in zip(self.plan, work.plan)], paid)
        if self._held(work.best) < self._held(self.best):
            work.plan = name_bits(work.plan, work.roundings)
            vars(self).update(vars(work))

    def _cut_again(self, plan: list[Decision], roundings: Sequence[Rounding]) -> None:
        """Sample and round as decided, and cut, unless that is what was done last. Early sites keep rows and read nothing
        rounded."""
        early = {d.site.node for d in plan if d.action is Action.EARLY}
        left = [r for r in (r.without(early) for r in roundings) if r.factors]
        if (plan, left) != (self.plan, self.roundings):
            self.plan, self.roundings = plan, left
            self.best, self.done, _ = self._attempt(plan)

    def held_bytes(self) -> int:
        """Between forward and backward, by the best partition so far."""
        return self._held(self.best)

    def _held(self, partition: Partition) -> int:
        saved = saved_bytes(partition[0], self.num_fwd_outputs, self.in_memory)
        return saved - saved_by_packing(partition, self.num_fwd_outputs, self.packs)

    def cut_as_planned(self) -> None:
        """Sample as decided, and cut."""
        self.best, self.done, self.uncut = self._attempt(self.plan)

    def planners(self) -> list[Planner]:
        """For recomputation on top of the first cut; and, where something can be rounded, for both."""
        assert self.uncut is not None
        saved = {n.name for n in saved_tensors(self.best[0], self.num_fwd_outputs)}
        users = {n.name for n in self.users}
        planner = make_planner(
            self.uncut, saved, self.weights, users, self.device, self._options, self.relaid, self.packs
        )
        if not self.config.rounds:
            return [planner]
        roundings = self._roundings(rows_or_bits(self.plan, self.config))
        nodes = {n.name: n for n in self.uncut.graph.nodes}
        with_bits = planner.rounding(substitutes(roundings, self._saved(), self.kinds, nodes))
        return [planner, with_bits] if with_bits.substitutes else [planner]

    def _options(self, ordered: bool) -> MemoryOptions:
        """Of plans for this work: whether they recompute or round anything."""
        sampled = any(d.action is not Action.EXACT for d in self.plan)
        return memory_options(self.config, ordered=ordered, sampled=sampled)

    def noise(self) -> float:
        """Of what is rounded, summed."""
        return sum(r.noise for r in self.roundings)

    def predicted(self) -> Prediction:
        """Of the best partition so far."""
        if self.known is None or self.known[0] is not self.best:
            self.known = self.best, predict(*self._partition_now(), self.device, self.packs)
        return self.known[1]

    def peak_place(self) -> str:
        """Where the best partition so far has its peak, in words."""
        return peak_place(*self._partition_now(), self.packs)

    def _partition_now(self) -> tuple[Partition, int, set[str], MemoryOptions]:
        """The best one so far, and what a prediction takes besides."""
        options = self._options(bool(self.recomputed or self.roundings))
        return self.best, self.num_fwd_outputs, self.in_memory, options

    def recompute_as(self, plan: Plan, reasons: Sequence[str]) -> None:
        """From now on recompute what a plan says, for these reasons."""
        by_name = {n.name: n for n in self.joint.graph.nodes}
        self.recomputation, self.reasons = plan, reasons
        self.recomputed = self.users | {by_name[n.name] for n in plan.recomputed if n.name in by_name}
        self.starts = {by_name[n.name]: why for n, why in plan.starts.items() if n.name in by_name}

    def _saved(self) -> set[str]:
        return {view_base(n).name for n in saved_tensors(self.best[0], self.num_fwd_outputs)}

    def _improve(self, revised: list[Decision], changed: int) -> None:
        """Take the revised plan, unless its partition holds more bytes than the one it came from."""
        if not changed:
            self.plan = revised  # the same actions, with their reasons
            return
        again, done, _ = self._attempt(revised)
        if self._held(again) <= self._held(self.best):
            self.plan, self.best, self.done = revised, again, done

    def _attempt(self, plan: Sequence[Decision]) -> tuple[Partition, Sampled, Uncut]:
        module, env = copy_joint(self.joint)
        severed = Severed(module.graph)
        draws = Draws(module.graph, severed, self.config.seed)
        with watch("round_factors", module.graph, self.config.verbose):
            rounded = round_factors(module.graph, self.roundings, env, self.kinds, draws)
        with watch("sample", module.graph, self.config.verbose):
            done = sample(module.graph, plan, env, draws, self.config, rounded, self.padding)
        outputs = severed.extend_outputs(self.num_fwd_outputs)
        with watch("recompute", module.graph, self.config.verbose):
            recompute(module.graph, outputs, {env[n] for n in self.recomputed}, [env[n] for n in self.starts])
        module.graph.lint()
        uncut = Uncut(module.graph, outputs)
        # Torch must not merge equal nodes again: copies are equal to their originals until the cut has parted them, and what
        # is computed for a draw on one side can be equal to a node of the other.
        forward, backward = self.cut(module, outputs, cse=False)
        severed.join(forward, self.num_fwd_outputs)
        if self.roundings:
            with watch("defer_codes, spread_costly", forward.graph, self.config.verbose):
                defer_codes(forward.graph, self.config.memory_budget is None)
                share_exponentials(forward.graph)
                spread_costly(forward.graph)
        with watch("unfold_late_sums", backward.graph, self.config.verbose):
            unfold_late_sums(backward.graph)
        return (forward, backward), done, uncut
