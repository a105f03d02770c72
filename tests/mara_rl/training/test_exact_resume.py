"""A run that is killed again and again ends as one that never was: bit for bit on the CPU."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow
import numpy as np
import pytest
from evaluate_command import comparable, read_rows
from training_runs import POISON, TinyModels, TrainingProcess, all_metrics, iterations, write_config

from mara_rl.training.run.checkpoint import load_newest_checkpoint
from services.prompt_queue.prompt_epochs import QueuePosition, Ticket, epoch_order

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

PROMPTS = 20


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exact")
    prompts = [f"Tell me about {i} foxes." for i in range(PROMPTS)]
    prompts[3] += POISON  # its reward is NaN
    prompts[5] *= 100  # longer than the context
    return write_config(
        folder,
        TinyModels(folder),
        prompts,
        prompts={"max_failures": 2},
        warm_start={"answers": 32, "rounds": 2, "epochs": 3, "batch_size": 64, "distil_epochs": 1},
        ppo={"iterations": 8},
        checkpoint={"every_iterations": 3},
        evaluation={"kl_prompts": 8},
    )


@pytest.fixture(scope="module")
def whole(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MARA_HOME of the run that nothing happened to."""
    home = tmp_path_factory.mktemp("whole")
    TrainingProcess(home, str(config)).finish()
    return home


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "home"
    url = tmp_path / "home" / "redis" / "url"
    assert not url.exists(), "the last process to use the embedded Redis stops it"


def assert_equal_runs(home: Path, whole: Path) -> None:
    states, learners = zip(
        *(load_newest_checkpoint(at / "tiny-1" / "checkpoints") for at in (home, whole)),
        strict=True,
    )
    # What was trained twice is counted, and that is the only difference.
    resumed, expected = (state.model_dump(exclude={"training_s", "position"}) for state in states)
    assert resumed == expected  # score scales, counts
    assert unfinished(states[0].position) == unfinished(states[1].position)
    np.testing.assert_equal(learners[0], learners[1])  # weights of agent and critic, Adam
    for file in ("agent/agent.safetensors", "evaluation/scores.jsonl"):
        first, second = ((at / "tiny-1" / file).read_bytes() for at in (home, whole))
        assert first == second, file
    for name in ("base", "agent", "kl/agent"):
        first, second = (
            [
                {key: value for key, value in row.items() if key not in ("forwards", "seconds")}
                for row in read_rows(at / "tiny-1" / "evaluation" / "answers" / f"{name}.jsonl")
            ]
            for at in (home, whole)
        )
        assert first == second, name
    first, second = (
        comparable(json.loads((at / "tiny-1/evaluation/summary.json").read_text()))
        for at in (home, whole)
    )
    for figures in (first, second):  # where the run's folder is
        figures["methods"]["agent"]["spec"].pop("agent")
    assert first == second
    names = ("000006", "000008")
    assert {path.name for path in (home / "tiny-1/checkpoints").iterdir()} >= set(names)

    # Readers fetch prompts ahead in a thread of their own: what still waits is a matter of timing.
    differs = (
        "time/",
        "eval/agent/tokens_per_s",
        "eval/base/tokens_per_s",
        "queue/duplicates",
        "queue/waiting",
        "queue/pending",
    )
    first, second = (
        [row[:3] for row in all_metrics(at) if not row[0].startswith(differs)]
        for at in (home, whole)
    )
    assert first == second  # every step once
    assert [step for step, _ in iterations(home)] == list(range(1, 9))
    runs = mlflow.MlflowClient(f"sqlite:///{home / 'mlflow.db'}").search_runs(["1"])
    assert [run.info.status for run in runs] == ["FINISHED"]


def unfinished(position: QueuePosition | None) -> list[Ticket]:
    """What is to be read, in order; how much of it was fetched ahead is a matter of timing."""
    assert position is not None
    rest: list[Ticket] = []
    if position.frontier is not None:
        ids = {f"p{i}" for i in range(PROMPTS)} - set(position.withdrawn)
        repeats = dict.fromkeys(ids, 1)
        rest = epoch_order(
            repeats, seed=position.seed, epoch=position.epoch, frontier=position.frontier
        )
    return [*position.head, *rest, *position.tail]


def test_killed_in_the_warm_start_and_between_checkpoints(
    config: Path, home: Path, whole: Path
) -> None:
    run = TrainingProcess(home, str(config))
    run.until_line("scoring base answers")
    run.kill()
    assert "PPO" not in run.output
    run = TrainingProcess(home, "--resume", "tiny-1")
    run.until_iteration(5)
    run.kill()
    assert iterations(home)[-1][0] in (5, 6)
    output = TrainingProcess(home, "--resume", "tiny-1").finish()
    assert "resumed tiny-1 at iteration 3" in output
    assert_equal_runs(home, whole)


def test_killed_while_a_checkpoint_is_written_and_in_the_evaluation(
    config: Path, home: Path, whole: Path
) -> None:
    run = TrainingProcess(home, str(config))
    checkpoints = home / "tiny-1" / "checkpoints"
    run.until((checkpoints / "000003").exists, "checkpoint 3")
    deadline = time.monotonic() + 60
    while not list(checkpoints.glob(".writing-*")):
        assert time.monotonic() < deadline
    run.kill()
    run = TrainingProcess(home, "--resume", "tiny-1")
    run.until_line("answers of base")
    run.kill()
    output = TrainingProcess(home, "--resume", "tiny-1").finish()
    assert "resumed tiny-1 at iteration 8" in output
    assert not list(checkpoints.glob(".writing-*"))
    assert_equal_runs(home, whole)


def test_what_could_not_be_trained_on_is_counted(whole: Path) -> None:
    found = {(key, step): value for key, step, value, _ in all_metrics(whole)}
    assert found["prompts/too_long/train", 0] == found["prompts/too_long/heldout", 0] == 1
    assert found["queue/dead", 8] == 2  # the one too long and the one without a reward
    assert sum(value for (key, _), value in found.items() if key == "rollout/failed_answers") >= 2
    assert json.loads((whole / "tiny-1/evaluation/summary.json").read_text())["result"]["n"] == 19
