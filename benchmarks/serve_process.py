"""A ``mara-rl serve`` of its own for a benchmark."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

_START_TIMEOUT_S = 300


@contextlib.contextmanager
def serving(*arguments: str) -> Iterator[str]:
    """The URL of a server that ends with the block; its output goes to this terminal's errors."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = "from mara_rl.cli.app import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "serve", "--port", str(port), *arguments],
        env={key: value for key, value in os.environ.items() if key != "MARA_API_KEY"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        began_s = time.monotonic()
        for line in process.stdout:
            print(line, end="", file=sys.stderr)
            if "playground:" in line:
                break
            if time.monotonic() - began_s > _START_TIMEOUT_S:
                raise TimeoutError("mara-rl serve did not start")
        else:
            raise RuntimeError("mara-rl serve ended before it was ready")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate()
