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


def preset_or_file(kind: str, name_or_path: str, presets: Traversable) -> str:
    """The text of a preset by name, or of a file. Raises ConfigError where it is neither."""
    if name_or_path in names_in(presets):
        return (presets / f"{name_or_path}.yaml").read_text(encoding="utf-8")
    if Path(name_or_path).is_file():
        try:
            return Path(name_or_path).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            reason = f"not UTF-8 text ({first_line(error)})"
            raise ConfigError(f"{kind} {name_or_path!r}: {reason}") from error
    known = ", ".join(names_in(presets))
    raise ConfigError(f"{kind} {name_or_path!r}: neither a preset ({known}) nor a file")


def read_settings(text: str, name: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The mapping in ``text`` with ``a.b=c`` overrides (values in YAML) put in.

    ``name`` is what errors call the text. Raises ConfigError, one line, for what is no YAML or no
    mapping, for a key that stands twice and for an override that does not fit.
    """
    try:
        values = yaml.load(text, Loader=_StrictLoader)  # noqa: S506  (a SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not YAML: {_one_line(error)}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{name}: expected a mapping of settings")
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
