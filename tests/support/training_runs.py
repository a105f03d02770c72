"""`mara-rl train` as a process of its own, on tiny models, to be watched and killed."""

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from tiny_checkpoints import BeaverFolder
from tiny_llms import save_tiny_llms

COMMAND = [sys.executable, "-c", "from mara_rl.cli.app import main; main()"]
POISON = "é"
REWARD_LEVEL = 1000.0
RUNNER, REPLICA, LEARNER = "SingleAgentEnvRunner", "ServeReplica:{}", "_WrappedExecutable"
"""What `TrainingProcess.processes` finds the processes of a run by."""


class TinyModels:
    """An LLM and two score models with random weights.

    The reward of a prompt that has `POISON` in it is NaN; others are within a few tens of
    `REWARD_LEVEL`, so that a mean over answers tells whether a 0 was among them.
    """

    def __init__(self, folder: Path) -> None:
        self.llm = save_tiny_llms(folder)["llama"]
        self.scores = {}
        for name in ("reward", "cost"):
            checkpoint = BeaverFolder(folder / name, score_type=name)
            if name == "reward":
                # Of `<unk>`, which stands for every character that is not ASCII.
                checkpoint.state["model.embed_tokens.weight"][0] = float("nan")
                checkpoint.state["score_head.bias"][0] = REWARD_LEVEL
            else:
                checkpoint.state["score_head.weight"] = torch.randn(1, 32)
            self.scores[name] = checkpoint.write()


def write_config(folder: Path, models: TinyModels, texts: list[str], **sections: Any) -> Path:
    """A config file; ``sections`` are merged into its sections. No poison in held-out prompts."""
    train, heldout = folder / "train.jsonl", folder / "heldout.jsonl"
    for file, poison in ((train, POISON), (heldout, "")):
        rows = [
            {"id": f"p{i}", "prompt": text.replace(POISON, poison)} for i, text in enumerate(texts)
        ]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    service = {"num_cpus": 0.1, "torch_threads": 1}
    settings: dict[str, Any] = {
        "name": "tiny",
        "llm": {"name": str(models.llm), "dtype": "float32"},
        "candidates": {"top_k": 8, "top_p": 0.9},
        "prompts": {"train": str(train), "heldout": str(heldout), "dead_after_s": 5},
        "scores": {
            name: {"model": str(path), "weight": weight, **service}
            for (name, path), weight in zip(models.scores.items(), (1.0, -1.0), strict=True)
        },
        "rollouts": {
            "num_slots": 8,
            "fragment_steps": 16,
            "max_new_tokens": 8,
            "num_cpus": 0.5,
            "torch_threads": 1,
            "sample_timeout_s": 120,
            "probe_timeout_s": 5,
        },
        "learner": {"num_cpus": 0.3},
        "ppo": {"iterations": 6, "kl_coeff": 0.05, "minibatch_size": 64, "scale_answers": 16},
        "checkpoint": {"every_iterations": 2},
        "registry": {"promote": False},
        "driver_torch_threads": 1,
    }
    for name, values in sections.items():
        if isinstance(values, Mapping):
            settings[name] = {**(settings.get(name) or {}), **values}
        else:
            settings[name] = values
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


class TrainingProcess:
    """A running ``mara-rl train`` in a process group of its own.

    Attributes:
        lines: what it has printed so far, both streams, with the time of each line.
    """

    def __init__(self, home: Path, *arguments: str, env: Mapping[str, str] | None = None) -> None:
        inherited = {
            key: value
            for key, value in os.environ.items()
            if key not in ("RAY_ADDRESS", "MARA_REDIS_URL", "MLFLOW_TRACKING_URI")
        }
        self.home = home
        self.lines: list[tuple[float, str]] = []
        self.process = subprocess.Popen(
            [*COMMAND, "train", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**inherited, "MARA_HOME": str(home), **(env or {})},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._known: set[psutil.Process] = set()

    @property
    def output(self) -> str:
        return "".join(line for _, line in list(self.lines))

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append((time.time(), line))

    def processes(self, title: str) -> list[psutil.Process]:
        """Processes of this run whose title has ``title`` in it."""
        found = []
        for process in self._all():
            with contextlib.suppress(psutil.NoSuchProcess):
                if title in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def _all(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            self._known |= set(psutil.Process(self.process.pid).children(recursive=True))
        return [process for process in self._known if process.is_running()]

    def until(self, condition: Callable[[], Any], what: str, timeout_s: float = 300) -> Any:
        """Wait for a true value of ``condition`` while the run goes on, and return it."""
        deadline = time.monotonic() + timeout_s
        while not (value := condition()):
            assert self.process.poll() is None, f"the run ended before {what}:\n{self.output}"
            assert time.monotonic() < deadline, f"{what} did not come:\n{self.output}"
            time.sleep(0.05)
        return value

    def until_line(self, text: str, timeout_s: float = 300) -> float:
        """Wait for a line with ``text`` in it; the time it came."""
        return self.until(
            lambda: next((at for at, line in list(self.lines) if text in line), None),
            f"a line with {text!r}",
            timeout_s,
        )

    def until_iteration(self, number: int, timeout_s: float = 300) -> float:
        """Wait until MLflow has the metrics of an iteration; the time they were logged."""
        return self.until(
            lambda: dict(iterations(self.home)).get(number), f"iteration {number}", timeout_s
        )

    def kill(self) -> float:
        """SIGKILL to the driver's process group; returns the time, once all its processes are gone.

        What else it started on this machine ends by itself, save for Redis.
        """
        ray = []
        for process in self._all():
            with contextlib.suppress(psutil.NoSuchProcess):
                if "redis-server" not in process.name():
                    ray.append(process)
        at = time.time()
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        _, alive = psutil.wait_procs(ray, timeout=30)
        assert not alive, alive
        return at

    def finish(self, status: int = 0, timeout_s: float = 300) -> str:
        """Wait for the end of the run, check its exit status and return what it printed."""
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the run goes on and on:\n{self.output}") from None
        self._reader.join(10)
        assert self.process.returncode == status, self.output
        assert "Traceback" not in self.output, self.output
        return self.output

    def interrupt(self) -> str:
        """Ctrl-C: the run saves itself and ends; what it printed."""
        os.kill(self.process.pid, signal.SIGINT)
        return self.finish(status=130)

    def stop(self) -> None:
        """End whatever is still there, at the end of a test."""
        for process in self._all():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()
                process.kill()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def iterations(home: Path) -> list[tuple[int, float]]:
    """The iterations that MLflow's database under ``home`` has, with the time each was logged."""
    return [(step, at) for step, _, at in metric_history(home, "time/iteration_s")]


def metric_history(home: Path, key: str) -> list[tuple[int, float, float]]:
    """(step, value, seconds since 1970) of a metric, in the order of the steps."""
    return [(step, value, at) for name, step, value, at in all_metrics(home) if name == key]


def all_metrics(home: Path) -> list[tuple[str, int, float, float]]:
    """(key, step, value, seconds since 1970) of all metrics of all runs, sorted."""
    database = home / "mlflow.db"
    if not database.exists():
        return []
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        try:
            rows = connection.execute("SELECT key, step, value, timestamp FROM metrics").fetchall()
        except sqlite3.OperationalError:  # its tables are being made
            return []
    return sorted((key, step, value, ms / 1000) for key, step, value, ms in rows)
