import numpy as np
import pytest

from mara_rl.common.errors import DataError
from mara_rl.metrics.bootstrap import PairedBootstrap


def test_the_interval_of_a_mean_is_that_of_a_plain_bootstrap():
    values = np.random.default_rng(1).normal(2.0, 3.0, 80)
    found = PairedBootstrap(80, resamples=10_000, seed=3).mean(values)
    rng = np.random.default_rng(9)
    plain = [rng.choice(values, 80).mean() for _ in range(10_000)]
    low, high = np.quantile(plain, (0.025, 0.975))
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == (pytest.approx(low, abs=0.05), pytest.approx(high, abs=0.05))


def test_the_same_seed_gives_the_same_interval_and_another_one_does_not():
    values = np.arange(30.0)
    intervals = [PairedBootstrap(30, resamples=500, seed=s).mean(values) for s in (0, 0, 1)]
    assert intervals[0] == intervals[1] != intervals[2]


def test_figures_of_one_prompt_are_resampled_together():
    values = np.random.default_rng(0).normal(size=40)
    bootstrap = PairedBootstrap(40, resamples=300)
    means = bootstrap.means(np.stack([values, 1 - values], axis=1))
    assert np.allclose(means.sum(1), 1)


def test_some_rows_alone():
    values, rows = np.arange(20.0), np.array([3, 5, 7, 9])
    found = PairedBootstrap(20, resamples=2000).mean(values, rows)
    assert found.value == 6.0
    assert 3 <= found.low < 6 < found.high <= 9
    assert PairedBootstrap(20, resamples=2000).mean(np.ones(20), rows).low == 1.0


def test_a_95_percent_interval_covers_the_truth_as_often():
    rng = np.random.default_rng(5)
    covered = []
    for seed in range(300):
        found = PairedBootstrap(60, resamples=400, seed=seed).mean(rng.exponential(1.0, 60))
        covered.append(found.low <= 1.0 <= found.high)
    assert 0.88 < np.mean(covered) < 0.98


def test_the_difference_at_equal_length_is_the_intercept_of_the_line():
    rng = np.random.default_rng(2)
    longer = rng.normal(10, 5, 50)
    difference = 0.3 + 0.02 * longer + rng.normal(0, 0.1, 50)
    _, intercept = np.polyfit(longer, difference, 1)
    found = PairedBootstrap(50, resamples=2000).length_controlled(difference, longer)
    assert found.value == pytest.approx(intercept)
    assert found.low < 0.3 < found.high < 0.4  # the mean is 0.5


def test_without_a_spread_of_lengths_it_is_the_mean():
    found = PairedBootstrap(3, resamples=2000).length_controlled([1.0, 2.0, 6.0], [4.0, 4.0, 4.0])
    assert found.value == pytest.approx(3.0)


def test_no_prompts_are_refused():
    with pytest.raises(DataError, match="num_prompts is 0"):
        PairedBootstrap(0)
