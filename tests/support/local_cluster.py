"""A cluster as a platform team would run it, on this machine: Ray head, Redis with TLS, MLflow."""

import contextlib
import datetime
import ipaddress
import os
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import redis
import requests
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
_STOP_S = 20.0


@dataclass(frozen=True)
class LocalCluster:
    """Addresses of a running cluster, and the environment of those who may use it."""

    environment: Mapping[str, str]
    dashboard: str
    mlflow: str
    redis: str
    gcs: str

    def run(self, *command: str, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
        """Run a command line of the package's environment as a user of the cluster."""
        return subprocess.run(
            command,
            cwd=ROOT,
            env=dict(self.environment),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )


def free_ports(count: int) -> list[int]:
    """Ports on loopback that nobody listens on, all different."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@contextlib.contextmanager
def local_cluster(folder: Path, *, num_cpus: int, home: Path) -> Iterator[LocalCluster]:
    """Start everything below ``folder``; at the end stop what was started, and nothing else."""
    with contextlib.ExitStack() as stack:
        redis_url = stack.enter_context(tls_redis(folder / "redis"))
        mlflow_url = stack.enter_context(mlflow_server(folder / "mlflow"))
        environment = cluster_environment(home, redis_url, mlflow_url)
        head = stack.enter_context(ray_head(environment, folder, num_cpus))
        environment["RAY_API_SERVER_ADDRESS"] = head.dashboard
        yield LocalCluster(environment, head.dashboard, mlflow_url, redis_url, head.gcs)


def cluster_environment(home: Path, redis_url: str, mlflow_url: str) -> dict[str, str]:
    """What docs/cluster.md wants in the environment of a cluster's nodes, and nothing of ours."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("RAY_", "MLFLOW_", "MARA_"))
    } | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # there is no other node to drain to
        "MARA_HOME": str(home),
        "MARA_REDIS_URL": redis_url,
        "MARA_API_KEY": "a-key-for-the-tests",
        "MARA_SCORE_KEY": "a-key-for-the-scores-of-the-tests",
        "MLFLOW_TRACKING_URI": mlflow_url,
        "HF_HUB_OFFLINE": "1",
    }


def compose_command(service: str) -> list[str]:
    """The command line of a service in `deploy/compose.yaml`; options put behind it prevail."""
    services = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())["services"]
    return _of_this_environment(services[service]["command"])


def _of_this_environment(command: list[str]) -> list[str]:
    return [str(BIN / command[0]), *command[1:]]


@dataclass(frozen=True)
class HeadNode:
    """A running ``ray start --head --block``.

    Attributes:
        dashboard: its URL.
        gcs: the address that other nodes and drivers join it at.
    """

    process: subprocess.Popen[bytes]
    dashboard: str
    gcs: str


@contextlib.contextmanager
def ray_head(environment: Mapping[str, str], folder: Path, num_cpus: int) -> Iterator[HeadNode]:
    """The head node of Compose, on ports of its own so that other Rays here are left alone."""
    dashboard_port, gcs_port, client_port = free_ports(3)
    dashboard = f"http://127.0.0.1:{dashboard_port}"
    # Ray's sockets lie below it, and their paths must be short.
    with tempfile.TemporaryDirectory(prefix="mara-ray-", ignore_cleanup_errors=True) as scratch:
        command = [*compose_command("node"), *_node_options("127.0.0.1", num_cpus)]
        command += [f"--port={gcs_port}", f"--ray-client-server-port={client_port}"]
        command += [f"--dashboard-port={dashboard_port}", "--dashboard-host=127.0.0.1"]
        command += [f"--temp-dir={scratch}"]
        with process(command, folder / "ray.log", environment) as head:
            # The dashboard answers before there is an agent that takes jobs.
            probe = [BIN / "ray", "job", "submit", "--no-wait", "--", "true"]
            asking = {**environment, "RAY_API_SERVER_ADDRESS": dashboard}
            await_ready(
                lambda: (
                    subprocess.run(
                        probe, env=asking, capture_output=True, timeout=60, check=False
                    ).returncode
                    == 0
                ),
                head,
                folder / "ray.log",
            )
            yield HeadNode(head, dashboard, f"127.0.0.1:{gcs_port}")


