"""What happens to sampled episodes before they leave the rollout actor.

Scores are set, failed episodes deleted, and rows without a choice dropped, so that
neither GAE nor the loss ever sees them and their hidden states are not shipped.
"""

from typing import Any

import numpy as np
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from envs.accept_reject_task import Answer
from envs.observation import FORCED
from mara_rl.training.rllib.iteration_figures import ENTRY_IDS, METRICS


class DecisionEpisodes(RLlibCallback):
    """RLlib callback of the rollout actors."""

    def on_sample_end(  # type: ignore[override]
        self, *, env_runner: Any, metrics_logger: Any, samples: list[SingleAgentEpisode], **kw: Any
    ) -> None:
        env = env_runner.env.unwrapped
        answers = env.take_finished()
        env.task.score([a for a in answers.values() if a.finish_reason != "failed"])
        failed = [a for a in answers.values() if a.finish_reason == "failed"]
        for answer in failed:
            if not answer.outage:  # else the next barrier hands the prompt out again
                env.task.prompts.fail(answer.prompt, answer.failure)
        kept = []
        for episode in samples:
            if episode.is_done:
                answer = answers.get(episode.get_infos(-1)["answer_key"])
                if answer is None or answer.finish_reason == "failed":
                    continue
                episode.set_rewards(new_data=answer.reward, at_indices=-1)
            decisions = decision_rows(episode)
            if decisions is not None:
                kept.append(decisions)
        # Where every answer failed, what is left would train on KL and bootstrapped values alone.
        samples[:] = [] if failed and len(failed) == len(answers) else kept
        _log(metrics_logger, list(answers.values()))
        for episode in samples:
            if episode.is_terminated and (entry_id := episode.get_infos(-1).get("entry_id")):
                metrics_logger.log_value((METRICS, ENTRY_IDS), entry_id, reduce="item_series")


def decision_rows(episode: SingleAgentEpisode) -> SingleAgentEpisode | None:
    """The episode chunk without its forced rows; None where no decision is left.

    A reward on a forced row goes to the decision before it. The last observation stays, for the
    bootstrap value of a chunk that goes on. The last chunk of an episode keeps its last row even if
    it is forced: its log π is 0, so it moves no policy, but it carries the prompt's delivery.
    """
    n = len(episode)
    window = slice(0, n)
    forced = episode.get_observations(window)["x"][:, FORCED] > 0.5
    rows = np.flatnonzero(~forced)
    if len(rows) == 0 and episode.is_terminated:
        rows = np.array([n - 1])
    if len(rows) == 0:
        return None
    if len(rows) == n:
        return episode
    rewards = np.add.reduceat(np.asarray(episode.get_rewards(window), dtype=np.float64), rows)
    observations = episode.get_observations(slice(0, n + 1))
    with_last = np.append(rows, n)
    infos = episode.get_infos(slice(0, n + 1))
    outputs = {
        key: episode.get_extra_model_outputs(key, window)[rows]
        for key in episode.extra_model_outputs
    }
    shorter = SingleAgentEpisode(
        id_=episode.id_,
        observation_space=episode.observation_space,
        action_space=episode.action_space,
        observations=[{key: value[i] for key, value in observations.items()} for i in with_last],
        actions=list(episode.get_actions(window)[rows]),
        rewards=list(rewards),
        infos=[infos[i] for i in with_last],
        terminated=episode.is_terminated,
        truncated=episode.is_truncated,
        extra_model_outputs={key: list(value) for key, value in outputs.items()},
        t_started=episode.t_started,
        len_lookback_buffer=0,
    )
    return shorter.to_numpy()


def _log(metrics: Any, answers: list[Answer]) -> None:
    scored = [a for a in answers if a.finish_reason != "failed"]
    counts = {
        "answers": len(scored),
        "response_tokens": sum(a.num_tokens for a in scored),
        "prefill_tokens": sum(a.prefill_tokens for a in answers),
        "decisions": sum(a.decisions for a in scored),
        "forced_steps": sum(a.forced_steps for a in scored),
    }
    for name, value in counts.items():
        metrics.log_value((METRICS, name), value, reduce="sum")
    # Sums, from which the driver makes means: a window would carry over a checkpoint.
    for answer in scored:
        metrics.log_value((METRICS, "reward"), answer.reward, reduce="sum")
        for name, score in answer.scores.items():
            metrics.log_value((METRICS, f"score_{name}"), score, reduce="sum")
