"""Files that appear whole or not at all."""

import os
from pathlib import Path

from mara_rl.errors import DataError


def write_atomically(path: Path, text: str) -> None:
    """Write a text file whole or not at all. Raises DataError when it cannot (a full disk)."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text(text, encoding="utf-8")
        os.replace(scratch, path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise DataError(f"{path}: could not be written: {error.strerror}") from error
