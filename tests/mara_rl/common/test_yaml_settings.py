"""Settings that extend others: merged key by key, every fault of the chain on one line."""

from pathlib import Path

import pytest

from mara_rl.common.errors import ConfigError
from mara_rl.common.yaml_settings import read_settings


@pytest.fixture
def presets(tmp_path: Path) -> Path:
    folder = tmp_path / "presets"
    folder.mkdir()
    (folder / "small.yaml").write_text("a: {x: 1, y: [1, 2]}\nb: {z: 1}\nc: 1\n")
    (folder / "large.yaml").write_text("extends: small\na: {x: 10}\n")
    return folder


def test_mappings_merge_and_the_rest_is_replaced(tmp_path: Path, presets: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "mine.yaml").write_text("extends: more/base.yaml\na: {y: [3], w: 0}\nb: null\n")
    (tmp_path / "more" / "base.yaml").write_text("extends: large\nc: {n: 1}\n")
    assert read_settings("config", str(tmp_path / "mine.yaml"), presets, ["a.w=7"]) == {
        "a": {"x": 10, "y": [3], "w": 7},
        "b": None,
        "c": {"n": 1},
    }
    assert read_settings("config", "small", presets) == {
        "a": {"x": 1, "y": [1, 2]},
        "b": {"z": 1},
        "c": 1,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: huge", "extends 'huge': neither a preset (large, small) nor a file"),
        ("extends: [small]", "extends: ['small']; expected a preset or a file by name"),
        ("extends: null", "extends: None; expected a preset or a file by name"),
        ("extends: other.yaml", "extends 'other.yaml': extends 'mine.yaml': extends itself"),
        ("extends: mine.yaml", "extends 'mine.yaml': extends itself"),
        ("extends: broken.yaml", "extends 'broken.yaml': not YAML"),
        ("extends: list.yaml", "extends 'list.yaml': expected a mapping"),
    ],
)
def test_what_cannot_be_extended_is_named_on_one_line(
    tmp_path: Path, presets: Path, text: str, message: str
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    (tmp_path / "other.yaml").write_text("extends: mine.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError) as caught:
        read_settings("config", str(path), presets)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"config {str(path)!r}: ")
    assert "\n" not in str(caught.value)
