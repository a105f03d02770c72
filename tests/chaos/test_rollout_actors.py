"""Rollout actors that die, hang or take their time to come back."""

import time
from pathlib import Path

import psutil
import pytest
from training_runs import RUNNER, metric_history

pytestmark = pytest.mark.slow


def restarts(home: Path) -> float:
    return sum(number for _, number, _ in metric_history(home, "faults/runner_restarts"))


@pytest.mark.parametrize("runners", [pytest.param(1, marks=pytest.mark.cluster), 2])
def test_an_actor_dies_in_mid_episode(chaos, runners: int) -> None:
    run = chaos.start(rollouts={"num_runners": runners})
    run.until_iteration(3)
    victim = run.processes(RUNNER)[0]
    run.until(lambda: victim.cpu_percent(interval=0.1) > 30, "sampling")  # idle: 5
    at = time.time()
    victim.kill()
    took_s = chaos.recovered(run, at)
    run.until(lambda: len(run.processes(RUNNER)) == runners, "a new rollout actor")
    run.until(lambda: chaos.status().dead, "the dead letter")
    letters = chaos.queue().dead_letters()
    assert [letter["prompt"] for letter in letters] == ["p3"]
    assert "score not finite" in letters[0]["reason"]
    run.until(lambda: restarts(chaos.home), "the restart in the metrics")
    output = chaos.end(run, f"one of {runners} rollout actors killed", took_s)
    # Ray says that the actor died, or that it is unavailable.
    message = "0 of 1 runners alive: The actor" if runners == 1 else "is replaced: The actor"
    assert message in output
    assert restarts(chaos.home) == 1


@pytest.mark.cluster
def test_a_lone_actor_dies_while_the_learner_is_at_work(chaos) -> None:
    """No call to it fails: it is there again, without reward scales and weights, for the next."""
    run = chaos.start(rollouts={"num_runners": 1}, ppo={"epochs": 250})
    run.until_iteration(1)
    driver = psutil.Process(run.process.pid)
    run.until(lambda: driver.cpu_percent(interval=1) > 80, "an update")
    at = time.time()
    run.processes(RUNNER)[0].kill()
    took_s = chaos.recovered(run, at)
    chaos.end(run, "the only rollout actor killed while the learner is at work", took_s)
    assert restarts(chaos.home) == 1


@pytest.mark.cluster
def test_a_lone_actor_dies_while_base_answers_are_made(chaos) -> None:
    run = chaos.start(ppo={"scale_answers": 1500})
    run.until_line("loading the LLM")
    at = time.time()
    time.sleep(1)
    run.processes(RUNNER)[0].kill()
    assert "base answers" not in run.output
    took_s = run.until_line("base answers") - at
    run.until_iteration(2)
    chaos.end(run, "the only rollout actor killed in the start phase", took_s)


@pytest.mark.cluster
def test_an_actor_hangs(chaos) -> None:
    run = chaos.start(rollouts={"num_runners": 2, "sample_timeout_s": 8})
    run.until_iteration(3)
    victim = run.processes(RUNNER)[0]
    at = time.time()
    victim.suspend()
    took_s = chaos.recovered(run, at)
    assert not victim.is_running()
    output = chaos.end(run, "one of 2 rollout actors hangs (sample_timeout_s: 8)", took_s)
    assert "gave no sample for 8 s (rollouts.sample_timeout_s) and is replaced" in output


@pytest.mark.cluster
def test_a_run_ends_though_an_actor_hangs_at_its_end(chaos) -> None:
    run = chaos.start(rollouts={"num_runners": 2, "sample_timeout_s": 8}, ppo={"iterations": 3})
    run.until_line("PPO: ")
    hanging = run.processes(RUNNER)[0]
    hanging.suspend()
    run.finish()
    assert not hanging.is_running()


@pytest.mark.cluster
def test_an_actor_loads_its_llm_for_longer_than_the_health_probe(chaos) -> None:
    run = chaos.start(rollouts={"num_runners": 1, "probe_timeout_s": 2})
    run.until_iteration(3)
    victim = run.processes(RUNNER)[0]
    at = time.time()
    victim.kill()
    loading = run.until(
        lambda: [p for p in run.processes(RUNNER) if p != victim], "a new rollout actor"
    )[0]
    loading.suspend()
    time.sleep(12)
    loading.resume()
    took_s = chaos.recovered(run, at)
    output = chaos.end(run, "a rollout actor loads for 12 s more (probe_timeout_s: 2)", took_s)
    assert "brought nothing to learn from, trying again; 0 of 1 runners alive" in output
