"""The keyword arguments both environments share, and how they become a task."""

import functools
from collections.abc import Callable

import torch
from gymnasium import spaces
from pydantic import ConfigDict, Field

from envs.accept_reject_task import AcceptRejectTask
from envs.in_process_scorer import InProcessScorer
from envs.list_prompt_source import ListPromptSource
from envs.observation import observation_space
from envs.protocols import Prompt, PromptSource, Scorer
from envs.reward import RewardSpec
from envs.task_settings import TaskSettings
from mara_rl.llm.policy_llm import SMOLLM2, DType, OptionalDType, PolicyLLM, load_policy_llm


class EnvSettings(TaskSettings):
    """A task with its LLM, prompts and scores; the environments take these as keyword arguments."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    llm: str | PolicyLLM = Field(
        SMOLLM2, description="policy LLM: shipped name, folder, hub id, or one already loaded"
    )
    llm_dtype: OptionalDType = None
    device: str | None = Field(None, description="default: the first CUDA device, else the CPU")
    prompts: Callable[[], PromptSource] | None = Field(
        None, description="makes the prompt source; default: the packaged prompts"
    )
    scorer: Scorer | None = Field(None, description="default: the shipped models, in process")
    reward: RewardSpec = RewardSpec(weights={"reward": 1.0, "cost": -1.0})

    def observation_space(self, task: AcceptRejectTask) -> spaces.Dict:
        """The space of one slot's observation."""
        return observation_space(
            task.llm.hidden_size, prefix=self.prefix, state_dtype=self.state_dtype
        )

    def task(self, num_slots: int) -> AcceptRejectTask:
        """Load what is needed and build the task for S = ``num_slots``."""
        if self.torch_threads is not None:
            torch.set_num_threads(self.torch_threads)
        llm = self.llm
        if isinstance(llm, str):
            llm = _cached_policy_llm(llm, self.device, self.llm_dtype)
        return AcceptRejectTask(
            llm,
            num_slots,
            self,
            prompts=(self.prompts or _packaged_prompts)(),
            scorer=self.scorer or _shipped_scorer(),
            reward=self.reward,
        )


@functools.cache
def _cached_policy_llm(name: str, device: str | None, dtype: DType | None) -> PolicyLLM:
    """One LLM per process: RLlib may rebuild an environment, which must not reload the LLM."""
    return load_policy_llm(name, device=device, dtype=dtype)


def _packaged_prompts() -> PromptSource:
    from mara_rl.prompts import packaged_prompts

    return ListPromptSource([Prompt(p.prompt, p.id) for p in packaged_prompts("train")])


@functools.cache
def _shipped_scorer() -> Scorer:
    from mara_rl.score_models.loading import load_score_model

    names = {"reward": "smollm2-reward", "cost": "smollm2-cost"}
    return InProcessScorer({name: load_score_model(model) for name, model in names.items()})
