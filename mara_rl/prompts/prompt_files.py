"""Prompt files: json lines, the published JSON lists, parquet."""

import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mara_rl.common.errors import DataError, first_line

_log = logging.getLogger(__name__)

PACKAGED = "packaged"

_TEXT_FIELD = {".jsonl": "prompt", ".json": "instruction", ".parquet": "prompt"}


class PromptRecord(NamedTuple):
    """One prompt of a file; ``extra`` holds the fields that are neither its text nor its id."""

    prompt_id: str
    text: str
    extra: dict[str, Any] = {}  # noqa: RUF012  (never written to)


def prompt_hash(text: str) -> str:
    """The id of a prompt that names none: 16 hex digits that depend on its text alone."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def read_prompts(path: str | Path) -> list[PromptRecord]:
    """The prompts of a file, in its order, each text once; dropped duplicates are logged.

    ``.jsonl``: one object a line with ``prompt``. ``.json``: a list of objects with ``instruction``
    (the published form). ``.parquet``: a column ``prompt``. An optional ``id`` (string or whole
    number) names the prompt, else its text does; all other fields are kept in ``extra``.

    Raises DataError as `read_records`.
    """
    records = read_records(path)
    distinct: dict[str, PromptRecord] = {}
    for record in records:
        distinct.setdefault(record.text, record)
    if len(records) > len(distinct):
        _log.warning("%s: dropped %d duplicate prompts", path, len(records) - len(distinct))
    return list(distinct.values())


def read_records(path: str | Path) -> list[PromptRecord]:
    """All prompts of a file, in its order, texts that occur more than once included.

    Raises DataError, naming file and place, for a file that is missing, empty, unreadable or of
    another kind, a prompt that is no text or blank, and an id that names two texts.
    """
    path = Path(path)
    field = _TEXT_FIELD.get(path.suffix)
    if field is None:
        raise DataError(f"{path}: unknown kind of file, expected {', '.join(_TEXT_FIELD)}")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    records: list[PromptRecord] = []
    texts: dict[str, str] = {}
    for place, row in _rows(path):
        record = _record(f"{path}, {place}", row, field)
        if texts.setdefault(record.prompt_id, record.text) != record.text:
            raise DataError(f"{path}, {place}: id {record.prompt_id!r} already names another text")
        records.append(record)
    if not records:
        raise DataError(f"{path}: no prompts in it")
    return records


def load_prompts(name: str, split: Literal["train", "heldout"]) -> list[PromptRecord]:
    """The packaged prompts of a split (``packaged``), or those of a file."""
    if name != PACKAGED:
        return read_prompts(name)
    from mara_rl.prompts import packaged_prompts

    return [
        PromptRecord(p.id, p.prompt, {"kind": p.kind, "category": p.category})
        for p in packaged_prompts(split)
    ]


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Pairs of a row's place ("line 3") and the row, whatever it is."""
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from error
    if path.suffix == ".json":
        rows = _parse(f"{path}", content) if content.strip() else []
        if not isinstance(rows, list):
            raise DataError(f"{path}: expected a list of objects, got {type(rows).__name__}")
        yield from ((f"item {number}", row) for number, row in enumerate(rows, start=1))
        return
    # Not splitlines(): a prompt may hold U+2028 and the like unescaped.
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            yield f"line {number}", _parse(f"{path}, line {number}", line)


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a parquet file ({first_line(error)})") from error
    yield from ((f"row {number}", row) for number, row in enumerate(table.to_pylist(), start=1))


def _parse(place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not JSON ({error})") from error


def _record(place: str, row: Any, field: str) -> PromptRecord:
    if not isinstance(row, dict):
        raise DataError(f"{place}: expected an object, got {type(row).__name__}")
    if field not in row:
        raise DataError(f"{place}: field {field!r} is missing")
    text, name = row[field], row.get("id")
    if not isinstance(text, str):
        raise DataError(f"{place}: {field} is {type(text).__name__}, expected a string")
    if not text.strip():
        raise DataError(f"{place}: {field} is empty")
    for key, value in row.items():
        try:  # with all that is in it
            json.dumps([key, value], ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError as error:
            shown = key.encode(errors="backslashreplace").decode()
            raise DataError(f"{place}: {shown} is not valid Unicode ({error.reason})") from error
    if name is not None and (isinstance(name, bool) or not isinstance(name, str | int)):
        raise DataError(f"{place}: id is {name!r}, expected a string or a whole number")
    extra = {key: value for key, value in row.items() if key not in (field, "id")}
    return PromptRecord(prompt_hash(text) if name in (None, "") else str(name), text, extra)
