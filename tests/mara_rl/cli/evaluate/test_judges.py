"""Judges that fail half-way, and judges behind URLs."""

import contextlib
import re

import pytest
import yaml
from endpoints import serving
from evaluate_command import N, base_alone, common, read_rows

from mara_rl.common.errors import DataError
from mara_rl.evaluation import judging
from services.http.api_keys import ApiKeys
from services.scoring.score_api import create_score_api


class FailingJudge:
    """Scores so many texts, then fails or says NaN."""

    def __init__(self, good: int, failure: str) -> None:
        self.good, self.failure, self.scored = good, failure, 0

    def score(self, pairs):
        self.scored += len(pairs)
        if self.scored > self.good:
            if self.failure == "raise":
                raise DataError("out of order")
            return [float("nan")] * len(pairs)
        return [float(len(answer)) for _, answer in pairs]


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (
            "raise",
            r"judge 'tiny': reward by .* failed: out of order \(what it had .* is kept\)",
        ),
        ("nan", r"judge 'tiny': reward of method 'base', prompt 'p\d+', by .* is nan"),
    ],
)
def test_a_judge_that_fails_half_way_keeps_what_it_had(
    evaluate, made, tmp_path, monkeypatch, failure, message
):
    monkeypatch.setenv("MARA_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(judging, "_BATCH", 2)
    judge = FailingJudge(6, failure)
    monkeypatch.setattr(judging, "load_score_model", lambda name, dtype: judge)
    arguments = (*base_alone(made), "--out", tmp_path / "out")
    status, _, err = evaluate(*arguments)
    assert (status, bool(re.search(message, err))) == (1, True), err
    better = FailingJudge(1000, failure)
    monkeypatch.setattr(judging, "load_score_model", lambda name, dtype: better)
    status, text, _ = evaluate(*arguments)
    assert status == 0
    assert "answers of base" not in text
    assert better.scored == (N - 6) + N  # the rest of the reward, and the cost


def test_prompts_without_a_finite_score_can_be_left_out(evaluate, made, tmp_path, monkeypatch):
    monkeypatch.setenv("MARA_HOME", str(tmp_path / "home"))

    class Judge:
        def score(self, pairs):
            return [float("inf" if "3" in prompt else len(text)) for prompt, text in pairs]

    monkeypatch.setattr(judging, "load_score_model", lambda name, dtype: Judge())
    arguments = [*common(made), "--methods", "base,agent,best-of-2"]
    status, text, err = evaluate(
        *arguments, "--set", "leave_out_unscored=true", "--out", tmp_path / "out"
    )
    assert status == 0, err
    assert f"1 of {N} prompts are left out, a score is not finite: 'p3' (reward)" in text
    assert text.rstrip().endswith(f"(n={N - 1})")
    scores = {
        (row["method"], row["id"]): row["scores"]["tiny"]["cost"]
        for row in read_rows(tmp_path / "out" / "scores.jsonl")
    }
    assert scores["agent", "p3"] is None
    assert scores["agent", "p4"] is not None


def test_judges_may_be_services_behind_urls(evaluate, made, tmp_path, monkeypatch):
    key = "a-key-of-this-test"
    monkeypatch.setenv("MARA_SCORE_KEY", key)
    with contextlib.ExitStack() as stack:
        urls = []
        for sign in (1.0, -1.0):

            async def score(pairs, sign=sign):
                return [sign * (len(prompt) + len(answer)) for prompt, answer in pairs]

            api = create_score_api(score, "lengths", ApiKeys([key]))
            urls.append(stack.enter_context(serving(api)))
        judges = {
            "tiny": {"reward": made["reward"], "cost": made["cost"]},
            "served": {"reward": urls[0], "cost": urls[1], "serve": True},
        }
        plan = tmp_path / "plan.yaml"
        plan.write_text(yaml.safe_dump({"judges": judges}))
        at = common(made).index("--judge")
        arguments = [plan, *common(made)[:at], *common(made)[at + 2 :], "--methods", "base,agent"]
        status, _, err = evaluate(*arguments, "--out", tmp_path / "out")
        assert status == 0, err
        lengths = {
            (method, row["id"]): len(f"Question {row['id'][1:]}?") + len(row["text"])
            for method in ("base", "agent")
            for row in read_rows(tmp_path / "out" / "answers" / f"{method}.jsonl")
        }
        for row in read_rows(tmp_path / "out" / "scores.jsonl"):
            length = lengths[row["method"], row["id"]]
            assert row["scores"]["served"] == {"reward": length, "cost": -length}
        monkeypatch.delenv("MARA_SCORE_KEY")
        status, _, err = evaluate(*arguments, "--out", tmp_path / "two")
        assert status == 1
        assert "judges.served.reward: score service http" in err
        assert "MARA_SCORE_KEY is not set" in err
