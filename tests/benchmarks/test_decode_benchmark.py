"""`make bench-decode` over a tiny LLM: what it prints, and that the worst case is one."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from small_agents import random_agent

from mara_rl.agents.agent_files import save_agent
from mara_rl.llm.policy_llm import load_policy_llm

DECODE = Path(__file__).parents[2] / "benchmarks" / "decode.py"


def bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, DECODE, *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_the_line_of_the_ratio_and_the_worst_case(tiny_llms, tmp_path):
    name = str(tiny_llms["llama"])
    llm = load_policy_llm(name, device="cpu", dtype="float32")
    save_agent(random_agent(llm, "advantage", top_k=6, llm=name), tmp_path / "agent")
    done = bench(
        *("--llm", name, "--agent", tmp_path / "agent", "--prompts", 2, "--tokens", 6),
        *("--batches", 1, 2, "--threads", 1, "--parts", "generate", "worst"),
    )
    assert done.returncode == 0, done.stderr
    of_generate = [line for line in done.stdout.splitlines() if "ratio" in line]
    assert len(of_generate) == 2
    for line in of_generate:
        assert re.fullmatch(r"batch [12]: .*generate.* ratio \d+\.\d{3}", line)
    worst = re.findall(r"batch (\d): worst case, .* k 40, p 1: (\d+\.\d) candidates", done.stdout)
    assert [batch for batch, _ in worst] == ["1", "2"]
    assert all(float(examined) > 6 for _, examined in worst)


def test_without_an_agent_it_says_how_to_get_one(tmp_path):
    done = bench("--agent", tmp_path / "none")
    assert done.returncode == 2
    assert "`make quickstart` trains one" in done.stderr
