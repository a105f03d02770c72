"""What an agent must show before it becomes champion."""

import math
from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mara_rl.common.errors import DataError, first_problem
from mara_rl.metrics.preference import PreferenceRate, sign_test

MIN_PROMPTS = 30
MAX_P_VALUE = 0.05
_PREFIX = "preference."


class PromotionEvidence(BaseModel):
    """A version's preference rate (points, 95 % interval) against the base LLM or the champion.

    A figure that is missing is NaN, a missing count 0; such evidence never promotes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    rate: float = math.nan
    low: float = math.nan
    high: float = math.nan
    n: int = Field(0, ge=0)
    wins: int = Field(0, ge=0)
    losses: int = Field(0, ge=0)
    against: Literal["base", "champion"]
    champion_version: int | None = None
    flaw: str = Field("", description="why the figures are not to be trusted; such never promote")

    @model_validator(mode="after")
    def _names_its_champion(self) -> "PromotionEvidence":
        if (self.against == "champion") != (self.champion_version is not None):
            raise ValueError("champion_version: expected with against 'champion', and only then")
        return self

    @classmethod
    def from_rate(
        cls,
        rate: PreferenceRate,
        *,
        against: Literal["base", "champion"],
        champion_version: int | None = None,
        flaw: str = "",
    ) -> "PromotionEvidence":
        """Evidence from a comparison on the same prompts."""
        return cls(
            rate=rate.rate,
            low=rate.low,
            high=rate.high,
            n=rate.n,
            wins=rate.won,
            losses=rate.lost,
            against=against,
            champion_version=champion_version,
            flaw=flaw,
        )

    @classmethod
    def from_tags(cls, tags: Mapping[str, str]) -> "PromotionEvidence | None":
        """The evidence that `tags` wrote, None if there is none.

        Raises DataError for a tag that is not what it should be.
        """
        values = {
            key.removeprefix(_PREFIX): value
            for key, value in tags.items()
            if key.startswith(_PREFIX) and value != ""
        }
        if not values:
            return None
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise DataError(f"tag {first_problem(error, _PREFIX.rstrip('.'))}") from error

    def tags(self) -> dict[str, str]:
        """Registry tags that hold this evidence; an empty value for a figure that is missing."""
        return {
            _PREFIX + key: "" if value is None else str(value)
            for key, value in self.model_dump().items()
        }


def refusal(evidence: PromotionEvidence | None, champion: int | None) -> str | None:
    """Why ``evidence`` does not make a champion where ``champion`` rules; None if it does.

    The interval's lower bound must be above 0 on at least `MIN_PROMPTS` prompts: against the base
    LLM, or against the champion's version where there is one. A percentile bootstrap has no width
    where all outcomes agree, so the sign test must agree as well.
    """
    if evidence is None:
        return "no preference rate is recorded for it"
    if evidence.flaw:
        return evidence.flaw
    if champion is None and evidence.against != "base":
        return "there is no champion: expected a comparison with the base LLM"
    if champion is not None and evidence.champion_version != champion:
        found = evidence.champion_version
        other = "the base LLM" if found is None else f"version {found}"
        return f"compared with {other}; expected the champion, version {champion}"
    for name in ("rate", "low", "high"):
        if not math.isfinite(value := getattr(evidence, name)):
            return f"preference figure {name!r} is {value}"
    if evidence.low <= 0:
        return f"lower bound {evidence.low:+.1f} is not above 0"
    if evidence.n < MIN_PROMPTS:
        return f"{evidence.n} prompts; expected at least {MIN_PROMPTS}"
    p_value = sign_test(evidence.wins, evidence.losses)
    if p_value >= MAX_P_VALUE:
        return f"sign test p = {p_value:.3f}; expected below {MAX_P_VALUE}"
    return None
