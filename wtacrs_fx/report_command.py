"""Say what a model would hold for its backward, and which batch would fit, before anything runs.

The model is traced without weights and without compute. Presets need transformers, but no download.
"""

import argparse
import ast
import contextlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wtacrs_fx.config import Config
from wtacrs_fx.errors import BudgetError, ReportError
from wtacrs_fx.files import replace_text
from wtacrs_fx.ledger import LEVELS, Ledger
from wtacrs_fx.presets import PRESETS, TASKS, build
from wtacrs_fx.report import report
from wtacrs_fx.roomy import collector_paused
from wtacrs_fx.tracing import Batch
from wtacrs_fx.training_memory import ARMS, OPTIMIZERS, StepTraces, table
from wtacrs_fx.units import positive

HELP = "what a model holds for its backward: eager, Inductor, wtacrs; and the largest batch that fits"

ERRORS = (ReportError, BudgetError)

FILES = ("json", "csv", "plot")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

PRESET = {"task": None, "batch_size": 8, "seq_len": 128, "dtype": "float32", "lora": None}
"""Options of models that are built here, and what they are if not given."""


def configure(parser: argparse.ArgumentParser) -> None:
    """The options of ``wtacrs-fx report``."""
    add_model(parser)
    parser.add_argument("--device", help="predict for this device, for example cuda (the model's own)")
    parser.add_argument("--level", choices=LEVELS, default="layer", help="detail of the table (%(default)s)")
    parser.add_argument("--gpu-memory", metavar="SIZE", help='find the largest batch that fits, for example "80GiB"')
    parser.add_argument("--optimizer", choices=list(OPTIMIZERS), default="adamw", help="(%(default)s)")
    parser.add_argument("--optimizer-8bit", action="store_true", help="its states in 8 bits")
    for kind in FILES:
        parser.add_argument(f"--{kind}", type=Path, metavar="PATH", help=f"write the saved tensors as {kind} too")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Which model, on what batch, with which options of the backend."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", metavar="NAME", help=f"a transformers config.json, or one of {', '.join(PRESETS)}")
    source.add_argument("--python", metavar="MODULE:FUNCTION", help="a function that returns (model, batch)")
    parser.add_argument("--task", choices=list(TASKS), help="(the usual one)")
    parser.add_argument("--batch-size", type=positive, help=f"({PRESET['batch_size']})")
    parser.add_argument("--seq-len", type=positive, help=f"tokens ({PRESET['seq_len']})")
    parser.add_argument("--dtype", choices=list(DTYPES), help=f"of the parameters ({PRESET['dtype']})")
    parser.add_argument("--lora", metavar="r=32[,...]", help="train adapters only; arguments of peft's LoraConfig")
    parser.add_argument("--ratio", type=float, default=Config().ratio, help="share of rows kept (%(default)s)")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="any option of the backend")


def run(args: argparse.Namespace) -> int:
    """Print the report and write its files. Raises: ReportError or BudgetError, with what to do about it."""
    _check_files(args)
    model, batch = load(args)
    options = {"device": args.device, **backend_options(args)}
    traces = checked(StepTraces, model, batch, args.optimizer, eight_bit=args.optimizer_8bit, **options)
    if args.gpu_memory:
        checked(traces.limit, args.gpu_memory)  # before anything is traced
    # (A search makes too many graphs to keep them all.)
    with contextlib.nullcontext() if args.gpu_memory else collector_paused(collect=False):
        return _report(args, traces, checked(report, model, batch, **options))


def _report(args: argparse.Namespace, traces: StepTraces, ledger: Ledger) -> int:
    print(ledger.table(args.level))
    if args.json:
        replace_text(args.json, ledger.to_json())
    if args.csv:
        replace_text(args.csv, ledger.to_csv())
    if args.plot:
        checked(ledger.plot, args.plot)
    if ledger.saved_bytes_eager is None:
        print("\nTraining memory is unknown, because the report is not of the whole model.")
        return 1 if args.gpu_memory else 0
    traces.add(ledger)
    found = [traces.at(arm, traces.batch_size) for arm in ARMS]
    largest = {arm: checked(traces.largest_batch, arm, args.gpu_memory) for arm in ARMS} if args.gpu_memory else None
    size = f", batch of {traces.batch_size}" if traces.sizes else ""
    print(f"\nTraining with {args.optimizer}{' (8-bit)' * args.optimizer_8bit}{size}:")
    print(table(found, largest, args.gpu_memory or ""))
    return 0


def _check_files(args: argparse.Namespace) -> None:
    """Find out before the work, and not behind it, that a file cannot be written."""
    for kind in FILES:
        path = getattr(args, kind)
        if path and not path.absolute().parent.is_dir():
            raise ReportError(f"--{kind} {path}: there is no folder {path.absolute().parent}; make it first.")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise ReportError('--plot needs matplotlib: pip install "wtacrs-fx[plot]"')


def load(args: argparse.Namespace, device: str = "meta") -> tuple[nn.Module, Batch]:
    """The model and the batch that the command line asks for."""
    given = {name: value for name in PRESET if (value := getattr(args, name)) is not None}
    if args.python:
        if given:
            options = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in given.items())
            raise ReportError(
                f"{options} beside --python {args.python}: that function makes the model and the batch. Leave it out, and "
                "change it there."
            )
        return _from_python(args.python)
    values = {**PRESET, **given}
    return build(
        args.model,
        task=args.task,
        batch_size=values["batch_size"],
        length=values["seq_len"],
        dtype=DTYPES[values["dtype"]],
        lora=_assignments("--lora", re.split(r",(?=\s*\w+=)", args.lora)) if args.lora else None,
        device=device,
    )


def backend_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of the backend that the command line asks for."""
    return {"ratio": args.ratio, **_assignments("--option", args.option)}


def checked(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call it; what is wrong with an option's value is an error that is meant for the user."""
    try:
        return function(*args, **kwargs)
    except (BudgetError, ReportError):
        raise
    except (TypeError, ValueError) as error:
        raise ReportError(str(error)) from error


def _from_python(name: str) -> tuple[nn.Module, Batch]:
    module, _, function = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        try:
            make = getattr(importlib.import_module(module), function)
            inspect.signature(make).bind()
        except (ImportError, AttributeError, ValueError, TypeError) as error:
            raise ReportError(
                f"--python {name}: {error}; expected MODULE:FUNCTION, importable from here, without arguments."
            ) from error
        result = make()  # whose errors are the user's own
    finally:
        sys.path.remove(str(Path.cwd()))
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], nn.Module)):
        raise ReportError(f"--python {name}: it returned {type(result).__name__}, expected a tuple (model, batch).")
    return result


def _assignments(option: str, texts: list[str]) -> Mapping[str, Any]:
    """``["r=32", "late=exact"]`` -> ``{"r": 32, "late": "exact"}``: Python literals, or text."""
    values: dict[str, Any] = {}
    for text in texts:
        name, found, value = text.partition("=")
        if not found:
            raise ReportError(f"{option} {text}: expected NAME=VALUE.")
        try:
            values[name.strip()] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            values[name.strip()] = value
    return values
