"""Files that are written whole or not at all."""

import os
import tempfile
from pathlib import Path

from contrastive_diffusion.errors import RunError


def write_atomic(path: Path, content: bytes | str) -> None:
    """Writes a file as a whole or not at all: to a temporary beside it, then renamed. A full or unwritable disk is one line."""
    data = content.encode() if isinstance(content, str) else content
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)
        raise RunError(f"given the path {path}, expected to write there: {error.strerror}; free space or choose another folder") from error
