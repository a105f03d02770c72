"""Fixtures every test may use: a home of its own, tiny LLMs, the real SmolLM2."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tensors are tiny, and threads that wait for each other take the cores of a test that runs beside.
os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest_plugins = ["mlflow_fixtures"]
SLOW_TIMEOUT_S = 900


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "smollm2" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT_S))


@pytest.fixture(scope="session", autouse=True)
def session_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """MARA_HOME for the whole session, so that SmolLM2 is converted once."""
    before = os.environ.get("MARA_HOME")
    home = tmp_path_factory.mktemp("mara-home")
    os.environ["MARA_HOME"] = str(home)
    yield home
    if before is None:
        del os.environ["MARA_HOME"]
    else:
        os.environ["MARA_HOME"] = before


@pytest.fixture(scope="session")
def tiny_llms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny random LLMs by family; windows are shorter than any prompt."""
    from tiny_llms import save_tiny_llms

    return save_tiny_llms(tmp_path_factory.mktemp("tiny-llms"))


@pytest.fixture(params=["llama", "mistral", "gemma2", "qwen2", "qwen3"])
def any_llm(request: pytest.FixtureRequest, tiny_llms: dict[str, Path]):
    """A tiny LLM of each family in turn, loaded in float32."""
    from mara_rl.llm.policy_llm import load_policy_llm

    return load_policy_llm(str(tiny_llms[request.param]), device="cpu", dtype="float32")


@pytest.fixture(params=["llama", "mistral"])
def tiny_llm(request: pytest.FixtureRequest, tiny_llms: dict[str, Path]):
    """Two tiny LLMs in turn, without and with an attention window, loaded in float32."""
    from mara_rl.llm.policy_llm import load_policy_llm

    return load_policy_llm(str(tiny_llms[request.param]), device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def smollm2():
    """The real SmolLM2-135M-Instruct on the CPU in float32."""
    from mara_rl.llm.policy_llm import SMOLLM2, load_policy_llm

    return load_policy_llm(SMOLLM2, device="cpu", dtype="float32")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """No test depends on what ran before it."""
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(1)  # some commands set it for their process
