"""Reading the weights of a transformers-style checkpoint folder, nothing in it executed."""

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mara_rl.common.errors import DataError, first_line

_SINGLE = ("model.safetensors", "pytorch_model.bin")
_SHARDED = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises DataError naming the file when there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} could not be read: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} holds a {type(value).__name__}; expected a JSON object")
    return value


def read_state_dict(folder: Path) -> dict[str, Tensor]:
    """All weights of a folder on the CPU: safetensors before ``.bin``, whole or sharded.

    Raises DataError naming the file that is missing or torn.
    """
    for name in _SINGLE:
        if (folder / name).is_file():
            return _read_file(folder / name)
    for name in _SHARDED:
        if (folder / name).is_file():
            weight_map = read_json(folder / name).get("weight_map")
            if not isinstance(weight_map, dict):
                raise DataError(f"{folder / name} has no weight_map; expected tensor: file names")
            state: dict[str, Tensor] = {}
            for shard in sorted(set(weight_map.values())):
                state |= _read_file(folder / Path(shard).name)
            return state
    raise DataError(f"{folder} holds no weights; expected one of {', '.join(_SINGLE + _SHARDED)}")


def fill(module: nn.Module, state: dict[str, Tensor], source: Path) -> None:
    """Give ``module`` the weights in ``state`` without copying them.

    Raises DataError naming the first key that is missing, has another shape or is not known.
    """
    wanted = module.state_dict()
    missing = [key for key in wanted if key not in state]
    if missing:
        raise DataError(f"{source} lacks {len(missing)} weights, the first is {missing[0]!r}")
    for key, tensor in state.items():
        if key not in wanted:
            raise DataError(f"{source} holds the unknown weight {key!r}")
        if tensor.shape != wanted[key].shape:
            raise DataError(
                f"{source}: weight {key!r} has shape {tuple(tensor.shape)}; "
                f"expected {tuple(wanted[key].shape)}"
            )
    module.load_state_dict(state, assign=True)


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = first_line(error)
        raise DataError(f"{path} could not be read as weights: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise DataError(f"{path} does not hold named tensors")
    return state
