"""Whether fake tensors of a device can be trained with."""

from collections.abc import Callable
from typing import Any

import torch

from wtacrs_fx.errors import ReportError
from wtacrs_fx.private import FakeTensorMode


def check_support(name: str | torch.device) -> None:
    """Fake tensors need no device, but their operations need a build of torch that knows it (else they raise in the middle of a
    trace, and autograd ends the process), and the autograd of torch 2.13 needs a device of CUDA too."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ReportError(f"device={name!r}: expected a device of torch, such as 'cpu' or 'cuda'.") from error
    built = device.type != "cuda" or torch.backends.cuda.is_built()
    if not (built and _works(lambda: torch.empty(2, 2, device=device)[:1].sum())):
        raise ReportError(
            f"device={str(device)!r}: torch {torch.__version__} is built without {device.type.upper()}, and has no operations "
            "for its tensors, not even for fake ones. Install a build of torch with it, or leave device out: what is saved "
            "differs between devices only where kernels do, such as fused attention."
        )
    if not _works(lambda: torch.autograd.grad((x := torch.empty(2, device=device, requires_grad=True)).sum(), x)):
        raise ReportError(
            f"device={str(device)!r}: torch {torch.__version__} has no autograd for its tensors without such a device. Use a "
            "machine that has one, or leave device out: what is saved differs between devices only where kernels do, such as "
            "fused attention."
        )


def _works(function: Callable[[], Any]) -> bool:
    """Whether it runs on fake tensors."""
    try:
        with FakeTensorMode():
            function()
    except (RuntimeError, AttributeError):  # "PyTorch is not linked with support for ..."; no module torch.hpu
        return False
    return True
