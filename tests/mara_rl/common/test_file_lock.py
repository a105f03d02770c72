"""A file is held by one process at a time, also where it is removed and made again meanwhile."""

import threading
from pathlib import Path

import pytest

from mara_rl.common import file_lock
from mara_rl.common.errors import ConfigError
from mara_rl.common.file_lock import held


def test_a_file_that_took_the_place_of_the_awaited_one_is_held_by_one_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_lock, "_POLL_S", 0.05)
    path = tmp_path / "lock"
    told: list[str] = []

    def wait() -> None:
        try:
            with held(path, "held by another", wait_s=1):
                told.append("held")
        except ConfigError as error:
            told.append(str(error))

    waiting = threading.Thread(target=wait)  # flock is of the open file: as another process
    with held(path, "refused"):
        waiting.start()
        path.unlink()  # as a run that failed removes its folder
        with held(path, "refused"):  # as the same run started again
            waiting.join()
    assert told == ["held by another"]


def test_a_file_removed_as_it_was_opened_is_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lock"
    flock = file_lock.fcntl.flock

    def late(file: object, operation: int) -> None:
        path.unlink()
        path.touch()
        flock(file, operation)

    monkeypatch.setattr(file_lock.fcntl, "flock", late)
    with pytest.raises(ConfigError, match="refused"), held(path, "refused"):
        pass
    monkeypatch.setattr(file_lock.fcntl, "flock", flock)
    path.unlink()
    tmp_path.rmdir()
    with pytest.raises(FileNotFoundError), held(path, "refused"):
        pass
