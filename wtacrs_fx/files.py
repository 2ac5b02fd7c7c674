"""Write files so that a process killed in between leaves the previous one."""

import contextlib
import os
import threading
from pathlib import Path


def replace_text(path: "str | Path", text: str) -> None:
    """Write a text file at once: beside its place first, then onto disk, then into its place.

    Raises: OSError, as ``open`` does; nothing is left behind then.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with temporary.open("w") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
