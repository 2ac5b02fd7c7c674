"""Check on a real batch that sampled gradients are unbiased, how noisy they are, and that the bytes are as predicted.

Presets get random weights and random tokens: for the noise of your own training, give your model and a batch of your data
with --python.
"""

import argparse

import torch

from wtacrs_fx.check import DRAWS, check
from wtacrs_fx.errors import BudgetError, ReportError
from wtacrs_fx.report_command import add_model, backend_options, checked, load
from wtacrs_fx.units import positive

HELP = "compare sampled gradients with exact ones on a real batch: bias, noise, bytes"

ERRORS = (ReportError, BudgetError)


def configure(parser: argparse.ArgumentParser) -> None:
    """The options of ``wtacrs-fx check``."""
    add_model(parser)
    parser.add_argument("--draws", type=positive, default=DRAWS, help="samples of the gradient (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Print the check; 0 if all is as it should be. Raises: ReportError or BudgetError, with what to do about it."""
    torch.manual_seed(0)
    model, batch = load(args, device="cpu")
    result = checked(check, model, batch, draws=args.draws, **backend_options(args))
    print(result.table())
    return 1 if result.faults else 0
