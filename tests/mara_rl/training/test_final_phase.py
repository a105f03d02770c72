"""What a run ends with: the comparison, also where scores are missing; registering after a cut."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import pytest
from endpoints import serving
from rich.console import Console

from mara_rl.agents.agent import Agent, AgentSpec
from mara_rl.agents.agent_files import save_agent
from mara_rl.common.display import Display
from mara_rl.common.errors import RetryableError
from mara_rl.decoding.answer import DecodedAnswer
from mara_rl.evaluation.evaluation import Evaluation
from mara_rl.evaluation.tracking import evidence
from mara_rl.prompts.prompt_files import PromptRecord
from mara_rl.tracking.promotion import PromotionEvidence, refusal
from mara_rl.tracking.registry import AgentRegistry
from mara_rl.tracking.tracking_run import TrackingRun
from mara_rl.training.config import TrainConfig, load_config
from mara_rl.training.faults.stop_request import Interrupted
from mara_rl.training.final_phase import compare, register
from mara_rl.training.rollout_answers import RolloutAnswers
from mara_rl.training.run.checkpoint import TrainState
from mara_rl.training.run.run_folder import RunFolder, remove_folder
from services.http.api_keys import ApiKeys
from services.scoring.score_api import create_score_api
from services.scoring.score_client import ScoreClientConfig

COUNT = 40
KEY = "a-key-of-this-test"
LEVELS = {"base": 0, "ours": 1, "champion": 2}


class Runners:
    """Answers with the name of who answers and the prompt.

    Attributes:
        sampled: prompts that answers were sampled to.
        empty: how many of an agent's answers are empty, the first ones.
    """

    def __init__(self) -> None:
        self.token_forwards = 0
        self.sampled: list[str] = []
        self.empty = 0

    def answers(
        self, texts: list[str], *, agent: Agent | None, rule: str | None, progress: Any, **_: Any
    ) -> list[DecodedAnswer]:
        who = "base" if agent is None else ("ours", "champion")[level(agent)]
        answers = [DecodedAnswer(text, f"{who} on {text}", [1, 2], [0, 1]) for text in texts]
        if rule == "sample":
            self.sampled += texts
            for answer in answers:
                answer.kl = 0.5
        elif agent is not None:
            for answer in answers[: self.empty]:
                answer.text = ""
        self.token_forwards += 4 * len(texts)
        progress(len(texts))
        return answers


class ScoreServices:
    """The agent is better than the base LLM on both axes, the champion better still.

    Attributes:
        missing: answers without a score, with the axis.
        away: whether they refuse to answer.
    """

    def __init__(self) -> None:
        self.missing: dict[str, str] = {}
        self.away = False

    def api(self, axis: str) -> Any:
        async def score(pairs: list[tuple[str, str]]) -> list[float]:
            if self.away:
                raise RetryableError("on its way up")
            return [self._score(axis, answer) for _, answer in pairs]

        return create_score_api(score, axis, ApiKeys([KEY]))

    def _score(self, axis: str, answer: str) -> float:
        if self.missing.get(answer) == axis:
            return float("nan")
        level = LEVELS.get(answer.partition(" on ")[0], -1)
        return float(level if axis == "reward" else -level)


def level(agent: Agent) -> int:
    return round(agent.network.output_linear.bias[0].item())


def make_agent(number: int) -> Agent:
    """The one that `level` gives this number of."""
    agent = Agent(AgentSpec(hidden_size=6, head="relative", llm=load_config("quickstart").llm.name))
    agent.network.output_linear.bias.data.fill_(number)
    return agent


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[ScoreServices, dict[str, str]]]:
    """Score services and their URLs by axis."""
    services = ScoreServices()
    with contextlib.ExitStack() as stack:
        yield (
            services,
            {axis: stack.enter_context(serving(services.api(axis))) for axis in ("reward", "cost")},
        )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


class End:
    """The end of a run: what `compare` and `register` are given."""

    def __init__(self, path: Path, store: str, served: tuple[ScoreServices, dict[str, str]]):
        self.scores, urls = served
        self.name = f"mara-{path.name.replace('_', '-')}"
        self.runners = Runners()
        self.folder = RunFolder(path / "run")
        self.folder.path.mkdir()
        self.session: Any = SimpleNamespace(
            tracking_uri=store, scores=ScoreClientConfig(sources=urls)
        )
        self.registry = AgentRegistry(store)
        self.interrupted = False
        save_agent(make_agent(0), self.folder.agent)

    @property
    def config(self) -> TrainConfig:
        return load_config(
            "quickstart",
            ["evaluation.judges={}", "evaluation.kl_prompts=4", "scoring.max_attempts=1",
             f"registry.model_name={self.name}"],
        )  # fmt: skip

    def compare(self, tracking: TrackingRun) -> Evaluation | None:
        prompts = [
            PromptRecord(
                prompt_id=f"p{i}",
                text=f"prompt {i}",
                extra={"kind": ("ordinary", "harmful")[i % 2]},
            )
            for i in range(COUNT)
        ]
        maker: Any = RolloutAnswers(self.config, self.runners, self._check)  # type: ignore[arg-type]
        state = TrainState(iteration=4, score_scales={"reward": 1.0, "cost": 1.0})
        return compare(self._run(tracking), state, prompts, maker)

    def compared(self) -> Evaluation | None:
        with TrackingRun.start(self.session.tracking_uri, "end", "run", {}) as tracking:
            return self.compare(tracking)

    def register(self, tracking: TrackingRun, comparison: Evaluation | None) -> str:
        return register(self._run(tracking), comparison)

    def _run(self, tracking: TrackingRun) -> Any:
        return SimpleNamespace(
            config=self.config,
            folder=self.folder,
            session=self.session,
            tracking=tracking,
            display=Display(Console(width=120)),
        )

    def evidence(self) -> PromotionEvidence:
        comparison = self.compared()
        assert comparison is not None
        found = evidence(comparison, "agent", self.name, self.registry)
        assert found is not None
        return found

    def reign(self) -> None:
        """Make a better agent champion."""
        path = self.folder.path.parent / "champion"
        save_agent(make_agent(1), path)
        with TrackingRun.start(self.session.tracking_uri, "end", "champion", {}) as run:
            version = self.registry.register(self.name, run.log_agent(path), {})
        self.registry.promote(self.name, version, evidence=None, force_reason="for this test")

    def _check(self) -> None:
        if self.interrupted:
            raise Interrupted(15)


@pytest.fixture
def end(tmp_path: Path, store: str, served: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[End]:
    monkeypatch.setenv("MARA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MARA_SCORE_KEY", KEY)
    yield End(tmp_path, store, served)
    served[0].missing, served[0].away = {}, False


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(row) for row in path.open(encoding="utf-8")]


def test_prompts_without_a_score_are_left_out_and_named(
    end: End, capsys: pytest.CaptureFixture[str]
) -> None:
    end.scores.missing = {"ours on prompt 3": "reward", "base on prompt 11": "cost"}
    with TrackingRun.start(end.session.tracking_uri, "end", "run", {}) as tracking:
        done = end.compare(tracking)
    assert done is not None
    figures = done.summary
    assert figures["prompts"]["left_out"] == {"p3": "reward", "p11": "cost"}
    assert (figures["result"]["n"], figures["result"]["wins"]) == (COUNT - 2, COUNT - 2)
    client = mlflow.MlflowClient(end.session.tracking_uri)
    logged = client.get_run(tracking.run_id).data.metrics
    assert logged["eval/left_out"] == 2
    assert logged["eval/agent/training/both/rate"] == 100
    said = capsys.readouterr().out
    assert (
        "2 of 40 prompts are left out, a score is not finite: 'p3' (reward), 'p11' (cost)" in said
    )
    assert said.count("preference rate: +100.0 [+100.0, +100.0] (n=38)\n") == 1
    assert done.result_line in said
    assert len(rows(end.folder.evaluation / "answers" / "agent.jsonl")) == COUNT
    scores = {
        (row["method"], row["id"]): row["scores"]["training"]
        for row in rows(end.folder.evaluation / "scores.jsonl")
    }
    assert len(scores) == 2 * COUNT
    assert scores["base", "p3"]["reward"] == 0
    assert scores["agent", "p3"]["reward"] is None
    assert scores["base", "p11"]["cost"] is None
    assert scores["agent", "p11"]["cost"] == -1
    shown = {example["id"] for example in figures["examples"]["agent"]}
    assert shown
    assert not shown & {"p3", "p11"}


def test_what_a_comparison_shows_and_leaves(end: End, capsys: pytest.CaptureFixture[str]) -> None:
    done = end.compared()
    assert done is not None
    assert done.summary["result"]["n"] == COUNT
    said = capsys.readouterr().out
    assert "left out" not in said
    lines = [line.split() for line in said.splitlines()]
    for kind in ("harmful", "ordinary"):
        assert [kind, "+100.0", "[+100.0,", "+100.0]", "+100.0", "+100.0", "+2.25", "0%"] in lines
    # Few answers are sampled, to prompts spread over all: they are what the KL is of.
    assert end.runners.sampled == [f"prompt {i}" for i in (0, 13, 26, 39)]
    decoding = done.summary["methods"]["agent"]["decoding"]
    assert decoding["kl_per_token"] == 0.25
    assert decoding["kl_is"] == "estimate from sampled answers"
    assert decoding["forwards_per_token"] == 2
    assert {path.name for path in end.folder.evaluation.iterdir()} == {
        "answers", "inputs.json", "lock", "report.html", "scores.jsonl", "summary.json"
    }  # fmt: skip


def test_without_any_score_the_agent_is_registered_without_comparison(
    end: End, capsys: pytest.CaptureFixture[str]
) -> None:
    end.scores.missing = {f"base on prompt {i}": "cost" for i in range(COUNT)}
    with TrackingRun.start(end.session.tracking_uri, "end", "run", {}) as tracking:
        assert end.compare(tracking) is None
        said = capsys.readouterr().out
        assert (
            "no comparison with the base LLM: none of the 40 prompts has all its scores\n" in said
        )
        assert end.register(tracking, None) == f"models:/{end.name}/1"
    assert end.registry.champion(end.name) is None


def test_score_services_that_are_away_leave_no_comparison(
    end: End, capsys: pytest.CaptureFixture[str]
) -> None:
    end.scores.away = True
    assert end.compared() is None
    said = capsys.readouterr().out
    assert "no comparison with the base LLM: judge 'training': reward by http" in said
    assert "on its way up" in said
    end.scores.away = False
    assert end.compared() is not None, "with the folder of the attempt before"


def test_the_champion_is_compared_on_the_same_prompts(end: End) -> None:
    end.reign()
    end.scores.missing = {f"champion on prompt {i}": "cost" for i in range(4)}
    found = end.evidence()
    assert (found.against, found.champion_version, found.flaw) == ("champion", 1, "")
    assert (found.n, found.losses) == (COUNT - 4, COUNT - 4)
    assert refusal(found, champion=1) == "lower bound -100.0 is not above 0"
    nothing = PromotionEvidence(against="champion", champion_version=4)
    assert refusal(nothing, champion=4) == "preference figure 'rate' is nan"


def test_many_missing_scores_are_a_flaw(end: End, capsys: pytest.CaptureFixture[str]) -> None:
    end.scores.missing = {f"ours on prompt {i}": "cost" for i in range(8)}
    assert end.evidence().flaw == "8 of 40 prompts lack a score: do not trust the rate"
    assert "'p4' (cost) and 3 more" in capsys.readouterr().out
    end.scores.missing = {f"ours on prompt {i}": "cost" for i in range(5)}
    assert end.evidence().flaw == "5 of 40 prompts lack a score: do not trust the rate"
    end.scores.missing = {}
    assert end.evidence().flaw == ""


def test_broken_answers_are_a_flaw(end: End) -> None:
    end.runners.empty = 20
    assert end.evidence().flaw.startswith("50% of its 40 answers are broken (50% empty")


def test_a_winner_becomes_champion_with_its_figures_as_tags(end: End) -> None:
    with TrackingRun.start(end.session.tracking_uri, "end", "run", {}) as tracking:
        comparison = end.compare(tracking)
        assert end.register(tracking, comparison) == f"models:/{end.name}/1"
    version = end.registry.find(f"models:/{end.name}@champion")
    assert version.version == 1
    assert version.tags["evaluation.training.both"] == "+100.0 [+100.0, +100.0] (training judge)"
    assert version.tags["evaluation.run"] == version.run_id == tracking.run_id
    assert (version.tags["preference.against"], version.tags["preference.n"]) == ("base", "40")


def test_a_resumed_run_does_not_mix_in_answers_of_another_agent(end: End) -> None:
    first = end.compared()
    assert first is not None
    remove_folder(end.folder.agent)
    save_agent(make_agent(1), end.folder.agent)
    second = end.compared()
    assert second is not None
    made = rows(end.folder.evaluation / "answers" / "agent.jsonl")
    assert [row["text"] for row in made] == [f"champion on prompt {i}" for i in range(COUNT)]
    shas = [done.summary["provenance"]["agents"]["agent"]["sha256"] for done in (first, second)]
    assert shas[0] != shas[1]


def test_a_stop_while_evaluating_ends_the_run(end: End) -> None:
    end.interrupted = True
    with pytest.raises(Interrupted):
        end.compared()
    assert not list((end.folder.evaluation / "answers").glob("*.jsonl")) or not rows(
        end.folder.evaluation / "answers" / "base.jsonl"
    )


def test_a_run_that_comes_to_its_end_again_registers_once(
    end: End, capsys: pytest.CaptureFixture[str]
) -> None:
    with TrackingRun.start(end.session.tracking_uri, "end", "run", {}) as tracking:
        assert end.register(tracking, None) == f"models:/{end.name}/1"
        assert end.register(tracking, None) == f"models:/{end.name}/1"
        assert f"registered before: models:/{end.name}/1" in capsys.readouterr().out
        assert len(end.registry.show(end.name)) == 1

        remove_folder(
            end.folder.agent
        )  # it had gone back to an older checkpoint and ended elsewhere
        save_agent(make_agent(1), end.folder.agent)
        assert end.register(tracking, None) == f"models:/{end.name}/2"
