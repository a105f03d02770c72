"""What a run ends with: the comparison where scores are missing, registering after a cut."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from mara_rl.agents.agent import Agent, AgentSpec
from mara_rl.agents.agent_files import save_agent
from mara_rl.common.display import Display
from mara_rl.common.errors import DataError
from mara_rl.decoding.answer import DecodedAnswer
from mara_rl.prompts.prompt_files import PromptRecord
from mara_rl.tracking.promotion import PromotionEvidence, refusal
from mara_rl.tracking.registry import AgentRegistry
from mara_rl.tracking.tracking_run import TrackingRun
from mara_rl.training.config import load_config
from mara_rl.training.final_phase import HeldoutEvaluation, register
from mara_rl.training.run.run_folder import RunFolder, remove_folder
from services.scoring.score_client import ScoreClientConfig

COUNT = 40


class Runners:
    """Answers with the name of who answers and the prompt."""

    def answers(self, texts: list[str], *, agent: Any, **_: Any) -> list[DecodedAnswer]:
        return [DecodedAnswer(text, f"{agent} on {text}", [1, 2]) for text in texts]


class Scorer:
    """The agent is better than the base LLM on both axes, the champion better still.

    Attributes:
        missing: answers without a score, with the axis.
    """

    names = ("reward", "cost")

    def __init__(self, missing: dict[str, str]) -> None:
        self.missing = missing

    def score(self, pairs: list[tuple[str, str]]) -> np.ndarray:
        levels = {"None": 0, "ours": 1, "champion": 2}
        rows = []
        for _, answer in pairs:
            level = levels[answer.split(" ")[0]]
            axis = self.missing.get(answer)
            row = [level if axis != "reward" else np.nan, -level if axis != "cost" else np.inf]
            rows.append(row)
        return np.array(rows, dtype=float)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def evaluation(missing: dict[str, str]) -> HeldoutEvaluation:
    config = load_config("quickstart")
    assert config.evaluation is not None
    made = HeldoutEvaluation(
        config,
        config.evaluation.model_copy(update={"judges": {}}),
        [PromptRecord(prompt_id=f"p{i}", text=f"prompt {i}") for i in range(COUNT)],
        Runners(),
        SimpleNamespace(scores=ScoreClientConfig()),
        Display(Console()),
        lambda: None,
    )
    made._scorer = Scorer(missing)
    return made


def test_prompts_without_a_score_are_left_out_and_named(
    folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    made = evaluation({"ours on prompt 3": "reward", "None on prompt 11": "cost"})
    aligned = made.answers("aligned", "ours")
    result = made.compare("ours", aligned, folder, {"reward": 1.0, "cost": 1.0})
    assert result.left_out == {3: "reward", 11: "cost"}
    assert (result.both.n, result.both.wins) == (COUNT - 2, COUNT - 2)
    assert result.metrics()["eval/left_out"] == 2
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "2 of 40 held-out prompts are left out of the comparison with the base LLM, a score is not "
        "finite: 'p3' (reward), 'p11' (cost)" in said
    )
    rows = [json.loads(row) for row in (folder.evaluation / "answers.jsonl").open()]
    assert len(rows) == COUNT
    assert rows[3]["scores"]["reward"] == {"base": 0, "aligned": None}
    assert rows[11]["scores"]["cost"] == {"base": None, "aligned": -1}
    assert not set(result.example_rows.values()) & {3, 11}


def test_with_all_scores_nothing_is_said(
    folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    made = evaluation({})
    aligned = made.answers("aligned", "ours")
    result = made.compare("ours", aligned, folder, {})
    assert result.both.n == COUNT
    assert "left out" not in capsys.readouterr().out


def test_without_any_score_there_is_no_comparison(folder: RunFolder) -> None:
    made = evaluation({f"None on prompt {i}": "cost" for i in range(COUNT)})
    aligned = made.answers("aligned", "ours")
    with pytest.raises(DataError, match="none of the 40 held-out prompts has all its scores"):
        made.compare("ours", aligned, folder, {})


def test_the_champion_is_compared_on_the_prompts_that_have_scores(
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = evaluation({f"champion on prompt {i}": "cost" for i in range(8)})
    aligned = made.answers("aligned", "ours")
    rate = made.rate_against("champion", 4, aligned)
    assert rate is not None
    assert (rate.n, rate.losses) == (COUNT - 8, COUNT - 8)
    said = " ".join(capsys.readouterr().out.split())
    assert "8 of 40 held-out prompts are left out of the comparison with the champion" in said
    assert "'p4' (cost) and 3 more" in said

    made = evaluation({f"champion on prompt {i}": "cost" for i in range(COUNT)})
    assert made.rate_against("champion", 4, aligned) is None
    nothing = PromotionEvidence.from_rate(None, against="champion", champion_version=4)
    assert refusal(nothing, champion=4) == "preference figure 'rate' is nan"


def test_broken_answers_or_many_missing_scores_are_a_flaw() -> None:
    whole = evaluation({})
    aligned = whole.answers("aligned", "ours")
    rate = whole.rate_against("champion", 4, aligned)
    assert whole.flaw(aligned, rate) == ""
    for missing, flaw in ((4, ""), (5, "5 of 40 prompts lack a score: do not trust the rate")):
        made = evaluation({f"champion on prompt {i}": "cost" for i in range(missing)})
        assert made.flaw(aligned, made.rate_against("champion", 4, aligned)) == flaw
    empty = [replace(answer, text="") for answer in aligned.answers[:20]]
    broken = replace(aligned, answers=[*empty, *aligned.answers[20:]])
    assert whole.flaw(broken, rate).startswith("50% of its 40 answers are broken (50% empty")


def test_a_run_that_comes_to_its_end_again_registers_once(
    folder: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config("quickstart", ["registry.model_name=mara-once"])
    session = SimpleNamespace(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    agent = Agent(AgentSpec(hidden_size=6, head="relative", llm=config.llm.name))
    save_agent(agent, folder.agent)
    with TrackingRun.start(session.tracking_uri, "end", "run", {}) as tracking:

        def end() -> str:
            display = Display(Console())
            return register(config, folder, session, tracking, None, None, None, display)

        assert end() == "models:/mara-once/1"
        assert end() == "models:/mara-once/1"
        assert "registered before: models:/mara-once/1" in capsys.readouterr().out
        assert len(AgentRegistry(session.tracking_uri).show("mara-once")) == 1

        remove_folder(folder.agent)  # it had gone back to an older checkpoint and ended elsewhere
        agent.network.output_linear.bias.data += 1
        save_agent(agent, folder.agent)
        assert end() == "models:/mara-once/2"
