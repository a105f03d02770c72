"""Which MLflow to use: the one of ``MLFLOW_TRACKING_URI``, or SQLite under ``MARA_HOME``."""

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlparse

from mara_rl.common.environment import environment_variables
from mara_rl.common.errors import ConfigError, DataError, RetryableError
from mara_rl.common.file_lock import blocking_file_lock
from mara_rl.common.home import mara_home
from mara_rl.common.urls import hide_credentials, hide_credentials_in

if TYPE_CHECKING:
    from mlflow import MlflowClient

_CHECK_TIMEOUT_S = 5
_SQLITE = "sqlite:///"
_RETRIES = 5  # with MLflow's backoff up to about half a minute


def tracking_uri(*, allow_local: bool) -> str:
    """The URI of an MLflow that answers.

    That is ``MLFLOW_TRACKING_URI`` where set. Otherwise, and only if ``allow_local``, the SQLite
    file ``MARA_HOME/mlflow.db``, made on first use (some 5 s); artifacts go to
    ``MARA_HOME/mlflow-artifacts``.

    Raises ConfigError (nothing set, a bad URI, refused access) or RetryableError (an HTTP server
    does not answer within 5 s); credentials in the URI are not shown.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    if uri:
        _check(uri, "MLFLOW_TRACKING_URI")
        return uri
    if not allow_local:
        raise ConfigError(
            "MLFLOW_TRACKING_URI is not set: expected http(s)://host:port, an MLflow server that "
            "every machine of the cluster reaches"
        )
    home = mara_home()
    uri = f"{_SQLITE}{home / 'mlflow.db'}"
    with blocking_file_lock(home / "mlflow.lock"):  # two processes must not both create the tables
        _check(uri, "MLflow database")
    return uri


def mlflow_client(uri: str) -> "MlflowClient":
    """A client of ``uri`` for runs and registry alike, whatever MLflow's process-wide URIs are."""
    _quiet()
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def experiment_id(client: "MlflowClient", name: str) -> str:
    """The id of the experiment ``name``, created if it does not exist.

    With SQLite its artifacts go beside the database file, not to MLflow's default below the
    working directory. Raises ConfigError when the experiment was deleted.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        location = None
        if client.tracking_uri.startswith(_SQLITE):
            database = Path(client.tracking_uri.removeprefix(_SQLITE)).resolve()
            location = (database.parent / "mlflow-artifacts" / slug(name)).as_uri()
        try:
            return client.create_experiment(name, artifact_location=location)
        except MlflowException as error:
            found = client.get_experiment_by_name(name)  # another process was first
            if found is None:
                raise error
    if found.lifecycle_stage != "active":
        raise ConfigError(f"MLflow experiment {name!r} is deleted; restore it or choose another")
    return found.experiment_id


def slug(name: str) -> str:
    """``name`` in lower case with everything but letters, digits, ``.`` and ``_`` as ``-``."""
    return re.sub(r"[^a-z0-9._]+", "-", name.lower()).strip("-.")


@contextlib.contextmanager
def mlflow_calls(uri: str, *, timeout_s: int = 20, retries: int | None = None) -> Iterator[None]:
    """`http_limits` and `mlflow_errors` around calls of MLflow; 5 retries by default."""
    limits = http_limits(timeout_s=timeout_s, retries=_RETRIES if retries is None else retries)
    with limits, mlflow_errors(uri):
        yield


@contextlib.contextmanager
def mlflow_errors(uri: str) -> Iterator[None]:
    """Turn MLflow's errors into one line each.

    Trouble that may pass becomes RetryableError, refused access ConfigError, anything else (an
    unknown run or model, a value MLflow does not take) DataError.
    """
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    where = f"MLflow at {hide_credentials(uri)}"
    try:
        yield
    except RequestException as error:  # up- and downloads of artifacts
        raise RetryableError(f"{where} cannot serve: {_reason(error)}") from error
    except MlflowException as error:
        status = error.get_http_status_code()
        if status in (401, 403):
            raise ConfigError(f"{where} refused access: {_reason(error)}") from error
        if status == 429 or status >= 500:
            raise RetryableError(f"{where} cannot serve: {_reason(error)}") from error
        raise DataError(f"{where}: {_reason(error)}") from error


@contextlib.contextmanager
def http_limits(*, timeout_s: int, retries: int) -> Iterator[None]:
    """Bound each MLflow request in here, retries (with jitter) included; MLflow waits minutes.

    MLflow reads these limits from the environment at every request, so that they hold for the
    whole process meanwhile.
    """
    limits = {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(timeout_s),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries),
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    }
    with environment_variables(limits):
        yield


def _check(uri: str, what: str) -> None:
    """Raise unless ``uri`` answers a real request, which sets up a new SQLite file as well."""
    scheme = urlparse(uri).scheme
    if scheme in ("", "file"):
        raise ConfigError(
            f"{what} is {uri!r}: expected http(s)://host:port or sqlite:///file.db; "
            "MLflow has no model registry on plain files"
        )
    from mlflow.exceptions import MlflowException

    try:
        with mlflow_calls(uri, timeout_s=_CHECK_TIMEOUT_S, retries=0):
            mlflow_client(uri).search_experiments(max_results=1)
    except RetryableError as error:
        raise RetryableError(
            f"{what} {hide_credentials(uri)}: no answer: {_reason(error.__cause__ or error)}"
        ) from error
    except (DataError, ImportError, ValueError, MlflowException) as error:
        raise ConfigError(
            f"{what} {hide_credentials(uri)}: not an MLflow server or database: {_reason(error)}"
        ) from error


def _reason(error: BaseException) -> str:
    """Its first line without credentials; of a failed connection only what caused it."""
    line = hide_credentials_in(str(error).strip() or type(error).__name__).splitlines()[0]
    return line.rpartition("(Caused by ")[2]


def _quiet() -> None:
    """No telemetry to MLflow's makers, no lines on the terminal that nobody asked for."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    for name in ("alembic", "mlflow.store.db.utils", "mlflow.pyfunc"):
        logging.getLogger(name).setLevel(logging.WARNING)
