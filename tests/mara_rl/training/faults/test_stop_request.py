"""Signals to a training run: noted, and acted on at safe points."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from mara_rl.cli.app import app
from mara_rl.common.display import Display
from mara_rl.training import training_run
from mara_rl.training.faults.stop_request import Interrupted, StopRequest

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def before() -> Iterator[None]:
    handlers = [signal.getsignal(signum) for signum in SIGNALS]
    yield
    assert [signal.getsignal(signum) for signum in SIGNALS] == handlers


def stop_request() -> StopRequest:
    return StopRequest(Display(Console()))


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_noted_and_raised_where_it_is_safe(
    signum: signal.Signals, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with stop_request() as stop:
        stop.check()
        os.kill(os.getpid(), signum)
        with pytest.raises(Interrupted) as caught:
            stop.check()
    assert caught.value.status == status
    assert "stopping at the next safe point" in capsys.readouterr().out


def test_a_second_ctrl_c_stops_at_once_and_a_second_sigterm_does_not() -> None:
    with stop_request() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt) as caught:
            os.kill(os.getpid(), signal.SIGINT)
        assert not isinstance(caught.value, Interrupted)
        with pytest.raises(Interrupted):
            stop.check()


def test_a_signal_that_another_has_taken_meanwhile_is_taken_back() -> None:
    with stop_request() as stop:
        signal.signal(signal.SIGTERM, lambda signum, frame: os._exit(signum))  # as Ray does
        stop.listen()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted):
            stop.check()


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_says_how_to_go_on_and_by_what_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signum: signal.Signals, status: int
) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise Interrupted(signum)

    monkeypatch.setenv("MARA_HOME", str(tmp_path))
    monkeypatch.setattr(training_run, "train", stopped)
    done = CliRunner().invoke(app, ["train", "quickstart", "--run", "mine"])
    assert done.exit_code == status
    assert "interrupted: continue with `mara-rl train --resume mine`" in done.output
