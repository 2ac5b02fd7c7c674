import os
import shutil
import tempfile

_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if not _WORKER:  # before torch is imported: no test sees what an earlier run compiled; workers share what they compile
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="wtacrs-tests-")

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: a second thread only waits
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # kernels take less than a pool of processes does to start

import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(autouse=True)
def _fresh_state():
    """Every test traces afresh, from one seed."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    torch.set_num_threads(1)


def pytest_unconfigure():
    if not _WORKER:
        shutil.rmtree(os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)
