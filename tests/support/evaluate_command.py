"""What the tests of ``mara-rl evaluate`` write, pass and read."""

import json
from collections.abc import Sequence
from pathlib import Path

N = 10  # prompts


def write_rows(path: object, rows: Sequence[object]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    Path(str(path)).write_text(text, encoding="utf-8")


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def common(made) -> list[str]:
    return made["common"].split("\n")


def base_alone(made) -> list[str]:
    """`common` without the agent."""
    return ["--llm", made["llm"], *common(made)[2:], "--methods", "base"]


def answered(text: str) -> list[dict]:
    return [{"id": f"p{i}", "answer": f"{text} {i}"} for i in range(N)]


def comparable(summary: dict) -> dict:
    """A summary without what differs from run to run: time and, by a few tokens, its cost."""
    kept = json.loads(json.dumps(summary))
    kept.pop("provenance")
    for method in kept["methods"].values():
        for figure in ("tokens_per_s", "forwards_per_token", "kl_per_token", "kl_per_answer"):
            method["decoding"].pop(figure, None)
    return kept
