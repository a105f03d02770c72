"""The commands that start Redis in the manifests, run with a password and a folder of their own."""

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
import yaml
from redis_servers import REDIS_BINARY

from services.cluster.redis_server import connect

DEPLOY = Path(__file__).parents[2] / "deploy"
PASSWORD = "a-password"


def commands() -> dict[str, list[str]]:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["redis"]
    documents = yaml.safe_load_all((DEPLOY / "kuberay" / "redis.yaml").read_text())
    [pod] = [d["spec"]["template"]["spec"] for d in documents if d["kind"] == "StatefulSet"]
    [container] = pod["containers"]
    return {"compose": compose["command"], "kuberay": container["command"] + container["args"]}


@pytest.fixture(params=["compose", "kuberay"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL, without the password, of Redis as one of them starts it."""
    name, *arguments = commands()[request.param]
    assert name == "redis-server"
    password = re.compile(r"\$\{REDIS_PASSWORD:.*\}|\$\(REDISCLI_AUTH\)")
    given = [password.sub(PASSWORD, word).replace("/data", str(tmp_path)) for word in arguments]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [REDIS_BINARY, *given, "--port", str(port), "--bind", "127.0.0.1"],
        cwd=tmp_path,  # as in the image, whose folder is /data
        stdout=subprocess.DEVNULL,
    )
    yield f"127.0.0.1:{port}/0"
    process.terminate()
    process.wait(20)


def test_it_starts_asks_for_the_password_and_keeps_what_it_is_given(
    server: str, tmp_path: Path
) -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            with pytest.raises(redis.AuthenticationError):
                redis.Redis.from_url(f"redis://{server}").ping()
            break
        except redis.ConnectionError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    client = connect(f"redis://:{PASSWORD}@{server}")
    client.set("a", "b")
    assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
    assert list(tmp_path.glob("appendonly*")), "nothing is on disk"
    cli = shutil.which("redis-cli")
    if cli is None:
        pytest.skip("no redis-cli: the probes are not run")
    port = re.split("[:/]", server)[1]
    probe = [cli, "-p", port, "ping"]  # as the probes, which find the password in the environment
    environment = os.environ | {"REDISCLI_AUTH": PASSWORD}
    assert subprocess.check_output(probe, env=environment, text=True) == "PONG\n"
