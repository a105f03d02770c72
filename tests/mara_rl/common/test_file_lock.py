"""A file is locked by one process at a time, also where it is removed and made again meanwhile."""

import threading
from pathlib import Path

import pytest

from mara_rl.common import file_lock as module
from mara_rl.common.errors import ConfigError
from mara_rl.common.file_lock import file_lock


def test_a_file_that_took_the_place_of_the_awaited_one_is_locked_by_one_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_POLL_S", 0.05)
    path = tmp_path / "lock"
    messages: list[str] = []

    def wait() -> None:
        try:
            with file_lock(path, "locked by another", wait_s=1):
                messages.append("locked")
        except ConfigError as error:
            messages.append(str(error))

    waiting = threading.Thread(target=wait)  # flock is of the open file: as another process
    with file_lock(path, "refused"):
        waiting.start()
        path.unlink()  # as a run that failed removes its folder
        with file_lock(path, "refused"):  # as the same run started again
            waiting.join()
    assert messages == ["locked by another"]


@pytest.mark.parametrize("how", ["removed", "renamed"])  # NFS renames a file that is open
def test_a_file_removed_as_it_was_opened_is_not_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    path = tmp_path / "run" / "lock"
    path.parent.mkdir()
    flock = module.fcntl.flock

    def late(file: object, operation: int) -> None:
        if how == "removed":
            path.unlink()
        else:
            path.rename(tmp_path / "renamed")
        path.touch()
        flock(file, operation)

    monkeypatch.setattr(module.fcntl, "flock", late)
    with pytest.raises(ConfigError, match="refused"), file_lock(path, "refused"):
        pass
    monkeypatch.setattr(module.fcntl, "flock", flock)
    path.unlink()
    path.parent.rmdir()
    with pytest.raises(FileNotFoundError), file_lock(path, "refused"):
        pass