@contextlib.contextmanager
def ray_node(
    environment: Mapping[str, str], log: Path, gcs: str, ip: str, num_cpus: int, resource: str
) -> Iterator[subprocess.Popen[bytes]]:
    """A worker node as of `deploy/ray-cluster.yaml`, at an address of loopback of its own."""
    settings = yaml.safe_load((ROOT / "deploy" / "ray-cluster.yaml").read_text())
    [line] = [each for each in settings["worker_start_ray_commands"] if "--address" in each]
    command = _of_this_environment(shlex.split(line.replace("$RAY_HEAD_IP:6379", gcs)))
    command += ["--block", *_node_options(ip, num_cpus), f'--resources={{"{resource}": 1}}']
    with process(command, log, environment) as node:
        # Two that start at once on one machine are in each other's way.
        await_ready(lambda: b"Ray runtime started" in log.read_bytes(), node, log)
        yield node


def _node_options(ip: str, num_cpus: int) -> list[str]:
    options = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port")
    options += ("runtime-env-agent-port", "metrics-export-port")
    return [
        *(f"--{name}={port}" for name, port in zip(options, free_ports(4), strict=True)),
        f"--node-ip-address={ip}",
        f"--num-cpus={num_cpus}",
        "--num-gpus=0",
        "--min-worker-port=0",
        "--max-worker-port=0",
    ]


def system_redis() -> str | None:
    """The system's redis-server: the one that an active virtual environment has speaks no TLS."""
    places = os.environ.get("PATH", os.defpath).split(os.pathsep)
    return shutil.which("redis-server", path=os.pathsep.join(p for p in places if Path(p) != BIN))


@contextlib.contextmanager
def tls_redis(folder: Path) -> Iterator[str]:
    """URL of a redis-server that speaks TLS only and asks for a password."""
    folder.mkdir(parents=True)
    certificate, key = self_signed(folder)
    [port] = free_ports(1)
    password = secrets.token_hex(16)
    settings = {
        "bind": "127.0.0.1",
        "port": "0",
        "tls-port": str(port),
        "tls-cert-file": str(certificate),
        "tls-key-file": str(key),
        "tls-ca-cert-file": str(certificate),
        "tls-auth-clients": "no",
        "requirepass": password,
        "appendonly": "yes",
        "dir": str(folder),
    }
    binary = system_redis()
    assert binary is not None
    command = [binary, *(part for name, value in settings.items() for part in (f"--{name}", value))]
    url = f"rediss://:{password}@127.0.0.1:{port}/0?ssl_ca_certs={certificate}"

    def answers() -> bool:
        with redis.Redis.from_url(url) as client, contextlib.suppress(redis.ConnectionError):
            return bool(client.ping())
        return False

    with process(command, folder / "server.log") as server:
        await_ready(answers, server, folder / "server.log")
        yield url


@contextlib.contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """URL of an MLflow server over SQLite that hands artifacts through."""
    folder.mkdir(parents=True)
    [port] = free_ports(1)
    # Compose's, which lets in the name of the service and where it is here.
    here = {"/mlflow/": f"{folder}/", "0.0.0.0": "127.0.0.1", "127.0.0.1:5000": f"127.0.0.1:{port}"}
    command = [*compose_command("mlflow"), f"--port={port}"]
    for theirs, ours in here.items():
        command = [word.replace(theirs, ours) for word in command]
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        with contextlib.suppress(requests.ConnectionError):
            return requests.get(f"{url}/health", timeout=10).ok
        return False

    environment = os.environ | {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # seven processes less
    }
    with process(command, folder / "server.log", environment) as server:
        await_ready(answers, server, folder / "server.log")
        yield url


@contextlib.contextmanager
def process(
    command: Sequence[object],
    log: Path,
    environment: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """A process and its children while the context lasts; only these are ended."""
    with log.open("wb") as out:
        started = subprocess.Popen(
            [str(part) for part in command],
            cwd=ROOT,
            env=dict(environment) if environment is not None else None,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield started
    finally:
        family = []
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(started.pid).children(recursive=True)
        started.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            started.wait(_STOP_S)
        _, alive = psutil.wait_procs(family, timeout=5)
        for left in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
        started.kill()
        started.wait()


def await_ready(
    ready: Callable[[], bool], started: subprocess.Popen[bytes], log: Path, timeout_s: float = 180
) -> None:
    deadline = time.monotonic() + timeout_s
    while not ready():
        assert started.poll() is None, log.read_text(errors="replace")
        assert time.monotonic() < deadline, log.read_text(errors="replace")
        time.sleep(0.2)


def self_signed(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 and its key, as files."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "redis of the tests")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    paths = folder / "redis.crt", folder / "redis.key"
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    paths[1].chmod(0o600)
    return paths
