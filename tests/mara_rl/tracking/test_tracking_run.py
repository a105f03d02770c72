import json
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from mlflow.entities import ViewType
from tenacity import Retrying, stop_after_delay, wait_fixed

import mara_rl.tracking.tracking_run as run_module
from mara_rl.common.errors import DataError, RetryableError
from mara_rl.tracking.store import mlflow_client
from mara_rl.tracking.tracking_run import TrackingRun

CONFIG = {"seed": 1, "ppo": {"lr": 0.1}, "long": "x" * 9000, "key*": "odd"}


def start(uri: str, config=CONFIG, **options) -> TrackingRun:
    return TrackingRun.start(uri, "tests", "a run", config, **options)


def stored(run: TrackingRun):
    return mlflow_client(run.uri).get_run(run.run_id)


def history(run: TrackingRun, key: str) -> list[tuple[int, float]]:
    found = mlflow_client(run.uri).get_metric_history(run.run_id, key)
    return [(metric.step, metric.value) for metric in found]


def test_params_metrics_and_files_of_a_run(uri, tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "note.txt").write_text("hello")
    with start(uri) as run:
        run.log_metrics({"loss": 0.5, "deep": {"kl": 2}}, step=1)
        run.log_metrics({"loss": 0.25}, step=2)
        run.log_tags({"colour": "red"})
        run.log_artifact(tmp_path / "files" / "note.txt", "one")
        run.log_artifacts(tmp_path / "files", "all")
        assert stored(run).info.status == "RUNNING"
        assert run.buffered == 0
    found = stored(run)
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "a run"
    assert found.data.params["seed"] == "1"
    assert found.data.params["ppo.lr"] == "0.1"
    assert found.data.params["long"].endswith("(9000 characters)")
    assert found.data.tags["colour"] == "red"
    assert history(run, "loss") == [(1, 0.5), (2, 0.25)]
    assert history(run, "deep/kl") == [(1, 2.0)]
    client = mlflow_client(uri)
    config = client.download_artifacts(run.run_id, "config.json", str(tmp_path))
    with open(config) as file:
        assert json.load(file) == CONFIG
    for path in ("one/note.txt", "all/note.txt"):
        with open(client.download_artifacts(run.run_id, path, str(tmp_path))) as file:
            assert file.read() == "hello"


def test_more_params_and_metrics_than_one_call_takes(uri):
    with start(uri, {f"p{i}": i for i in range(250)}) as run:
        run.log_metrics({f"m{i}": i for i in range(1500)}, step=0)
    data = stored(run).data
    assert len(data.params) == 250
    assert len(data.metrics) == 1500


def test_values_that_are_not_finite_are_dropped_and_counted(sqlite_uri):
    with start(sqlite_uri) as run:
        run.log_metrics({"loss": math.nan, "good": 1.0}, step=1)
        run.log_metrics({"loss": math.inf, "good": math.nan}, step=2)
        run.log_metrics({"loss": 0.5}, step=3)
    assert run.non_finite == {"loss": 2, "good": 1}
    assert history(run, "loss") == [(3, 0.5)]
    assert history(run, "good") == [(1, 1.0)]
    assert json.loads(stored(run).data.tags["non_finite_metrics"]) == {"loss": 2, "good": 1}


def test_a_run_resumes_under_its_id(uri):
    first = start(uri)
    first.log_metrics({"loss": 1.0}, step=1)
    with pytest.raises(ValueError, match="crash"), first:
        raise ValueError("crash")
    assert stored(first).info.status == "FAILED"
    with start(uri, {**CONFIG, "seed": 2, "new": 3}, run_id=first.run_id) as second:
        assert stored(second).info.status == "RUNNING"
        second.log_metrics({"loss": 0.5}, step=2)
    found = stored(second)
    assert second.run_id == first.run_id
    assert found.info.status == "FINISHED"
    assert history(second, "loss") == [(1, 1.0), (2, 0.5)]
    assert (found.data.params["seed"], found.data.params["new"]) == ("1", "3")
    resumed = {key: value for key, value in found.data.tags.items() if key.startswith("resumed.")}
    assert resumed == {"resumed.seed": "2"}
    experiment = found.info.experiment_id
    runs = mlflow_client(uri).search_runs([experiment], run_view_type=ViewType.ALL)
    assert sum(found.info.run_id == run.info.run_id for run in runs) == 1


