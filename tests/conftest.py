import os
import shutil
import tempfile

_CACHE = tempfile.mkdtemp(prefix="wtacrs-tests-")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _CACHE  # before torch is imported: no test sees what an earlier run compiled

import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(autouse=True)
def _fresh_state():
    """Every test traces afresh, from one seed."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the models are tiny: a second thread only waits


def pytest_unconfigure():
    shutil.rmtree(_CACHE, ignore_errors=True)
