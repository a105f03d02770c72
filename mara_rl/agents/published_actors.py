"""Actors as the paper's authors publish them: ``.pth`` state dicts."""

import os
import pickle
import re
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from mara_rl.agents.agent import Agent, AgentSpec
from mara_rl.agents.agent_files import agent_with_weights
from mara_rl.common.errors import DataError, first_line

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


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
    except Exception as error:  # a damaged file raises whatever its reader stumbles over
        raise DataError(f"{path} could not be read: {first_line(error)}") from error
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(t, Tensor) for key, t in state.items()
    ):
        raise DataError(f"{path} does not hold named tensors; expected an actor's state dict")
    for key, t in state.items():
        if t.dtype not in _DTYPES or t.layout != torch.strided or t.is_meta or t.is_nested:
            raise DataError(f"{path}: weight {key!r} is not a dense tensor of floats")
    norm = state.get("ln.weight")
    if norm is None or norm.ndim != 1 or not len(norm):
        keys = ", ".join(sorted(map(str, state))[:4]) or "none"
        raise DataError(f"{path} has no vector 'ln.weight'; expected an actor, found keys {keys} …")
    spec = AgentSpec(
        hidden_size=norm.shape[0],
        head="paper",
        rule="threshold",
        fallback="first",
        llm="",
    )
    return agent_with_weights(spec, state, path)


def is_published_kind(spec: AgentSpec) -> bool:
    """Whether an agent is what the authors' code takes a ``.pth`` for."""
    return (spec.head, spec.rule, spec.fallback) == ("paper", "threshold", "first")


def save_published_actor(agent: Agent, path: Path) -> None:
    """Write a ``.pth`` that the authors' code and `load_published_actor` read: weights, float32.

    Raises DataError unless the agent is what that code takes it for (head ``paper``, rule
    ``threshold``, fallback ``first``), or when ``path`` exists.
    """
    if not is_published_kind(agent.spec):
        found = ", ".join((agent.spec.head, agent.spec.rule, agent.spec.fallback))
        raise DataError(
            f"agent has head, rule, fallback {found}; a published .pth stands for "
            "paper, threshold, first: keep agent.safetensors and agent.json"
        )
    if path.exists():
        raise DataError(f"{path} exists; expected a new file")
    weights = {
        key: t.detach().to("cpu", torch.float32) for key, t in agent.network.state_dict().items()
    }
    descriptor, scratch = tempfile.mkstemp(prefix=".actor-", suffix=".pth", dir=path.parent)
    os.close(descriptor)
    try:
        torch.save(weights, scratch)
        os.chmod(scratch, 0o644)
        os.rename(scratch, path)
    except BaseException:
        os.unlink(scratch)
        raise
