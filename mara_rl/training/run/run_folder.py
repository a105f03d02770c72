"""A run on disk: its config, checkpoints, agent and evaluation."""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field

from mara_rl.common.atomic_write import write_atomically
from mara_rl.common.errors import ConfigError
from mara_rl.common.file_lock import file_lock, is_locked
from mara_rl.common.home import mara_home
from mara_rl.common.yaml_settings import NAME_PATTERN
from mara_rl.tracking.flat_values import flat_params
from mara_rl.training.config import TrainConfig, load_config

_LOCK = "lock"
_OUTCOME = "outcome.json"


class RunOutcome(BaseModel):
    """What a finished run has made."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: str
    agent_uri: str = Field(description="models:/name/version of the registered agent")
    preference_rate: str | None = Field(description="its result line; None without a comparison")


class RunFolder:
    """``MARA_HOME/<run>``: config, MLflow run id, checkpoints, agent, evaluation, outcome."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def agent(self) -> Path:
        return self.path / "agent"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation"

    @property
    def mlflow_run_id(self) -> str | None:
        """The MLflow run of this run; None before it has one."""
        path = self.path / "mlflow_run_id"
        return path.read_text(encoding="utf-8") if path.exists() else None

    @mlflow_run_id.setter
    def mlflow_run_id(self, run_id: str) -> None:
        write_atomically(self.path / "mlflow_run_id", run_id)

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
        folder = cls(path)
        folder._write_config(config)
        return folder

    @classmethod
    def named(cls, name: str, config: TrainConfig) -> "RunFolder":
        """The folder of run ``name``, new or as an earlier process left it.

        So a job that is submitted again under its name goes on. Raises ConfigError for a bad name,
        where the run was started with another config, and where the folder is something else's.
        """
        if not re.fullmatch(NAME_PATTERN, name):
            raise ConfigError(
                f"run name {name!r}: expected letters, digits, '.', '_' and '-', beginning with a "
                "letter or digit"
            )
        folder = cls(mara_home() / name)
        folder.path.mkdir(exist_ok=True)
        if not folder.config.is_file():
            if other := sorted(p.name for p in folder.path.iterdir() if not p.name.startswith(".")):
                raise ConfigError(
                    f"run name {name!r}: {folder.path} is there and is no run (it holds "
                    f"{other[0]!r} and no config.yaml): give the run another name"
                )
            folder._write_config(config)
            return folder
        before = load_config(str(folder.config))
        if before != config:
            difference = _first_difference(before, config)
            raise ConfigError(
                f"run {name!r} was started with another config ({difference}): give the new one "
                "another run name"
            )
        return folder

    @classmethod
    def open(cls, run: str) -> tuple["RunFolder", TrainConfig]:
        """An existing run by name or folder, and its config.

        Raises ConfigError when there is no such run.
        """
        path = Path(run) if Path(run).is_dir() else mara_home() / run
        if not cls(path).config.is_file():
            known = sorted(p.parent.name for p in mara_home().glob("*/config.yaml"))
            raise ConfigError(
                f"run {run!r}: no such run in {mara_home()}; expected one of: "
                f"{', '.join(known) or 'none yet'}"
            )
        folder = cls(path.resolve())
        return folder, load_config(str(folder.config))

    def _write_config(self, config: TrainConfig) -> None:
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        write_atomically(self.config, text)

    @contextlib.contextmanager
    def claimed(self, wait_s: float = 0.0) -> Iterator[None]:
        """Keep all other processes from training in this folder; see `file_lock`.

        Raises ConfigError when that does not succeed within ``wait_s``, and where the process that
        was waited for had begun nothing and removed the folder.
        """
        refusal = (
            f"run {self.name!r} is being trained by another process; expected one that is "
            f"stopped (`mara-rl status {self.name}` tells how far it is)"
        )
        with contextlib.ExitStack() as holding:
            try:
                holding.enter_context(file_lock(self.path / _LOCK, refusal, wait_s))
            except FileNotFoundError:
                raise ConfigError(
                    f"run {self.name!r}: the process before ended without having begun, and took "
                    "the folder with it; start it again"
                ) from None
            yield

    def is_claimed(self) -> bool:
        """Whether a process trains in this folder at this moment."""
        return is_locked(self.path / _LOCK)

    def finish(self, outcome: RunOutcome) -> None:
        """Note that the run is done: resubmitting it by name does nothing more."""
        write_atomically(self.path / _OUTCOME, outcome.model_dump_json(indent=1) + "\n")

    def outcome(self) -> RunOutcome | None:
        """What the run has come to, None before its end."""
        path = self.path / _OUTCOME
        if not path.exists():
            return None
        return RunOutcome.model_validate_json(path.read_text(encoding="utf-8"))


def _first_difference(before: TrainConfig, now: TrainConfig) -> str:
    """E.g. ``ppo.lr 0.1, not 0.2``."""
    old, new = (flat_params(config.model_dump(mode="json")) for config in (before, now))
    keys = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    return f"{keys[0]} {old.get(keys[0])}, not {new.get(keys[0])}" if keys else "a long value"


def remove_folder(path: Path) -> None:
    """Remove a folder by first renaming it, so that no half-removed folder bears its name."""
    doomed = Path(tempfile.mkdtemp(dir=path.parent, prefix=".removed-"))
    os.replace(path, doomed / path.name)
    # NFS keeps a file that is open somewhere, under another name, until it is closed.
    shutil.rmtree(doomed, ignore_errors=True)
