"""`MARAGenerator`, the few-lines interface."""

import pytest
import torch
from small_agents import make_agent, random_agent

from mara_rl import MARAGenerator
from mara_rl.agents.agent import Agent
from mara_rl.agents.agent_files import save_agent
from mara_rl.agents.published_actors import save_published_actor
from mara_rl.common.errors import ConfigError, DataError
from mara_rl.llm.policy_llm import PolicyLLM


def actor(llm: PolicyLLM, head: str = "paper") -> Agent:
    return random_agent(llm, head, rule="threshold", fallback="first")


def test_raw_and_proxy_output_of_a_published_actor(tiny_llm, tmp_path) -> None:
    save_published_actor(actor(tiny_llm), tmp_path / "tiny_2_1_actor.pth")
    mara = MARAGenerator(str(tmp_path / "tiny_2_1_actor.pth"), tiny_llm)
    raw = mara.get_raw_output("Hi", max_new_tokens=12)
    ids = torch.tensor([tiny_llm.prompt_ids("Hi")])
    plain = tiny_llm.model.generate(ids, max_new_tokens=12, do_sample=False)
    assert raw["details"].token_ids == plain[0, ids.shape[1] :].tolist()
    proxy = mara.get_proxy_output("Hi", max_new_tokens=12)
    assert proxy["answer"] == proxy["details"].text
    assert proxy["details"].token_ids != raw["details"].token_ids
    assert proxy["details"].examined > len(proxy["details"].token_ids)
    sampled = [
        mara.get_proxy_output("Hi", max_new_tokens=12, do_sample=True, seed=s) for s in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


def test_left_out_the_length_is_what_fits(tiny_llm) -> None:
    mara = MARAGenerator(random_agent(tiny_llm, "relative", top_k=6), tiny_llm)
    prompt = "Hi " * 40
    for details in (
        mara.get_raw_output(prompt)["details"],
        mara.get_proxy_output(prompt)["details"],
    ):
        room = tiny_llm.context_tokens - len(tiny_llm.prompt_ids(prompt))
        assert details.finish_reason == "stop" or len(details.token_ids) == room


def test_settings_that_do_not_fit_are_refused_at_once(tiny_llm, tmp_path) -> None:
    save_agent(make_agent(), tmp_path / "agent")  # hidden size 12
    with pytest.raises(DataError, match="hidden size 12; LLM"):
        MARAGenerator(tmp_path / "agent", tiny_llm, allow_other_llm=True)
    with pytest.raises(ConfigError, match="top_k: 7 asked for, the agent was trained with 40"):
        MARAGenerator(actor(tiny_llm), tiny_llm, top_k=7)
    MARAGenerator(actor(tiny_llm), tiny_llm, top_k=7, allow_other_candidates=True)
    with pytest.raises(ConfigError, match="strength"):
        MARAGenerator(actor(tiny_llm), tiny_llm, strength=0.5)
    with pytest.raises(ConfigError, match=r"fallback: .*'best'"):
        MARAGenerator(actor(tiny_llm), tiny_llm, fallback="best")
    with pytest.raises(DataError, match="no such file or folder"):
        MARAGenerator("nothing.pth", tiny_llm)


def test_strength_0_answers_as_the_llm(tiny_llm) -> None:
    mara = MARAGenerator(actor(tiny_llm, "anchored"), tiny_llm, strength=0.0)
    for do_sample in (False, True):
        options = {
            "max_new_tokens": 12,
            "do_sample": do_sample,
            "rule": "sample" if do_sample else "argmax_induced",
        }
        aligned = mara.get_proxy_output("Hello", **options)["details"].token_ids
        assert aligned == mara.get_raw_output("Hello", **options)["details"].token_ids
