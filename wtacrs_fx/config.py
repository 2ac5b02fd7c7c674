"""Options: the one place where they are defined, documented and checked."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from tabulate import tabulate

from wtacrs_fx.config_checks import (
    OUTPUT_HEADS,
    as_bits,
    as_inductor_options,
    as_patterns,
    as_ratios,
    check_adaptive,
    check_budget,
    check_choice,
    check_flags,
    check_number,
    check_padding,
    check_row_bits,
    check_seed,
    first_match,
    refuse_state,
    refuse_unknown,
)
from wtacrs_fx.estimators import ESTIMATORS
from wtacrs_fx.norms import NamedNorms, NormSource, check_norms
from wtacrs_fx.rounding import BITS

ROW_BITS = (8, 4)
"""Of kept rows. At 2 bits the rounding is as large as what it rounds."""


def _option(default: Any, doc: str) -> Any:
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True)
class Config:
    """What to sample and how. Every value is checked when the object is made.

    The same names are accepted by ``torch.compile(..., backend="wtacrs", options={...})``,
    ``wtacrs_fx.Backend(...)`` and ``wtacrs_fx.partitioner(...)``. ``Config.table()`` prints
    the fields with their defaults and meanings.

    Raises:
        TypeError: an unknown option (the nearest known name is suggested) or a value of the wrong type.
        ValueError: a value outside its range.
    """

    ratio: float | str | Mapping[str, float] = _option(
        0.3,
        "Share of rows (tokens) of a linear layer's input kept for the weight gradient, 0 < ratio <= 1; "
        "ceil(ratio * rows) rows are kept. 1 trains exactly. A dict gives a share per module: the first of its patterns "
        "(fnmatch) that matches counts, modules without one stay exact, and modules that read one input keep the largest of "
        "their shares. 'auto:0.3': the bytes of 0.3 everywhere, spread over the layers of a graph for the least total "
        "variance, which is measured in the first steps (with 0.3 everywhere); 'auto' is 'auto:0.3'. wtacrs_fx.calibrate() "
        "measures before training.",
    )
    noise: float | None = _option(
        None,
        "Noise budget: every layer gets the least share of rows whose added variance is at most this share of the variance "
        "that the batch itself gives to its weight gradient, such as 0.05; none is sampled where that takes all rows. Measured "
        "in the first steps, which keep `ratio` everywhere; then each graph is compiled once more. None: `ratio` decides.",
    )
    recalibrate: int = _option(
        1000, "With `noise` or ratio='auto': runs of a graph after which its noise is measured again. Runs."
    )
    recompilations: int = _option(
        3,
        "With `noise` or ratio='auto': how often a graph is compiled again at most, because a share that was measured differs "
        "by more than 30 % from the one in force; the first choice is one of them.",
    )
    estimator: str = _option(
        "systematic",
        "How rows are chosen: 'systematic', 'wta_crs' (the paper's), 'crs' (all unbiased) or 'topk' (biased; for comparison "
        "only).",
    )
    row_bits: int | None = _option(
        None,
        "Bits, 8 or 4, in which kept rows are stored where they are chosen in the forward: rounded at random, without bias. "
        "`ratio` stays the share of rows, so the bytes of float32 rows hold 3.9 or 7.5 times as many in 8 or 4 bits, those of "
        "16-bit rows half of that. With ratio=1 no row is drawn, and inputs of layers are rounded to so many bits, as by "
        "`round_bits` (under a memory_budget too), where that does not ask for more; a dict's modules with 1 keep theirs. Rows "
        "stay as they are where that takes no more bytes (very narrow ones), in float64, and where their number is "
        "symbolic and one is no whole number of bytes. Attention's get twice the bits, at most 8. None: as they are.",
    )
    center_rows: bool = _option(
        False,
        "Sample rows minus their mean; what the mean contributes to the weight gradient is computed exactly (one more pass "
        "over the input in the forward and over the gradient in the backward). Less noise where all rows have much in common. "
        "The mean is that of rows that are no padding, where `padding` tells them.",
    )
    directions: int = _option(
        0,
        "Of a linear layer's input, as many principal directions beside the mean whose part of the weight gradient is computed "
        "exactly, like that of the mean with `center_rows`; only what is left of the rows is sampled. Held for it are as many "
        "bytes a row, and as many columns of the product are exact, an eighth of them at most. 16 take a half to three "
        "quarters of the noise away. 0: none.",
    )
    min_rows: int = _option(128, "Products over fewer rows than this stay exact. Rows.")
    min_bytes: int = _option(65536, "Inputs smaller than this stay exact. Bytes.")
    include: tuple[str, ...] = _option(
        ("*",), "Only sites whose module name matches one of these patterns (fnmatch, e.g. '*.query') are sampled."
    )
    exclude: tuple[str, ...] = _option(
        OUTPUT_HEADS, "Sites whose module name matches one of these patterns stay exact. Default: output heads."
    )
    norms: "str | NormSource" = _option(  # noqa: RUF009  (the default is a str)
        "activation",
        "What early sites (rows chosen in the forward) know of gradient norms: 'activation', nothing; 'position', a running "
        "mean per position of the sequence and layer; 'sample', those of the last time that the training example was seen, see "
        "wtacrs_fx.sample_ids; or an object, such as wtacrs_fx.SampleNorms(examples=20000). Wrong norms cost variance only.",
    )
    padding: str | None = _option(
        None,
        "Name of the batch argument whose zeros mark rows without a gradient, e.g. 'attention_mask': they are never kept, once "
        "a real batch has shown at a site that their gradients are zero. None: unknown.",
    )
    padding_exclude: tuple[str, ...] = _option(
        (), "Modules about whose rows the argument of padding says nothing (fnmatch, e.g. 'decoder.*')."
    )
    late: str = _option(
        "sample",
        "What to do where the input is in memory in the backward anyway: 'sample' (rows chosen by the true gradient; "
        "saves FLOPs) or 'exact'.",
    )
    attention: bool = _option(
        False,
        "Sample the products of attention too, a draw per head. This puts noise into the gradients that flow on to earlier "
        "layers, where it accumulates with depth. Fused attention has no such products and is left alone.",
    )
    memory_budget: float | int | str | None = _option(
        "auto",
        "Least-time plan of what the backward recomputes, block by block, so that the predicted peak of a step's activations "
        "stays below: a float in (0, 1], share of the exact partition's peak; an int or a string such as '12GiB', bytes. "
        "'auto': the least peak that is predicted to take no longer than exact training; where none is (small models), nothing "
        "is recomputed; a graph in which every plan takes more memory (two layers) is trained exactly. None: no budget; what "
        "sampling saves in time is kept as time, and nothing is recomputed but what Inductor itself recomputes.",
    )
    round_bits: int | Mapping[str, int | None] | None = _option(
        None,
        "Bits, 8, 4 or 2, in which tensors are kept that the backward multiplies gradients by (derivatives of activation "
        "functions, normalised inputs, attention's operands, inputs of linear layers): rounded at random, without bias. "
        "Normalised inputs and attention's operands get twice the bits, at most 8. Where kept rows of a layer's input take "
        "fewer bytes, rows are kept. With a memory_budget only what serves it is rounded, and these are the fewest bits: where "
        "the budget is met with more (8 for 4), or with a tensor as it is, that is taken, most noise per byte first. A dict "
        "gives bits per module that reads, as for `ratio`: {'*.mlp.*': 4, '*': 8}. None: tensors stay as they are.",
    )
    round_include: tuple[str, ...] = _option(
        ("*",), "`round_bits` is for modules only whose name matches one of these patterns (fnmatch)."
    )
    round_exclude: tuple[str, ...] = _option(
        OUTPUT_HEADS,
        "`round_bits` is not for modules whose name matches one of these patterns. Default: output heads.",
    )
    round_fused_attention: bool = _option(
        False,
        "Round q, k, v and the output of fused attention too. Its backward is not linear in them, so that this has a bias, "
        "small at 8 bits.",
    )
    round_float64: bool = _option(
        False,
        "Round tensors of float64 too. Their scales have the range of float32: what lies outside of it becomes infinite.",
    )
    pack_masks: bool = _option(
        True, "Hand masks (of dropout, ReLU) to the backward as one bit an element instead of one byte. Without loss."
    )
    seed: int | None = _option(
        None, "None: draws follow torch.manual_seed. An integer: draws come from a generator of their own."
    )
    inner: str = _option("inductor", "What compiles the partitioned graphs: 'inductor' or 'eager' (for debugging).")
    inductor: Mapping[str, Any] = _option((), "Inductor's own options, passed through, e.g. {'max_autotune': True}.")
    verbose: bool | int = _option(
        False,
        "Print the ledger of every training graph after it was partitioned. 2: also what every pass did to its graph, nodes "
        "before and after by op.",
    )

    measures: ClassVar[bool] = False
    """Whether graphs report the noise of their products; see :meth:`measuring`."""

    def __post_init__(self) -> None:
        for name in ("include", "exclude", "round_include", "round_exclude", "padding_exclude"):
            object.__setattr__(self, name, as_patterns(name, getattr(self, name)))
        object.__setattr__(self, "inductor", as_inductor_options(self.inductor))
        object.__setattr__(self, "ratio", as_ratios(self.ratio))
        check_adaptive(self)
        check_choice("estimator", self.estimator, tuple(ESTIMATORS))
        check_norms(self.norms)
        check_padding(self.padding)
        check_choice("late", self.late, ("sample", "exact"))
        check_choice("inner", self.inner, ("inductor", "eager"))
        check_number("min_rows", self.min_rows, int, lambda n: n >= 1, "an integer >= 1 (rows)")
        check_number("min_bytes", self.min_bytes, int, lambda n: n >= 0, "an integer >= 0 (bytes)")
        object.__setattr__(self, "round_bits", as_bits(self.round_bits, BITS))
        check_row_bits(self.row_bits, ROW_BITS)
        check_budget(self.memory_budget)
        check_seed(self.seed)
        check_number("directions", self.directions, int, lambda n: n >= 0, "an integer >= 0 (16 is a good number)")
        check_flags(self)

    def exact(self) -> "Config":
        """The same with nothing sampled, known, rounded, packed or planned: what Inductor's own partition holds."""
        sampled: dict[str, Any] = {"ratio": 1.0, "noise": None, "attention": False}
        known: dict[str, Any] = {"norms": "activation", "padding": None}
        held: dict[str, Any] = {"memory_budget": None, "round_bits": None, "row_bits": None, "pack_masks": False}
        return dataclasses.replace(self, **sampled, **known, **held)

    @classmethod
    def from_options(cls, options: "Mapping[str, Any] | Config | None" = None) -> "Config":
        """A Config from the ``options=`` dict of ``torch.compile``; unknown keys are refused.

        Raises:
            TypeError: ``options`` is neither a mapping nor a Config, or has an unknown key.
        """
        if isinstance(options, Config):
            return options
        if options is None:
            return cls()
        if not isinstance(options, Mapping):
            raise TypeError(f"options={options!r}: expected a dict such as {{'ratio': 0.3}}.")
        refuse_unknown(options, [f.name for f in dataclasses.fields(cls)])
        return cls(**options)

    def ratio_of(self, module: str) -> float | None:
        """Share of rows kept for a module; None where ``ratio`` is a dict that has no pattern for it. Where shares are
        measured, that of the first steps."""
        if not isinstance(self.ratio, Mapping):
            return self.first_ratio
        return first_match(self.ratio, module)

    def bits_of(self, module: str) -> int | None:
        """Bits in which is kept what a module's backward reads; None: as it is."""
        return first_match(self.round_bits, module) if isinstance(self.round_bits, Mapping) else self.round_bits

    @property
    def all_rows_in_bits(self) -> bool:
        """Whether ``row_bits`` is for all rows: they are rounded and none is left out."""
        return self.row_bits is not None and self.ratio == 1 and self.noise is None

    @property
    def bits_asked(self) -> str:
        """The options that ask for rounding of whole tensors, as the user wrote them."""
        names = ["round_bits"] * (self.round_bits is not None) + ["row_bits"] * self.all_rows_in_bits
        return " and ".join(f"{name}={getattr(self, name)}" for name in names)

    @property
    def rounds(self) -> bool:
        """Whether whole tensors are rounded."""
        return self.round_bits is not None or self.all_rows_in_bits

    @property
    def samples(self) -> bool:
        """Whether any module is asked to keep fewer rows than all."""
        return any(r < 1 for r in self.ratio.values()) if isinstance(self.ratio, Mapping) else self.first_ratio < 1

    @property
    def first_ratio(self) -> float:
        """The one number of ``ratio``. (Of a dict, which has none, the largest.)"""
        if isinstance(self.ratio, Mapping):
            return max(self.ratio.values())
        return float(self.ratio.partition(":")[2]) if isinstance(self.ratio, str) else self.ratio

    @property
    def adapts(self) -> bool:
        """Whether shares of rows are measured while the model is trained."""
        return self.noise is not None or isinstance(self.ratio, str)

    def measuring(self) -> "Config":
        """The same for the first steps: one share everywhere, and graphs that report their noise."""
        return _Measuring(**{**_values(self), "ratio": self.first_ratio, "noise": None})

    def with_ratios(self, ratios: Mapping[str, float]) -> "Config":
        """The same with shares that were measured; what was not stays exact."""
        return dataclasses.replace(self, noise=None, ratio={**ratios, "*": 1.0})

    @property
    def has_state(self) -> bool:
        """Whether compiled graphs ask a Backend for what it knows of rows."""
        return self.norms != "activation" or self.padding is not None

    @property
    def norms_kind(self) -> str:
        """The norm source's name."""
        return self.norms if isinstance(self.norms, str) else self.norms.kind

    def without_state(self) -> "Config":
        """The same, as graphs are compiled by it: with the kind of a norm source in place of the object."""
        return self if isinstance(self.norms, str) else dataclasses.replace(self, norms=NamedNorms(self.norms.kind))

    def refuse_state(self, entry: str) -> None:
        """For ways in without a Backend.

        Raises: ValueError: ``noise``, ratio="auto", ``norms`` or ``padding`` would be without effect there.
        """
        refuse_state(self, entry)

    def fingerprint(self) -> str:
        """A hash over every option, for cache keys. Equal options give equal fingerprints in every process."""
        values = _values(self)
        for name in ("ratio", "round_bits"):
            if isinstance(values[name], Mapping):
                values[name] = list(values[name].items())  # the order of the patterns counts
        values["norms"] = self.norms_kind
        values["measures"] = self.measures
        values["inductor"] = sorted((k, repr(v)) for k, v in self.inductor.items())
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    @classmethod
    def table(cls) -> str:
        """The options as a Markdown table (the README's table is made by this)."""
        rows = []
        for f in dataclasses.fields(cls):
            default = "output heads" if f.default is OUTPUT_HEADS else repr({} if f.name == "inductor" else f.default)
            rows.append((f"`{f.name}`", f"`{default}`", f.metadata["doc"]))
        return tabulate(rows, headers=("option", "default", "meaning"), tablefmt="github")


class _Measuring(Config):
    """Options of graphs that report the noise of their products."""

    measures = True


def _values(config: Config) -> dict[str, Any]:
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
