"""Answers on disk: one json line each, appended as they are made, read back after a kill."""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self, TextIO

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from mara_rl.common.atomic_write import write_atomically
from mara_rl.common.errors import DataError, first_line, first_problem
from mara_rl.decoding.answer import DecodedAnswer
from mara_rl.evaluation.prompt_set import PromptSet
from mara_rl.prompts.prompt_files import PromptRecord

_TEXT_FIELDS = ("answer", "text", "output", "response")
_PROMPT_FIELDS = ("prompt", "instruction")


class Answer(BaseModel):
    """One answer of a method. What a method does not know of its answers stays None.

    Attributes:
        id, replicate: which prompt, and the how manieth answer to it.
        finish_reason: "stop" or "length".
        tokens: its length.
        examined: candidates that looking at one after the other would have needed.
        looked: candidates put through the LLM for it.
        kl: in nats; see `DecodedAnswer`.
        positions: tokens that were their position's first, second, … candidate.
        forwards: tokens put through LLMs for it, its share of the prompt's included.
        seconds: its share of the time decoding took.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    replicate: int
    text: str
    finish_reason: str | None = None
    tokens: int | None = None
    examined: int | None = None
    looked: int | None = None
    kl: float | None = None
    positions: tuple[int, ...] | None = None
    forwards: float | None = None
    seconds: float | None = None

    @classmethod
    def of(
        cls, id: str, replicate: int, decoded: DecodedAnswer, *, forwards: float, seconds: float
    ) -> Self:
        """What a decoder made, with its share of what decoding took."""
        return cls(
            id=id,
            replicate=replicate,
            text=decoded.text,
            finish_reason=decoded.finish_reason,
            tokens=len(decoded.token_ids),
            examined=decoded.examined,
            looked=decoded.looked,
            kl=decoded.kl,
            positions=tuple(np.bincount(decoded.choices).tolist()),
            forwards=forwards,
            seconds=seconds,
        )


class AnswerFile:
    """The answers of one method, appended to a file while they are made."""

    def __init__(self, path: Path) -> None:
        """Reads what is there; a last line that a kill tore is cut off the file."""
        self.path = path
        self.done = _read(path)
        self._file: TextIO | None = None

    def __enter__(self) -> "AnswerFile":
        self._file = open(self.path, "a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def append(self, *answers: Answer) -> None:
        """Keep answers: they are on disk when this returns."""
        if self._file is None:
            raise ValueError("append outside of the with block")
        self._file.writelines(a.model_dump_json(exclude_none=True) + "\n" for a in answers)
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done.update(((answer.id, answer.replicate), answer) for answer in answers)

    def table(self, ids: Sequence[str], replicates: int) -> list[list[Answer]]:
        """All answers, by prompt and replicate."""
        return [[self.done[name, number] for number in range(replicates)] for name in ids]


def write_answers(path: Path, table: Sequence[Sequence[Answer]]) -> None:
    """Write a whole table at once: of answers chosen from others', or made elsewhere."""
    lines = [answer.model_dump_json(exclude_none=True) for row in table for answer in row]
    write_atomically(path, "".join(line + "\n" for line in lines))


