"""The keyword arguments both environments share, and how they become a task."""

import functools
from collections.abc import Callable

import torch
from gymnasium import spaces
from pydantic import BaseModel, ConfigDict, Field

from envs.accept_reject_task import AcceptRejectTask
from envs.in_process_scorer import InProcessScorer
from envs.list_prompt_source import ListPromptSource
from envs.observation import StateDType, observation_space
from envs.protocols import Prompt, PromptSource, Scorer
from envs.reward import RewardSpec
from mara_rl.llm.policy_llm import SMOLLM2, DType, PolicyLLM, load_policy_llm


class EnvSettings(BaseModel):
    """What fixes the accept/reject task; the environments take these as keyword arguments."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, frozen=True)

    llm: str | PolicyLLM = Field(
        SMOLLM2, description="policy LLM: shipped name, folder, hub id, or one already loaded"
    )
    llm_dtype: DType | None = Field(None, description="default: bfloat16 on CUDA, else float32")
    device: str | None = Field(None, description="default: the first CUDA device, else the CPU")
    system: str | None = Field(None, description="system prompt; None keeps the template's own")
    top_k: int = Field(40, ge=1, description="candidates kept by top-k")
    top_p: float = Field(0.95, gt=0, le=1, description="mass kept by top-p, after top-k")
    max_new_tokens: int = Field(48, ge=1, description="length cap of an answer, in tokens")
    prefix: bool = Field(False, description="whether observations carry h_prefix")
    state_dtype: StateDType = Field("float16", description="how hidden states are stored")
    prefill_chunk_tokens: int = Field(512, ge=1, description="prompt tokens read in one step")
    defer_scores: bool = Field(False, description="leave scoring to the end of `sample()`")
    torch_threads: int | None = Field(None, ge=1, description="torch threads of this process")
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
            prompts=(self.prompts or _packaged_prompts)(),
            scorer=self.scorer or _shipped_scorer(),
            **self.model_dump(
                include={
                    "max_new_tokens",
                    "top_k",
                    "top_p",
                    "prefix",
                    "system",
                    "defer_scores",
                    "prefill_chunk_tokens",
                    "state_dtype",
                }
            ),
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
