"""Checkpoints are whole or skipped; the newest few stay."""

import os
from pathlib import Path

import numpy as np
import pytest

from mara_rl.common.errors import DataError
from mara_rl.training.run import checkpoint
from mara_rl.training.run.checkpoint import TrainState, load_newest_checkpoint, save_checkpoint

LEARNER = {
    "learner": {
        "rl_module": {"default_policy": {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}},
        "optimizer": {"state": {0: {"step": 3.0, "exp_avg": np.ones(2, np.float32)}}, "lr": 1e-3},
        "weights_seq_no": 4,
    }
}


def save(folder: Path, iteration: int, keep: int = 2) -> Path:
    return save_checkpoint(folder, TrainState(iteration=iteration), LEARNER, keep)


def test_a_checkpoint_comes_back_equal(tmp_path: Path) -> None:
    save(tmp_path, 5)
    state, learner = load_newest_checkpoint(tmp_path)
    assert state.iteration == 5
    np.testing.assert_equal(learner, LEARNER)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for iteration in (1, 2, 3, 10):
        save(tmp_path, iteration)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000003", "000010"]


def test_saving_an_iteration_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 3)
    save_checkpoint(tmp_path, TrainState(iteration=3, token_forwards=9), LEARNER, 2)
    assert load_newest_checkpoint(tmp_path)[0].token_forwards == 9


def test_a_figure_that_is_not_finite_is_no_torn_checkpoint(tmp_path: Path) -> None:
    state = TrainState(iteration=3, warm_start={"r2": 0.5, "r2_within_prompt": float("nan")})
    save_checkpoint(tmp_path, state, LEARNER, 2)
    loaded = load_newest_checkpoint(tmp_path)[0]
    assert loaded.warm_start["r2"] == 0.5
    assert np.isnan(loaded.warm_start["r2_within_prompt"])


def test_saving_an_iteration_again_keeps_the_old_one_until_the_new_one_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 3)

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 3)
    assert load_newest_checkpoint(tmp_path)[0].iteration == 3
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "remove_folder", killed)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, TrainState(iteration=3, token_forwards=9), LEARNER, 2)
    assert load_newest_checkpoint(tmp_path)[0].token_forwards == 9
    save_checkpoint(tmp_path, TrainState(iteration=3, token_forwards=11), LEARNER, 2)
    assert load_newest_checkpoint(tmp_path)[0].token_forwards == 11
    assert len(list(tmp_path.iterdir())) == 1


def test_the_best_is_kept_beside_the_newest(tmp_path: Path) -> None:
    for iteration, reward in enumerate([0.1, 0.9, None, 0.3, float("nan"), 0.2]):
        save_checkpoint(tmp_path, TrainState(iteration=iteration, reward=reward), LEARNER, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000001", "000004", "000005"]


def test_what_a_killed_process_was_writing_goes(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / ".writing-x" / "000002").mkdir(parents=True)
    assert load_newest_checkpoint(tmp_path)[0].iteration == 1
    assert [p.name for p in tmp_path.iterdir()] == ["000001"]


@pytest.mark.parametrize("damage", ["learner.pt", "state.json", "sha256.json"])
def test_a_torn_checkpoint_is_skipped(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    torn = save(tmp_path, 2) / damage
    torn.write_bytes(torn.read_bytes()[:-20])
    assert load_newest_checkpoint(tmp_path)[0].iteration == 1
    assert "000002 is torn and skipped" in caplog.text


def test_a_changed_byte_is_noticed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    state = save(tmp_path, 2) / "state.json"
    state.write_text(state.read_text().replace('"iteration":2', '"iteration":3'))
    assert load_newest_checkpoint(tmp_path)[0].iteration == 1


def test_one_that_cannot_be_read_is_not_taken_for_torn(tmp_path: Path) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    (newest / "learner.pt").unlink()
    (newest / "learner.pt").mkdir()  # reading it is an OSError, as of a file system that fails
    with pytest.raises(DataError, match=r"000002: could not be read: "):
        load_newest_checkpoint(tmp_path)
    assert newest.exists()


def test_none_without_checkpoints(tmp_path: Path) -> None:
    assert load_newest_checkpoint(tmp_path) is None


def test_a_full_disk_is_named_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("torch.save", full)
    with pytest.raises(DataError, match="No space left on device"):
        save(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["000001"]
    assert load_newest_checkpoint(tmp_path)[0].iteration == 1
