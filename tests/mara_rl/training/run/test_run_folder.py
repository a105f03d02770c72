"""Runs by name: who may train in a folder, with which config, and when there is nothing to do."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mara_rl.common.errors import ConfigError
from mara_rl.training.config import load_config
from mara_rl.training.run.run_folder import RunFolder, RunOutcome, remove_folder


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MARA_HOME", str(tmp_path))
    return tmp_path


def test_a_run_is_created_once_and_found_again_with_the_same_config(home: Path) -> None:
    config = load_config("quickstart")
    first = RunFolder.named("mine", config)
    assert first.path == home / "mine"
    assert RunFolder.open("mine")[1] == config
    assert RunFolder.named("mine", config).path == first.path


def test_a_folder_whose_creation_was_cut_off_is_completed(home: Path) -> None:
    (home / "mine").mkdir()
    RunFolder.named("mine", load_config("quickstart"))
    assert RunFolder.open("mine")[1].name == "quickstart"


def test_a_folder_that_is_no_run_is_left_alone(home: Path) -> None:
    (home / "hub" / "models").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"run name 'hub': .* is no run \(it holds 'models'"):
        RunFolder.named("hub", load_config("quickstart"))
    assert (home / "hub" / "models").is_dir()


def test_another_config_under_the_same_name_is_refused_by_its_first_difference() -> None:
    RunFolder.named("mine", load_config("quickstart"))
    other = load_config("quickstart", ["ppo.lr=0.5", "seed=3"])
    with pytest.raises(ConfigError, match=r"run 'mine' .* \(ppo\.lr 5e-06, not 0\.5\)"):
        RunFolder.named("mine", other)


@pytest.mark.parametrize("name", ["", "../x", "a b", ".hidden", "a/b", "mine\n"])
def test_a_bad_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="run name"):
        RunFolder.named(name, load_config("quickstart"))


def test_one_process_trains_in_a_folder_and_its_death_sets_it_free() -> None:
    folder = RunFolder.named("mine", load_config("quickstart"))
    assert not folder.is_claimed()
    script = (
        "import sys\nfrom pathlib import Path\n"
        "from mara_rl.training.run.run_folder import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])).claimed():\n"
        "    print('claimed', flush=True)\n    sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(folder.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "claimed\n"
        assert folder.is_claimed()
        with (
            pytest.raises(ConfigError, match="'mine' is being trained by another process"),
            folder.claimed(),
        ):
            pass
        threading.Timer(1.5, other.kill).start()
        with folder.claimed(wait_s=60):  # as a job that is submitted again at once
            assert other.poll() is not None
    finally:
        other.kill()
        other.communicate()
    assert not folder.is_claimed()


def test_a_folder_that_goes_while_it_is_waited_for_is_not_trained_in() -> None:
    folder = RunFolder.named("mine", load_config("quickstart"))
    entered = threading.Event()
    failures: list[ConfigError] = []

    def wait() -> None:
        try:
            with folder.claimed(wait_s=60):
                entered.set()
        except ConfigError as error:
            failures.append(error)

    with folder.claimed():  # flock is of the open file: the thread waits as a process would
        other = threading.Thread(target=wait)
        other.start()
        time.sleep(1.5)
        remove_folder(folder.path)
    other.join()
    assert not entered.is_set()
    assert "ended without having begun" in str(failures[0])


def test_the_outcome_is_kept() -> None:
    folder = RunFolder.named("mine", load_config("quickstart"))
    assert folder.outcome() is None
    outcome = RunOutcome(run="mine", agent_uri="models:/mara-x/1", preference_rate=None)
    folder.finish(outcome)
    assert folder.outcome() == outcome
