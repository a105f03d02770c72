"""Where runs and caches live on disk: ``MARA_HOME``, by default ``./runs``."""

import os
from pathlib import Path


def mara_home() -> Path:
    """The folder for runs, caches and embedded servers, created if it does not exist."""
    home = Path(os.environ.get("MARA_HOME", "runs")).expanduser().resolve()
    home.mkdir(parents=True, exist_ok=True)
    return home
