"""The driver and the remote learner die: training goes on from a checkpoint."""

import time

import pytest
from training_runs import LEARNER, iterations

pytestmark = pytest.mark.slow


def test_the_learner_dies(chaos) -> None:
    run = chaos.start(learner={"num_learners": 1, "num_cpus": 0.3})
    run.until_iteration(3)
    at = time.time()
    run.processes(LEARNER)[0].kill()
    took_s = chaos.recovered(run, at)
    output = chaos.end(run, "the learner killed", took_s)
    back = [line for line in output.splitlines() if "going back to checkpoint" in line]
    assert len(back) == 1
    assert back[0].startswith("the learner failed: ")
    assert "resumed tiny-1 at iteration" in output


@pytest.mark.cluster
def test_the_learner_hangs(chaos) -> None:
    run = chaos.start(
        learner={"num_learners": 1, "num_cpus": 0.3, "update_timeout_s": 4},
        rollouts={"sample_timeout_s": 8},
    )
    run.until_iteration(3)
    at = time.time()
    run.processes(LEARNER)[0].suspend()
    took_s = chaos.recovered(run, at)
    fault = "the learner hangs (learner.update_timeout_s: 4, rollouts.sample_timeout_s: 8)"
    output = chaos.end(run, fault, took_s)
    assert (
        "no answer from the learner within 4 s (learner.update_timeout_s): it is killed" in output
    )
    assert "the learner failed: " in output


def test_the_driver_dies(chaos) -> None:
    run = chaos.start(rollouts={"num_runners": 2})
    run.until_iteration(5)
    at = run.kill()
    before = iterations(chaos.home)[-1][0]
    run = chaos.resume()
    took_s = chaos.recovered(run, at)
    output = chaos.end(run, "the driver killed, `--resume` at once", took_s)
    line = next(line for line in output.splitlines() if line.startswith("resumed tiny-1"))
    assert before - 2 <= int(line.split()[-1]) <= before


@pytest.mark.cluster
def test_the_driver_dies_and_redis_is_away_as_it_resumes(chaos) -> None:
    run = chaos.start()
    run.until_iteration(5)
    at = run.kill()
    chaos.redis.kill()
    run = chaos.resume()
    run.until_line("cannot serve")
    run.until_line("trying for up to 900 s")
    chaos.redis.start()
    took_s = chaos.recovered(run, at)
    fault = "the driver and Redis killed, `--resume` at once, Redis back when the run waits for it"
    assert "resumed tiny-1 at iteration" in chaos.end(run, fault, took_s)
