"""Files that appear whole or not at all."""

import os
from pathlib import Path

from mara_rl.common.errors import DataError


def write_atomically(path: Path, text: str) -> None:
    """Write a text file whole or not at all. Raises DataError when it cannot (a full disk)."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text(text, encoding="utf-8")
        to_disk(scratch)
        os.replace(scratch, path)
        to_disk(path.parent)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise DataError(f"{path}: could not be written: {error.strerror}") from error


def to_disk(path: Path) -> None:
    """Make what was written, or the names in a folder, outlive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
