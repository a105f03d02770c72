"""RLlib's result of an iteration as flat metrics of this project."""

from collections.abc import Mapping
from typing import Any

METRICS = "mara"
"""The key under which rollout actors and learners log metrics of their own."""

ENTRY_IDS = "entry_ids"
"""The metric that is a list: entries of the prompt queue whose last episode chunk was sampled."""


def rows_trained(result: Mapping[str, Any]) -> float:
    """Rows trained on since the start; 0 where the iteration had no fresh samples."""
    if "env_runners" not in result:
        return 0.0
    learner = result.get("learners", {}).get("__all_modules__", {})
    return float(learner.get("num_module_steps_trained_lifetime", 0))


def learned_entries(result: Mapping[str, Any]) -> list[str]:
    """Entries of the prompt queue whose episodes ended in an iteration that brought an update."""
    return list(result["env_runners"].get(METRICS, {}).get(ENTRY_IDS, []))


def iteration_figures(result: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of an iteration that brought an update."""
    updates = result["learners"][METRICS]
    policy = result["learners"]["default_policy"]
    figures = _rollout_figures(result["env_runners"].get(METRICS, {}))
    decisions = figures.get("rollout/decisions", 0.0)
    tokens = figures.get("rollout/response_tokens", 0.0)
    kl_per_decision = float(updates["kl_sum"] / max(1, updates["kl_decisions"]))
    steps = float(result["env_runners"]["num_env_steps_sampled"])
    figures |= {
        "rollout/token_forwards": steps + figures.get("rollout/prefill_tokens", 0.0),
        "rollout/steps": steps,
        "learner/rows": float(updates["rows"]),
        "learner/kl_per_decision": kl_per_decision,
        "learner/explained_variance": float(updates["explained_variance"]),
        "learner/entropy": float(policy["entropy"]),
        "learner/vf_loss": float(policy["vf_loss"]),
        "learner/policy_loss": float(policy["policy_loss"]),
        "learner/gradient_norm": float(policy["gradients_default_optimizer_global_norm"]),
        "time/sampling_s": float(result["timers"]["env_runner_sampling_timer"]),
        "time/update_s": float(result["timers"]["learner_update_timer"]),
    }
    if tokens and decisions:
        figures["rollout/accept_rate"] = (tokens - figures["rollout/forced_steps"]) / decisions
        figures["learner/kl_per_token"] = kl_per_decision * decisions / tokens
    return figures


def _rollout_figures(rollout: Mapping[str, Any]) -> dict[str, float]:
    """Counts as they are, rewards and scores as means over the answers, where there are any."""
    answers = float(rollout["answers"])
    figures = {}
    for key, value in rollout.items():
        if key == "reward" or key.startswith("score_"):
            if answers:
                figures[f"rollout/{key}"] = float(value) / answers
        elif key != ENTRY_IDS:
            figures[f"rollout/{key}"] = float(value)
    return figures


def progress_note(figures: Mapping[str, float]) -> str:
    """The few figures that stand beside the progress bar."""
    shown = {
        "reward": "rollout/reward",
        "KL/token": "learner/kl_per_token",
        "accept": "rollout/accept_rate",
        "expl.var": "learner/explained_variance",
    }
    scores = {
        key.removeprefix("rollout/score_"): key
        for key in figures
        if key.startswith("rollout/score_")
    }
    return " ".join(f"{k} {figures[v]:.2f}" for k, v in {**shown, **scores}.items() if v in figures)
