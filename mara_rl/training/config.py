"""What a training run can be told: one schema, YAML presets, ``--set a.b=c`` overrides."""

from collections.abc import Sequence
from importlib import resources
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from envs.task_settings import AnswerSettings
from mara_rl.agents.agent import AgentKind, AgentSpec, Head
from mara_rl.common.errors import validated
from mara_rl.common.yaml_settings import (
    NAME_PATTERN,
    Section,
    names_in,
    read_settings,
)
from mara_rl.llm.candidates import CandidateRule
from mara_rl.llm.policy_llm import OptionalDType, SystemPrompt
from services.cluster.replica_config import CustomResources
from services.scoring.score_service import ScoreServiceConfig


class LLMConfig(Section):
    """The frozen policy LLM."""

    name: str = Field(description="shipped name, hub id or folder")
    dtype: OptionalDType = None
    system: SystemPrompt = None


class AgentConfig(AgentKind):
    """The agent to train."""

    head: Head = "advantage"


class PromptsConfig(Section):
    """Where prompts come from: `packaged`, or a jsonl, json or parquet file."""

    train: str = Field("packaged", description="prompts to train on")
    heldout: str = Field("packaged", description="prompts to measure on after training")
    queue: str | None = Field(None, description="Redis queue; default: one per run")
    repeats: int = Field(1, ge=1, description="answers per prompt and epoch")
    read_timeout_s: float = Field(60.0, gt=0, description="longest wait for a prompt")
    max_failures: int = Field(3, ge=1, description="failed answers until a prompt is a dead letter")
    dead_after_s: float = Field(
        60.0, gt=0, description="silence after which what a rollout actor holds goes to another"
    )


class ScoreConfig(ScoreServiceConfig):
    """One score model: its weight in the reward and the Serve replicas that host it."""

    weight: float = Field(description="weight in the reward; negative where lower is better")
    app: str | None = Field(
        None,
        description="a Serve application that hosts the model already, for several runs; None: the "
        "run starts its own, with the replicas named here",
    )
    url: str | None = Field(
        None,
        pattern=r"^https?://[^\s/?#]+[^\s?#]*$",
        description="the same, by the URL of a score service that asks for a key (MARA_SCORE_KEY)",
    )

    @property
    def shared(self) -> str | None:
        """The application or URL that is there already, None where the run starts its own."""
        return self.app or self.url


class ScoringConfig(Section):
    """How long scoring may take."""

    deadline_s: float = Field(120.0, gt=0, description="for one call of all score models")
    max_attempts: int = Field(4, ge=1, description="attempts per call within the deadline")

    @model_validator(mode="before")
    @classmethod
    def _without_mode(cls, values: Any) -> Any:
        """Runs of earlier versions say ``mode: deferred``: once per `sample()`, as all do now."""
        if isinstance(values, dict) and values.get("mode") == "deferred":
            return {key: value for key, value in values.items() if key != "mode"}
        return values


class RolloutsConfig(AnswerSettings):
    """The rollout actors, each with an LLM of its own."""

    num_runners: int = Field(1, ge=1)
    num_slots: int = Field(64, ge=1, description="concurrent sequences per runner")
    fragment_steps: int = Field(64, ge=1, description="steps per slot and iteration")
    num_cpus: float = Field(1.0, ge=0, description="CPUs per runner")
    num_gpus: float = Field(0.0, ge=0, le=1, description="share of a GPU per runner")
    resources: CustomResources = Field({}, description="custom resources per runner")
    sample_timeout_s: float = Field(
        1800.0, gt=0, description="a runner that brings no sample for so long is replaced"
    )
    probe_timeout_s: float = Field(
        30.0, gt=0, description="how long an iteration waits for a runner that is starting again"
    )
    placement_timeout_s: float = Field(
        120.0, gt=0, description="longest wait for room for actors, and for score services"
    )


class LearnerConfig(Section):
    """Where the update runs: 0 learners means in the driver."""

    num_learners: int = Field(0, ge=0)
    num_cpus: float = Field(1.0, ge=0, description="CPUs per remote learner")
    num_gpus: float = Field(0.0, ge=0, le=1, description="share of a GPU per learner")
    resources: CustomResources = Field({}, description="custom resources per remote learner")
    update_timeout_s: float = Field(
        1800.0, gt=0, description="a remote learner whose update takes longer is replaced"
    )


class WarmStartConfig(Section):
    """Value regression on base answers before PPO."""

    answers: int = Field(ge=8, description="answers sampled in all rounds together")
    rounds: int = Field(
        1, ge=1, description="the first by the base LLM, later ones by the agent so far"
    )
    answers_per_prompt: int | None = Field(
        None,
        ge=2,
        description="so many to each of as many prompts as that makes, drawn with the seed; null: "
        "spread over all. What is learned is which of a prompt's answers is better",
    )
    openings: list[Annotated[str, Field(pattern=r"\S")]] = Field(
        [], description="texts some of them begin with, as far as the candidates allow"
    )
    opened_share: float = Field(0.25, ge=0, le=1, description="share of base answers that try one")
    beta: float = Field(0.3, gt=0, description="accept log-odds move by Q differences over this")
    win_margin: float | None = Field(
        None,
        gt=0,
        description="learn which of a prompt's answers is better, not by how much: a score's "
        "standard deviations from which on it is; null: by how much",
    )
    epochs: int = Field(6, ge=1, description="passes of the value regression")
    early_weight: float = Field(
        15.0, ge=0, description="extra weight of an answer's first token in it, beside 1"
    )
    batch_size: int = Field(512, ge=1, description="prefixes per gradient step")
    lr: float = Field(3e-4, gt=0)
    credit_epochs: int = Field(
        8, ge=0, description="passes of the regression of a token's share in the reward; 0: none"
    )
    credit_lr: float = Field(6e-4, gt=0)
    weight_decay: float = Field(1e-2, ge=0)
    distil_epochs: int = Field(
        0,
        ge=0,
        description="passes that fit the chain of decisions to the choice among all candidates, on "
        "answers of the rounds after the first, whose candidates are then kept; 0: none",
    )


