import pytest
import torch


@pytest.fixture(autouse=True)
def _fresh_state():
    """Every test compiles afresh, from one seed."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch._inductor.config.patch(force_disable_caches=True):
        yield
