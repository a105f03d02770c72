"""A limit on calls that have none of their own."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from mara_rl.common.errors import RetryableError

_AGAIN_S = 2.0


@contextlib.contextmanager
def time_limit(seconds: float, message: str) -> Iterator[None]:
    """Raise RetryableError with ``message`` when the block takes longer. In the main thread only.

    What interrupts it is KeyboardInterrupt, as Ray's waiting calls hear of no other exception. It
    comes again and again, as Python drops one that meets a finalizer.
    """
    expired = False

    def expire(signum: int, frame: FrameType | None) -> None:
        nonlocal expired
        expired = True
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN_S)
    try:
        yield
    except KeyboardInterrupt:
        if expired:
            raise RetryableError(message) from None
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
