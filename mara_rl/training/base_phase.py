"""First phase: base answers fix the score scales and, where asked for, warm-start the agent."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from tenacity import Retrying

from envs.protocols import Scorer
from envs.reward import RewardSpec
from mara_rl.agents.agent import AcceptNetwork, Agent, AgentSpec
from mara_rl.common.display import Display, Phase
from mara_rl.common.errors import DataError
from mara_rl.decoding.answer import DecodedAnswer
from mara_rl.training.config import TrainConfig, WarmStartConfig
from mara_rl.training.faults.patience import patience
from mara_rl.training.rllib.rollout_group import RolloutGroup, derived_seed
from mara_rl.training.warm_start.distillation import distil
from mara_rl.training.warm_start.token_credit import BaseAnswer
from mara_rl.training.warm_start.value_warm_start import fit_value, lean, total_epochs


@dataclass(frozen=True)
class BasePhase:
    """What came out of it; ``agent`` and ``value`` only with a warm start."""

    reward: RewardSpec
    figures: dict[str, float]
    token_forwards: int
    agent: Agent | None
    value: AcceptNetwork | None


def run_base_phase(
    config: TrainConfig,
    spec: AgentSpec,
    prompts: list[str],
    runners: RolloutGroup,
    scorer: Scorer,
    display: Display,
    check_interrupt: Callable[[], None],
) -> BasePhase:
    """Sample, score and (with a warm start) learn from answers: first of the base LLM alone.

    They fix the score scales. Later rounds of a warm start add answers of the agent so far: what it
    would now do wrongly is what the values fitted to base answers know least of. They are decoded
    by the ``exact`` rule, which does what the values say and not what the chain makes of it.
    """
    warm = config.warm_start
    if warm:
        prompts = prompts_of(warm, prompts, config.seed)

    patient = patience(config.ppo.no_progress_timeout_s, display, check_interrupt)

    def sampled(number: int, count: int, agent: Agent | None) -> _ScoredAnswers:
        whose = "base answers" if agent is None else f"answers of round {number + 1}"
        with display.phase(whose, total=count) as phase:

            def progress(done: int) -> None:
                phase.advance(done)
                check_interrupt()

            answers = runners.answers(
                spread(prompts, count, derived_seed(config.seed, 3, number)),
                openings=openings_of(warm, count, config.seed) if warm and not number else None,
                agent=agent,
                rule="sample",
                keep_states=warm is not None,
                exact=True if agent is not None else None,
                keep_candidates=agent is not None and warm is not None and warm.distil_epochs > 0,
                seed=derived_seed(config.seed, 1, number),
                progress=progress,
            )
        with display.phase(f"scoring {whose}", total=count) as phase:
            scores = score_in_batches(scorer, answers, phase.advance, patient)
        return _ScoredAnswers(answers, scores)

    count = warm.answers // warm.rounds if warm else config.ppo.scale_answers
    found = sampled(0, count, None)
    reward, figures = _scaled_reward(config, scorer.names, found)
    if warm is None:
        return BasePhase(reward, figures, runners.token_forwards, None, None)
    usable: list[BaseAnswer] = []
    agent: Agent | None = None
    for number in range(warm.rounds):
        if agent is not None:
            found = sampled(number, count, agent)
        usable.extend(found.usable(reward, scorer.names))
        name = f"value warm start {number + 1} of {warm.rounds}"
        distils = warm.distil_epochs > 0 and 0 < number == warm.rounds - 1
        epochs = total_epochs(warm, spec.head) + (warm.distil_epochs if distils else 0)
        with display.phase(name, total=epochs) as phase:

            def epoch_done(done: int, phase: Phase = phase) -> None:
                phase.advance(done)
                check_interrupt()

            fit = fit_value(usable, warm, spec.head, seed=config.seed, progress=epoch_done)
            agent = Agent(spec)
            lean(agent, fit, usable, warm.beta)
            if distils:
                apart = distil(
                    agent, usable, epochs=warm.distil_epochs, seed=config.seed, progress=epoch_done
                )
                figures |= {
                    "warm_start/chain_kl_before": apart[0],
                    "warm_start/chain_kl": apart[1],
                }
    figures |= {
        "warm_start/r2": fit.r2,
        "warm_start/r2_within_prompt": fit.r2_within_prompt,
        "warm_start/unscored": float(warm.rounds * count - len(usable)),
    }
    return BasePhase(reward, figures, runners.token_forwards, agent, fit.value)


@dataclass(frozen=True)
class _ScoredAnswers:
    """Answers (N) and their scores (N, scores), NaN where there is none."""

    answers: list[DecodedAnswer]
    scores: np.ndarray

    @property
    def finite(self) -> np.ndarray:
        return np.isfinite(self.scores).all(-1)

    def usable(self, reward: RewardSpec, names: tuple[str, ...]) -> list[BaseAnswer]:
        """Those with all scores, for the value fit."""
        terms = torch.from_numpy(reward.terms(names, self.scores))
        return [
            BaseAnswer(a.prompt, a.states, row, a.candidates)
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
    opened = rng.random(count) < warm.opened_share
    return [str(text) for text in np.where(opened, rng.choice(warm.openings, count), "")]
