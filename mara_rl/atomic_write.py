"""Files that appear whole or not at all."""

import os
import tempfile
from pathlib import Path

from mara_rl.errors import DataError


def write_atomically(path: Path, text: str) -> None:
    """Write a text file whole or not at all. Raises DataError when it cannot (a full disk)."""
    descriptor, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(scratch, path)
    except OSError as error:
        os.unlink(scratch)
        raise DataError(f"{path}: could not be written: {error.strerror}") from error
