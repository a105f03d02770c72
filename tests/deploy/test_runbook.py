"""The runbook's entries are whole, and the lines it quotes are those that the code writes."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
ENTRIES = re.split(r"^### ", TEXT, flags=re.MULTILINE)[1:]


def source() -> str:
    """All code as one text, literals that stand on consecutive lines joined."""
    paths = (p for part in ("mara_rl", "services", "envs") for p in (ROOT / part).rglob("*.py"))
    text = "\n".join(path.read_text(encoding="utf-8") for path in paths)
    text = re.sub(r"\"\n\s*f?\"", "", text)
    return re.sub(r"\{[^{}\n]*\}", "…", text)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.splitlines()[0])
def test_an_entry_says_where_why_and_what_to_do(entry: str) -> None:
    lines = entry.split("\n## ")[0].strip().splitlines()[1:]
    assert [line[: line.index("**:")] for line in lines] == ["- **Where", "- **Cause", "- **Do"]


def test_quoted_lines_of_the_log_are_in_the_code() -> None:
    code = source()
    quoted = [
        span
        for entry in ENTRIES
        for where in re.findall(r"^- \*\*Where\*\*: (.*)$", entry, re.MULTILINE)
        for part in where.split("; ")
        if part.lower().startswith("log: ")
        for span in re.findall(r"`([^`]+)`", part)
        if " " in span
    ]
    assert len(quoted) > 20
    unknown = [
        piece.strip()
        for span in quoted
        for piece in span.split("…")
        if len(piece.strip()) > 3 and piece.strip() not in code
    ]
    assert not unknown


def test_metrics_and_settings_that_are_named_exist() -> None:
    code = "\n".join(
        path.read_text(encoding="utf-8")
        for part in ("mara_rl", "services")
        for path in (ROOT / part).rglob("*.py")
    )
    for name in re.findall(r"`(?:rollout|learner|time)/(\w+)`", TEXT):
        assert f'"{name}"' in code or f"/{name}" in code, name
    for section, name in re.findall(r"`(rollouts|ppo|scoring|prompts|checkpoint)\.(\w+)`", TEXT):
        assert re.search(rf"^    {name}: ", code, re.MULTILINE), f"{section}.{name}"
