"""What linters say of the image and the shell scripts."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def lint(tool: str, *files: Path) -> str:
    """What the linter found; "" for nothing."""
    done = subprocess.run([BIN / tool, *files], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode in (0, 1), done.stderr
    return done.stdout


def test_the_dockerfile() -> None:
    assert lint("hadolint", ROOT / "deploy" / "Dockerfile") == ""


def test_the_scripts() -> None:
    assert lint("shellcheck", ROOT / "deploy" / "submit.sh", ROOT / ".ci" / "run") == ""


@pytest.mark.parametrize(
    ("tool", "name", "text", "rule"),
    [
        ("hadolint", "Dockerfile", "FROM debian\nRUN apt-get install -y wget\n", "DL3008"),
        ("shellcheck", "run.sh", "#!/bin/sh\nrm -r $1/*\n", "SC2086"),
    ],
)
def test_a_fault_is_found(tmp_path: Path, tool: str, name: str, text: str, rule: str) -> None:
    (tmp_path / name).write_text(text)
    assert rule in lint(tool, tmp_path / name)
