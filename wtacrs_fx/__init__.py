"""Train transformers with several times less activation memory: ``torch.compile(model, backend="wtacrs")``."""

from wtacrs_fx.backend import Backend, ledgers, partitioner
from wtacrs_fx.config import Config
from wtacrs_fx.errors import InvariantError, WtacrsWarning
from wtacrs_fx.ledger import Ledger

__all__ = ["Backend", "Config", "InvariantError", "Ledger", "WtacrsWarning", "ledgers", "partitioner"]
