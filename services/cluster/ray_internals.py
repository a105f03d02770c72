"""The private parts of Ray, Ray Serve and RLlib that this project needs, as of Ray 2.60.0.

Nothing outside this module touches them. Each function says which public API is missing.
"""

import contextlib
import logging
import os
import secrets
import signal
import sys
from collections.abc import Iterator
from typing import Any

from mara_rl.common.environment import environment_variables

# Ray -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def local_cluster_settings() -> Iterator[None]:
    """The environment in which a local Ray starts; afterwards as it was before.

    Missing: loopback alone and a token of its own as arguments of `ray.init`. Ray reads both from
    the environment when it is imported, and keeps them.
    """
    from ray._private import ray_constants

    variables = {
        # Without a token of its own Ray writes one to ~/.ray, which then turns authentication on
        # for later clusters and jobs of this user.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        # Ray's switch for "this machine only": binds to 127.0.0.1 instead of every interface.
        ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0",
        ray_constants.GCS_PORT_ENVIRONMENT_VARIABLE: "0",  # any free port, never Redis' 6379
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray's native code reports on the terminal, as an error, what RLlib does by design.
        "RAY_BACKEND_LOG_LEVEL": os.environ.get("RAY_BACKEND_LOG_LEVEL", "fatal"),
        # On a busy machine a replica needs longer than Serve's 0.1 s to say how long its queue is;
        # Serve would warn on the terminal each time.
        "RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "2",
        "RAY_SERVE_MAX_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "10",
    }
    clusters_enabled = ray_constants.ENABLE_RAY_CLUSTER
    try:
        with environment_variables(variables):
            ray_constants.ENABLE_RAY_CLUSTER = False
            _reload_authentication()
            yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = clusters_enabled
        _reload_authentication()


def _reload_authentication() -> None:
    """Make Ray's native code, which caches both, read the mode and the token anew."""
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def forget_serve_client() -> None:
    """Make Serve forget the cluster of this process, which is to be left.

    Missing: `ray.shutdown` doing so. Serve tells the clusters of one process apart by job id, and
    the first job of every cluster has the same: it would call the old cluster's controller.
    """
    if "ray.serve.context" in sys.modules:
        sys.modules["ray.serve.context"]._set_global_client(None)


def kill_process(actor: Any) -> None:
    """SIGKILL an actor's process, from its own node.

    Missing: where an actor runs, by its handle. `ray.kill` asks the process to end, which hangs.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    info = ray._private.state.actors(actor._actor_id.hex())
    where = NodeAffinitySchedulingStrategy(info["Address"]["NodeID"], soft=False)
    kill: Any = ray.remote(num_cpus=0)(_sigkill)
    kill.options(scheduling_strategy=where).remote(info["Pid"])


def _sigkill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


# RLlib ---------------------------------------------------------------------------------------


def silence_hints() -> None:
    """Show no deprecations and hints that no user can act on.

    Missing: a public name of the logger that tells of deprecations.
    """
    for name in ("ray.rllib", "ray.tune", "ray._common.deprecation"):
        logging.getLogger(name).setLevel(logging.ERROR)


def kill_learners(group: Any) -> None:
    """SIGKILL every remote learner of a LearnerGroup. Missing: their handles."""
    for actor in group._worker_manager.actors().values():
        kill_process(actor)


def lacks_learners(group: Any) -> bool:
    """Whether a remote learner of a LearnerGroup is known to be dead. Missing: their health."""
    return len(group) > 0 and group._worker_manager.num_healthy_actors() < len(group)


def kill_env_runner(group: Any, number: int) -> None:
    """SIGKILL an actor of an EnvRunnerGroup, which starts it again.

    Missing: a way to replace an actor that hangs.
    """
    kill_process(group._worker_manager.actors()[number])
    group._worker_manager.set_actor_state(number, healthy=False)


def drop_env_runners(group: Any) -> None:
    """End the actors of an EnvRunnerGroup.

    Missing: a stop that does not wait for those that hang.
    """
    group._worker_manager.clear()


def reset_env_runner(runner: Any, seed: int) -> None:
    """Have an EnvRunner abandon its episodes and reset its environment with ``seed``.

    Missing: a public reset.
    """
    runner._seed = seed
    runner._needs_initial_reset = True


def append_learner_connector(learner: Any, connector: Any) -> None:
    """Put a connector behind all others of a Learner that is built.

    Missing: a setting for it. `AlgorithmConfig.learners` takes only those before GAE.
    """
    learner._learner_connector.append(connector)