def read_foreign_answers(path: str, prompts: PromptSet) -> list[list[Answer]]:
    """Answers that were made elsewhere, as many to each prompt as the file has.

    A row holds the answer in ``answer``, ``text``, ``output`` or ``response``, and names its prompt
    by ``id`` or by its text in ``prompt`` or ``instruction``. Rows of prompts that were left out
    are passed over; where a prompt stands in the prompt file more than once, the answers to the
    first count. Rows of other prompts are an error, and so are prompts without an answer.

    Raises DataError naming the file and the row or prompt.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(f"{path}: no such file")
    by_id = {prompt.prompt_id: prompt for prompt in prompts.read}
    by_text = {prompt.text: prompt for prompt in reversed(prompts.read)}
    lines_of_id = Counter(prompt.prompt_id for prompt in prompts.read)
    lines_of_text = Counter(prompt.text for prompt in prompts.read)
    found: dict[str, list[Answer]] = {name: [] for name in prompts.ids}
    lines: dict[str, int] = {}  # lines of the prompt file that a prompt's answers may be to
    rows = 0
    for place, row in _foreign_rows(file):
        rows += 1
        prompt = _prompt_of(f"{path}, {place}", row, by_id, by_text)
        text = next((row[field] for field in _TEXT_FIELDS if field in row), None)
        if not isinstance(text, str):
            raise DataError(
                f"{path}, {place}: no answer text; expected {' or '.join(_TEXT_FIELDS)}"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{path}, {place}: not text ({first_line(error)})") from error
        if prompt.prompt_id in found:
            answers = found[prompt.prompt_id]
            answers.append(Answer(id=prompt.prompt_id, replicate=len(answers), text=text))
            named = row.get("id") not in (None, "")
            lines[prompt.prompt_id] = (
                lines_of_id[prompt.prompt_id] if named else lines_of_text[prompt.text]
            )
    if not rows:
        raise DataError(f"{path}: no answers in it")
    missing = [name for name, answers in found.items() if not answers]
    if missing:
        raise DataError(
            f"{path}: no answer to {len(missing)} of {len(found)} prompts (the first: "
            f"{missing[0]!r}); expected answers to the same prompts"
        )
    # As many answers to every line of the prompt file: those to a prompt's first line count.
    per_line = {len(answers) / lines[name] for name, answers in found.items()}
    if len(per_line) == 1 and (each := per_line.pop()).is_integer():
        for answers in found.values():
            del answers[int(each) :]
    counts = sorted({len(answers) for answers in found.values()})
    if len(counts) > 1:
        raise DataError(
            f"{path}: {counts[0]} to {counts[-1]} answers a prompt; expected one number"
        )
    return list(found.values())


def _prompt_of(
    place: str,
    row: Mapping[str, object],
    by_id: Mapping[str, PromptRecord],
    by_text: Mapping[str, PromptRecord],
) -> PromptRecord:
    text = next((row[field] for field in _PROMPT_FIELDS if field in row), None)
    if row.get("id") not in (None, ""):
        prompt = by_id.get(str(row["id"]))
        if prompt is None:
            raise DataError(f"{place}: id {row['id']!r} is none of the {len(by_id)} prompts")
        if text is not None and text != prompt.text:
            raise DataError(f"{place}: prompt {str(text)[:40]!r}… is not that of id {row['id']!r}")
        return prompt
    if text is None:
        raise DataError(f"{place}: neither id nor prompt; expected one of them")
    if not isinstance(text, str) or text not in by_text:
        raise DataError(f"{place}: prompt {str(text)[:40]!r}… is none of the {len(by_id)} prompts")
    return by_text[str(text)]


def _foreign_rows(file: Path) -> list[tuple[str, dict[str, object]]]:
    try:
        content = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text ({first_line(error)})") from error
    if file.suffix == ".json":
        try:
            rows = json.loads(content) if content.strip() else []
        except json.JSONDecodeError as error:
            raise DataError(f"{file}: not JSON ({error})") from error
        if not isinstance(rows, list):
            raise DataError(f"{file}: expected a list of objects, got {type(rows).__name__}")
        placed = [(f"item {number}", row) for number, row in enumerate(rows, start=1)]
    else:
        placed = []
        for number, line in enumerate(content.split("\n"), start=1):
            if not line.strip():
                continue
            try:
                placed.append((f"line {number}", json.loads(line)))
            except json.JSONDecodeError as error:
                raise DataError(f"{file}, line {number}: not JSON ({error})") from error
    for place, row in placed:
        if not isinstance(row, dict):
            raise DataError(f"{file}, {place}: expected an object, got {type(row).__name__}")
    return placed


def _read(path: Path) -> dict[tuple[str, int], Answer]:
    if not path.is_file():
        return {}
    content = path.read_bytes()
    whole, _, torn = content.rpartition(b"\n")
    if torn:
        with open(path, "r+b") as file:
            file.truncate(len(content) - len(torn))
    done: dict[tuple[str, int], Answer] = {}
    for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
        try:
            answer = Answer.model_validate_json(line)
        except ValidationError as error:
            raise DataError(f"{path}, line {number}: {first_problem(error)}") from error
        done[answer.id, answer.replicate] = answer
    return done
