"""Settings as people write them: YAML with ``a.b=c`` overrides."""

from collections.abc import Hashable, Sequence
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from mara_rl.common.errors import ConfigError, first_line

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""Names of runs, methods and judges: they become names of files and columns."""


class Section(BaseModel):
    """A part of settings: unknown keys are refused, values are fixed once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def names_in(presets: Traversable) -> list[str]:
    """Names of the YAML files in a folder of the package."""
    return sorted(
        p.name.removesuffix(".yaml") for p in presets.iterdir() if p.name.endswith(".yaml")
    )


def read_settings(
    kind: str, name_or_path: str, presets: Traversable, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """The mapping in a preset or YAML file with ``a.b=c`` overrides (values in YAML) put in.

    It may say ``extends:`` with a preset or the path of a file, relative to its own: it has what
    is there as well, mappings key by key. ``kind`` is what errors call it.

    Raises ConfigError, one line, for what is neither a preset nor a file, no YAML or no mapping,
    for a key that stands twice, files that extend each other and an override that does not fit.
    """
    values: dict[str, Any] = {}
    read: list[Traversable] = []
    label, place, folder = f"{kind} {name_or_path!r}", name_or_path, Path()
    while True:
        source = _find(label, place, folder, presets)
        if source in read:
            raise ConfigError(f"{label}: extends itself; expected an end")
        read.append(source)
        values = _merged(_mapping(label, source), values)
        if "extends" not in values:
            break
        base = values.pop("extends")
        if not isinstance(base, str):
            raise ConfigError(f"{label}: extends: {base!r}; expected a preset or a file by name")
        label, place, folder = f"{label}: extends {base!r}", base, Path(str(source)).parent
    override(values, overrides)
    return values


def override(values: dict[str, Any], overrides: Sequence[str]) -> None:
    """Put ``a.b=c`` overrides (values in YAML) into a mapping.

    Raises ConfigError, one line, for one that does not fit.
    """
    for text in overrides:
        _override(values, text)


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that stands twice, where YAML would take the last one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is not None and key in seen:
                mark = f"line {key_node.start_mark.line + 1}"
                raise yaml.YAMLError(f"key {key!r} stands twice ({mark})")
            seen.add(key)
        return super().construct_mapping(node, deep)


def _override(values: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"--set {override!r}: expected key=value, e.g. ppo.kl_coeff=0.1")
    *parents, last = path.split(".")
    section: Any = values
    for parent in parents:
        if section.get(parent) is None:
            section[parent] = {}
        section = section[parent]
        if not isinstance(section, dict):
            raise ConfigError(f"--set {override!r}: {parent!r} is a value, not a section")
    try:
        section[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: value is not YAML: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _find(label: str, place: str, folder: Path, presets: Traversable) -> Traversable:
    known = names_in(presets)
    if place in known:
        return presets / f"{place}.yaml"
    if not (folder / place).is_file():
        raise ConfigError(f"{label}: neither a preset ({', '.join(known)}) nor a file")
    return (folder / place).resolve()


def _mapping(label: str, source: Traversable) -> dict[str, Any]:
    try:
        values = yaml.load(source.read_text(encoding="utf-8-sig"), Loader=_StrictLoader)  # noqa: S506  (a SafeLoader)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{label}: not UTF-8 text ({first_line(error)})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{label}: not YAML: {_one_line(error)}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{label}: expected a mapping of settings")
    return values


def _merged(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """``values`` over ``base``: mappings key by key, anything else in place of what is there."""
    merged = dict(base)
    for key, value in values.items():
        before = merged.get(key)
        if isinstance(before, dict) and isinstance(value, dict):
            value = _merged(before, value)
        merged[key] = value
    return merged
