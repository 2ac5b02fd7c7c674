"""Several processes: ranks must ask for the same thing, and graphs of tensor parallelism are refused."""

import dataclasses
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from typing import Any

import torch

from wtacrs_fx import private
from wtacrs_fx.config import Config
from wtacrs_fx.errors import RankError, UnsupportedError

OF_ONE_RANK = ("verbose", "seed")
"""Options that may differ from rank to rank."""


def refuse_dtensors(names: Sequence[str | None], inputs: Sequence[Any]) -> None:
    """Raise if an input of a Dynamo graph is a DTensor, as parameters of tensor parallelism are.

    The ranks of such a group compute parts of one product, so that all of them would have to draw the same rows, by norms
    over all of a row's parts. (FSDP2's parameters are DTensors between its hooks, and plain tensors in the forward.)

    Raises: UnsupportedError.
    """
    module = sys.modules.get("torch.distributed.tensor")
    if module is None:
        return
    for i, value in enumerate(inputs):
        if isinstance(value, module.DTensor):
            name = (names[i] if i < len(names) else None) or f"input {i}"
            raise UnsupportedError(
                f"wtacrs: {name} is a DTensor with placements {value.placements}, as in tensor parallelism: ranks that hold "
                "parts of one layer would draw different rows of it. Compile such modules with backend='inductor', or use "
                "data parallelism (DDP, FSDP2's fully_shard) with wtacrs."
            )


def check_ranks(config: Config, names: Sequence[str | None], inputs: Sequence[Any]) -> None:
    """Compare the options of this rank with those of the first rank that compiled the same parameters.

    Nothing waits: the first rank writes its options into the key-value store of the process group, and every later one
    compares. Where a process compiles the same parameters with several sets of options, the sets are compared in order.

    Args:
        config: this rank's options.
        names, inputs: per input of the Dynamo graph its parameter's name (or None) and an example.

    Raises:
        RankError: naming both ranks and what differs.
    """
    group = torch.distributed
    if not (group.is_available() and group.is_initialized()) or group.get_world_size() == 1:
        return
    store, rank = private.default_store(), group.get_rank()
    what = [(n, str(x.dtype)) for n, x in zip(names, inputs) if n and isinstance(x, torch.Tensor)]
    key = f"wtacrs/{hashlib.sha256(repr(what).encode()).hexdigest()}"
    mine = options_of(config)
    count = _index(store, f"{key}/rank{rank}", mine)
    entry = json.dumps({"rank": rank, "options": mine}, sort_keys=True)
    first = json.loads(store.compare_set(f"{key}/{count}", "", entry))
    different = [o for o in mine if mine[o] != first["options"].get(o)]
    if different:
        ours, theirs = (", ".join(f"{o}={options.get(o)}" for o in different) for options in (mine, first["options"]))
        raise RankError(
            f"wtacrs: rank {rank} compiles with {ours}, rank {first['rank']} compiled the same parameters with {theirs}: "
            "gradients of different kinds would be averaged. Give every rank the same options."
        )


def options_of(config: Config) -> dict[str, str]:
    """What every rank must agree about: option -> its value as text, and the version of torch. Of objects (norm sources, passes
    of Inductor) it is their class that counts, and not where they lie in a rank's memory."""
    fields = [f.name for f in dataclasses.fields(config) if f.name not in OF_ONE_RANK]
    texts = {name: re.sub(r" at 0x[0-9a-fA-F]+", "", repr(getattr(config, name))) for name in fields}
    return {"torch": torch.__version__, **texts}


def _index(store: Any, key: str, options: dict[str, str]) -> int:
    """How many other sets of options this rank has used for the same parameters before. Only this rank writes the key."""
    used = json.loads(store.get(key)) if store.check([key]) else []
    if options not in used:
        store.set(key, json.dumps([*used, options]))
        used.append(options)
    return used.index(options)
