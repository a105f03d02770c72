"""What is away at the start of a run that had begun is waited for."""

import io

import pytest
from rich.console import Console

from mara_rl.common.display import Display
from mara_rl.common.errors import ConfigError, RetryableError
from mara_rl.training.faults import patience as patience_module
from mara_rl.training.faults.patience import patience


class Away:
    """Raises until it was called ``times`` times."""

    def __init__(self, times: int, error: Exception) -> None:
        self.times, self.error, self.calls = times, error, 0

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self.times:
            raise self.error
        return "redis://there"


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience_module, "_WAIT_S", 0.01)


def test_it_waits_for_the_limit_and_says_so_once() -> None:
    out = io.StringIO()
    display = Display(Console(file=out))
    away = Away(3, RetryableError("Redis is away"))
    assert patience(60, display, lambda: None)(away) == "redis://there"
    assert out.getvalue().splitlines() == ["Redis is away; trying for up to 60 s"]
    with pytest.raises(RetryableError, match="Redis is away"):
        patience(0, display, lambda: None)(Away(1, away.error))  # of a run that had not begun
    for _ in range(2):
        assert patience(0, display, lambda: None)(away) == "redis://there"
    assert out.getvalue().count("\n") == 1


def test_what_does_not_pass_and_an_interrupt_end_it() -> None:
    display = Display(Console(file=io.StringIO()))
    wrong = Away(9, ConfigError("refused access"))
    with pytest.raises(ConfigError, match="refused access"):
        patience(60, display, lambda: None)(wrong)
    assert wrong.calls == 1
    away = Away(10**9, RetryableError("Redis is away"))

    def interrupt() -> None:
        if away.calls == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        patience(60, display, interrupt)(away)


def test_each_retry_of_what_has_a_name_is_shown() -> None:
    out = io.StringIO()
    away = Away(2, RetryableError("no answer"))
    patience(60, Display(Console(file=out)), lambda: None, retry="asking again")(away)
    assert out.getvalue().splitlines() == ["asking again: no answer"] * 2
