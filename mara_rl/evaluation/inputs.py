"""What answers on disk depend on: a folder is gone on with only if none of it has changed."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mara_rl.agents.agent import Agent
from mara_rl.agents.agent_files import agent_sha256
from mara_rl.common.atomic_write import write_atomically
from mara_rl.common.errors import ConfigError, first_line
from mara_rl.common.file_lock import file_lock
from mara_rl.evaluation.answer_maker import AnswerMaker
from mara_rl.evaluation.answers import AnswerFile
from mara_rl.evaluation.fingerprints import file_sha256, llm_sha256
from mara_rl.evaluation.plan import AnswersMethod, BestOfMethod, EvaluationPlan, RewriteMethod
from mara_rl.evaluation.prompt_set import PromptSet

FILE = "inputs.json"
ANSWERS = "answers"
LOCK = "lock"
_MAY_GROW = ("replicates", "kl_prompts")
_DECODED_BY = {"dtype", "device"}
_KNOWN_BY = {"llm": "llm_sha256", "source": "checksum", "agent": "agent_sha256", "file": "sha256"}
"""What says that two names are of the same content; "" does not."""


def plan_inputs(
    plan: EvaluationPlan, prompts: PromptSet, agents: Mapping[str, Agent], maker: AnswerMaker
) -> dict[str, Any]:
    """All that fixes the answers, by name, the content of files included.

    Judges and weights are not part of it; of methods that only choose among answers, that they do.
    """
    shared = ("llm", "system", "max_new_tokens", "seed")
    inputs: dict[str, Any] = {name: getattr(plan, name) for name in shared}
    inputs["llm_sha256"] = llm_sha256(plan.llm)
    inputs["prompts"] = {"source": plan.prompts, "n": len(prompts.prompts)}
    inputs["prompts"]["checksum"] = prompts.checksum
    inputs["methods"] = {}
    for name, method in plan.methods.items():
        if isinstance(method, BestOfMethod):
            inputs["methods"][name] = {"kind": method.kind}
            continue
        found = method.model_dump(mode="json")
        if isinstance(method, AnswersMethod):
            found["sha256"] = file_sha256(Path(method.file))
        else:
            found |= {"dtype": maker.dtype, "device": maker.device}
        if isinstance(method, RewriteMethod):
            source = plan.methods[method.of]
            found["of_sha256"] = (
                file_sha256(Path(source.file)) if isinstance(source, AnswersMethod) else ""
            )
        if not isinstance(method, AnswersMethod) and method.llm is not None:
            found["llm_sha256"] = llm_sha256(method.llm)
        if name in agents:
            found["agent_sha256"] = agent_sha256(agents[name])
        inputs["methods"][name] = found
    return inputs


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder of an evaluation, or enter one, and keep other processes out.

    Raises ConfigError where something else is in it, or another process evaluates there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / FILE).is_file() and any(path.name != LOCK for path in folder.iterdir()):
        raise ConfigError(f"{folder} is not empty and holds no evaluation; give another --out")
    refusal = f"{folder} is being evaluated by another process; expected one that is stopped"
    with file_lock(folder / LOCK, refusal):
        yield


def claim(folder: Path, inputs: Mapping[str, Any]) -> bool:
    """See that the answers in ``folder`` are of these inputs; whether any were made there.

    Methods may be added, and changed as long as they have no answers; where none is missing, it is
    no matter how one more would be decoded. How many answers a prompt has may change: each has its
    own seed. Raises ConfigError naming the first input that differs.
    """
    before, now = _read(folder / FILE), json.loads(json.dumps(inputs))
    begun = {
        file.stem: done
        for file in (folder / ANSWERS).glob("*.jsonl")
        if (done := AnswerFile(file).done)
        and not _made_elsewhere(before["methods"], now["methods"], file.stem)
    }
    theirs = {name: found for name, found in before["methods"].items() if name in begun}
    for name in theirs.keys() & now["methods"].keys():
        method = now["methods"][name]
        wanted = now["methods"].get(method.get("of"), method).get("replicates", 1)
        made = sum(replicate < wanted for _, replicate in begun[name])
        if made >= now["prompts"]["n"] * wanted:
            for key in _DECODED_BY & method.keys():
                method[key] = theirs[name].get(key)
    for key, old, new in _differences(before | {"methods": theirs}, now) if begun else ():
        raise ConfigError(
            f"{folder} holds an evaluation with {key}: {old!r}, not {new!r}; give the same "
            "again to go on, or another --out"
        )
    now["methods"] = before["methods"] | now["methods"]
    write_atomically(folder / FILE, json.dumps(now, indent=2, ensure_ascii=False) + "\n")
    (folder / ANSWERS).mkdir(exist_ok=True)
    return bool(begun)


def _made_elsewhere(before: Mapping[str, Any], now: Mapping[str, Any], name: str) -> bool:
    """Whether a method's answers are copies of a file, now as before: made anew every time."""
    old = before.get(name, {})
    return old.get("kind") == now.get(name, old).get("kind") == "answers"


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {"methods": {}}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: {first_line(error)}; give another --out") from error
    if not isinstance(found, dict) or not isinstance(found.get("methods"), dict):
        raise ConfigError(f"{path}: not that of an evaluation; give another --out")
    return found


def _differences(
    old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Dotted keys of ``new`` whose value in ``old`` is another; methods only in one are passed.

    So are numbers of answers, and names of what is the same by its checksum.
    """
    for key, value in new.items():
        path = f"{prefix}{key}"
        if (prefix == "methods." and key not in old) or key in _MAY_GROW:
            continue
        check = _KNOWN_BY.get(key)
        if check is not None and new.get(check) and old.get(check) == new[check]:
            continue
        if isinstance(value, dict) and isinstance(old.get(key), dict):
            yield from _differences(old[key], value, f"{path}.")
        elif old.get(key) != value:
            yield path, old.get(key), value
