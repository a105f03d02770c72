"""Value regression and how an agent leans on it."""

import pytest
import torch

from mara_rl.agent import Agent, AgentSpec
from mara_rl.errors import DataError
from mara_rl.training.config import WarmStartConfig
from mara_rl.training.value_warm_start import BaseAnswer, fit_value, lean

H = 8


def answers(n: int = 200) -> list[BaseAnswer]:
    """The reward is the first component of the answer's mean state, made up of two terms."""
    made = []
    for i in range(n):
        offset = torch.randn(H)
        states = (offset + 0.3 * torch.randn(6, H)).half()
        made.append(
            BaseAnswer(f"prompt {i // 4}", states, torch.stack([offset[0] + offset[1], -offset[1]]))
        )
    return made


@pytest.fixture(scope="module")
def config() -> WarmStartConfig:
    return WarmStartConfig(answers=200, epochs=15, batch_size=64, lr=1e-3)


def test_fit_explains_prompts_it_never_saw_and_is_seeded(config: WarmStartConfig) -> None:
    data = answers()
    fit = fit_value(data, config, seed=3)
    assert fit.r2 > 0.6
    assert fit.r2_within_prompt > 0.6
    again = fit_value(data, config, seed=3)
    for name in ("value", "advantage"):
        first, second = getattr(fit, name), getattr(again, name)
        for a, b in zip(first.parameters(), second.parameters(), strict=True):
            assert torch.equal(a, b)


def test_the_advantage_does_not_see_what_a_whole_prompt_is_worth(config: WarmStartConfig) -> None:
    data = [
        BaseAnswer(a.prompt, a.states, a.terms + 10 * (i // 4 % 2)) for i, a in enumerate(answers())
    ]
    fit = fit_value(data, config, seed=0)
    even, odd = (torch.cat([a.states for a in data if int(a.prompt[7:]) % 2 == r]) for r in (0, 1))
    with torch.no_grad():
        assert abs(fit.advantage(even).mean() - fit.advantage(odd).mean()) < 1
        assert fit.value(odd).mean() > 5
    alone = [data[0], data[4], *data[8:]]
    assert torch.isfinite(fit_value(alone, config, seed=0).advantage(even)).all()


def test_a_fit_that_diverges_and_a_single_prompt_are_errors(config: WarmStartConfig) -> None:
    data = answers(8)
    with pytest.raises(DataError, match="answers to 1 prompt"):
        fit_value(data[:4], config, seed=0)
    broken = [BaseAnswer(a.prompt, a.states, torch.tensor([float("inf"), 0.0])) for a in data]
    with pytest.raises(DataError, match="error is not finite"):
        fit_value(broken, config, seed=0)


def test_relative_agent_moves_by_the_difference_of_q(config: WarmStartConfig) -> None:
    data = answers()
    q = fit_value(data, config, seed=0).advantage
    agent = Agent(AgentSpec(hidden_size=H, head="relative"))
    lean(agent, q, data, beta=0.5)
    h, prefix, base = torch.randn(5, H), torch.randn(5, H), torch.randn(5)
    expected = base + (q(h) - q(prefix))[:, 0] / 0.5
    torch.testing.assert_close(agent.accept_logit(h, base, prefix), expected)


def test_anchored_agent_prefers_what_raises_q(config: WarmStartConfig) -> None:
    data = answers()
    q = fit_value(data, config, seed=0).advantage
    agent = Agent(AgentSpec(hidden_size=H, head="anchored"))
    lean(agent, q, data, beta=0.1)
    assert agent.accept_logit(torch.randn(3, H), torch.zeros(3)).shape == (3,)
    with pytest.raises(ValueError, match="paper"):
        lean(Agent(AgentSpec(hidden_size=H, head="paper")), q, data, beta=1)
