import math

import numpy as np
import pytest

from mara_rl.common.errors import ConfigError, DataError
from mara_rl.metrics.preference import (
    PreferenceRate,
    outcomes,
    preference_rate,
    result_line,
    sign_test,
)


def column(scores) -> np.ndarray:
    """One answer a prompt."""
    return np.array(scores, float)[:, None]


def outcomes_of(*scores) -> dict[str, list[float]]:
    """Outcomes of one answer each, from rewards of A and B and costs of A and B."""
    return {key: found[:, 0].tolist() for key, found in outcomes(*map(column, scores)).items()}


def test_a_wins_or_loses_only_where_both_axes_agree():
    #        both  only reward  only cost  neither  equal cost  all equal
    reward_a = [2, 2, 0, 0, 2, 1]
    reward_b = [1, 1, 1, 1, 1, 1]
    cost_a = [-5, 5, -5, 5, 0, 0]
    cost_b = [0, 0, 0, 0, 0, 0]
    result = outcomes_of(reward_a, reward_b, cost_a, cost_b)
    assert result["both"] == [1, 0, 0, -1, 0, 0]


def test_changing_sides_changes_every_sign():
    rng = np.random.default_rng(0)
    ra, rb, ca, cb = rng.integers(0, 3, (4, 200)).astype(float)
    result = outcomes_of(ra, rb, ca, cb)["both"]
    assert {-1, 0, 1} == set(result)
    assert outcomes_of(rb, ra, cb, ca)["both"] == [-each for each in result]


def test_a_higher_reward_is_better_and_a_lower_cost():
    a, b = [3.0, 1.0, 2.0], [1.0, 3.0, 2.0]
    found = outcomes_of(a, b, a, b)
    assert found["helpful"] == [1, -1, 0]
    assert found["harmless"] == [-1, 1, 0]


def test_tiny_and_huge_differences_count():
    tiny = np.nextafter(0.0, 1.0)
    scores = [tiny, 1e308], [0.0, -1e308]
    assert outcomes_of(*scores, *scores)["helpful"] == [1, 1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_named(bad):
    with pytest.raises(DataError, match=rf"cost_b\[2\] is {bad}"):
        outcomes_of([1, 1, 1], [0, 0, 0], [0, 0, 0], [1, 1, bad])


def test_unequal_and_flat_scores_are_refused():
    with pytest.raises(DataError, match="2 reward_a and 3 reward_b"):
        outcomes_of([1, 1], [0, 0, 0], [0, 0], [1, 1])
    with pytest.raises(DataError, match="2 reward and 1 cost"):
        outcomes_of([1, 1], [0, 0], [0], [1])
    with pytest.raises(DataError, match=r"reward_a has shape \(2,\)"):
        outcomes([1, 2], column([1, 2]), column([1, 2]), column([1, 2]))


def test_the_rate_is_net_wins_in_points():
    rate = preference_rate([1] * 70 + [-1] * 20 + [0] * 10)
    assert (rate.rate, rate.n, rate.wins, rate.losses, rate.ties) == (50.0, 100, 70, 20, 10)
    assert (rate.won, rate.lost, rate.p_value) == (70, 20, sign_test(70, 20))
    # Normal approximation: standard error of the mean of the outcomes, 1.96 of them either side.
    error = 1.96 * 100 * math.sqrt((0.9 - 0.5**2) / 100)
    assert rate.low == pytest.approx(50 - error, abs=1.5)
    assert rate.high == pytest.approx(50 + error, abs=1.5)


def test_the_interval_is_that_of_resampling_the_prompts_themselves():
    values = np.array([1] * 25 + [-1] * 10 + [0] * 15)
    drawn = np.random.default_rng(1).choice(values, (20_000, len(values))).mean(axis=1) * 100
    rate = preference_rate(values, resamples=20_000)
    # one outcome moves the mean by 2 points
    assert rate.low == pytest.approx(np.quantile(drawn, 0.025), abs=2.01)
    assert rate.high == pytest.approx(np.quantile(drawn, 0.975), abs=2.01)


@pytest.mark.parametrize(
    ("p_win", "p_loss"), [(0.3, 0.3), (0.5, 0.2), (0.1, 0.6)], ids=["even", "ahead", "behind"]
)
def test_the_interval_covers_the_true_rate_about_as_often_as_it_says(p_win, p_loss):
    rng = np.random.default_rng(7)
    true_rate, trials = 100 * (p_win - p_loss), 600
    covered = {0.8: 0, 0.95: 0}
    for trial in range(trials):
        values = rng.choice([1, -1, 0], size=120, p=[p_win, p_loss, 1 - p_win - p_loss])
        for confidence in covered:
            rate = preference_rate(values, resamples=500, seed=trial, confidence=confidence)
            covered[confidence] += rate.low <= true_rate <= rate.high
    for confidence, hits in covered.items():
        sampling_error = math.sqrt(confidence * (1 - confidence) / trials)
        assert hits / trials == pytest.approx(confidence, abs=0.02 + 3 * sampling_error)


@pytest.mark.parametrize(("value", "points"), [(1, 100.0), (-1, -100.0), (0, 0.0)])
def test_equal_outcomes_give_an_interval_without_width(value, points):
    rate = preference_rate([value] * 30)
    assert (rate.rate, rate.low, rate.high) == (points, points, points)


def test_the_seed_alone_decides_the_interval():
    values = [1] * 60 + [-1] * 37
    assert preference_rate(values, seed=3) == preference_rate(values, seed=3)
    assert preference_rate(values, seed=3, resamples=100) != preference_rate(
        values, seed=4, resamples=100
    )


def test_more_confidence_and_fewer_prompts_widen_the_interval():
    def width(values: list[int], confidence: float) -> float:
        rate = preference_rate(values, confidence=confidence)
        return rate.high - rate.low

    values = [1, -1, 0, 1] * 25
    assert width(values, 0.8) < width(values, 0.95) < width(values, 0.99)
    assert width(values, 0.95) < width(values[:20], 0.95)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], r"shape \(0,\)"),
        ([[1, 0]], r"shape \(1, 2\)"),
        ([1, 0, 2], r"outcomes\[2\] is 2"),
        ([1, math.nan], r"outcomes\[1\] is nan"),
    ],
)
def test_outcomes_that_are_none_are_refused(values, message):
    with pytest.raises(DataError, match=message):
        preference_rate(values)


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match="resamples is 0"):
        preference_rate([1], resamples=0)
    with pytest.raises(ConfigError, match="confidence is 95"):
        preference_rate([1], confidence=95)


