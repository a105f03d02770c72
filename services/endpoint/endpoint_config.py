"""What an endpoint is made of; the same for ``mara-rl serve`` and ``serve deploy``."""

from pathlib import Path
from typing import Any

from pydantic import Field

from mara_rl.common.errors import validated
from mara_rl.llm.policy_llm import SMOLLM2, OptionalDType
from services.cluster.replica_config import ReplicaConfig
from services.endpoint.decode_plan import ApiLimits


class EndpointConfig(ReplicaConfig):
    """One LLM with its agents, behind one HTTP API."""

    llm: str = Field(SMOLLM2, description="the LLM: shipped name, hub id, folder or .gguf file")
    dtype: OptionalDType = None
    agents: tuple[str, ...] = Field(
        (), description="agents beside those of the registry, as REF or name=REF"
    )
    allow_other_llm: bool = Field(
        False, description="let agents of another LLM of the same hidden size answer"
    )
    tracking_uri: str | None = Field(
        None, description="MLflow with registered agents; None: MLFLOW_TRACKING_URI, if set"
    )
    poll_s: float = Field(2.0, gt=0, description="how often the aliases of agents are looked up")
    slots: int = Field(16, ge=1, description="answers decoded at the same time, by one replica")
    max_waiting: int = Field(64, ge=0, description="answers that may wait for a slot")
    step_timeout_s: float = Field(
        120.0, gt=0, description="a decode step that takes longer gets its replica replaced"
    )
    limits: ApiLimits = ApiLimits()
    score_apps: dict[str, str] = Field(
        {}, description="score name to the Serve application or URL that gives it"
    )
    score_timeout_s: float = Field(30.0, gt=0, description="time for the scores of one request")
    keys_file: Path | None = Field(
        None, description="API keys, one a line, beside those of MARA_API_KEY"
    )
    anonymous: bool = Field(
        False, description="answer without any key; meant for a server on loopback"
    )
    log_text: bool = Field(False, description="write prompts and answers to the request log")
    log_file: Path | None = Field(None, description="the request log; None: standard error")
    drain_timeout_s: float = Field(
        30.0, ge=0, description="time for running answers when a replica is to end"
    )

    @classmethod
    def parse(cls, values: dict[str, Any]) -> "EndpointConfig":
        """A config from what a user gave. Raises ConfigError naming the first bad field."""
        return validated(cls, values, "endpoint")

    @property
    def alone(self) -> bool:
        """Whether there is one replica only, which has no other to load beside."""
        return self.num_replicas == 1 and self.max_replicas is None