class PPOSettings(Section):
    """PPO as it fits this task (discount 1 per decision)."""

    iterations: int = Field(ge=0, description="updates; 0 stops after the warm start")
    minutes: float | None = Field(None, gt=0, description="stop earlier after this much training")
    kl_coeff: float = Field(ge=0, description="β of the sampled KL to the base LLM, as a reward")
    lr: float = Field(3e-4, gt=0)
    epochs: int = Field(4, ge=1)
    minibatch_size: int = Field(512, ge=1)
    gae_lambda: float = Field(0.95, ge=0, le=1)
    clip: float = Field(0.2, gt=0)
    entropy_coeff: float = Field(0.0, ge=0)
    vf_loss_coeff: float = Field(0.5, ge=0)
    grad_clip: float = Field(0.5, gt=0)
    scale_answers: int = Field(
        128, ge=8, description="base answers that fix the score scales, without a warm start"
    )
    no_progress_timeout_s: float = Field(
        900.0,
        gt=0,
        description="without an update for so long the run saves itself and ends; also the longest "
        "that actors may take to start and to load",
    )


class CheckpointConfig(Section):
    """When the run is saved; every checkpoint abandons the open episodes."""

    every_iterations: int = Field(10, ge=1)
    keep: int = Field(2, ge=1)


class EvaluationConfig(Section):
    """Base against aligned greedy answers to the held-out prompts, after training."""

    max_prompts: int | None = Field(None, ge=1, description="default: all held-out prompts")
    judges: dict[str, str] = Field(
        default_factory=dict,
        description="independent score models by axis (reward, cost); never used as a reward",
    )
    kl_prompts: int = Field(48, ge=0, description="prompts whose sampled answers measure the KL")


class RegistryConfig(Section):
    """How the agent is registered."""

    model_name: str | None = Field(None, description="default: mara-<llm>")
    promote: bool = Field(True, description="try for the alias `champion` after training")


class TrainConfig(Section):
    """A whole training run."""

    name: str = Field("train", pattern=NAME_PATTERN, description="run name")
    seed: int = Field(0, ge=0)
    llm: LLMConfig
    candidates: CandidateRule = CandidateRule()
    agent: AgentConfig = AgentConfig()
    prompts: PromptsConfig = PromptsConfig()
    scores: dict[str, ScoreConfig] = Field(description="score models by name")
    scoring: ScoringConfig = ScoringConfig()
    rollouts: RolloutsConfig = RolloutsConfig()
    learner: LearnerConfig = LearnerConfig()
    warm_start: WarmStartConfig | None = None
    ppo: PPOSettings
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig | None = None
    registry: RegistryConfig = RegistryConfig()
    driver_torch_threads: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> "TrainConfig":
        if not any(score.weight for score in self.scores.values()):
            raise ValueError("scores: every weight is 0; expected at least one that is not")
        for name, score in self.scores.items():
            if score.app is not None and score.url is not None:
                raise ValueError(f"scores.{name}: app and url are both set; expected one of them")
            if score.url is not None and "@" in urlsplit(score.url).netloc:
                raise ValueError(
                    f"scores.{name}.url: names a user or password; expected none in a config, and "
                    "the key in MARA_SCORE_KEY"
                )
        if self.warm_start and self.agent.head == "paper":
            raise ValueError("warm_start: needs an agent.head anchored to the LLM, not 'paper'")
        if self.warm_start and self.warm_start.answers < 8 * self.warm_start.rounds:
            raise ValueError(
                f"warm_start.answers: {self.warm_start.answers} for {self.warm_start.rounds} "
                "rounds; expected at least 8 each"
            )
        if self.warm_start and self.warm_start.distil_epochs and self.warm_start.rounds == 1:
            raise ValueError(
                f"warm_start.distil_epochs: {self.warm_start.distil_epochs} with one round, which "
                "looks at no other candidates; expected 0, or warm_start.rounds of at least 2"
            )
        rows = self.rollouts.num_runners * self.rollouts.num_slots * self.rollouts.fragment_steps
        if self.ppo.minibatch_size > rows:
            raise ValueError(
                f"ppo.minibatch_size: {self.ppo.minibatch_size} is more than the {rows} steps of "
                "an iteration (num_runners x num_slots x fragment_steps)"
            )
        if self.evaluation and set(self.evaluation.judges) not in (set(), {"reward", "cost"}):
            raise ValueError(
                f"evaluation.judges: {sorted(self.evaluation.judges)}; expected reward and cost"
            )
        if self.evaluation and not {"reward", "cost"} <= set(self.scores):
            raise ValueError("evaluation: needs scores named 'reward' and 'cost'")
        return self

    def agent_spec(self, hidden_size: int) -> AgentSpec:
        """The spec of the agent this config trains on an LLM of this hidden size."""
        return AgentSpec(
            hidden_size=hidden_size,
            **self.agent.model_dump(),
            **self.candidates.model_dump(),
            llm=self.llm.name,
        )


PRESETS = resources.files("mara_rl.training") / "presets"


def preset_names() -> list[str]:
    """The presets the package ships."""
    return names_in(PRESETS)


def load_config(name_or_path: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """A preset or YAML file with ``a.b=c`` overrides (values in YAML), checked.

    Raises ConfigError, one line, naming the key, its value and what was expected.
    """
    values = read_settings("config", name_or_path, PRESETS, overrides)
    return validated(TrainConfig, values, f"config {name_or_path!r}")
