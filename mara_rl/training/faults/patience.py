"""Waiting for Redis, MLflow and score services to come back."""

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


def patience(
    limit_s: float, display: Display, check_interrupt: Callable[[], None], *, retry: str = ""
) -> Retrying:
    """Calls what it is given again while that raises RetryableError, for ``limit_s`` at most.

    The first of these is shown, or with ``retry``, a name of what is done, each of them. The last
    is raised, as is whatever ``check_interrupt`` raises.
    """

    def show(state: RetryCallState) -> None:
        error = state.outcome and state.outcome.exception()
        if retry:
            display.line(f"{retry}: {error}")
        elif state.attempt_number == 1:
            display.line(f"{error}; trying for up to {limit_s:g} s")

    return Retrying(
        stop=stop_after_delay(limit_s),
        wait=wait_fixed(_WAIT_S),
        retry=retry_if_exception_type(RetryableError),
        before=lambda state: check_interrupt(),
        before_sleep=show,
        reraise=True,
    )
