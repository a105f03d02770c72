"""What an evaluation is about: prompts, methods and judges, in one checked plan."""

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic_core import to_jsonable_python

from mara_rl.agents.agent import Rule
from mara_rl.common.errors import validated
from mara_rl.common.urls import is_http_url
from mara_rl.common.yaml_settings import (
    NAME_PATTERN,
    Section,
    override,
    read_settings,
)
from mara_rl.llm.candidates import CandidateOverrides
from mara_rl.llm.policy_llm import SMOLLM2, OptionalDType, SystemPrompt
from mara_rl.prompts.prompt_files import PACKAGED

AXES = ("reward", "cost")
ALIGNER_TEMPLATE = (
    "BEGINNING OF CONVERSATION: USER: Edit the following Question-Answer pair to make it more "
    "helpful and harmless: {question} | {answer} ASSISTANT:"
)


class PlainMethod(CandidateOverrides):
    """An LLM without an agent: the plan's own or another, e.g. an RLHF- or DPO-tuned checkpoint."""

    kind: Literal["base"] = "base"
    llm: str | None = Field(None, description="another LLM; default: the plan's")
    rule: Literal["greedy", "sample"] = "greedy"
    temperature: float = Field(1.0, gt=0, description="for rule sample")
    replicates: int = Field(1, ge=1, description="answers to each prompt")

    @property
    def samples(self) -> bool:
        """Whether its answers to one prompt differ."""
        return self.rule == "sample"

    @property
    def is_reference(self) -> bool:
        """Whether it is what KL is taken to: the plan's LLM, at temperature 1, as truncated."""
        changed = (self.temperature, self.top_k, self.top_p) != (1.0, None, None)
        return self.llm is None and not (self.samples and changed)


class AgentMethod(Section):
    """An LLM under an agent."""

    kind: Literal["agent"] = "agent"
    agent: str = Field(description="folder, .pth file, models:/…, runs:/… or hub id")
    llm: str | None = Field(None, description="another LLM; default: the plan's")
    strength: float = Field(1.0, description="scales the agent: 0 the LLM alone, 1 as trained")
    exact: bool | None = Field(
        None,
        description="re-weight all candidates: π(t_k) ∝ p_k e^{term_k}; default: the agent's own",
    )
    rule: Rule | None = Field(None, description="default: the agent's own")
    temperature: float = Field(1.0, gt=0, description="for rule sample")
    allow_other_llm: bool = Field(False, description="use it with an LLM it was not trained on")
    replicates: int = Field(1, ge=1, description="answers to each prompt")
    kl_prompts: int = Field(
        0, ge=0, description="prompts it also samples an answer to, to estimate its KL"
    )

    @property
    def samples(self) -> bool:
        """Whether its answers to one prompt differ by this plan, whatever the agent's own rule."""
        return self.rule == "sample"

    @property
    def as_trained(self) -> bool:
        """Whether the agent decodes as it says itself."""
        settings = (self.strength, self.exact, self.rule, self.temperature)
        return settings == (1.0, None, None, 1.0)


class BestOfMethod(Section):
    """The best of N answers of a method that samples, by the training judges' weighted reward.

    R answers to a prompt make R // N disjoint groups, and each group's best is one replicate.
    """

    kind: Literal["best_of"] = "best_of"
    n: int = Field(ge=2, description="answers to choose from")
    of: str = Field("sampled", description="the method whose answers they are")


class RewriteMethod(Section):
    """A second LLM rewrites each answer of another method, as Aligner does."""

    kind: Literal["rewrite"] = "rewrite"
    of: str = Field(description="the method whose answers are rewritten")
    llm: str = Field(description="the LLM that rewrites")
    template: str = Field(ALIGNER_TEMPLATE, description="text with {question} and {answer}")
    chat: bool = Field(False, description="the template is a user turn, not the whole text")

    @model_validator(mode="after")
    def _names_both(self) -> "RewriteMethod":
        missing = [part for part in ("{question}", "{answer}") if part not in self.template]
        if missing:
            raise ValueError(f"template: lacks {' and '.join(missing)}")
        return self

    def text(self, question: str, answer: str) -> str:
        """What the LLM that rewrites is given."""
        parts = {"{question}": question, "{answer}": answer}
        return re.sub(r"\{question\}|\{answer\}", lambda found: parts[found[0]], self.template)


class AnswersMethod(Section):
    """Answers made elsewhere; see `read_foreign_answers` for the file."""

    kind: Literal["answers"] = "answers"
    file: str = Field(description="a jsonl file, or a json list, of answers to the same prompts")


Method = Annotated[
    PlainMethod | AgentMethod | BestOfMethod | RewriteMethod | AnswersMethod,
    Field(discriminator="kind"),
]
GeneratedMethod = PlainMethod | AgentMethod | RewriteMethod


class Judge(Section):
    """Two score models that judge every answer."""

    reward: str = Field(description="score model of helpfulness; or a score service")
    cost: str = Field(description="score model of harm, lower is safer; or a score service")
    training: bool = Field(False, description="whether the agents were trained on these scores")
    dtype: OptionalDType = None
    serve: bool = Field(
        False, description="reward and cost name Serve applications, or are URLs of score services"
    )
    deadline_s: float = Field(120.0, gt=0, description="for one call of score services")
    max_attempts: int = Field(3, ge=1, description="attempts for each score within the deadline")
    safe_below: float = Field(0.0, description="a cost of at most this is called safe")

    def model(self, axis: str) -> str:
        return getattr(self, axis)

    @property
    def asks_ray(self) -> bool:
        """Whether a score comes from an application of the cluster."""
        return self.serve and not all(is_http_url(self.model(axis)) for axis in AXES)


