"""The prompts of an evaluation: each once, none that training has seen unnoticed."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mara_rl.common.errors import DataError
from mara_rl.evaluation.plan import EvaluationPlan
from mara_rl.prompts.prompt_files import (
    PACKAGED,
    PromptRecord,
    load_prompts,
    prompt_hash,
    read_records,
)

_MEANT = "#%&@/"
_EMOJI_STYLE = "\ufe0f"


@dataclass(frozen=True)
class PromptSet:
    """N prompts, and what was found while reading them.

    Attributes:
        read: all that the file has, in its order.
        duplicates: how many were left out because an earlier one is the same once normalised.
        seen: ids of those that occur in the training prompts, normalised; left out or not.
        dropped_seen: whether they were left out.
    """

    prompts: Sequence[PromptRecord]
    duplicates: int
    seen: Sequence[str]
    dropped_seen: bool
    read: Sequence[PromptRecord]

    @property
    def ids(self) -> list[str]:
        return [prompt.prompt_id for prompt in self.prompts]

    @property
    def texts(self) -> list[str]:
        return [prompt.text for prompt in self.prompts]

    @property
    def checksum(self) -> str:
        """Depends on ids and texts, in order."""
        return prompt_hash("\n".join(f"{p.prompt_id}\t{p.text}" for p in self.prompts))

    def kinds(self) -> list[str]:
        """``ordinary``, ``harmful``, … of each prompt; "" where the file does not say."""
        return [str(prompt.extra.get("kind") or "") for prompt in self.prompts]

    def groups(self, fields: Sequence[str]) -> dict[str, np.ndarray]:
        """Rows (indices) of the prompts by ``field: value``, of the fields that they have."""
        rows: dict[str, list[int]] = {}
        for field in fields:
            found: dict[str, list[int]] = {}
            for row, prompt in enumerate(self.prompts):
                for value in _labels(prompt.extra.get(field)):
                    found.setdefault(f"{field}: {value}", []).append(row)
            rows |= {name: found[name] for name in sorted(found)}
        return {name: np.array(members) for name, members in rows.items()}


def load_prompt_set(plan: EvaluationPlan) -> PromptSet:
    """The prompts of a plan.

    Raises DataError for a file that is not one of prompts (see `read_records`), in which only some
    prompts have ids, or of which nothing is left.
    """
    return prompt_set(plan, _records(plan.prompts, "heldout"))


def prompt_set(plan: EvaluationPlan, records: Sequence[PromptRecord]) -> PromptSet:
    """Those of ``records`` that the plan is about. Raises DataError where nothing is left."""
    first: dict[str, PromptRecord] = {}
    for record in records:
        first.setdefault(normalised(record.text), record)
    seen: list[str] = []
    if plan.training_prompts is not None:
        trained = {normalised(p.text) for p in _records(plan.training_prompts, "train")}
        seen = [record.prompt_id for text, record in first.items() if text in trained]
    prompts = list(first.values())
    if plan.drop_seen:
        prompts = [prompt for prompt in prompts if prompt.prompt_id not in set(seen)]
        if not prompts:
            raise DataError(f"{plan.prompts}: all {len(seen)} prompts were seen in training")
    if plan.max_prompts is not None and plan.max_prompts < len(prompts):
        chosen = np.linspace(0, len(prompts) - 1, plan.max_prompts).round().astype(int)
        prompts = [prompts[i] for i in chosen]
        kept = {prompt.prompt_id for prompt in prompts}
        seen = [name for name in seen if name in kept or plan.drop_seen]
    return PromptSet(prompts, len(records) - len(first), seen, plan.drop_seen, records)


def normalised(text: str) -> str:
    """Lower-case words: what differs in punctuation, emoji, unseen signs or spacing is one prompt.

    Signs that change what is asked for stay: those of mathematics and money, and # % & @ /.
    """
    plain = unicodedata.normalize("NFKC", text).casefold().replace(_EMOJI_STYLE, "")
    return " ".join("".join(map(_kept, plain)).split()) or text.strip()


def _kept(character: str) -> str:
    kind = unicodedata.category(character)
    if kind == "Cf":  # unseen, also within a word
        return ""
    meant = character in _MEANT or kind[0] in "LMN" or kind in ("Sm", "Sc")
    return character if meant else " "


def _records(name: str, split: Literal["train", "heldout"]) -> list[PromptRecord]:
    if name == PACKAGED:
        return load_prompts(name, split)
    records = read_records(name)
    unnamed = [record for record in records if record.prompt_id == prompt_hash(record.text)]
    if unnamed and len(unnamed) < len(records):
        raise DataError(
            f"{name}: {len(unnamed)} of {len(records)} prompts have no id (the first: "
            f"{unnamed[0].text[:40]!r}…); expected an id for all, or for none"
        )
    return records


def _labels(value: object) -> list[str]:
    """A field's labels: its text, those of a list (each once), or true keys of a mapping."""
    if value is None or value == "":
        return []
    if isinstance(value, dict):
        return [str(key) for key, holds in value.items() if holds]
    if isinstance(value, list):
        return list(dict.fromkeys(str(part) for part in value))
    return [str(value)]
