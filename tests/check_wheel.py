"""Install the built wheel in a clean venv and use it from another directory. Run by ``make test``."""

import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

CODE = """
import importlib.metadata, pathlib, torch, wtacrs_fx, wtacrs_fx.passes.partition, wtacrs_fx.benchmarks.options
assert pathlib.Path(wtacrs_fx.__file__).is_relative_to(SITE), wtacrs_fx.__file__
assert "wtacrs" in torch._dynamo.list_backends()
try:
    import passes
except ImportError:
    pass
else:
    raise AssertionError("the wheel leaves a top-level package called passes")
model = torch.nn.Linear(32, 32)
backend = wtacrs_fx.Backend(ratio=0.5, inner="eager", min_rows=1, min_bytes=0, memory_budget=None)
torch.compile(model, backend=backend)(torch.randn(64, 32)).square().sum().backward()
assert backend.ledger.count("early") == 1
print("wheel ok:", importlib.metadata.version("wtacrs-fx"))
"""


def main(dist: Path, constraints: Path) -> None:
    (wheel,) = dist.resolve().glob("*.whl")
    pinned = next(line for line in constraints.read_text().splitlines() if line.startswith("torch=="))
    with tempfile.TemporaryDirectory() as folder:
        venv.create(Path(folder) / "venv", with_pip=True)
        python = str(Path(folder) / "venv" / "bin" / "python")
        subprocess.run([python, "-m", "pip", "install", "--quiet", pinned, str(wheel)], check=True)
        where = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        site = subprocess.check_output(where, text=True).strip()
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        subprocess.run([python, "-c", f"SITE = {site!r}\n{CODE}"], check=True, cwd=folder, env=env)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