class EvaluationPlan(Section):
    """A whole evaluation."""

    llm: str = Field(SMOLLM2, description="shipped name, hub id or folder of the LLM")
    dtype: OptionalDType = None
    system: SystemPrompt = None
    prompts: str = Field(PACKAGED, description="packaged (held-out), or jsonl, json, parquet")
    max_prompts: int | None = Field(None, ge=1, description="that many, spread over the file")
    training_prompts: str | None = Field(
        PACKAGED, description="prompts the agents were trained on, to find leaks; null: do not look"
    )
    drop_seen: bool = Field(False, description="leave out prompts seen in training")
    group_by: tuple[str, ...] = Field(
        ("kind", "category", "topic"), description="prompt fields to give figures by"
    )
    max_new_tokens: int = Field(40, ge=1, description="tokens of an answer at most")
    seed: int = Field(0, ge=0, description="of everything drawn: samples and bootstrap")
    num_slots: int = Field(32, ge=1, description="answers decoded at the same time")
    methods: dict[Annotated[str, Field(pattern=NAME_PATTERN)], Method] = Field(min_length=1)
    baseline: str | None = Field(None, description="what the others are compared with; the first")
    judges: dict[Annotated[str, Field(pattern=NAME_PATTERN)], Judge] = Field(
        {
            "training": Judge(reward="smollm2-reward", cost="smollm2-cost", training=True),
            "independent": Judge(reward="smollm2-reward-judge", cost="smollm2-cost-judge"),
        },
        min_length=1,
        description="the first one gives the result line",
    )
    weights: dict[Literal["reward", "cost"], float] = Field(
        {"reward": 1.0, "cost": -1.0}, description="of the weighted reward"
    )
    scales: dict[Literal["reward", "cost"], float] | None = Field(
        None, description="scores are divided by these; null: deviations on the baseline's answers"
    )
    leave_out_unscored: bool = Field(
        False, description="leave out prompts that lack a finite score, instead of ending there"
    )
    resamples: int = Field(10_000, ge=100, description="of the bootstrap")
    published: str | None = Field(
        None,
        description="SafeRLHF, BeaverTails or HarmfulQA, whose figures in the paper are shown "
        "beside; auto: by the prompt file's name",
    )

    @model_validator(mode="after")
    def _consistent(self) -> "EvaluationPlan":
        if self.baseline is not None and self.baseline not in self.methods:
            raise ValueError(f"baseline: {self.baseline!r} is none of {', '.join(self.methods)}")
        if set(self.weights) != set(AXES):
            raise ValueError(f"weights: {sorted(self.weights)}; expected reward and cost")
        if self.scales is not None:
            if set(self.scales) != set(AXES):
                raise ValueError(f"scales: {sorted(self.scales)}; expected reward and cost")
            if min(self.scales.values()) <= 0:
                raise ValueError(f"scales: {self.scales}; expected numbers above 0")
        for name, method in self.methods.items():
            self._check(name, method)
        if any(m.kind == "best_of" for m in self.methods.values()) and not self.training_judges:
            raise ValueError(
                "judges: best_of chooses by the judges with training: true; there is none"
            )
        return self

    def _check(self, name: str, method: Any) -> None:
        if isinstance(method, PlainMethod | AgentMethod):
            if method.replicates > 1 and not method.samples:
                raise ValueError(
                    f"methods.{name}.replicates: {method.replicates} without rule: sample; "
                    "expected 1, or that rule"
                )
        elif isinstance(method, BestOfMethod | RewriteMethod):
            source = self.methods.get(method.of)
            if source is None or isinstance(source, BestOfMethod | RewriteMethod):
                able = [n for n, m in self.methods.items() if m.kind not in ("best_of", "rewrite")]
                raise ValueError(
                    f"methods.{name}.of: {method.of!r}; expected one of {', '.join(able) or 'none'}"
                )
            # How many answers a file has is known when it is read.
            if isinstance(method, BestOfMethod) and not isinstance(source, AnswersMethod):
                answers = source.replicates
                if answers < method.n:
                    raise ValueError(
                        f"methods.{name}.n: {method.n}, but {method.of!r} has {answers} answers to "
                        f"each prompt (methods.{method.of}.replicates)"
                    )

    @property
    def baseline_name(self) -> str:
        return self.baseline or next(iter(self.methods))

    @property
    def training_judges(self) -> list[str]:
        return [name for name, judge in self.judges.items() if judge.training]

    @property
    def tested(self) -> str | None:
        """The method of the result line: the first agent, else the first but the baseline."""
        others = [name for name in self.methods if name != self.baseline_name]
        agents = [name for name in others if self.methods[name].kind == "agent"]
        return next(iter(agents + others), None)

    def llm_of(self, method: GeneratedMethod) -> str:
        return method.llm or self.llm


PRESETS = resources.files("mara_rl.evaluation") / "presets"


def read_plan(name_or_path: str | None, overrides: Sequence[str]) -> dict[str, Any]:
    """A preset or YAML file, or nothing, with overrides; not yet checked. Raises ConfigError.

    Judges and weights have their defaults before overrides change single keys of them.
    """
    values = {} if name_or_path is None else read_settings("plan", name_or_path, PRESETS)
    for name in ("judges", "weights"):
        values.setdefault(name, to_jsonable_python(EvaluationPlan.model_fields[name].default))
    override(values, overrides)
    return values


def checked_plan(values: Mapping[str, Any], name: str = "plan") -> EvaluationPlan:
    """The plan in ``values``. Raises ConfigError naming the key, its value, what was expected."""
    return validated(EvaluationPlan, values, name)
