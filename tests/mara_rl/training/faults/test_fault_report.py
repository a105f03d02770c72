"""What a run says of faults, and how it counts them."""

import io
import logging

from rich.console import Console

from mara_rl.common.display import Display
from mara_rl.training.config import load_config
from mara_rl.training.faults.fault_report import FaultReport, Faults


def report(out: io.StringIO) -> FaultReport:
    return FaultReport(load_config("quickstart", []), Display(Console(file=out, width=200)))


def actor_failed(message: str) -> None:
    logging.getLogger("ray.rllib.utils.actor_manager").error(message)


def test_an_attempt_in_vain_names_all_causes_and_repeats_the_last_known() -> None:
    out = io.StringIO()
    faults = report(out)
    faults.no_update(5, 1, [])
    faults.outage(RuntimeError("Redis is away"))
    actor_failed("Traceback\nray.exceptions.ActorDiedError: it died")
    faults.no_update(5, 0, ["not finite"])
    faults.no_update(5, 0, [])
    assert [line.partition("alive: ")[2] for line in out.getvalue().splitlines()] == [
        "no cause reported",
        "Redis is away; ray.exceptions.ActorDiedError: it died; not finite",
        "Redis is away; ray.exceptions.ActorDiedError: it died; not finite",
    ]


def test_an_update_shows_each_fault_on_a_line_and_counts_since_the_last() -> None:
    out = io.StringIO()
    faults = report(out)
    faults.no_update(3, 1, [])
    faults.outage(RuntimeError("Redis is away"))
    actor_failed("ActorDiedError: it died")
    first = faults.update(3, Faults(2, 1, frozenset(["b", "a"]), frozenset(["late"])), restarts=4)
    assert first == {
        "rollout/failed_answers": 2,
        "rollout/scoring_retries": 1,
        "faults/runner_restarts": 4,
        "faults/attempts_without_update": 1,
    }
    assert out.getvalue().splitlines()[1:] == [
        "iteration 3: 2 answers failed and were not trained on: a; b",
        "iteration 3: scores were asked for again 1 times: late",
        "iteration 3: Redis is away",
        "iteration 3: a rollout actor failed and is replaced: ActorDiedError: it died",
    ]
    shown = out.getvalue()
    assert set(faults.update(4, Faults(), restarts=4).values()) == {0.0}
    assert out.getvalue() == shown, "told once"
