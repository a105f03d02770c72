"""How base answers are spread over prompts and openings, and scored."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt

from mara_rl.common.errors import RetryableError
from mara_rl.decoding.answer import DecodedAnswer
from mara_rl.training.config import WarmStartConfig
from mara_rl.training.start_phase import openings_of, prompts_of, score_in_batches, spread


def test_prompts_are_spread_evenly_and_repeats_stand_together() -> None:
    prompts = list("abcde")
    asked = spread(prompts, 13, seed=0)
    assert sorted(Counter(asked).values()) == [2, 2, 3, 3, 3]
    assert sum(a != b for a, b in pairwise(asked)) == 4
    assert asked == spread(prompts, 13, seed=0) != spread(prompts, 13, seed=1)


def test_few_prompts_get_many_answers_where_that_is_asked_for() -> None:
    prompts = [str(i) for i in range(50)]
    warm = WarmStartConfig(answers=60, answers_per_prompt=3)
    chosen = prompts_of(warm, prompts, seed=0)
    assert len(set(chosen)) == 20
    assert set(chosen) < set(prompts)
    assert chosen == prompts_of(warm, prompts, seed=0) != prompts_of(warm, prompts, seed=1)
    assert len(prompts_of(WarmStartConfig(answers=9, answers_per_prompt=9), prompts, seed=0)) == 2
    assert set(prompts_of(WarmStartConfig(answers=999, answers_per_prompt=3), prompts, 0)) == set(
        prompts
    )
    assert prompts_of(WarmStartConfig(answers=60), prompts, seed=0) == prompts


def test_a_share_of_the_answers_tries_each_opening() -> None:
    warm = WarmStartConfig(answers=2000, openings=["I", "No, I"], opened_share=0.3)
    counts = Counter(openings_of(warm, 2000, seed=0))
    assert set(counts) == {"", "I", "No, I"}
    assert abs(counts[""] / 2000 - 0.7) < 0.04
    assert abs(counts["I"] - counts["No, I"]) < 100
    again, other = openings_of(warm, 2000, seed=0), openings_of(warm, 2000, seed=1)
    assert openings_of(warm, 2000, seed=0) == again != other
    assert openings_of(WarmStartConfig(answers=8), 8, seed=0) is None


class ScorerThatWasAway:
    """Scores an answer by its length; the first calls fail."""

    names = ("reward",)

    def __init__(self, failures: int) -> None:
        self.failures = failures

    def score(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        if self.failures:
            self.failures -= 1
            raise RetryableError("no answer within 2 s")
        return np.array([[len(answer)] for _, answer in pairs], dtype=float)


def test_scores_are_asked_for_again_as_often_as_patience_has_it() -> None:
    answers = [DecodedAnswer("p" * (3 - i), text="a" * i) for i in range(3)]
    patience = Retrying(
        stop=stop_after_attempt(3), retry=retry_if_exception_type(RetryableError), reraise=True
    )
    scores = score_in_batches(ScorerThatWasAway(2), answers, patience=patience, batch_size=2)
    assert scores.tolist() == [[0.0], [1.0], [2.0]]
    with pytest.raises(RetryableError):
        score_in_batches(ScorerThatWasAway(3), answers, patience=patience)
    with pytest.raises(RetryableError):
        score_in_batches(ScorerThatWasAway(1), answers)
