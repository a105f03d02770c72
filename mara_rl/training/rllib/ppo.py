"""PPO for the accept/reject task: RLlib's algorithm with this project's settings."""

import functools
from typing import Any

import gymnasium as gym
from ray.rllib.algorithms.ppo import PPO, PPOConfig
from ray.rllib.algorithms.ppo.torch.ppo_torch_learner import PPOTorchLearner
from ray.rllib.core.rl_module.rl_module import RLModuleSpec

from envs import ENV_ID
from envs.observation import observation_space
from envs.reward import RewardSpec
from envs.task_settings import AnswerSettings
from mara_rl.agents.agent import AgentSpec
from mara_rl.training.config import TrainConfig
from mara_rl.training.rllib.accept_module import AcceptModule
from mara_rl.training.rllib.connectors import SampledKLReward, StandardizedAdvantages
from mara_rl.training.rllib.decision_episodes import DecisionEpisodes
from services.cluster.ray_internals import append_learner_connector
from services.prompt_queue.prompt_source import PromptSourceConfig, RedisPromptSource
from services.scoring.score_client import ScoreClient, ScoreClientConfig


class AcceptLearner(PPOTorchLearner):
    """PPO's learner with advantages standardised over real decisions."""

    def build(self) -> None:
        super().build()
        append_learner_connector(self, StandardizedAdvantages())


class AcceptPPO(PPO):
    """PPO whose rollout actors have the reward with the scales measured at the start of the run.

    Attributes:
        reward: that reward; every actor gets it before it samples.
        unnoticed_restarts: actors that died and came back while nothing was asked of them.
    """

    reward: RewardSpec
    unnoticed_restarts = 0
    _noticed_restarts = 0

    def training_step(self) -> None:
        """Ray starts an actor that dies again, as it was made: without scales and weights."""
        group: Any = self.env_runner_group
        config: Any = self.config
        new = group.foreach_env_runner(
            functools.partial(_set_reward, reward=self.reward),
            local_env_runner=False,
            timeout_seconds=config.env_runner_health_probe_timeout_s,  # they are idle
        )
        noticed = group.num_remote_worker_restarts()
        if numbers := [number for number in new if number]:
            if self.iteration:  # at first all are new
                self.unnoticed_restarts += max(0, len(numbers) - noticed + self._noticed_restarts)
            group.sync_weights(
                from_worker_or_learner_group=self.learner_group,
                to_worker_indices=numbers,
                inference_only=True,
            )
        self._noticed_restarts = noticed
        super().training_step()


def _set_reward(runner: Any, reward: RewardSpec) -> int:
    """The runner's number if it had another reward, else 0."""
    task = runner.env.unwrapped.task
    known, task.reward = task.reward, reward
    return 0 if known == reward else runner.worker_index


def build_algorithm(
    config: TrainConfig, spec: AgentSpec, prompts: PromptSourceConfig, scores: ScoreClientConfig
) -> AcceptPPO:
    """The algorithm with its rollout actors, each holding its own LLM."""
    rollouts, ppo = config.rollouts, config.ppo
    prefix = spec.needs_prefix
    reward = RewardSpec({name: score.weight for name, score in config.scores.items()})
    env_config = {
        "llm": config.llm.name,
        "llm_dtype": config.llm.dtype,
        "system": config.llm.system,
        **spec.candidates.model_dump(),
        **rollouts.model_dump(include=set(AnswerSettings.model_fields)),
        "prefix": prefix,
        "defer_scores": True,
        "prompts": functools.partial(RedisPromptSource, prompts),
        "scorer": ScoreClient(scores),
        "reward": reward,
    }
    plain: Any = PPOConfig(algo_class=AcceptPPO)
    algorithm_config = (
        plain.environment(
            f"envs:{ENV_ID}",
            env_config=env_config,
            observation_space=observation_space(
                spec.hidden_size, prefix=prefix, state_dtype=rollouts.state_dtype
            ),
            action_space=gym.spaces.Discrete(2),
            normalize_actions=False,
            clip_actions=False,
        )
        .env_runners(
            num_env_runners=rollouts.num_runners,
            num_envs_per_env_runner=rollouts.num_slots,
            gym_env_vectorize_mode=gym.VectorizeMode.VECTOR_ENTRY_POINT,
            rollout_fragment_length=rollouts.fragment_steps,
            batch_mode="truncate_episodes",
            sample_timeout_s=rollouts.sample_timeout_s,
            num_cpus_per_env_runner=rollouts.num_cpus,
            num_gpus_per_env_runner=rollouts.num_gpus,
            custom_resources_per_env_runner=rollouts.resources,
        )
        .learners(
            num_learners=config.learner.num_learners,
            num_cpus_per_learner=config.learner.num_cpus,
            num_gpus_per_learner=config.learner.num_gpus,
            custom_resources_per_learner=config.learner.resources,
            learner_class=AcceptLearner,
            learner_connector=functools.partial(_connectors, ppo.kl_coeff),
        )
        .training(
            gamma=1.0,  # per decision: less would tax every rejection
            lambda_=ppo.gae_lambda,
            lr=ppo.lr,
            num_epochs=ppo.epochs,
            minibatch_size=ppo.minibatch_size,
            train_batch_size_per_learner=rollouts.num_runners
            * rollouts.num_slots
            * rollouts.fragment_steps
            // max(1, config.learner.num_learners),
            clip_param=ppo.clip,
            vf_clip_param=float("inf"),
            vf_loss_coeff=ppo.vf_loss_coeff,
            entropy_coeff=ppo.entropy_coeff,
            use_kl_loss=False,  # that KL is to the previous policy
            grad_clip=ppo.grad_clip,
            grad_clip_by="global_norm",
        )
        .rl_module(
            rl_module_spec=RLModuleSpec(
                module_class=AcceptModule, model_config={"agent": spec.model_dump()}
            )
        )
        .callbacks([DecisionEpisodes])
        .fault_tolerance(
            restart_failed_env_runners=True,
            # A rebuilt environment would go on with unscaled rewards.
            restart_failed_sub_environments=False,
            delay_between_env_runner_restarts_s=0.0,
            env_runner_health_probe_timeout_s=rollouts.probe_timeout_s,
            env_runner_restore_timeout_s=1800.0,
        )
        .debugging(seed=config.seed, log_level="ERROR")
    )
    algorithm: Any = algorithm_config.build_algo()
    algorithm.reward = reward
    return algorithm


def _connectors(kl_coeff: float, observation: Any, action: Any) -> list[Any]:
    return [SampledKLReward(kl_coeff)]
