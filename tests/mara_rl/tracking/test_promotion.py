import math

import numpy as np
import pytest
from pydantic import ValidationError

from mara_rl.common.errors import DataError
from mara_rl.metrics.preference import preference_rate
from mara_rl.tracking.promotion import PromotionEvidence, refusal


def measured(wins: int, losses: int, ties: int, **against) -> PromotionEvidence:
    rate = preference_rate(np.repeat([1, -1, 0], [wins, losses, ties]))
    return PromotionEvidence.from_rate(rate, **(against or {"against": "base"}))


def test_a_clear_win_over_the_base_llm_promotes_where_there_is_no_champion():
    assert refusal(measured(60, 20, 40), champion=None) is None


def test_a_clear_win_over_the_champion_promotes():
    evidence = measured(60, 20, 40, against="champion", champion_version=3)
    assert refusal(evidence, champion=3) is None


@pytest.mark.parametrize(
    ("evidence", "champion", "reason"),
    [
        (None, None, "no preference rate is recorded"),
        (measured(45, 40, 35), None, "lower bound -"),
        (measured(20, 60, 40), None, "lower bound -"),
        (measured(30, 30, 0), None, "lower bound -"),
        (measured(29, 0, 0), None, "29 prompts; expected at least 30"),
        # Nothing but wins and ties: the interval alone would be too sure of these.
        (measured(5, 0, 30), None, "sign test p = 0.062"),
        (measured(60, 20, 40, against="base", flaw="40% are broken"), None, "40% are broken"),
        (measured(60, 20, 40), 3, "compared with the base LLM; expected the champion, version 3"),
        (
            measured(60, 20, 40, against="champion", champion_version=2),
            3,
            "compared with version 2; expected the champion, version 3",
        ),
        (
            measured(60, 20, 40, against="champion", champion_version=2),
            None,
            "there is no champion: expected a comparison with the base LLM",
        ),
    ],
)
def test_what_does_not_suffice_is_said(evidence, champion, reason):
    assert refusal(evidence, champion).startswith(reason)


@pytest.mark.parametrize("figure", ["rate", "low", "high"])
@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_a_missing_or_nan_figure_refuses(figure, value):
    figures = measured(60, 20, 40).model_dump()
    if value is None:
        del figures[figure]
    else:
        figures[figure] = value
    assert f"preference figure {figure!r} is" in refusal(PromotionEvidence(**figures), None)


@pytest.mark.parametrize(
    ("count", "reason"), [("n", "0 prompts; expected"), ("wins", "sign test p")]
)
def test_a_missing_count_refuses(count, reason):
    figures = measured(60, 0, 60).model_dump()
    del figures[count]
    assert refusal(PromotionEvidence(**figures), None).startswith(reason)


def test_tags_hold_all_of_the_evidence():
    for evidence in (
        measured(60, 20, 40),
        measured(60, 20, 40, against="champion", champion_version=7),
    ):
        tags = evidence.tags()
        assert tags["preference.n"] == "120"
        assert PromotionEvidence.from_tags({**tags, "seed": "0"}) == evidence
    assert PromotionEvidence.from_tags({"seed": "0"}) is None


def test_bad_tags_and_contradictions_are_named():
    with pytest.raises(DataError, match=r"tag preference\.n: .*integer.*not 'many'"):
        PromotionEvidence.from_tags({**measured(1, 2, 3).tags(), "preference.n": "many"})
    with pytest.raises(DataError, match=r"tag preference\.against: missing"):
        PromotionEvidence.from_tags({"preference.rate": "3"})
    with pytest.raises(ValidationError, match="champion_version"):
        PromotionEvidence(against="champion")
