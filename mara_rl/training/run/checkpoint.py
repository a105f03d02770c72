"""Checkpoints of a training run: whole or not at all, the newest few and the best, no pickles.

A checkpoint is a folder named after its iteration; one that is saved again gets a number behind it
(``000004``, ``000004.1``), so that the old one stays until the new one is in place.
"""

import hashlib
import json
import logging
import math
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from mara_rl.common.atomic_write import to_disk
from mara_rl.common.errors import DataError, first_line
from mara_rl.tracking.tracking_run import MetricBatch
from mara_rl.training.run.run_folder import remove_folder
from services.prompt_queue.prompt_queue import QueuePosition

logger = logging.getLogger(__name__)

LEARNER_FILE = "learner.pt"
STATE_FILE = "state.json"
SUMS_FILE = "sha256.json"
_NAME = re.compile(r"(\d+)(?:\.(\d+))?")


class TrainState(BaseModel):
    """Everything a resumed run needs beside the learner's tensors."""

    # A figure that is not finite must not make the checkpoint unreadable.
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")

    iteration: int = Field(0, description="updates so far")
    score_scales: dict[str, float] = Field(default_factory=dict)
    position: QueuePosition | None = Field(None, description="where the prompt queue stands")
    training_s: float = Field(0.0, description="seconds of training so far")
    warm_start: dict[str, float] = Field(default_factory=dict, description="its figures")
    token_forwards: int = Field(0, description="tokens put through the LLM so far")
    restarts: int = Field(0, description="how often the run went back to a checkpoint by itself")
    reward: float | None = Field(
        None, description="mean reward of the answers since the checkpoint before"
    )
    unsent_metrics: list[MetricBatch] = Field(
        default_factory=list, description="what MLflow, away at the time, has not got yet"
    )


def save_checkpoint(folder: Path, state: TrainState, learner: dict[str, Any], keep: int) -> Path:
    """Write ``folder/<iteration>``, then remove all but the newest ``keep`` and the best one.

    The best is the one with the highest ``reward``. ``learner`` is a state of RLlib's learner group
    (numpy arrays and plain values). Raises DataError when it cannot be written (a full disk); what
    was there before stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    before = checkpoints_in(folder)
    older = [path for path in before if _iteration(path) == state.iteration]
    name = f"{state.iteration:06d}" + (f".{_number(older[-1]) + 1}" if older else "")
    target = folder / name
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as scratch:
            new = Path(scratch) / name
            new.mkdir()
            torch.save(_to_tensors(learner), new / LEARNER_FILE)
            (new / STATE_FILE).write_text(state.model_dump_json(), encoding="utf-8")
            sums = {file: _sha256(new / file) for file in (LEARNER_FILE, STATE_FILE)}
            (new / SUMS_FILE).write_text(json.dumps(sums), encoding="utf-8")
            for file in new.iterdir():
                to_disk(file)
            os.replace(new, target)
            to_disk(folder)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        raise DataError(f"checkpoint {target}: could not be written: {error}") from error
    kept = [path for path in before if path not in older] + [target]
    best = _best(kept)
    for path in before:
        if path not in kept[-keep:] and path != best:
            remove_folder(path)
    return target


def load_newest_checkpoint(folder: Path) -> tuple[TrainState, dict[str, Any]] | None:
    """The newest checkpoint that is whole; torn ones are removed with a warning. None without any.

    Raises DataError when there are checkpoints and all of them are torn, or one cannot be read.
    """
    for pattern in (".writing-*", ".removed-*"):  # by a process that was killed
        for unfinished in folder.glob(pattern):
            remove_folder(unfinished)
    found = checkpoints_in(folder)
    for path in reversed(found):
        try:
            sums = json.loads((path / SUMS_FILE).read_text(encoding="utf-8"))
            for file in (LEARNER_FILE, STATE_FILE):
                if _sha256(path / file) != sums.get(file):
                    raise ValueError(f"{file} does not match its checksum")
            state = TrainState.model_validate_json((path / STATE_FILE).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError) as error:
            logger.warning("checkpoint %s is torn and skipped: %s", path, first_line(error))
            continue
        except OSError as error:  # it may be whole
            raise DataError(f"checkpoint {path}: could not be read: {error}") from error
        try:
            learner = torch.load(path / LEARNER_FILE, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, UnpicklingError) as error:  # no memory left, for one
            reason = first_line(error)
            raise DataError(f"checkpoint {path}: could not be loaded: {reason}") from error
        for torn in found[found.index(path) + 1 :]:  # else they would count among the newest
            remove_folder(torn)
        return state, _to_arrays(learner)
    if found:
        raise DataError(f"{folder}: all {len(found)} checkpoints are torn; start a new run")
    return None


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder by name, unverified, oldest first."""
    paths = [path for path in folder.glob("[0-9]*") if _NAME.fullmatch(path.name)]
    return sorted(paths, key=lambda path: (_iteration(path), _number(path)))


def _iteration(path: Path) -> int:
    return int(path.name.partition(".")[0])


def _number(path: Path) -> int:
    """How often this iteration had been saved before."""
    return int(path.name.partition(".")[2] or 0)


def _best(paths: Sequence[Path]) -> Path | None:
    """The one with the highest reward, the newest of equals; None where none has a reward."""
    rewards = {}
    for path in paths:
        try:
            state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # torn; told of when it is loaded
            continue
        reward = state.get("reward")
        if reward is not None and math.isfinite(reward):
            rewards[path] = reward
    return max(reversed(rewards), key=lambda path: rewards[path], default=None)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _to_tensors(value: Any) -> Any:
    """Arrays as tensors, numpy scalars as plain numbers, all else as it is."""
    if isinstance(value, dict):
        return {key: _to_tensors(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_to_tensors(item) for item in value)
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    return value.item() if isinstance(value, np.generic) else value


def _to_arrays(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _to_arrays(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_to_arrays(item) for item in value)
    return value.numpy() if isinstance(value, torch.Tensor) else value
