"""RLlib's result of an iteration becomes flat metrics."""

from typing import Any

import pytest

from mara_rl.training.rllib.iteration_figures import (
    iteration_figures,
    learned_entries,
    progress_note,
    rows_trained,
)


def result(**rollout: float) -> dict[str, Any]:
    """An iteration with 4 answers of 30 tokens, 20 decisions among them, unless told otherwise."""
    answers = {
        "answers": 4,
        "response_tokens": 30,
        "prefill_tokens": 12,
        "decisions": 20,
        "forced_steps": 20,
    }
    return {
        "env_runners": {"mara": {**answers, **rollout}, "num_env_steps_sampled": 40},
        "learners": {
            "__all_modules__": {"num_module_steps_trained_lifetime": 77},
            "mara": {"rows": 20, "kl_sum": 5.0, "kl_decisions": 20, "explained_variance": 0.4},
            "default_policy": {
                "entropy": 0.5,
                "vf_loss": 1.5,
                "policy_loss": -0.1,
                "gradients_default_optimizer_global_norm": 2.0,
            },
        },
        "timers": {"env_runner_sampling_timer": 3.0, "learner_update_timer": 1.0},
    }


def test_counts_stay_and_sums_become_means_over_answers() -> None:
    figures = iteration_figures(result(reward=2.0, score_cost=-6.0))
    assert figures["rollout/answers"] == 4
    assert figures["rollout/reward"] == 0.5
    assert figures["rollout/score_cost"] == -1.5
    assert figures["rollout/token_forwards"] == 40 + 12
    assert figures["rollout/accept_rate"] == (30 - 20) / 20
    assert figures["learner/kl_per_decision"] == 0.25
    assert figures["learner/kl_per_token"] == pytest.approx(0.25 * 20 / 30)
    assert figures["learner/gradient_norm"] == 2
    assert figures["time/sampling_s"] == 3
    assert all(type(figure) is float for figure in figures.values())
    assert progress_note(figures) == (
        "reward 0.50 KL/token 0.17 accept 0.50 expl.var 0.40 cost -1.50"
    )


def test_without_a_finished_answer_there_is_no_mean() -> None:
    figures = iteration_figures(result(answers=0, response_tokens=0, reward=0.0))
    assert not {"rollout/reward", "rollout/accept_rate", "learner/kl_per_token"} & figures.keys()


def test_entries_are_no_figure() -> None:
    found = result()
    assert learned_entries(found) == []
    found["env_runners"]["mara"]["entry_ids"] = ["1-0", "2-0"]
    assert learned_entries(found) == ["1-0", "2-0"]
    assert "rollout/entry_ids" not in iteration_figures(found)


def test_rows_are_those_of_an_iteration_with_fresh_samples() -> None:
    assert rows_trained(result()) == 77
    stale = result()
    del stale["env_runners"]
    assert rows_trained(stale) == rows_trained({}) == 0
