"""Score replicas, Redis and MLflow go away, for a while or with all they had."""

import re
import shutil
import time
from pathlib import Path

import pytest
from mlflow_servers import MLflowServer
from tiny_checkpoints import deepened
from training_runs import REPLICA, iterations, metric_history

pytestmark = pytest.mark.slow


REPEATED = r"scores were asked for again (\d+) times: score 'reward' from app 'reward'"
DROPPED = r"answers failed and were not trained on: .*score 'reward' from app 'reward'"


def test_a_reward_replica_dies_in_mid_call(chaos, models, tmp_path: Path) -> None:
    slow = deepened(models.scores["reward"], tmp_path / "slow", layers=500)
    reward = {"model": str(slow), "weight": 1.0, "num_cpus": 0.1}
    cost = {"model": str(models.scores["cost"]), "weight": -1.0, "num_cpus": 0.1}
    run = chaos.start(scores={"reward": reward, "cost": cost}, scoring={"deadline_s": 60})
    run.until_iteration(3)
    replica = run.processes(REPLICA.format("reward"))[0]
    run.until(lambda: replica.cpu_percent(interval=0.1) > 50, "a call")  # idle: 5
    at = time.time()
    replica.kill()
    took_s = chaos.recovered(run, at)
    output = chaos.end(run, "the reward replica killed in mid-call (deadline_s: 60)", took_s)
    repeated = re.search(REPEATED, output)
    assert repeated
    assert retries(chaos.home) >= int(repeated[1])
    assert not re.search(DROPPED, output)


@pytest.mark.cluster
def test_a_reward_replica_stays_away_beyond_the_deadline(chaos) -> None:
    """The answers of that time are dropped, counted, and asked for again."""
    run = chaos.start(scoring={"deadline_s": 2})
    run.until_iteration(3)
    at = time.time()
    run.processes(REPLICA.format("reward"))[0].kill()
    took_s = chaos.recovered(run, at)
    output = chaos.end(run, "the reward replica killed (deadline_s: 2)", took_s)
    assert re.search(REPEATED, output)
    assert re.search(DROPPED, output)
    assert retries(chaos.home) > 0
    failed = sum(value for _, value, _ in metric_history(chaos.home, "rollout/failed_answers"))
    assert failed > 3  # as often as the poisoned prompt may
    assert [letter["prompt"] for letter in chaos.queue().dead_letters()] in (["p3"], [])


def retries(home: Path) -> float:
    return sum(value for _, value, _ in metric_history(home, "rollout/scoring_retries"))


@pytest.mark.parametrize("data", ["with", pytest.param("without", marks=pytest.mark.cluster)])
def test_redis_dies_and_comes_back(chaos, data: str) -> None:
    run = chaos.start(rollouts={"num_runners": 2})
    run.until_iteration(3)
    at = time.time()
    chaos.redis.kill()
    time.sleep(2)
    if data == "without":
        shutil.rmtree(chaos.redis.folder)
        chaos.redis.folder.mkdir()
    chaos.redis.start()
    took_s = chaos.recovered(run, at)
    # Without its data, what was delivered since the driver last looked, in one iteration.
    output = chaos.end(
        run,
        f"Redis killed, back after 2 s {data} its data",
        took_s,
        uncounted=16 if data == "without" else 0,
    )
    lost = [line for line in output.splitlines() if "is missing from Redis; going back to" in line]
    assert len(lost) == (data == "without")


@pytest.mark.cluster
def test_mlflow_is_away_for_a_minute(chaos, mlflow_server: MLflowServer) -> None:
    chaos.env["MLFLOW_TRACKING_URI"] = mlflow_server.uri
    run = chaos.start()
    run.until_iteration(3)
    at = time.time()
    mlflow_server.kill()
    before = iterations(chaos.home)[-1][0]
    time.sleep(60)
    mlflow_server.start()
    run.until(lambda: dict(iterations(chaos.home)).get(before + 1), "the metrics of that time")
    took_s = time.time() - at
    output = chaos.end(run, "MLflow killed, back after 60 s", took_s)
    assert "metrics are kept in memory for now" in output
    away = [ended for step, ended in iterations(chaos.home) if step > before]
    assert min(away) - at < 10, "training went on meanwhile"
    assert metric_history(chaos.home, "faults/resumes")[-1][1] == 0
