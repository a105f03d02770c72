import json
import os
import subprocess
import sys
from pathlib import Path

import mlflow.pyfunc
import numpy as np
import pytest
import torch
from linked_packages import link_packages
from mlflow.exceptions import MlflowException
from packaging.requirements import Requirement

from mara_rl.agents.agent_files import load_agent
from mara_rl.tracking.store import mlflow_client
from mara_rl.tracking.tracking_run import TrackingRun


def inputs(rows: int, prefix: bool) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    h, h_prefix = generator.normal(size=(2, rows, 6)).astype(np.float32)
    base_logit = np.linspace(-3, 3, rows, dtype=np.float32)
    return {"h": h, "base_logit": base_logit} | ({"h_prefix": h_prefix} if prefix else {})


def expected(folder: Path, values: dict[str, np.ndarray]) -> np.ndarray:
    tensors = {name: torch.from_numpy(value) for name, value in values.items()}
    with torch.inference_mode():
        return load_agent(folder).accept_logit(**tensors).sigmoid().numpy()


def logged_location(uri: str, folder: Path) -> str:
    """Log the agent; where the model lies."""
    with TrackingRun.start(uri, "pyfunc", "run", {}) as run:
        model_uri = run.log_agent(folder)
    model = mlflow_client(uri).get_logged_model(model_uri.removeprefix("models:/"))
    assert model.status == "READY"
    return model.artifact_location


@pytest.mark.parametrize("head", ["paper", "anchored", "relative", "advantage"])
def test_the_model_is_the_agent(sqlite_uri, make_agent, head):
    folder = make_agent(head=head)
    model = mlflow.pyfunc.load_model(logged_location(sqlite_uri, folder))
    for rows in (1, 5):
        values = inputs(rows, prefix=head in ("relative", "advantage"))
        found = model.predict(values)
        assert found.dtype == np.float32
        assert found.shape == (rows,)
        np.testing.assert_allclose(found, expected(folder, values), rtol=1e-5, atol=1e-6)


def test_the_signature_refuses_other_inputs(sqlite_uri, make_agent):
    model = mlflow.pyfunc.load_model(logged_location(sqlite_uri, make_agent()))
    values = inputs(3, prefix=True)
    assert model.metadata.get_input_schema().input_names() == ["h", "base_logit", "h_prefix"]
    with pytest.raises(MlflowException, match="h_prefix"):
        model.predict({name: values[name] for name in ("h", "base_logit")})
    with pytest.raises(MlflowException, match="shape"):
        model.predict(values | {"h": values["h"][:, :4]})
    with pytest.raises(MlflowException, match="type"):
        model.predict(values | {"h": values["h"].astype(np.float64)})


PREDICT = """
import json, sys
import mlflow, numpy as np
for missing in ("mara_rl", "transformers", "ray"):
    try:
        __import__(missing)
    except ModuleNotFoundError:
        continue
    sys.exit(f"{missing} is here")
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(sys.argv[2])
values = {name: np.array(rows, dtype=np.float32) for name, rows in json.load(sys.stdin).items()}
print(json.dumps(model.predict(values).tolist()))
"""


@pytest.mark.slow
def test_the_registered_model_loads_where_only_its_requirements_are(
    mlflow_server, make_agent, tmp_path
):
    from mara_rl.tracking.registry import AgentRegistry

    folder = make_agent()
    with TrackingRun.start(mlflow_server.uri, "pyfunc", "run", {}) as run:
        model_uri = run.log_agent(folder)
    AgentRegistry(mlflow_server.uri).register("mara-clean-venv", model_uri, {})
    client = mlflow_client(mlflow_server.uri)
    location = client.get_logged_model(model_uri.removeprefix("models:/")).artifact_location
    requirements = mlflow.artifacts.download_artifacts(
        f"{location}/requirements.txt", dst_path=tmp_path, tracking_uri=mlflow_server.uri
    )
    needed = [Requirement(line) for line in Path(requirements).read_text().splitlines()]
    assert [requirement.name for requirement in needed] == ["mlflow", "numpy", "torch"]

    packages = link_packages(tmp_path / "packages", needed)
    values = inputs(4, prefix=True)
    answer = subprocess.run(
        [
            sys.executable,
            "-S",
            "-c",
            PREDICT,
            mlflow_server.uri,
            "models:/mara-clean-venv@candidate",
        ],
        input=json.dumps({name: value.tolist() for name, value in values.items()}),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(packages)},
    )
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout.splitlines()[-1])
    np.testing.assert_allclose(found, expected(folder, values), rtol=1e-5, atol=1e-6)
