"""A short soak of the endpoint: the benchmark itself says what is wrong."""

import subprocess
import sys
from pathlib import Path

import pytest
from endpoints import make_backend, running_endpoint

from mara_rl.llm.policy_llm import load_policy_llm

SOAK = Path(__file__).parents[3] / "benchmarks" / "soak.py"


@pytest.mark.slow
def test_two_hundred_requests_of_every_kind(tiny_llms):
    llm = load_policy_llm(str(tiny_llms["llama"]), device="cpu", dtype="float32")
    backend = make_backend(llm, slots=8, max_waiting=64)
    with running_endpoint(backend) as (url, _):
        command = [sys.executable, SOAK, "--url", url, "--requests", "200", "--concurrent", "32"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "slots left in use: 0;" in done.stdout
