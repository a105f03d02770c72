"""Agents on disk: a folder with ``agent.safetensors`` and ``agent.json``."""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from pydantic_core import to_json
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mara_rl.agents.agent import Agent, AgentSpec
from mara_rl.agents.agent_card import agent_card
from mara_rl.common.errors import DataError, first_line, validated

FORMAT = 1
WEIGHTS_FILE = "agent.safetensors"
SPEC_FILE = "agent.json"
CARD_FILE = "README.md"
_HASHED = ("hidden_size", "head", "rule", "fallback", "exact", "top_k", "top_p", "llm")
"""The spec's fields in the order that an agent's SHA-256 takes them."""


def save_agent(agent: Agent, folder: Path | str, *, metadata: dict[str, Any] | None = None) -> None:
    """Write an agent to a new ``folder``, which appears whole or not at all.

    ``agent.safetensors`` holds the network's state dict in float32, under the keys of published
    actors; ``agent.json`` the format version, the `AgentSpec` and ``metadata`` (JSON values);
    ``README.md`` is the card, as the model hub shows it.
    Raises DataError when ``folder`` exists or ``metadata`` is not JSON.
    """
    folder = Path(folder)
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
        (scratch / CARD_FILE).write_text(agent_card(agent.spec, metadata or {}), encoding="utf-8")
        scratch.chmod(0o755)  # mkdtemp's 0700 would hide the agent from other users
        os.rename(scratch, folder)
    except BaseException:
        shutil.rmtree(scratch)
        raise


def load_agent(folder: Path | str) -> Agent:
    """The agent that `save_agent` wrote to ``folder``, on the CPU in float32.

    Raises DataError naming the file, key or shape that is not as expected.
    """
    folder = Path(folder)
    spec, _ = read_agent_spec(folder)
    path = folder / WEIGHTS_FILE
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} could not be read as weights: {first_line(error)}") from error
    return agent_with_weights(spec, state, path)


def agent_sha256(agent: Agent) -> str:
    """The SHA-256 of an agent's spec and weights, wherever it was loaded from."""
    spec = agent.spec.model_dump()
    digest = hashlib.sha256(to_json({name: spec[name] for name in _HASHED}))
    for key, tensor in sorted(agent.network.state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def read_agent_spec(folder: Path) -> tuple[AgentSpec, dict[str, Any]]:
    """What ``agent.json`` in ``folder`` says: the spec and the metadata given to `save_agent`.

    Raises DataError naming the file and the field that is not as expected.
    """
    path = folder / SPEC_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} could not be read: {first_line(error)}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise DataError(f"{path} has format {found!r}; expected {FORMAT}")
    spec = validated(AgentSpec, content.get("agent"), f"{path}", prefix="agent", error=DataError)
    metadata = content.get("metadata", {})
    if not isinstance(metadata, dict):
        raise DataError(f"{path}: metadata is {metadata!r}; expected a mapping")
    return spec, metadata


def agent_with_weights(spec: AgentSpec, state: dict[str, Tensor], path: Path) -> Agent:
    """An agent with these weights; DataError names the key or shape of ``path`` that is wrong."""
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
