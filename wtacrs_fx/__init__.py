"""Train transformers with several times less activation memory: ``torch.compile(model, backend="wtacrs")``."""

from pathlib import Path

if not (Path(__file__).parent / "passes").exists():
    # Imported from a source tree (python started in a clone): passes/ and benchmarks/ lie beside this folder there.
    __path__.append(str(Path(__file__).parent.parent))

from wtacrs_fx.backend import Backend, ledgers, partitioner
from wtacrs_fx.calibrate import calibrate
from wtacrs_fx.check import check
from wtacrs_fx.config import Config
from wtacrs_fx.errors import BudgetError, InvariantError, ReportError, WtacrsWarning
from wtacrs_fx.frontier import Frontier, frontier
from wtacrs_fx.joint import rewrite_joint
from wtacrs_fx.ledger import Ledger
from wtacrs_fx.norm_cache import SampleNorms
from wtacrs_fx.norm_state import norms_of
from wtacrs_fx.norms import NormSource, PositionNorms, Rows
from wtacrs_fx.report import report
from wtacrs_fx.rewrite import rewrite
from wtacrs_fx.sample_ids import SampleIdsCollator, SampleIdsTrainer, WithSampleIds, sample_ids
from wtacrs_fx.show import print_graph
from wtacrs_fx.swap import restore_linears, swap_linears

__all__ = [
    "Backend",
    "BudgetError",
    "Config",
    "Frontier",
    "InvariantError",
    "Ledger",
    "NormSource",
    "PositionNorms",
    "ReportError",
    "Rows",
    "SampleIdsCollator",
    "SampleIdsTrainer",
    "SampleNorms",
    "WithSampleIds",
    "WtacrsWarning",
    "calibrate",
    "check",
    "frontier",
    "ledgers",
    "norms_of",
    "partitioner",
    "print_graph",
    "report",
    "restore_linears",
    "rewrite",
    "rewrite_joint",
    "sample_ids",
    "swap_linears",
]
