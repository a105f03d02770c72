"""The Ray cluster a command runs on: one it joins, or a local one that it starts and owns."""

import contextlib
import logging
import math
import os
import socket
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mara_rl.common.environment import environment_variables
from mara_rl.common.errors import ConfigError, first_line
from services.cluster.ray_internals import forget_serve_client, local_cluster_settings

Bundle = Mapping[str, float]
"""Resources of one actor that must come from a single node, e.g. ``{"CPU": 1, "GPU": 0.5}``."""

_CONNECT_TIMEOUT_S = 10.0
# Of a control service that does not let us in: each time may take 40 s, and Ray asks 20 times.
_ASK_ONCE = {"RAY_gcs_server_port_wait_time_s": "1"}
_SLACK = 1e-6  # fractions of a CPU or GPU do not add up exactly


@dataclass(frozen=True, slots=True)
class RaySession:
    """A connection to Ray.

    Attributes:
        owns_cluster: whether this process started Ray, and with it the right to start embedded
            services (Redis, MLflow) that only this machine can reach.
        address: ``host:port`` of the cluster's control service.
    """

    owns_cluster: bool
    address: str


@contextlib.contextmanager
def ray_session(
    *, num_cpus: int | None = None, num_gpus: int | None = None
) -> Iterator[RaySession]:
    """Connect to Ray for the length of a ``with`` block.

    A process that is already connected stays as it is. With ``RAY_ADDRESS`` set (Ray sets it for
    the entrypoint of a job) that cluster is joined. Otherwise a local Ray is started that listens
    on loopback only, asks every client for a random token, and ends with the block.

    Args:
        num_cpus: CPUs of a cluster that is started here; None counts the machine's.
        num_gpus: GPUs of a cluster that is started here; None counts the machine's.

    Raises:
        ConfigError: ``RAY_ADDRESS`` is not a cluster address, or the cluster there does not answer
            or let this process in; a local Ray does not start.
    """
    import ray

    if ray.is_initialized():
        yield RaySession(owns_cluster=False, address=ray.get_runtime_context().gcs_address)
        return
    address = os.environ.get("RAY_ADDRESS", "")
    if address not in ("", "local"):
        _join(address)
        try:
            yield RaySession(owns_cluster=False, address=ray.get_runtime_context().gcs_address)
        finally:
            _disconnect()
        return
    with local_cluster_settings():
        try:
            ray.init(
                address="local",
                num_cpus=num_cpus,
                num_gpus=num_gpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
        except Exception as error:
            raise ConfigError(f"Ray did not start on this machine: {_reason(error)}") from error
        try:
            yield RaySession(owns_cluster=True, address=ray.get_runtime_context().gcs_address)
        finally:
            _disconnect()


def _disconnect() -> None:
    import ray

    ray.shutdown()
    forget_serve_client()


def check_resources(requests: Sequence[tuple[str, Bundle]]) -> None:
    """Raise ConfigError naming what is missing unless the connected cluster can hold a plan.

    Compared with what the nodes own, not with what is free at the moment; nodes that an
    autoscaler could still add do not count.

    Args:
        requests: one (name, bundle) for each actor, e.g. ``("reward", {"CPU": 0.1})``.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    missing = missing_resources(requests, nodes)
    if missing is not None:
        raise ConfigError(missing)


def await_room(requests: Sequence[tuple[str, Bundle]], timeout_s: float) -> None:
    """Wait until all of ``requests`` could be placed at once beside what runs already.

    They are reserved together, as one placement group, and given back for the actors to take.

    Raises:
        ConfigError: other work still had the room after ``timeout_s``; says what is free.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    bundles = [dict(bundle) for _, bundle in requests if bundle]
    if not bundles:
        return
    group = placement_group(bundles)
    try:
        if group.wait(math.ceil(timeout_s)):  # it takes whole seconds
            return
        free = ray.available_resources()
        asked = Counter((name, amounts(bundle)) for name, bundle in requests if bundle)
        needs = ", ".join(f"{name} {count} x ({each})" for (name, each), count in asked.items())
        left = {
            key: free.get(key, 0.0) for key in sorted({key for each in bundles for key in each})
        }
        raise ConfigError(
            f"no room for the plan within {timeout_s:g} s: waiting for {needs}; free in the "
            f"cluster: {amounts(left)}"
        )
    finally:
        remove_placement_group(group)


def missing_resources(
    requests: Sequence[tuple[str, Bundle]], nodes: Sequence[Bundle]
) -> str | None:
    """One line on why ``nodes`` cannot hold ``requests``, or None when they can.

    Bundles are placed largest first, each on the first node with room for it.
    """
    for resource in sorted({resource for _, bundle in requests for resource in bundle}):
        asked = sum(bundle.get(resource, 0) for _, bundle in requests)
        owned = sum(node.get(resource, 0) for node in nodes)
        if asked > owned + _SLACK:
            return (
                f"plan asks for {asked:g} {resource} ({_summands(requests, resource)}) "
                f"but the cluster has {owned:g}"
            )
    free = [dict(node) for node in nodes]
    for name, bundle in sorted(requests, key=lambda request: -max(request[1].values(), default=0)):
        node = next((node for node in free if _fits(bundle, node)), None)
        if node is None:
            owned_by_node = (amounts({key: node.get(key, 0) for key in bundle}) for node in nodes)
            return (
                f"plan asks for {amounts(bundle)} on one node for {name} but no node has room for "
                f"it beside the rest of the plan (nodes own: {'; '.join(owned_by_node)})"
            )
        for resource, amount in bundle.items():
            node[resource] = node.get(resource, 0) - amount
    return None


def _fits(bundle: Bundle, node: Bundle) -> bool:
    return all(amount <= node.get(name, 0) + _SLACK for name, amount in bundle.items())


def _summands(requests: Sequence[tuple[str, Bundle]], resource: str) -> str:
    """E.g. ``reward 0.1 + cost 0.1 + runners 3 x 1``."""
    counts = Counter((name, bundle.get(resource, 0)) for name, bundle in requests)
    return " + ".join(
        f"{name} {amount:g}" if count == 1 else f"{name} {count} x {amount:g}"
        for (name, amount), count in counts.items()
        if amount
    )


def amounts(bundle: Bundle) -> str:
    """E.g. ``1 CPU + 0.5 GPU``."""
    return " + ".join(f"{amount:g} {resource}" for resource, amount in bundle.items())


def _join(address: str) -> None:
    import ray

    if "://" in address:
        raise ConfigError(
            f"RAY_ADDRESS {address!r} is not a cluster address; expected host:port or 'auto' "
            "(to run on a remote cluster, use `ray job submit`)"
        )
    try:
        host, colon, port = address.rpartition(":")
        if colon:  # Ray itself goes on trying for many minutes
            socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise ConfigError(f"RAY_ADDRESS {address!r}: no Ray cluster there: {reason}") from error
    try:
        with environment_variables(_ASK_ONCE):
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except Exception as error:  # Ray raises errors of many kinds, plain ones too
        raise ConfigError(
            f"RAY_ADDRESS {address!r}: could not join a Ray cluster there: {_reason(error)}"
        ) from error


def _reason(error: BaseException) -> str:
    """What Ray has against it, on one line; it puts causes behind each other and tracebacks in."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip()
    if "Traceback (most recent call last)" in text:
        text = text.splitlines()[-1]
    return " ".join(text.split()) or type(error).__name__
