"""First phase: base answers fix the score scales and, where asked for, warm-start the agent."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from tenacity import Retrying

from envs.protocols import Scorer
from envs.reward import RewardSpec
from mara_rl.agents.agent import AcceptNetwork, Agent, AgentSpec
from mara_rl.common.display import Display
from mara_rl.common.errors import DataError
from mara_rl.decoding.answer import DecodedAnswer
from mara_rl.training.config import TrainConfig, WarmStartConfig
from mara_rl.training.faults.patience import patience
from mara_rl.training.rllib.rollout_group import RolloutGroup, derived_seed
from mara_rl.training.warm_start.distillation import distil
from mara_rl.training.warm_start.token_credit import SampledAnswer
from mara_rl.training.warm_start.value_warm_start import fit_value, improve_policy, total_epochs


@dataclass(frozen=True)
class StartingPoint:
    """Where PPO starts; ``agent`` and ``value`` only with a warm start."""

    reward: RewardSpec
    figures: dict[str, float]
    token_forwards: int
    agent: Agent | None
    value: AcceptNetwork | None


def run_start_phase(
    config: TrainConfig,
    spec: AgentSpec,
    prompts: list[str],
    runners: RolloutGroup,
    scorer: Scorer,
    display: Display,
    check_interrupt: Callable[[], None],
) -> StartingPoint:
    """Sample, score and (with a warm start) learn from answers: first of the base LLM alone."""
    warm = config.warm_start
    if warm:
        prompts = prompts_of(warm, prompts, config.seed)
    sampler = _Sampler(config, prompts, runners, scorer, display, check_interrupt)
    base = sampler.sample(0, None)
    reward, figures = _scaled_reward(config, scorer.names, base)
    agent = value = None
    if warm:
        agent, value, fitted = _warm_start(warm, spec, reward, sampler, base)
        figures |= fitted
    return StartingPoint(reward, figures, runners.token_forwards, agent, value)


def _warm_start(
    warm: WarmStartConfig,
    spec: AgentSpec,
    reward: RewardSpec,
    sampler: "_Sampler",
    base: "_ScoredAnswers",
) -> tuple[Agent, AcceptNetwork, dict[str, float]]:
    """An agent made of the values fitted to answers, its value function, and figures.

    Rounds after the first add answers of the agent so far: what it would now do wrongly is what the
    values fitted to base answers know least of.
    """
    seed, names = sampler.config.seed, sampler.scorer.names
    figures: dict[str, float] = {}
    usable = base.usable(reward, names)
    for number in range(warm.rounds):
        distils = warm.distil_epochs > 0 and 0 < number == warm.rounds - 1
        epochs = total_epochs(warm, spec.head) + (warm.distil_epochs if distils else 0)
        with sampler.phase(f"value warm start {number + 1} of {warm.rounds}", epochs) as progress:
            fit = fit_value(usable, warm, spec.head, seed=seed, progress=progress)
            agent = Agent(spec)
            improve_policy(agent, fit, usable, warm.beta)
            if distils:
                apart = distil(
                    agent, usable, epochs=warm.distil_epochs, seed=seed, progress=progress
                )
                figures |= {
                    "warm_start/chain_kl_before": apart[0],
                    "warm_start/chain_kl": apart[1],
                }
        if number + 1 < warm.rounds:
            usable.extend(sampler.sample(number + 1, agent).usable(reward, names))
    figures |= {
        "warm_start/r2": fit.r2,
        "warm_start/r2_within_prompt": fit.r2_within_prompt,
        "warm_start/unscored": float(warm.rounds * sampler.count - len(usable)),
    }
    return agent, fit.value, figures


@dataclass(frozen=True)
class _Sampler:
    """Samples and scores answers of the rollout actors' LLMs to these prompts."""

    config: TrainConfig
    prompts: list[str]
    runners: RolloutGroup
    scorer: Scorer
    display: Display
    check_interrupt: Callable[[], None]

    @property
    def count(self) -> int:
        """Answers of a round."""
        warm = self.config.warm_start
        return warm.answers // warm.rounds if warm else self.config.ppo.scale_answers

    def sample(self, number: int, agent: Agent | None) -> "_ScoredAnswers":
        """The answers of a round: of the base LLM for None, else of ``agent``.

        The agent's are decoded by the ``exact`` rule, which does what the values say and not what
        the chain makes of it.
        """
        seed, warm = self.config.seed, self.config.warm_start
        whose = "base answers" if agent is None else f"answers of round {number + 1}"
        with self.phase(whose, self.count) as progress:
            answers = self.runners.answers(
                spread(self.prompts, self.count, derived_seed(seed, 3, number)),
                openings=openings_of(warm, self.count, seed) if warm and not number else None,
                agent=agent,
                rule="sample",
                keep_states=warm is not None,
                exact=True if agent is not None else None,
                keep_candidates=agent is not None and warm is not None and warm.distil_epochs > 0,
                seed=derived_seed(seed, 1, number),
                progress=progress,
            )
        with self.display.phase(f"scoring {whose}", total=self.count) as phase:
            patient = patience(
                self.config.ppo.no_progress_timeout_s,
                self.display,
                self.check_interrupt,
                retry="asking for scores again",
            )
            scores = score_in_batches(self.scorer, answers, phase.advance, patient)
        return _ScoredAnswers(answers, scores)

    @contextlib.contextmanager
    def phase(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """A phase of the display whose progress is a safe point."""
        with self.display.phase(name, total=total) as phase:

            def progress(done: int) -> None:
                phase.advance(done)
                self.check_interrupt()

            yield progress


@dataclass(frozen=True)
class _ScoredAnswers:
    """Answers (N) and their scores (N, scores), NaN where there is none."""

    answers: list[DecodedAnswer]
    scores: np.ndarray

    @property
    def finite(self) -> np.ndarray:
        return np.isfinite(self.scores).all(-1)

    def usable(self, reward: RewardSpec, names: tuple[str, ...]) -> list[SampledAnswer]:
        """Those with all scores, for the value fit."""
        terms = torch.from_numpy(reward.terms(names, self.scores))
        return [
            SampledAnswer(a.prompt, a.states, row, a.candidates)
            for a, row, ok in zip(self.answers, terms, self.finite, strict=True)
            if ok and a.states is not None
        ]


def _scaled_reward(
    config: TrainConfig, names: tuple[str, ...], base: _ScoredAnswers
) -> tuple[RewardSpec, dict[str, float]]:
    """The reward with each score over its standard deviation on base answers; their figures."""
    finite = base.finite
    if finite.sum() < 2:
        raise DataError("scores: no base answer got finite scores; expected a score each")
    scales = dict(zip(names, base.scores[finite].std(0).tolist(), strict=True))
    for name, scale in scales.items():
        if scale == 0:
            raise DataError(f"score {name!r}: the same for all base answers; nothing to learn from")
    weights = {name: score.weight for name, score in config.scores.items()}
    means = zip(names, base.scores[finite].mean(0).tolist(), strict=True)
    figures = {f"base/scale_{name}": scale for name, scale in scales.items()}
    figures |= {f"base/mean_{name}": mean for name, mean in means}
    figures["base/unscored"] = float((~finite).sum())
    return RewardSpec(weights, scales), figures


def score_in_batches(
    scorer: Scorer,
    answers: list[DecodedAnswer],
    progress: Callable[[int], None] | None = None,
    patience: Retrying | None = None,
    batch_size: int = 64,
) -> np.ndarray:
    """Scores (N, len(scorer.names)), float64, NaN where there is none.

    ``patience``: how often a batch is asked for again while services are away; None: never.

    Answers to one prompt are scored together, as score models may read it once for all of them,
    and prompts of like length, so that little of a batch is padding.
    """
    scores = np.full((len(answers), len(scorer.names)), np.nan)
    prompts = [a.prompt for a in answers]
    order = np.array(sorted(range(len(answers)), key=lambda i: (len(prompts[i]), prompts[i], i)))
    ask = patience.wraps(scorer.score) if patience else scorer.score
    for rows in np.split(order, range(batch_size, len(order), batch_size)):
        pairs = [(answers[i].prompt, answers[i].text) for i in rows]
        scores[rows] = ask(pairs)
        if progress is not None:
            progress(len(rows))
    return scores


def spread(prompts: list[str], count: int, seed: int) -> list[str]:
    """``count`` prompts in seeded order, each as often as any other give or take one.

    A prompt's repeats stand together: slots that start the same prompt share its prefill.
    """
    order = np.random.default_rng([seed, 0]).permutation(len(prompts))
    repeats, more = divmod(count, len(prompts))
    times = [repeats + (place < more) for place in range(len(prompts))]
    return [prompts[i] for i in np.repeat(order, times)]


def prompts_of(warm: WarmStartConfig, prompts: list[str], seed: int) -> list[str]:
    """The prompts that a warm start's answers are to: all, or those that get enough of them."""
    if warm.answers_per_prompt is None:
        return prompts
    number = max(2, warm.answers // warm.answers_per_prompt)  # values cannot be fitted to one
    order = np.random.default_rng([seed, 2]).permutation(len(prompts))
    return [prompts[i] for i in order[:number]]


def openings_of(warm: WarmStartConfig, count: int, seed: int) -> list[str] | None:
    """An opening for each of ``count`` answers, for many of them none: exploring starts.

    Q can only tell where an opening pays, and where it does not, from answers that took it.
    """
    if not warm.openings:
        return None
    rng = np.random.default_rng([seed, 1])
    has_opening = rng.random(count) < warm.opened_share
    return [str(text) for text in np.where(has_opening, rng.choice(warm.openings, count), "")]
