"""A cluster as a platform team would run it, on this machine: Ray head, Redis with TLS, MLflow."""

import contextlib
import datetime
import ipaddress
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import redis
import requests
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
        dashboard_port, *ports = free_ports(7)
        dashboard = f"http://127.0.0.1:{dashboard_port}"
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("RAY_", "MLFLOW_", "MARA_"))
        } | {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_API_SERVER_ADDRESS": dashboard,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # there is no other node to drain to
            "MARA_HOME": str(home),
            "MARA_REDIS_URL": redis_url,
            "MARA_API_KEY": "a-key-for-the-tests",
            "MARA_SCORE_KEY": "a-key-for-the-scores-of-the-tests",
            "MLFLOW_TRACKING_URI": mlflow_url,
            "HF_HUB_OFFLINE": "1",
        }
        stack.enter_context(ray_head(environment, dashboard_port, ports, num_cpus, folder))
        yield LocalCluster(
            environment, dashboard, mlflow_url, redis_url, gcs=f"127.0.0.1:{ports[0]}"
        )


@contextlib.contextmanager
def ray_head(
    environment: Mapping[str, str],
    dashboard_port: int,
    ports: list[int],
    num_cpus: int,
    folder: Path,
) -> Iterator[None]:
    """``ray start --head`` on ports of its own, so that other Rays here are left alone."""
    options = ("port", "ray-client-server-port", "dashboard-agent-listen-port")
    options += ("dashboard-agent-grpc-port", "runtime-env-agent-port", "metrics-export-port")
    # Ray's sockets lie below it, and their paths must be short.
    with tempfile.TemporaryDirectory(prefix="mara-ray-", ignore_cleanup_errors=True) as scratch:
        command = [BIN / "ray", "start", "--head", "--block", "--disable-usage-stats"]
        command += [f"--{name}={port}" for name, port in zip(options, ports, strict=True)]
        command += [f"--dashboard-port={dashboard_port}", "--dashboard-host=127.0.0.1"]
        command += ["--node-ip-address=127.0.0.1", f"--temp-dir={scratch}"]
        command += [f"--num-cpus={num_cpus}", "--num-gpus=0"]
        command += ["--min-worker-port=0", "--max-worker-port=0"]
        with process(command, folder / "ray.log", environment) as head:
            # The dashboard answers before there is an agent that takes jobs.
            probe = [BIN / "ray", "job", "submit", "--no-wait", "--", "true"]
            await_ready(
                lambda: (
                    subprocess.run(
                        probe, env=dict(environment), capture_output=True, timeout=60, check=False
                    ).returncode
                    == 0
                ),
                head,
                folder / "ray.log",
            )
            yield


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
    command = [BIN / "mlflow", "server", "--host", "127.0.0.1", "--port", port, "--workers", 1]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
    command += ["--artifacts-destination", folder / "artifacts", "--serve-artifacts"]
    # The name of the service on Kubernetes and in Compose, and where it is here.
    command += ["--allowed-hosts", f"mlflow:5000,127.0.0.1:{port}"]
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        with contextlib.suppress(requests.ConnectionError):
            return requests.get(f"{url}/health", timeout=10).ok
        return False

    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"}
    with process(command, folder / "server.log", environment) as server:
        await_ready(answers, server, folder / "server.log")
        yield url


@contextlib.contextmanager
def process(
    command: list[object],
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
