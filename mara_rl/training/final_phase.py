"""Last phase: the agent against the base LLM on held-out prompts, then the registry."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from mara_rl.agents.agent import Agent
from mara_rl.agents.agent_files import agent_sha256, load_agent
from mara_rl.common.display import Display, Phase
from mara_rl.decoding.answer import DecodedAnswer
from mara_rl.evaluation.comparison import JudgedAnswers, rates, unscored
from mara_rl.evaluation.figures import flag
from mara_rl.evaluation.heldout import HeldoutResult, compare_heldout, report, save_heldout
from mara_rl.metrics.preference import PreferenceRate
from mara_rl.prompts.prompt_files import PromptRecord
from mara_rl.score_models.loading import load_score_model
from mara_rl.tracking.promotion import PromotionEvidence
from mara_rl.tracking.registry import AgentRegistry, model_name_for, source_tags
from mara_rl.tracking.tracking_run import TrackingRun
from mara_rl.training.config import EvaluationConfig, TrainConfig
from mara_rl.training.rllib.rollout_group import RolloutGroup, derived_seed
from mara_rl.training.run.run_folder import RunFolder
from mara_rl.training.run.session import Session
from mara_rl.training.start_phase import score_in_batches
from services.scoring.score_client import ScoreClient

_NAMED = 5  # prompts left out, on a line
_MAX_LEFT_OUT_SHARE = 0.1


@dataclass(frozen=True)
class SystemAnswers:
    """One system's greedy answers to the held-out prompts, with the services' scores by axis."""

    answers: list[DecodedAnswer]
    scores: dict[str, np.ndarray]

    def judged(self) -> JudgedAnswers:
        return JudgedAnswers([a.text for a in self.answers], self.scores)


class HeldoutEvaluation:
    """Answers to the held-out prompts by the rollout actors' LLMs, scored by the services."""

    def __init__(
        self,
        config: TrainConfig,
        evaluation: EvaluationConfig,
        prompts: list[PromptRecord],
        runners: RolloutGroup,
        session: Session,
        display: Display,
        check_interrupt: Callable[[], None],
    ) -> None:
        self._config = config
        self._evaluation = evaluation
        self._prompts = prompts[: evaluation.max_prompts]
        self._texts = [prompt.text for prompt in self._prompts]
        self._kinds = [str(prompt.extra.get("kind") or "unlabelled") for prompt in self._prompts]
        self._runners = runners
        self._scorer = ScoreClient(session.scores)
        self._display = display
        self._check_interrupt = check_interrupt

    def answers(self, name: str, agent: Agent | None) -> SystemAnswers:
        """The answers of ``agent``, or of the base LLM for None."""
        with self._display.phase(f"held-out answers, {name}", total=len(self._texts)) as phase:
            answers = self._runners.answers(
                self._texts,
                agent=agent,
                progress=self._progress(phase),
            )
            scores = score_in_batches(self._scorer, answers)
        columns = {axis: scores[:, i] for i, axis in enumerate(self._scorer.names)}
        return SystemAnswers(answers, columns)

    def compare(
        self, agent: Agent, aligned: SystemAnswers, folder: RunFolder, scales: dict[str, float]
    ) -> HeldoutResult:
        """Compare with the base LLM, print the report and save it in the run's folder.

        Prompts one of whose scores is not finite are left out and named on a line.
        """
        base = self.answers("base", None)
        judged = {
            axis: (self._judge(name, aligned), self._judge(name, base))
            for axis, name in self._evaluation.judges.items()
        }
        scores = {axis: (aligned.scores[axis], base.scores[axis]) for axis in aligned.scores}
        result = compare_heldout(
            self._kinds,
            base.answers,
            aligned.answers,
            scores,
            judged,
            scales,
            self._sampled(agent),
            seed=self._config.seed,
        )
        folder.evaluation.mkdir(exist_ok=True)
        ids = [prompt.prompt_id for prompt in self._prompts]
        save_heldout(
            folder.evaluation, result, ids, self._kinds, base.answers, aligned.answers, scores
        )
        self._display.line(f"\n{report(result, base.answers, aligned.answers)}\n")
        self._tell_of(result.left_out, "the base LLM")
        return result

    def rate_against(
        self, champion: Agent, version: int, aligned: SystemAnswers
    ) -> PreferenceRate | None:
        """The net rate over the champion on both axes; None where no prompt has all its scores.

        Prompts are left out as in `compare`.
        """
        theirs = self.answers(f"champion (version {version})", champion)
        left_out = unscored(aligned.scores, theirs.scores)
        self._tell_of(left_out, "the champion")
        rows = np.array([i for i in range(len(self._texts)) if i not in left_out], dtype=int)
        if not len(rows):
            return None
        ours, other = aligned.judged().subset(rows), theirs.judged().subset(rows)
        return rates(ours, other, seed=self._config.seed)["both"]

    def flaw(self, aligned: SystemAnswers, rate: PreferenceRate | None) -> str:
        """Why ``rate`` is not to be trusted: broken answers, or many without a score; else ""."""
        flagged = flag([answer.text for answer in aligned.answers], self._kinds)
        if flagged is not None:
            return flagged
        left_out = len(self._prompts) - rate.n if rate else 0
        if left_out > _MAX_LEFT_OUT_SHARE * len(self._prompts):
            return f"{left_out} of {len(self._prompts)} prompts lack a score: do not trust the rate"
        return ""

    def _tell_of(self, left_out: Mapping[int, str], other: str) -> None:
        if left_out:
            named = [f"{self._prompts[row].prompt_id!r} ({axis})" for row, axis in left_out.items()]
            more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
            self._display.line(
                f"{len(left_out)} of {len(self._prompts)} held-out prompts are left out of the "
                f"comparison with {other}, a score is not finite: {', '.join(named[:_NAMED])}{more}"
            )

    def _judge(self, name: str, system: SystemAnswers) -> np.ndarray:
        with self._display.phase("independent judges", total=1):
            pairs = [(a.prompt, a.text) for a in system.answers]
            return np.asarray(load_score_model(name).score(pairs))

    def _sampled(self, agent: Agent) -> list[DecodedAnswer]:
        """Answers sampled from the agent to some of the prompts: they measure its KL."""
        count = min(self._evaluation.kl_prompts, len(self._texts))
        chosen = np.linspace(0, len(self._texts) - 1, count).astype(int)
        with self._display.phase("sampled answers", total=count) as phase:
            return self._runners.answers(
                [self._texts[i] for i in chosen],
                agent=agent,
                rule="sample",
                seed=derived_seed(self._config.seed, 2),
                progress=self._progress(phase),
            )

    def _progress(self, phase: Phase) -> Callable[[int], None]:
        def advance(amount: int) -> None:
            phase.advance(amount)
            self._check_interrupt()

        return advance


