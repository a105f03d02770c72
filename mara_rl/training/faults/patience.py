"""Waiting for services that are away to come back."""

from collections.abc import Callable

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    stop_after_delay,
    wait_fixed,
)

from mara_rl.common.display import Display
from mara_rl.common.errors import RetryableError

_WAIT_S = 2.0


def patience(limit_s: float, display: Display, check_interrupt: Callable[[], None]) -> Retrying:
    """Calls what it is given again while that raises RetryableError, for ``limit_s`` at most.

    The first of these is shown; the last is raised, as is whatever ``check_interrupt`` raises.
    """

    def tell(state: RetryCallState) -> None:
        if state.attempt_number == 1 and state.outcome is not None:
            display.line(f"{state.outcome.exception()}; trying for up to {limit_s:g} s")

    return Retrying(
        stop=stop_after_delay(limit_s),
        wait=wait_fixed(_WAIT_S),
        retry=retry_if_exception_type(RetryableError),
        before=lambda state: check_interrupt(),
        before_sleep=tell,
        reraise=True,
    )
