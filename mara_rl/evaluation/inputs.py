"""What answers on disk depend on: a folder is gone on with only if none of it has changed."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mara_rl.agent import Agent
from mara_rl.agent_files import agent_sha256
from mara_rl.atomic_write import write_atomically
from mara_rl.errors import ConfigError
from mara_rl.evaluation.fingerprints import file_sha256, llm_sha256
from mara_rl.evaluation.plan import AnswersMethod, BestOfMethod, EvaluationPlan
from mara_rl.evaluation.prompt_set import PromptSet

FILE = "inputs.json"


def plan_inputs(
    plan: EvaluationPlan, prompts: PromptSet, agents: Mapping[str, Agent]
) -> dict[str, Any]:
    """All that fixes the answers, by name, the content of files included.

    Judges, weights and methods that only choose among answers are not part of it.
    """
    shared = ("llm", "dtype", "system", "max_new_tokens", "seed")
    inputs: dict[str, Any] = {name: getattr(plan, name) for name in shared}
    inputs["llm_sha256"] = llm_sha256(plan.llm)
    inputs["prompts"] = {"source": plan.prompts, "n": len(prompts.prompts)}
    inputs["prompts"]["checksum"] = prompts.checksum
    inputs["methods"] = {}
    for name, method in plan.methods.items():
        if isinstance(method, BestOfMethod):
            continue
        found = method.model_dump(mode="json")
        if isinstance(method, AnswersMethod):
            path = Path(method.file)
            found["sha256"] = file_sha256(path) if path.is_file() else ""
        elif method.llm is not None:
            found["llm_sha256"] = llm_sha256(method.llm)
        if name in agents:
            found["agent_sha256"] = agent_sha256(agents[name])
        inputs["methods"][name] = found
    return inputs


def claim(folder: Path, inputs: Mapping[str, Any]) -> bool:
    """Make ``folder`` one of these inputs, or see that it is; whether it was there before.

    Methods may be added. Raises ConfigError naming the first input that differs.
    """
    path = folder / FILE
    folder.mkdir(parents=True, exist_ok=True)
    before: dict[str, Any] = {}
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        for key, old, new in _differences(before, json.loads(json.dumps(inputs))):
            raise ConfigError(
                f"{folder} holds an evaluation with {key}: {old!r}, not {new!r}; give the same "
                "again to go on, or another --out"
            )
    elif any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty and holds no evaluation; give another --out")
    merged = dict(inputs)
    merged["methods"] = {**before.get("methods", {}), **inputs["methods"]}
    write_atomically(path, json.dumps(merged, indent=2, ensure_ascii=False) + "\n")
    return bool(before)


def _differences(
    old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Dotted keys of ``new`` whose value in ``old`` is another; methods only in one are passed."""
    for key, value in new.items():
        path = f"{prefix}{key}"
        if prefix == "methods." and key not in old:
            continue
        if isinstance(value, dict) and isinstance(old.get(key), dict):
            yield from _differences(old[key], value, f"{path}.")
        elif old.get(key) != value:
            yield path, old.get(key), value