def register(
    config: TrainConfig,
    folder: RunFolder,
    session: Session,
    tracking: TrackingRun,
    aligned: SystemAnswers | None,
    result: HeldoutResult | None,
    evaluation: HeldoutEvaluation | None,
    display: Display,
) -> str:
    """Register the agent as `candidate` and try for `champion`; its ``models:/`` URI.

    The gate is the comparison with the base LLM where there is no champion yet, else one with the
    champion on the same prompts. What a run registered before it was cut off is not registered
    again.
    """
    registry = AgentRegistry(session.tracking_uri)
    name = config.registry.model_name or model_name_for(config.llm.name)
    sha256 = agent_sha256(load_agent(folder.agent))
    version = registry.registered(name, run_id=tracking.run_id, sha256=sha256)
    tags = source_tags(llm=config.llm.name, seed=config.seed, run_id=tracking.run_id, sha256=sha256)
    evidence = None
    if result is not None and aligned is not None and evaluation is not None:
        evidence = PromotionEvidence.from_rate(
            result.both, against="base", flaw=evaluation.flaw(aligned, result.both)
        )
        champion = registry.champion(name)
        if champion not in (None, version) and config.registry.promote:
            reigning = registry.resolve(f"models:/{name}/{champion}")
            rate = evaluation.rate_against(reigning, champion, aligned)
            evidence = PromotionEvidence.from_rate(
                rate,
                against="champion",
                champion_version=champion,
                flaw=evaluation.flaw(aligned, rate),
            )
        tags = {**tags, **evidence.tags()}
    if version is not None:
        display.line(f"registered before: models:/{name}/{version}")
    else:
        with display.phase("registering the agent", total=1):
            version = registry.register(
                name, tracking.log_agent(folder.agent), {**tags, "run": folder.name}
            )
        display.line(f"registered models:/{name}@candidate (version {version})")
    if config.registry.promote and evidence is not None:
        display.line(registry.promote(name, version, evidence=evidence).line)
    return f"models:/{name}/{version}"
