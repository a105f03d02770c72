"""The processes behind Ray's actors."""

import os
import signal
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


def kill_process(actor: Any) -> None:
    """SIGKILL, from the actor's own node: `ray.kill` asks the process to end, which hangs."""
    info = ray._private.state.actors(actor._actor_id.hex())
    where = NodeAffinitySchedulingStrategy(info["Address"]["NodeID"], soft=False)
    kill: Any = _sigkill  # a function to type checkers
    kill.options(scheduling_strategy=where).remote(info["Pid"])


@ray.remote(num_cpus=0)
def _sigkill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
