"""What fixes the accept/reject task, whatever LLM, prompts and scores it is about."""

from pydantic import Field

from envs.observation import StateDType
from mara_rl.common.yaml_settings import Section
from mara_rl.llm.candidates import CandidateRule
from mara_rl.llm.policy_llm import SystemPrompt


class AnswerSettings(Section):
    """How answers are rolled out by one process."""

    max_new_tokens: int = Field(48, ge=1, description="length cap of an answer, in tokens")
    prefill_chunk_tokens: int = Field(512, ge=1, description="prompt tokens read in one step")
    state_dtype: StateDType = Field("float16", description="how hidden states are stored")
    torch_threads: int | None = Field(None, ge=1, description="torch threads of the process")


class TaskSettings(AnswerSettings, CandidateRule):
    """What fixes the accept/reject task."""

    system: SystemPrompt = None
    prefix: bool = Field(False, description="whether observations carry h_prefix")
    defer_scores: bool = Field(False, description="leave scoring to the end of `sample()`")
