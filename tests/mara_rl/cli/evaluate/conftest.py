"""Tiny LLMs, an agent, score models and prompts, and the command over them."""

import sys
from pathlib import Path

import pytest
from evaluate_command import N, write_rows
from small_agents import make_agent, random_agent
from tiny_checkpoints import BeaverFolder, write_classifier

from mara_rl.agents.agent_files import save_agent
from mara_rl.cli import app
from mara_rl.llm.policy_llm import load_policy_llm


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_llms) -> dict[str, str]:
    """Folders and files by name: two LLMs, an agent, two score models, prompts."""
    root = tmp_path_factory.mktemp("made")
    llm = load_policy_llm(str(tiny_llms["llama"]), device="cpu", dtype="float32")
    save_agent(random_agent(llm, "relative", top_k=6, llm=llm.name), root / "agent")
    save_agent(random_agent(llm, "relative", top_k=6, llm=llm.name, rule="sample"), root / "own")
    save_agent(make_agent(), root / "small")
    made = {
        "llm": llm.name,
        "other": str(tiny_llms["qwen3"]),
        "twin": str(root / "another-name"),
        "agent": str(root / "agent"),
        "sampling": str(root / "own"),
        "small": str(root / "small"),
        "reward": str(write_classifier(root / "reward", num_labels=1)),
        "cost": str(BeaverFolder(root / "cost").write()),
        "prompts": str(root / "prompts.jsonl"),
        "root": str(root),
    }
    rows = [
        {"id": f"p{i}", "prompt": f"Question {i}?", "kind": ("ordinary", "harmful")[i % 2]}
        for i in range(N)
    ]
    write_rows(made["prompts"], [*rows, {"id": "twin", "prompt": "question 3"}])
    Path(made["twin"]).symlink_to(made["llm"])
    made["common"] = "\n".join(
        ("--agent", made["agent"], "--prompts", made["prompts"], "--max-new-tokens", "12",
         "--judge", f"tiny={made['reward']},{made['cost']},training", "--set", "resamples=200")
    )  # fmt: skip
    return made


@pytest.fixture
def evaluate(monkeypatch, capsys):
    """Runs ``mara-rl evaluate …`` and returns its exit status, output and error output."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mara-rl", "evaluate", *map(str, arguments)])
        status = 0
        try:
            app.main()
        except SystemExit as end:
            status = int(end.code or 0)
        return status, *capsys.readouterr()

    return run
