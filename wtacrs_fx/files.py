"""Write files so that a process killed in between leaves the previous one."""

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: "str | Path") -> Iterator[Path]:
    """A place beside ``path`` to write to; at the end it goes onto disk and then into ``path``, at once.

        with replacing("checkpoint.pt") as new:
            torch.save({"model": model.state_dict(), "norms": norms.state_dict()}, new)

    If the process is killed, or the block raises, ``path`` is what it was before. Raises: OSError, as ``open`` does;
    nothing is left behind then.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        yield temporary
        with temporary.open("rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def replace_text(path: "str | Path", text: str) -> None:
    """Write a text file at once, see :func:`replacing`."""
    with replacing(path) as new:
        new.write_text(text)