@pytest.mark.parametrize(
    ("points", "line"),
    [
        ((34, 21, 47), "preference rate: +34.0 [+21.0, +47.0] (n=120)"),
        ((-8.26, -19.04, 2.5), "preference rate: -8.3 [-19.0, +2.5] (n=120)"),
        ((0.0, -0.04, 100), "preference rate: +0.0 [+0.0, +100.0] (n=120)"),
    ],
)
def test_the_result_line_has_its_one_form(points, line):
    rate = PreferenceRate(*points, n=120, wins=0, losses=0, ties=120, won=0, lost=0, p_value=1.0)
    assert result_line(rate) == line


@pytest.mark.parametrize(
    ("wins", "losses", "p_value"),
    [
        (0, 0, 1.0),
        (5, 5, 1.0),
        (5, 0, 2 / 32),
        (8, 2, 2 * (1 + 10 + 45) / 1024),
        (60, 40, 0.056887933640980784),  # scipy.stats.binomtest(60, 100)
    ],
)
def test_the_sign_test_is_exact_and_symmetric(wins, losses, p_value):
    assert sign_test(wins, losses) == pytest.approx(p_value, rel=1e-12)
    assert sign_test(losses, wins) == sign_test(wins, losses)


def test_the_sign_test_stays_exact_for_thousands_of_prompts():
    z = 100 / math.sqrt(5000)  # 2550 of 5000 against 2450, normal with continuity correction
    expected = math.erfc((z - 1 / math.sqrt(5000)) / math.sqrt(2))
    assert sign_test(2550, 2450) == pytest.approx(expected, rel=1e-3)
    assert 0 < sign_test(1000, 100) < 1e-150
    assert sign_test(np.int64(2550), np.int64(2450)) == sign_test(2550, 2450)


def test_the_sign_test_refuses_negative_counts():
    with pytest.raises(DataError, match="losses is -1"):
        sign_test(3, -1)
