from pathlib import Path

import pytest
from tiny_checkpoints import write_llm


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny chat LLM of three layers."""
    return write_llm(tmp_path_factory.mktemp("tiny-llm"))
