"""A run on disk: its config, checkpoints, agent and evaluation."""

import os
import shutil
import tempfile
from pathlib import Path

import yaml

from mara_rl.atomic_write import write_atomically
from mara_rl.errors import ConfigError
from mara_rl.home import mara_home
from mara_rl.training.config import TrainConfig, load_config


class RunFolder:
    """``MARA_HOME/<run>``: ``config.yaml``, ``checkpoints/``, ``agent/``, ``evaluation/``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def agent(self) -> Path:
        return self.path / "agent"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation"

    @classmethod
    def create(cls, config: TrainConfig) -> "RunFolder":
        """A new folder ``<config.name>-<n>`` with the config in it."""
        home = mara_home()
        number = 1
        while True:
            path = home / f"{config.name}-{number}"
            try:
                path.mkdir()
                break
            except FileExistsError:
                number += 1
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        write_atomically(path / "config.yaml", text)
        return cls(path)

    @classmethod
    def open(cls, run: str) -> tuple["RunFolder", TrainConfig]:
        """An existing run by name or folder, and its config.

        Raises ConfigError when there is no such run.
        """
        path = Path(run) if Path(run).is_dir() else mara_home() / run
        if not (path / "config.yaml").is_file():
            known = sorted(p.parent.name for p in mara_home().glob("*/config.yaml"))
            raise ConfigError(
                f"run {run!r}: no such run in {mara_home()}; expected one of: "
                f"{', '.join(known) or 'none yet'}"
            )
        return cls(path.resolve()), load_config(str(path / "config.yaml"))


def remove_folder(path: Path) -> None:
    """Remove a folder by first renaming it, so that no half-removed folder bears its name."""
    doomed = Path(tempfile.mkdtemp(dir=path.parent, prefix=".removed-"))
    os.replace(path, doomed / path.name)
    shutil.rmtree(doomed)
