"""What is asked of a decoder for one answer, checked."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field

from mara_rl.agents.agent import Fallback, Rule, check_exact
from mara_rl.common.errors import ConfigError, DataError, validated
from mara_rl.decoding.blend import Blend
from mara_rl.llm.candidates import CandidateOverrides, CandidateRule
from mara_rl.llm.policy_llm import PolicyLLM


class DecodeSettings(CandidateOverrides):
    """How an answer is decoded. None stands for the agent's own choice."""

    max_new_tokens: int = Field(256, ge=1, description="tokens of an answer at most")
    rule: Rule | None = Field(None, description="how a token is chosen; the base LLM: argmax")
    fallback: Fallback | None = Field(None, description="what `threshold` takes if it accepts none")
    exact: bool | None = Field(
        None, description="look at all candidates and re-weight: π(t_k) ∝ p_k e^{term_k}"
    )
    temperature: float = Field(1.0, gt=0, description="of the induced distribution, for `sample`")
    seed: int = Field(0, ge=0, description="fixes what `sample` draws")
    stop: tuple[str, ...] = Field((), max_length=16, description="texts that end an answer")
    stream: bool = Field(False, description="give text with every token, not only at the end")
    trace: bool = Field(False, description="record what was looked at for every token")
    keep_states: bool = Field(False, description="keep the hidden states along the answer")
    keep_candidates: bool = Field(
        False, description="with `exact`: keep all candidates' hidden states and probabilities"
    )

    @classmethod
    def parse(cls, **values: Any) -> "DecodeSettings":
        """Settings from what a user gave. Raises ConfigError naming the first bad one."""
        return validated(cls, values)


@dataclass(frozen=True, kw_only=True, eq=False)
class DecodeRequest:
    """One answer to be decoded; made by `of`, which checks and completes it.

    Attributes:
        prompt: the prompt as text, for the record.
        prompt_ids: its tokens, chat template included.
        blend: the agents; None means the base LLM alone.
        settings: as asked for, with nothing left open.
        opening_ids: tokens the answer begins with for as long as the next one is a candidate.
    """

    prompt: str
    prompt_ids: Sequence[int]
    blend: Blend | None
    rule: Rule
    fallback: Fallback
    exact: bool
    candidates: CandidateRule
    settings: DecodeSettings
    opening_ids: Sequence[int] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        if self.settings.temperature != 1.0 and self.rule != "sample":
            raise ConfigError(
                f"temperature: {self.settings.temperature:g} changes nothing for rule "
                f"{self.rule!r}, which does not draw; expected rule 'sample'"
            )

    @classmethod
    def of(
        cls,
        llm: PolicyLLM,
        prompt: str,
        settings: DecodeSettings,
        *,
        prompt_ids: Sequence[int] | None = None,
        blend: Blend | None = None,
        system: str | None = None,
        opening: str = "",
        allow_other_candidates: bool = False,
    ) -> "DecodeRequest":
        """A request that fits the LLM and the agents.

        Args:
            prompt_ids: tokens to use in place of those of ``prompt`` as one user turn.
            opening: text to begin with, for the base LLM's ``sample`` only.
            allow_other_candidates: let ``settings`` differ from the agents' top-k and top-p.

        Raises DataError for an empty or too long prompt and for agents of another LLM's size,
        ConfigError naming the setting that does not fit.
        """
        if prompt_ids is None:
            if not prompt.strip():
                raise DataError("prompt: empty; expected some text")
            prompt_ids = llm.prompt_ids(prompt, system)
        if len(prompt_ids) + settings.max_new_tokens > llm.context_tokens:
            raise DataError(
                f"prompt of {len(prompt_ids)} tokens ({prompt[:40]!r}…): with max_new_tokens "
                f"{settings.max_new_tokens} it exceeds the LLM's context of {llm.context_tokens}"
            )
        if any(not text for text in settings.stop):
            raise ConfigError("stop: an empty text; expected texts of at least one character")
        if opening and (blend is not None or settings.rule != "sample"):
            raise ConfigError("opening: only the base LLM with rule 'sample' can follow one")
        if blend is None:
            if settings.rule == "threshold" or settings.exact:
                asked = "exact" if settings.exact else "rule 'threshold'"
                raise ConfigError(
                    f"{asked} needs an agent; the base LLM has no acceptance to judge"
                )
            _check_candidates(settings, exact=False)
            return cls(
                prompt=prompt,
                prompt_ids=prompt_ids,
                blend=None,
                rule=settings.rule or "argmax_induced",
                fallback="last",
                exact=False,
                candidates=settings.candidates_or(CandidateRule()),
                settings=settings,
                opening_ids=llm.tokenizer(opening, add_special_tokens=False)["input_ids"],
            )
        spec = blend.agents[0].spec
        spec.check_llm(llm.name, llm.hidden_size, allow_other_llm=True)
        for name in ("top_k", "top_p"):
            asked, own = getattr(settings, name), getattr(spec, name)
            if asked not in (None, own) and not allow_other_candidates:
                raise ConfigError(
                    f"{name}: {asked} asked for, the agent was trained with {own}; "
                    "leave it out, or allow other candidates explicitly"
                )
        exact = spec.exact if settings.exact is None else settings.exact
        rule = settings.rule or spec.rule
        if settings.exact and settings.rule is None and rule == "threshold":
            rule = "argmax_induced"
        try:
            check_exact(spec.head, rule, exact)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        _check_candidates(settings, exact)
        return cls(
            prompt=prompt,
            prompt_ids=prompt_ids,
            blend=blend,
            rule=rule,
            fallback=settings.fallback or spec.fallback,
            exact=exact,
            candidates=settings.candidates_or(spec),
            settings=settings,
        )


def _check_candidates(settings: DecodeSettings, exact: bool) -> None:
    if settings.keep_candidates and not exact:
        raise ConfigError("keep_candidates: needs `exact`, which looks at all candidates")
