"""Nested configs and metrics as the flat, short, plainly named values that MLflow takes."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from mara_rl.common.errors import DataError

_KEY_CHARS = 250
_VALUE_CHARS = 500  # what servers before MLflow 2.8 take; the whole config is an artifact
_DIGEST_CHARS = 8


def flat_params(config: Mapping[str, Any]) -> dict[str, str]:
    """Leaves of a nested config by dotted key, values as short JSON (strings as they are)."""
    return {key: _short(value) for key, value in _leaves(config, ".")}


def flat_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Leaves of nested metrics by key joined with ``/``.

    Takes anything ``float()`` takes. Raises DataError naming a metric that is not a number.
    """
    flat: dict[str, float] = {}
    for key, value in _leaves(metrics, "/"):
        try:
            flat[key] = float(value)
        except (TypeError, ValueError):
            raise DataError(f"metric {key!r} is {value!r}; expected a number") from None
    return flat


def plain_key(key: str) -> str:
    """``key`` if MLflow takes it; else a cleaned, cut one that ends in a digest of the original.

    The digest keeps keys apart that would be alike once cleaned.
    """
    parts = [part.strip() for part in re.sub(r"[^\w\-. /]", "_", key, flags=re.ASCII).split("/")]
    plain = "/".join(part for part in parts if part.strip("."))[:_KEY_CHARS]
    if plain and plain == key:
        return key
    digest = hashlib.sha256(key.encode()).hexdigest()[:_DIGEST_CHARS]
    return f"{plain[: _KEY_CHARS - _DIGEST_CHARS - 1]}-{digest}"


def _leaves(values: Mapping[str, Any], separator: str) -> Iterator[tuple[str, Any]]:
    def walk(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, Mapping) and value:
            for key, inner in value.items():
                yield from walk(f"{prefix}{separator}{key}" if prefix else str(key), inner)
        else:
            yield plain_key(prefix), value

    return walk("", values) if values else iter(())


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    if len(text) <= _VALUE_CHARS:
        return text
    note = f"… ({len(text)} characters)"
    return text[: _VALUE_CHARS - len(note)] + note
