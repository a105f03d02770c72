"""One MLflow run: params, metrics that outlive a server's absence, artifacts, agents."""

import importlib.metadata
import json
import logging
import math
import re
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import mlflow.pyfunc
import numpy as np
from mlflow.entities import LoggedModelOutput, LoggedModelStatus, Metric, Param, RunTag
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, Schema, TensorSpec

from mara_rl.agents.agent import AgentSpec
from mara_rl.agents.agent_files import SPEC_FILE, WEIGHTS_FILE, read_agent_spec
from mara_rl.common.errors import DataError, MaraError
from mara_rl.tracking.flat_values import flat_metrics, flat_params
from mara_rl.tracking.store import experiment_id, mlflow_calls, mlflow_client

_MODEL_CODE = Path(__file__).with_name("agent_pyfunc.py")
_MODEL_NAME = "agent"
_PARAMS_PER_CALL = 100
_METRICS_PER_CALL = 1000
_TAG_CHARS = 5000
_PAUSE_S = 30.0  # between attempts while the server is known to be away
_logger = logging.getLogger(__name__)
_T = TypeVar("_T")

MetricBatch = list[tuple[str, float, int, int]]
"""Metrics as plain data: key, value, milliseconds since 1970, step."""


class TrackingRun:
    """An MLflow run; a context manager that ends it FINISHED, FAILED or (Ctrl-C) KILLED.

    Attributes:
        run_id: its id, with which `start` resumes it.
        non_finite: how often each metric was NaN or infinite, and therefore not logged.
    """

    def __init__(self, uri: str, run_id: str, experiment: str) -> None:
        self.uri = uri
        self.run_id = run_id
        self.non_finite: Counter[str] = Counter()
        self._client = mlflow_client(uri)
        self._experiment_id = experiment
        self._buffer: deque[list[Metric]] = deque()
        self._last_steps: dict[str, int] = {}
        self._next_attempt = 0.0

    @classmethod
    def start(
        cls,
        uri: str,
        experiment: str,
        run_name: str,
        config: Mapping[str, Any],
        run_id: str | None = None,
        unsent: Sequence[MetricBatch] = (),
    ) -> "TrackingRun":
        """Begin a run, or go on with the run ``run_id`` (then the names given play no part).

        ``unsent`` is what `unsent` returned when the run was saved. Steps that a metric has by now
        are not logged again: of work that is done again the first figures stay.

        ``config`` is logged as params and, whole, as ``config.json``. Of a resumed run the first
        value of a param stays (MLflow never changes one); what differs is a tag ``resumed.<key>``.
        Raises DataError for a ``run_id`` that is unknown or deleted, RetryableError when the
        server is away.
        """
        client = mlflow_client(uri)
        with mlflow_calls(uri):
            if run_id is None:
                created = client.create_run(experiment_id(client, experiment), run_name=run_name)
            else:
                created = client.get_run(run_id)
                if created.info.lifecycle_stage != "active":
                    raise DataError(f"MLflow run {run_id} is deleted; restore it to resume")
                client.update_run(run_id, status="RUNNING")
            run = cls(uri, created.info.run_id, created.info.experiment_id)
            run._log_config(config, created.data.params)
            for key in created.data.metrics:
                history = client.get_metric_history(run.run_id, key)
                run._last_steps[key] = max(metric.step for metric in history)
        for batch in unsent:
            run._append([Metric(*metric) for metric in batch])
        return run

    @property
    def buffered(self) -> int:
        """How many `log_metrics` batches wait for the server to come back."""
        return len(self._buffer)

    @property
    def unsent(self) -> list[MetricBatch]:
        """What is buffered, as plain data for a checkpoint."""
        return [[(m.key, m.value, m.timestamp, m.step) for m in batch] for batch in self._buffer]

    def log_metrics(self, metrics: Mapping[str, Any], step: int) -> None:
        """Log numbers (nested: keys joined with ``/``) at ``step``, with the time of this call.

        A metric's steps only grow: one that has ``step`` or a later one is left out. Values that
        are not finite are dropped and counted. While the server is away batches are kept in memory
        and go out later, in order, so this never raises for that. Raises DataError for a value
        that is not a number or when MLflow refuses the batch.
        """
        now_ms = time.time_ns() // 1_000_000
        batch = []
        for key, value in flat_metrics(metrics).items():
            if math.isfinite(value):
                batch.append(Metric(key, value, now_ms, step))
            else:
                self.non_finite[key] += 1
        self._append(batch)
        if time.monotonic() >= self._next_attempt:
            self._try_flush()

    def flush(self) -> None:
        """Send what is buffered. Raises RetryableError when the server is still away."""
        with mlflow_calls(self.uri):
            self._send_buffer()

    def log_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run. Raises RetryableError or DataError as `log_artifact`."""
        with mlflow_calls(self.uri):
            self._client.log_batch(self.run_id, tags=[RunTag(k, v) for k, v in tags.items()])

    def log_artifact(self, path: Path, artifact_path: str | None = None) -> None:
        """Upload a file into the folder ``artifact_path`` of the run.

        Raises RetryableError when the server is away, DataError when it refuses or there is no
        such file.
        """
        if not path.is_file():
            raise DataError(f"artifact {path}: no such file")
        with mlflow_calls(self.uri, timeout_s=60):
            self._client.log_artifact(self.run_id, str(path), artifact_path)

    def log_artifacts(self, folder: Path, artifact_path: str | None = None) -> None:
        """Upload what a folder holds; errors as `log_artifact`."""
        if not folder.is_dir():
            raise DataError(f"artifacts {folder}: no such folder")
        with mlflow_calls(self.uri, timeout_s=60):
            self._client.log_artifacts(self.run_id, str(folder), artifact_path)

    def log_agent(self, folder: Path) -> str:
        """Log a folder of `save_agent` as an MLflow model of this run; its ``models:/<id>`` URI.

        The model maps ``h`` (N, H), ``base_logit`` (N,) and, for heads that read it, ``h_prefix``
        (N, H), all float32, to accept probabilities (N,). ``mlflow.pyfunc.load_model`` needs
        mlflow, torch and numpy for it. Raises as `log_artifact`, and DataError when
        ``folder`` holds no agent.
        """
        spec, _ = read_agent_spec(folder)
        if not (folder / WEIGHTS_FILE).is_file():
            raise DataError(f"agent folder {folder} has no {WEIGHTS_FILE}")
        client = self._client
        with (
            mlflow_calls(self.uri, timeout_s=60),
            tempfile.TemporaryDirectory() as scratch,
        ):
            logged = client.create_logged_model(
                self._experiment_id, _MODEL_NAME, source_run_id=self.run_id
            )
            status = LoggedModelStatus.FAILED
            try:
                mlflow.pyfunc.save_model(
                    path=f"{scratch}/model",
                    python_model=str(_MODEL_CODE),
                    artifacts={
                        "weights": str(folder / WEIGHTS_FILE),
                        "spec": str(folder / SPEC_FILE),
                    },
                    signature=_signature(spec),
                    input_example=_example(spec),
                    pip_requirements=_requirements(),
                    mlflow_model=Model(
                        artifact_path=logged.artifact_location,
                        run_id=self.run_id,
                        model_id=logged.model_id,
                        model_uuid=logged.model_id,
                    ),
                )
                client.log_model_artifacts(logged.model_id, f"{scratch}/model")
                status = LoggedModelStatus.READY
            finally:
                client.finalize_logged_model(logged.model_id, status)
            client.log_outputs(self.run_id, [LoggedModelOutput(logged.model_id, step=0)])
        return f"models:/{logged.model_id}"

    def close(self, status: str = "FINISHED") -> None:
        """Send what is buffered and end the run. Raises RetryableError when that cannot be done."""
        self.flush()
        if self.non_finite:
            self.log_tags({"non_finite_metrics": json.dumps(self.non_finite)[:_TAG_CHARS]})
        with mlflow_calls(self.uri):
            self._client.set_terminated(self.run_id, status)

    def __enter__(self) -> "TrackingRun":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        except MaraError as lost:
            # The error that ended the run is the one to report.
            _logger.warning(
                "run %s ended but %d batches lost: %s", self.run_id, self.buffered, lost
            )

    def _append(self, batch: Sequence[Metric]) -> None:
        new = [m for m in batch if m.step > self._last_steps.get(m.key, -1)]
        self._last_steps.update((m.key, m.step) for m in new)
        if new:
            self._buffer.append(new)

    def _log_config(self, config: Mapping[str, Any], known: Mapping[str, str]) -> None:
        params = flat_params(config)
        new = [Param(key, value) for key, value in params.items() if key not in known]
        for chunk in _chunks(new, _PARAMS_PER_CALL):
            self._client.log_batch(self.run_id, params=chunk)
        changed = [
            RunTag(f"resumed.{key}"[:250], value)
            for key, value in params.items()
            if known.get(key, value) != value
        ]
        for tags in _chunks(changed, _PARAMS_PER_CALL):
            self._client.log_batch(self.run_id, tags=tags)
        self._client.log_dict(self.run_id, dict(config), "config.json")

    def _try_flush(self) -> None:
        try:
            retries = 0 if self._next_attempt else 2  # known to be away: ask once
            with mlflow_calls(self.uri, timeout_s=5, retries=retries):
                self._send_buffer()
        except MaraError as error:  # a proxy's 404 and a token that has run out pass as well
            if not self._next_attempt:
                _logger.warning("metrics are kept in memory for now: %s", error)
            self._next_attempt = time.monotonic() + _PAUSE_S
        else:
            self._next_attempt = 0.0

    def _send_buffer(self) -> None:
        while self._buffer:
            for chunk in _chunks(self._buffer[0], _METRICS_PER_CALL):
                self._client.log_batch(self.run_id, metrics=chunk)
            self._buffer.popleft()


def _chunks(items: Sequence[_T], size: int) -> Iterator[list[_T]]:
    for first in range(0, len(items), size):
        yield list(items[first : first + size])


def _signature(spec: AgentSpec) -> ModelSignature:
    state = (-1, spec.hidden_size)
    inputs: list[ColSpec | TensorSpec] = [TensorSpec(np.dtype("float32"), state, "h")]
    inputs.append(TensorSpec(np.dtype("float32"), (-1,), "base_logit"))
    if spec.needs_prefix:
        inputs.append(TensorSpec(np.dtype("float32"), state, "h_prefix"))
    return ModelSignature(Schema(inputs), Schema([TensorSpec(np.dtype("float32"), (-1,))]))


def _example(spec: AgentSpec) -> dict[str, np.ndarray]:
    """One candidate; MLflow stores it beside the model and tries the model with it."""
    state = np.zeros((1, spec.hidden_size), np.float32)
    example = {"h": state, "base_logit": np.zeros(1, np.float32)}
    return example | {"h_prefix": state} if spec.needs_prefix else example


def _requirements() -> list[str]:
    """The pinned packages of the model, without local build tags such as ``+cpu``."""
    packages = ("mlflow", "numpy", "torch")
    return [f"{p}=={re.sub(r'[+].*', '', importlib.metadata.version(p))}" for p in packages]
