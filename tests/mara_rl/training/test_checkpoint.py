"""Checkpoints are whole or skipped; the newest few stay."""

import os
from pathlib import Path

import numpy as np
import pytest

from mara_rl.errors import DataError
from mara_rl.training.checkpoint import TrainState, load_newest_checkpoint, save_checkpoint

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


@pytest.mark.parametrize("damage", ["learner.pt", "state.json"])
def test_a_torn_checkpoint_is_skipped(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    torn = save(tmp_path, 2) / damage
    torn.write_bytes(torn.read_bytes()[:-20])
    assert load_newest_checkpoint(tmp_path)[0].iteration == 1
    assert "is skipped" in caplog.text


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
