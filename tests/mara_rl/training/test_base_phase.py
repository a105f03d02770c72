"""How base answers are spread over prompts and openings."""

from collections import Counter
from itertools import pairwise

from mara_rl.training.base_phase import openings_of, spread
from mara_rl.training.config import WarmStartConfig


def test_prompts_are_spread_evenly_and_repeats_stand_together() -> None:
    prompts = list("abcde")
    asked = spread(prompts, 13, seed=0)
    assert sorted(Counter(asked).values()) == [2, 2, 3, 3, 3]
    assert sum(a != b for a, b in pairwise(asked)) == 4
    assert asked == spread(prompts, 13, seed=0) != spread(prompts, 13, seed=1)


def test_a_share_of_the_answers_tries_each_opening() -> None:
    warm = WarmStartConfig(answers=2000, openings=["I", "No, I"], opened_share=0.3)
    counts = Counter(openings_of(warm, 2000, seed=0))
    assert set(counts) == {"", "I", "No, I"}
    assert abs(counts[""] / 2000 - 0.7) < 0.04
    assert abs(counts["I"] - counts["No, I"]) < 100
    again, other = openings_of(warm, 2000, seed=0), openings_of(warm, 2000, seed=1)
    assert openings_of(warm, 2000, seed=0) == again != other
    assert openings_of(WarmStartConfig(answers=8), 8, seed=0) is None
