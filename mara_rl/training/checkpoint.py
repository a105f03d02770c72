"""Checkpoints of a training run: whole or not at all, the newest few kept, no pickles."""

import hashlib
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from mara_rl.errors import DataError, first_line
from mara_rl.training.run_folder import remove_folder
from services.prompt_queue import QueuePosition

logger = logging.getLogger(__name__)

LEARNER_FILE = "learner.pt"
STATE_FILE = "state.json"


class TrainState(BaseModel):
    """Everything a resumed run needs beside the learner's tensors."""

    # A figure that is not finite must not make the checkpoint unreadable.
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")

    iteration: int = Field(0, description="updates so far")
    score_scales: dict[str, float] = Field(default_factory=dict)
    position: QueuePosition | None = Field(None, description="where the prompt queue stands")
    mlflow_run_id: str = ""
    training_s: float = Field(0.0, description="seconds of training so far")
    warm_start: dict[str, float] = Field(default_factory=dict, description="its figures")
    token_forwards: int = Field(0, description="tokens put through the LLM so far")
    learner_sha256: str = Field("", description="checksum of the learner's file")


def save_checkpoint(folder: Path, state: TrainState, learner: dict[str, Any], keep: int) -> Path:
    """Write ``folder/<iteration>``, then remove all but the newest ``keep``.

    ``learner`` is a state of RLlib's learner group (numpy arrays and plain values). Raises
    DataError when it cannot be written (a full disk); what was there before stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{state.iteration:06d}"
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as scratch:
            new = Path(scratch) / target.name
            new.mkdir()
            torch.save(_to_tensors(learner), new / LEARNER_FILE)
            saved = state.model_copy(update={"learner_sha256": _sha256(new / LEARNER_FILE)})
            (new / STATE_FILE).write_text(saved.model_dump_json(), encoding="utf-8")
            if target.exists():
                remove_folder(target)
            os.replace(new, target)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        raise DataError(f"checkpoint {target}: could not be written: {error}") from error
    for old in _existing(folder)[:-keep]:
        remove_folder(old)
    return target


def load_newest_checkpoint(folder: Path) -> tuple[TrainState, dict[str, Any]] | None:
    """The newest checkpoint that is whole; torn ones are removed with a warning. None without any.

    Raises DataError when there are checkpoints and all of them are torn.
    """
    found = _existing(folder)
    for path in reversed(found):
        try:
            state = TrainState.model_validate_json((path / STATE_FILE).read_text(encoding="utf-8"))
            if _sha256(path / LEARNER_FILE) != state.learner_sha256:
                raise ValueError(f"{LEARNER_FILE} does not match its checksum")
            learner = torch.load(path / LEARNER_FILE, map_location="cpu", weights_only=True)
        except (OSError, ValueError, RuntimeError) as error:
            reason = first_line(error)
            logger.warning("checkpoint %s is skipped: %s", path, reason)
            continue
        for torn in found[found.index(path) + 1 :]:  # else they would count among the newest
            remove_folder(torn)
        return state, _to_arrays(learner)
    if found:
        raise DataError(f"{folder}: all {len(found)} checkpoints are torn; start a new run")
    return None


def _existing(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("[0-9]*") if path.is_dir())


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
