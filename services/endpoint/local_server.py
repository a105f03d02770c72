"""The endpoint on this machine, for as long as a command runs."""

import contextlib
import ipaddress
import json
import logging
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping

from mara_rl.common.environment import environment_variables
from mara_rl.common.errors import ConfigError
from services.cluster.ray_session import check_resources, ray_session
from services.endpoint.endpoint_config import EndpointConfig
from services.http.api_keys import KEYS_VARIABLE, configured_keys
from services.scoring.score_service import ScoreServiceConfig, deploy_scores

APP = "aligned"
_POLL_S = 0.5
_SCORE_CPUS = 0.1
_LOAD_TIMEOUT_S = 900.0
_FRESH_METRICS = {"RAY_metrics_report_interval_ms": "1000"}  # of a Ray that is started here


def serve_locally(
    config: EndpointConfig,
    scores: Mapping[str, str],
    *,
    host: str,
    port: int,
    announce: Callable[[str], None],
) -> None:
    """Serve until SIGINT or SIGTERM, then let running answers finish.

    Args:
        scores: score models to run, by the name of their Serve application.
        announce: is told where the endpoint is, and when it ends.

    Raises ConfigError for a host beyond loopback without keys, a port in use, a cluster that is too
    small, or what cannot be loaded.
    """
    from mara_rl.tracking.store import tracking_uri

    keys = configured_keys(config.keys_file)
    if not is_loopback(host) and not keys:
        raise ConfigError(
            f"host {host!r} is reached from other machines: set {KEYS_VARIABLE} or --keys-file, "
            "or listen on 127.0.0.1"
        )
    check_port(host, port)
    if config.log_file is not None:
        config.log_file.parent.mkdir(parents=True, exist_ok=True)
    with (
        environment_variables(_FRESH_METRICS),
        ray_session() as ray,
        ending_signal() as ending,  # Ray sets signal handlers as well
    ):
        from ray import serve

        from services.endpoint.application import application

        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        uri = config.tracking_uri or tracking_uri(allow_local=ray.owns_cluster)
        config = config.model_copy(update={"tracking_uri": uri, "anonymous": not keys})
        services = {
            name: ScoreServiceConfig(model=model, num_cpus=_SCORE_CPUS)
            for name, model in scores.items()
        }
        plan = [(name, service.bundle) for name, service in services.items()]
        check_resources([*plan, *[("endpoint", config.bundle)] * config.num_replicas])
        serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
        if services:
            deploy_scores(services)
        target = serve.RunTarget(application(config), name=APP, route_prefix="/")
        serve.run_many([target], wait_for_applications_running=False)
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        announce(f"loading {config.llm}; request log: {config.log_file or 'standard error'}")
        _wait_until_loaded(url, ending)
        if not ending.is_set():
            announce(f"playground: {url}/   OpenAI API: {url}/v1   (Ctrl-C ends)")
        ending.wait()
        announce("letting running answers finish")
        serve.delete(APP)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_port(host: str, port: int) -> None:
    """Raise ConfigError unless ``host:port`` can be listened on."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error


@contextlib.contextmanager
def ending_signal() -> Iterator[threading.Event]:
    """An event set by SIGINT or SIGTERM; a second SIGINT interrupts as usual."""
    ending = threading.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def end(number: int, _: object) -> None:
        ending.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, end)
    try:
        yield ending
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait_until_loaded(url: str, ending: threading.Event) -> None:
    """Wait for all replicas. Raises ConfigError where one says that it is broken."""
    from ray import serve
    from ray.serve.schema import ApplicationStatus

    deadline_s = time.monotonic() + _LOAD_TIMEOUT_S
    while not ending.wait(_POLL_S):
        application = serve.status().applications[APP]
        if application.status == ApplicationStatus.DEPLOY_FAILED:
            raise ConfigError(f"the endpoint did not start: {_last_line(application.message)}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=10):
                if application.status == ApplicationStatus.RUNNING:
                    return
        except urllib.error.HTTPError as error:
            if error.code == 500:
                message = json.loads(error.read())["error"]["message"]
                raise ConfigError(f"the endpoint did not start: {message}") from error
        except (urllib.error.URLError, TimeoutError):
            pass  # the proxy is not there yet
        if time.monotonic() > deadline_s:
            raise ConfigError(f"the endpoint has not loaded within {_LOAD_TIMEOUT_S:g} s")


def _last_line(message: str) -> str:
    """Serve puts a replica's traceback into its message; the error is at its end."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[-1] if lines else "Ray Serve does not say why"
