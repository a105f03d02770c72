"""Requests and blends that cannot be are refused, each by the field's name."""

import pytest

from mara_rl.agents.agent import Agent, AgentSpec
from mara_rl.common.errors import ConfigError, DataError
from mara_rl.decoding.blend import Blend
from mara_rl.decoding.request import DecodeRequest, DecodeSettings
from mara_rl.llm.candidates import CandidateRule
from mara_rl.llm.policy_llm import PolicyLLM


def agent(size: int, head: str = "anchored", **spec: object) -> Agent:
    return Agent(AgentSpec(hidden_size=size, head=head, **spec))


def request(llm: PolicyLLM, *agents: Agent, prompt: str = "Hi", **more: object) -> DecodeRequest:
    options = {key: more.pop(key) for key in ("opening", "allow_other_candidates") if key in more}
    blend = Blend.of(agents) if agents else None
    settings = DecodeSettings.parse(**{"max_new_tokens": 4, **more})
    return DecodeRequest.of(llm, prompt, settings, blend=blend, **options)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: .*greater than or equal to 1, not 0"),
        ({"temperature": 0}, "temperature: .*greater than 0"),
        ({"temperature": float("inf")}, "temperature: .*finite"),
        ({"top_p": 1.5}, "top_p: .*less than or equal to 1"),
        ({"rule": "best"}, "rule: .*not 'best'"),
        ({"seed": -1}, "seed"),
        ({"beam": 3}, "unknown key 'beam'"),
        ({"stop": ("",)}, "stop: an empty text"),
        ({"rule": "threshold"}, "rule 'threshold' needs an agent"),
        ({"exact": True}, "exact needs an agent"),
        ({"temperature": 0.7}, "temperature: 0.7 changes nothing for rule 'argmax_induced'"),
        ({"opening": "I"}, "opening: only the base LLM with rule 'sample'"),
    ],
)
def test_settings_are_refused_by_name(
    tiny_llm: PolicyLLM, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        request(tiny_llm, **settings)
    assert "\n" not in str(caught.value)


def test_prompts_that_are_empty_or_too_long_are_refused(tiny_llm: PolicyLLM) -> None:
    with pytest.raises(DataError, match="empty"):
        request(tiny_llm, prompt=" ")
    with pytest.raises(DataError, match="exceeds the LLM's context of 256"):
        request(tiny_llm, prompt="x" * 300)


def test_an_agent_brings_its_own_rule_and_candidates(tiny_llm: PolicyLLM) -> None:
    own = agent(32, rule="threshold", fallback="first", top_k=7, top_p=0.6)
    made = request(tiny_llm, own)
    assert (made.rule, made.fallback) == ("threshold", "first")
    assert made.candidates == CandidateRule(top_k=7, top_p=0.6)
    with pytest.raises(ConfigError, match="top_k: 9 asked for, the agent was trained with 7"):
        request(tiny_llm, own, top_k=9)
    assert request(tiny_llm, own, top_k=9, allow_other_candidates=True).candidates.top_k == 9
    assert request(tiny_llm, own, top_k=7).candidates.top_k == 7
    assert request(tiny_llm, own, exact=True).rule == "argmax_induced"
    with pytest.raises(ConfigError, match="exact: goes with"):
        request(tiny_llm, own, exact=True, rule="threshold")
    with pytest.raises(ConfigError, match="exact: needs a head that is anchored"):
        request(tiny_llm, agent(32, "paper"), exact=True)
    with pytest.raises(DataError, match=r"hidden size 64; LLM .* has hidden size 32"):
        request(tiny_llm, agent(64))


def test_an_agent_says_whether_all_candidates_are_looked_at(tiny_llm: PolicyLLM) -> None:
    own = agent(32, exact=True)
    assert request(tiny_llm, own).exact
    assert request(tiny_llm, own, keep_candidates=True).exact
    assert not request(tiny_llm, own, exact=False).exact
    assert not request(tiny_llm, agent(32)).exact
    assert request(tiny_llm, agent(32), exact=True).exact
    with pytest.raises(ConfigError, match="exact: goes with"):
        request(tiny_llm, own, rule="threshold")
    for impossible in ({"head": "paper"}, {"rule": "threshold"}):
        with pytest.raises(ValueError, match="exact: "):
            agent(32, **{"head": "anchored", "exact": True, **impossible})


def test_blends_that_cannot_be_are_refused() -> None:
    with pytest.raises(DataError, match=r"differ in top_k: \[5, 6\]"):
        Blend.of([agent(8, top_k=5), agent(8, top_k=6)])
    with pytest.raises(ConfigError, match="weights: 1 for 2 agents"):
        Blend.of([agent(8), agent(8)], [1.0])
    with pytest.raises(ConfigError, match="head 'paper' is not anchored"):
        Blend.of([agent(8, "paper")], strength=0.5)
    with pytest.raises(ConfigError, match="head 'paper' is not anchored"):
        Blend.of([agent(8, "paper"), agent(8)])
    with pytest.raises(ConfigError, match="finite"):
        Blend.of([agent(8)], strength=float("nan"))
    assert Blend.of([agent(8), agent(8)], strength=2.0).weights == (1.0, 1.0)


@pytest.mark.parametrize("name", ["org/Tiny-LLM", "/models/tiny-llm/", "Tiny-LLM"])
def test_an_agent_knows_its_llm(name: str) -> None:
    spec = AgentSpec(hidden_size=8, head="paper", llm="org/tiny-llm")
    spec.check_llm(name, 8)
    with pytest.raises(DataError, match="trained on LLM 'org/tiny-llm', used with 'org/other'"):
        spec.check_llm("org/other", 8)
    spec.check_llm("org/other", 8, allow_other_llm=True)
    with pytest.raises(DataError, match="hidden size 8; LLM 'x' has hidden size 9"):
        spec.check_llm("x", 9, allow_other_llm=True)
