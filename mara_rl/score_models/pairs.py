"""Preference pairs: two answers to one prompt, the better one named."""

import json
import os
import random
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from mara_rl.common.errors import DataError

LONGEST_PROMPT = 240  # characters, of prompts drawn for making pairs

NonBlank = Annotated[str, StringConstraints(pattern=r"\S")]


class Pair(BaseModel):
    """``chosen`` is the better answer to ``prompt``.

    ``kind`` says what the pair tests, ``weight`` how much it counts in a fit, ``answerable`` that
    the prompt deserves an answer. Other fields of a row (an id, a source) are ignored. An answer
    may be empty, a prompt may not.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    prompt: NonBlank
    chosen: str
    rejected: str
    kind: str = ""
    weight: float = Field(default=1.0, gt=0)
    answerable: bool = False


class Response(BaseModel):
    """An answer to score; its other fields are kept."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    prompt: NonBlank
    response: str


class PromptRow(BaseModel):
    """A prompt to answer; other fields are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    prompt: NonBlank


Row = TypeVar("Row", bound=BaseModel)


def read_rows(path: Path, row_type: type[Row]) -> list[Row]:
    """The rows of a UTF-8 JSON-lines file, blank lines skipped.

    Raises DataError naming the file, and the line and field where one is wrong.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} could not be read: {error}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(row_type.model_validate_json(line))
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "row"
            wanted = ", ".join(name for name, f in row_type.model_fields.items() if f.is_required())
            raise DataError(
                f"{path}, line {number}: {field}: {first['msg']} "
                f"(expected a JSON object with the texts {wanted})"
            ) from error
    if not rows:
        raise DataError(f"{path} is empty; expected one JSON object a line")
    return rows


def draw_prompts(path: Path, count: int, rng: random.Random) -> list[str]:
    """``count`` different prompts of at most `LONGEST_PROMPT` characters, drawn from a file."""
    texts = dict.fromkeys(row.prompt for row in read_rows(path, PromptRow))
    short = [text for text in texts if len(text) <= LONGEST_PROMPT]
    if len(short) < count:
        raise DataError(
            f"{path} holds {len(short)} different prompts of at most {LONGEST_PROMPT} characters; "
            f"expected {count} or more"
        )
    return rng.sample(short, count)


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write JSON lines to ``path``, which appears only once it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        os.replace(scratch, path)
    except BaseException:
        os.unlink(scratch)
        raise
