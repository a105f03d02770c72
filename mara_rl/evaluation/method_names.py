"""Methods by short names, as ``--methods base,agent,best-of-4`` gives them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mara_rl.common.errors import ConfigError

_KNOWN = "base, sampled, agent, agent-sampled, exact, best-of-N, strength-S"


def methods_of(names: Sequence[str], agents: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Method specs by name.

    ``agent``, ``agent-sampled``, ``exact`` and ``strength-S`` give one method for each of
    ``agents`` (name to reference), named after it. Of ``best-of-N`` the largest N fixes how many
    answers ``sampled`` has, which is added where it was not asked for.

    Raises ConfigError for an unknown name, one given twice, and one that lacks an agent.
    """
    pool = max([1, *(_number(name) for name in names if name.startswith("best-of-"))])
    methods: dict[str, dict[str, Any]] = {}
    for short in names:
        for name, spec in _expanded(short, agents, pool).items():
            if name in methods:
                raise ConfigError(f"methods: two are named {name!r}; expected different names")
            methods[name] = spec
    if pool > 1 and "sampled" not in methods:
        methods["sampled"] = _sampled(pool)
    return methods


def _expanded(short: str, agents: Mapping[str, str], pool: int) -> dict[str, dict[str, Any]]:
    if short == "base":
        return {"base": {"kind": "base"}}
    if short == "sampled":
        return {"sampled": _sampled(pool)}
    if short.startswith("best-of-"):
        return {short: {"kind": "best_of", "n": _number(short), "of": "sampled"}}
    how: dict[str, Any]
    if short == "agent":
        how = {}
    elif short == "agent-sampled":
        how = {"rule": "sample"}
    elif short == "exact":
        how = {"exact": True}
    elif short.startswith("strength-"):
        try:
            how = {"strength": float(short.removeprefix("strength-"))}
        except ValueError as error:
            raise ConfigError(f"methods: {short!r}; expected e.g. strength-0.5") from error
    else:
        raise ConfigError(f"methods: unknown {short!r}; expected {_KNOWN}")
    if not agents:
        raise ConfigError(f"methods: {short!r} needs an agent; name one with --agent")
    suffix = "" if short == "agent" else short.removeprefix("agent-")
    return {
        _joined(agent, suffix, alone=len(agents) == 1): {"kind": "agent", "agent": ref, **how}
        for agent, ref in agents.items()
    }


def _joined(agent: str, suffix: str, *, alone: bool) -> str:
    """``strength-0.5`` for the only agent where it has no name of its own, else with its name."""
    if not suffix:
        return agent
    return suffix if alone and agent == "agent" and suffix != "sampled" else f"{agent}-{suffix}"


def _sampled(replicates: int) -> dict[str, Any]:
    return {"kind": "base", "rule": "sample", "replicates": replicates}


def _number(short: str) -> int:
    found = re.fullmatch(r"best-of-(\d+)", short)
    if not found or int(found[1]) < 2:
        raise ConfigError(f"methods: {short!r}; expected best-of-N with N of 2 or more")
    return int(found[1])
