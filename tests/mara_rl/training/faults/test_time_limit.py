"""A call that waits without limit ends in one line."""

import signal
import threading
import time

import pytest
import ray

from mara_rl.common.errors import RetryableError
from mara_rl.training.faults import time_limit as time_limit_module
from mara_rl.training.faults.time_limit import time_limit
from services.cluster.ray_session import ray_session


def test_what_ends_in_time_is_left_alone():
    before = signal.getsignal(signal.SIGALRM)
    with time_limit(30, "late"):
        pass
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_a_ctrl_c_within_it_stays_one():
    with pytest.raises(KeyboardInterrupt), time_limit(30, "late"):
        raise KeyboardInterrupt


@pytest.mark.slow
def test_an_actor_that_has_no_room_is_not_waited_for_without_end():
    with ray_session(num_cpus=1):
        actor = ray.remote(num_cpus=1000)(threading.Event).remote()
        began = time.monotonic()
        with pytest.raises(RetryableError, match="no room"), time_limit(1, "no room for it"):
            ray.get(actor.is_set.remote())
        assert time.monotonic() - began < 20


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_alarm_that_a_finalizer_swallows_comes_again(monkeypatch):
    monkeypatch.setattr(time_limit_module, "_AGAIN_S", 0.2)

    class Finalized:
        def __del__(self):
            time.sleep(0.6)

    def wait() -> None:
        Finalized()
        time.sleep(30)

    began = time.monotonic()
    with pytest.raises(RetryableError, match="late"), time_limit(0.2, "late"):
        wait()
    assert time.monotonic() - began < 20