def test_work_done_again_is_not_logged_again(sqlite_uri):
    first = start(sqlite_uri)
    for step in (1, 2, 3):
        first.log_metrics({"loss": float(step)}, step=step)
    # Killed here; step 2 is the checkpoint's, and step 4 brings a metric that is new.
    with start(sqlite_uri, run_id=first.run_id) as second:
        for step in (3, 4):
            second.log_metrics({"loss": 10.0 * step, "new": 1.0}, step=step)
        second.log_metrics({"loss": 99.0}, step=4)
    assert history(second, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    assert history(second, "new") == [(3, 1.0), (4, 1.0)]


def test_what_was_not_sent_before_a_kill_is_sent_by_the_resumed_run(sqlite_uri):
    first = start(sqlite_uri)
    first.log_metrics({"loss": 1.0}, step=1)
    first._next_attempt = math.inf  # the server is known to be away
    for step in (2, 3):
        first.log_metrics({"loss": float(step)}, step=step)
    unsent = json.loads(json.dumps(first.unsent))
    assert [batch[0][0::3] for batch in unsent] == [["loss", 2], ["loss", 3]]
    first._next_attempt = 0.0
    first._buffer.pop()
    first.flush()  # one of them went out after the checkpoint
    with start(sqlite_uri, run_id=first.run_id, unsent=unsent) as second:
        second.log_metrics({"loss": 4.0}, step=4)
    assert history(second, "loss") == [(step, float(step)) for step in (1, 2, 3, 4)]


def test_an_unknown_or_deleted_run_does_not_resume(sqlite_uri):
    with pytest.raises(DataError, match="nothere"):
        start(sqlite_uri, run_id="nothere")
    with start(sqlite_uri) as run:
        pass
    mlflow_client(sqlite_uri).delete_run(run.run_id)
    with pytest.raises(DataError, match=f"run {run.run_id} is deleted"):
        start(sqlite_uri, run_id=run.run_id)


def test_an_interrupted_run_is_killed(sqlite_uri):
    with pytest.raises(KeyboardInterrupt), start(sqlite_uri) as run:
        raise KeyboardInterrupt
    assert stored(run).info.status == "KILLED"


def test_bad_calls_are_named(sqlite_uri, tmp_path):
    with start(sqlite_uri) as run:
        with pytest.raises(DataError, match="metric 'name' is 'x'"):
            run.log_metrics({"name": "x"}, step=0)
        with pytest.raises(DataError, match="none: no such file"):
            run.log_artifact(tmp_path / "none")
        with pytest.raises(DataError, match="none: no such folder"):
            run.log_artifacts(tmp_path / "none")
        with pytest.raises(DataError, match=r"agent\.json could not be read"):
            run.log_agent(tmp_path)


@pytest.mark.slow
def test_a_server_that_goes_away_and_comes_back_loses_nothing(own_server, monkeypatch):
    monkeypatch.setattr(run_module, "_PAUSE_S", 0.2)
    with start(own_server.uri) as run:
        run.log_metrics({"loss": 0.0}, step=0)
        own_server.kill()
        for step in range(1, 6):
            run.log_metrics({"loss": float(step)}, step=step)
        assert run.buffered == 5
        own_server.start()
        time.sleep(0.3)
        run.log_metrics({"loss": 6.0}, step=6)
        assert run.buffered == 0
        assert history(run, "loss") == [(step, float(step)) for step in range(7)]
    assert stored(run).info.status == "FINISHED"


class NotFound(BaseHTTPRequestHandler):
    """A proxy whose server is being replaced."""

    def do_POST(self) -> None:
        self.send_error(404)

    do_GET = do_POST


@pytest.mark.slow
def test_what_answers_in_the_server_s_place_is_waited_out(own_server, monkeypatch, caplog):
    monkeypatch.setattr(run_module, "_PAUSE_S", 0.2)
    with start(own_server.uri) as run:
        own_server.kill()
        patience = Retrying(stop=stop_after_delay(20), wait=wait_fixed(0.1), reraise=True)
        # The killed server's worker may still be on its way out.
        with patience(HTTPServer, ("127.0.0.1", own_server.port), NotFound) as proxy:
            threading.Thread(target=proxy.serve_forever, daemon=True).start()
            run.log_metrics({"loss": 0.0}, step=0)
            proxy.shutdown()
        assert run.buffered == 1
        assert "metrics are kept in memory for now" in caplog.text
        own_server.start()
        time.sleep(0.3)
        run.log_metrics({"loss": 1.0}, step=1)
        assert history(run, "loss") == [(0, 0.0), (1, 1.0)]


@pytest.mark.slow
def test_while_the_server_is_away_training_is_hardly_held_up(own_server):
    run = start(own_server.uri)
    own_server.kill()
    run.log_metrics({"loss": 0.0}, step=0)  # finds out, with its retries
    begin = time.monotonic()
    for step in range(1, 200):
        run.log_metrics({"loss": float(step)}, step=step)
    assert time.monotonic() - begin < 2
    assert run.buffered == 200


@pytest.mark.slow
def test_batches_that_cannot_be_sent_at_the_end_are_an_error(own_server, monkeypatch, caplog):
    monkeypatch.setattr("mara_rl.tracking.store._RETRIES", 1)
    run = start(own_server.uri)
    own_server.kill()
    run.log_metrics({"loss": 1.0}, step=1)
    with pytest.raises(RetryableError, match="cannot serve"):
        run.close()
    assert run.buffered == 1
    with pytest.raises(ValueError, match="the error to report"), run:
        raise ValueError("the error to report")
    assert f"run {run.run_id} ended but 1 batches lost" in caplog.text
