"""Fixtures: a real ``mlflow server``, ready-made SQLite stores, agents to register."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from mlflow_servers import MLflowDoor, MLflowServer

from mara_rl.agents.agent import Agent, AgentSpec
from mara_rl.agents.agent_files import save_agent
from mara_rl.tracking.store import mlflow_client


@pytest.fixture(scope="session")
def migrated_db(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database with all its tables, which take seconds to create."""
    path = tmp_path_factory.mktemp("migrated") / "mlflow.db"
    mlflow_client(f"sqlite:///{path}").search_experiments(max_results=1)
    return path


@pytest.fixture
def sqlite_uri(migrated_db: Path, tmp_path: Path) -> str:
    shutil.copy(migrated_db, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture(scope="session")
def mlflow_server(
    migrated_db: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MLflowServer]:
    folder = tmp_path_factory.mktemp("mlflow-server")
    shutil.copy(migrated_db, folder)
    server = MLflowServer(folder)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def own_server(mlflow_server: MLflowServer) -> Iterator[MLflowDoor]:
    """A server that this test alone may kill and start again."""
    door = MLflowDoor(mlflow_server)
    yield door
    door.kill()


@pytest.fixture(params=[pytest.param("server", marks=pytest.mark.slow), "sqlite"])
def uri(request: pytest.FixtureRequest) -> str:
    """Each kind of MLflow in turn: a server and a plain SQLite file."""
    if request.param == "sqlite":
        return request.getfixturevalue("sqlite_uri")
    return request.getfixturevalue("mlflow_server").uri


@pytest.fixture
def make_agent(tmp_path: Path) -> Callable[..., Path]:
    """Writes agents with random weights to folders of their own."""

    def make(seed: int = 0, head: str = "relative", hidden_size: int = 6) -> Path:
        torch.manual_seed(seed)
        agent = Agent(AgentSpec(hidden_size=hidden_size, head=head, llm="some/llm"))
        torch.nn.init.normal_(agent.network.output_linear.weight)
        folder = tmp_path / f"agent-{head}-{seed}"
        save_agent(agent, folder, metadata={"seed": seed})
        return folder

    return make
