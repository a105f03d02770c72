"""Agents on disk: our folder of ``agent.safetensors`` + ``agent.json``, and published ``.pth``."""

import json
import os
import pickle
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mara_rl.agent import Agent, AgentSpec
from mara_rl.errors import DataError

FORMAT = 1
WEIGHTS_FILE = "agent.safetensors"
SPEC_FILE = "agent.json"


def save_agent(agent: Agent, folder: Path, *, metadata: dict[str, Any] | None = None) -> None:
    """Write an agent to a new ``folder``, which appears whole or not at all.

    ``agent.safetensors`` holds the network's state dict in float32, under the keys of published
    actors; ``agent.json`` the format version, the `AgentSpec` and ``metadata`` (JSON values).
    Raises DataError when ``folder`` exists or ``metadata`` is not JSON.
    """
    if folder.exists():
        raise DataError(f"agent folder {folder} exists; expected a new one")
    content = {"format": FORMAT, "agent": agent.spec.model_dump(), "metadata": metadata or {}}
    try:
        text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise DataError(f"agent metadata cannot be written as JSON: {error}") from error
    weights = {
        key: tensor.detach().to("cpu", torch.float32).contiguous()
        for key, tensor in agent.network.state_dict().items()
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".agent-", dir=folder.parent))
    try:
        save_file(weights, scratch / WEIGHTS_FILE)
        (scratch / SPEC_FILE).write_text(text + "\n", encoding="utf-8")
        scratch.chmod(0o755)  # mkdtemp's 0700 would hide the agent from other users
        os.rename(scratch, folder)
    except BaseException:
        shutil.rmtree(scratch)
        raise


def load_agent(folder: Path) -> Agent:
    """The agent that `save_agent` wrote to ``folder``, on the CPU in float32.

    Raises DataError naming the file, key or shape that is not as expected.
    """
    spec, _ = read_agent_spec(folder)
    path = folder / WEIGHTS_FILE
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} could not be read as weights: {_first_line(error)}") from error
    return _with_weights(spec, state, path)


def read_agent_spec(folder: Path) -> tuple[AgentSpec, dict[str, Any]]:
    """What ``agent.json`` in ``folder`` says: the spec and the metadata given to `save_agent`.

    Raises DataError naming the file and the field that is not as expected.
    """
    path = folder / SPEC_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} could not be read: {_first_line(error)}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise DataError(f"{path} has format {found!r}; expected {FORMAT}")
    try:
        spec = AgentSpec.model_validate(content.get("agent"))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(("agent", *(str(part) for part in first["loc"])))
        found = "" if first["type"] == "missing" else f", not {first['input']!r}"
        raise DataError(f"{path}: {field}: {first['msg']}{found}") from error
    metadata = content.get("metadata", {})
    if not isinstance(metadata, dict):
        raise DataError(f"{path}: metadata is {metadata!r}; expected a mapping")
    return spec, metadata


def load_published_actor(path: Path) -> Agent:
    """A published actor, a ``.pth`` state dict: head ``paper``, rule ``threshold``, k 40, p .95.

    Only tensors are read; a file with anything else in it is refused. H is the width of its
    LayerNorm; which LLM it belongs to is not in the file (``spec.llm`` is empty).
    Raises DataError naming what is not as expected.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        if found:
            raise DataError(
                f"{path} holds the Python object {found[1]}; expected tensors alone, nothing else "
                "is loaded"
            ) from error
        raise DataError(f"{path} is truncated or not a torch file") from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise DataError(f"{path} could not be read: {_first_line(error)}") from error
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise DataError(f"{path} does not hold named tensors; expected an actor's state dict")
    norm = state.get("ln.weight")
    if norm is None or norm.ndim != 1:
        keys = ", ".join(sorted(map(str, state))[:4]) or "none"
        raise DataError(f"{path} has no vector 'ln.weight'; expected an actor, found keys {keys} …")
    spec = AgentSpec(
        hidden_size=norm.shape[0],
        head="paper",
        rule="threshold",
        fallback="first",
        top_k=40,
        top_p=0.95,
        llm="",
    )
    return _with_weights(spec, state, path)


def load_local_agent(path: Path) -> Agent:
    """An agent from a folder (`load_agent`) or a ``.pth`` file (`load_published_actor`).

    Raises DataError when neither is there.
    """
    if path.is_dir():
        return load_agent(path)
    if path.is_file():
        return load_published_actor(path)
    raise DataError(f"agent {str(path)!r}: no such file or folder")


def _with_weights(spec: AgentSpec, state: dict[str, Tensor], path: Path) -> Agent:
    with torch.device("meta"):  # nothing drawn from the global generator
        agent = Agent(spec)
    wanted = agent.network.state_dict()
    missing, unknown = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if missing or unknown:
        raise DataError(f"{path}: missing weights {missing}, unknown weights {unknown}")
    for key, tensor in state.items():
        if tensor.shape != wanted[key].shape:
            raise DataError(
                f"{path}: weight {key!r} has shape {tuple(tensor.shape)}; expected "
                f"{tuple(wanted[key].shape)} (head {spec.head}, hidden size {spec.hidden_size})"
            )
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise DataError(f"{path}: weight {key!r} is not all finite floats")
    agent.network.load_state_dict(
        {key: tensor.float() for key, tensor in state.items()}, assign=True
    )
    return agent.eval()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
