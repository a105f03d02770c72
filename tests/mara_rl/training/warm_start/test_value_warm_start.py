"""Value regression and the policy improved by it."""

import pytest
import torch

from mara_rl.agents.agent import Agent, AgentSpec, Head
from mara_rl.common.errors import DataError
from mara_rl.training.config import WarmStartConfig
from mara_rl.training.warm_start.token_credit import (
    SampledAnswer,
    above_others,
    earned,
    fit_credit,
    soft_win_rates,
)
from mara_rl.training.warm_start.value_warm_start import fit_value, improve_policy, total_epochs

H = 16


def answers(n: int = 400) -> list[SampledAnswer]:
    """The reward is the first component of the answer's mean state, made up of two terms."""
    made = []
    for i in range(n):
        offset = torch.randn(H)
        states = (offset + 0.2 * torch.randn(12, H)).half()
        states[0] = 0.0  # the prompt's knows nothing of the answer
        terms = torch.stack([offset[0] + offset[1], -offset[1]])
        made.append(SampledAnswer(f"prompt {i // 4}", states, terms))
    return made


@pytest.fixture(scope="module")
def config() -> WarmStartConfig:
    return WarmStartConfig(answers=200, epochs=8, batch_size=64, lr=1e-3, credit_lr=1e-3)


@pytest.mark.parametrize("head", ["relative", "advantage"])
def test_fit_explains_prompts_it_never_saw_and_is_seeded(
    config: WarmStartConfig, head: Head
) -> None:
    data, done = answers(), []
    fit = fit_value(data, config, head, seed=3, progress=done.append)
    assert sum(done) == total_epochs(config, head)
    assert fit.r2 > 0.6
    assert fit.r2_within_prompt > 0.6
    again = fit_value(data, config, head, seed=3)
    for name in ("value", "candidate", "prefix"):
        first, second = getattr(fit, name), getattr(again, name)
        for a, b in zip(first.parameters(), second.parameters(), strict=True):
            assert torch.equal(a, b)


def test_the_advantage_does_not_see_what_a_whole_prompt_is_worth(config: WarmStartConfig) -> None:
    data = [
        SampledAnswer(a.prompt, a.states, a.terms + 10 * (i // 4 % 2))
        for i, a in enumerate(answers())
    ]
    fit = fit_value(data, config, "advantage", seed=0)
    even, odd = (torch.cat([a.states for a in data if int(a.prompt[7:]) % 2 == r]) for r in (0, 1))
    with torch.no_grad():
        for network in (fit.candidate, fit.prefix):
            assert abs(network(even).mean() - network(odd).mean()) < 1
        assert fit.value(odd).mean() > 5
    alone = [data[0], data[4], *data[8:]]
    assert torch.isfinite(fit_value(alone, config, "advantage", seed=0).prefix(even)).all()


def test_a_fit_that_diverges_and_a_single_prompt_are_errors(config: WarmStartConfig) -> None:
    data = answers(8)
    with pytest.raises(DataError, match="answers to 1 prompt"):
        fit_value(data[:4], config, "relative", seed=0)
    broken = [SampledAnswer(a.prompt, a.states, torch.tensor([float("inf"), 0.0])) for a in data]
    for head in ("relative", "advantage"):
        with pytest.raises(DataError, match="error is not finite"):
            fit_value(broken, config, head, seed=0)


def test_the_head_moves_by_what_accepting_changes_in_value(config: WarmStartConfig) -> None:
    data = answers()
    h, prefix, base = torch.randn(5, H), torch.randn(5, H), torch.randn(5)
    for head in ("relative", "advantage"):
        fit = fit_value(data, config, head, seed=0)
        agent = Agent(AgentSpec(hidden_size=H, head=head))
        improve_policy(agent, fit, data, beta=0.5)
        expected = base + (fit.candidate(h) - fit.prefix(prefix))[:, 0] / 0.5
        torch.testing.assert_close(agent.accept_logit(h, base, prefix), expected)
        same = torch.equal(fit.candidate(h), fit.prefix(h))
        assert same == (head == "relative")  # without credit there is one value for both


def test_anchored_agent_prefers_what_raises_the_value(config: WarmStartConfig) -> None:
    data = answers()
    fit = fit_value(data, config, "anchored", seed=0)
    agent = Agent(AgentSpec(hidden_size=H, head="anchored"))
    improve_policy(agent, fit, data, beta=0.1)
    assert agent.accept_logit(torch.randn(3, H), torch.zeros(3)).shape == (3,)
    with pytest.raises(ValueError, match="paper"):
        improve_policy(Agent(AgentSpec(hidden_size=H, head="paper")), fit, data, beta=1)


def forgetful(n: int = 240) -> list[SampledAnswer]:
    """Answers whose reward is the mean of what each token says: no state remembers the others."""
    made = []
    for i in range(n):
        states = torch.randn(4 + i % 5, H).half()
        terms = torch.stack([states[1:, 0].float().mean(), states[1:, 1].float().mean()])
        made.append(SampledAnswer(f"prompt {i // 4}", states, terms + i // 4))
    return made


def test_credit_finds_each_tokens_share(config: WarmStartConfig) -> None:
    data = forgetful()
    credit = fit_credit(data, config, seed=0)
    states = torch.randn(50, H)
    with torch.no_grad():
        for term in range(2):
            assert (
                torch.corrcoef(torch.stack([credit(states)[:, term], states[:, term]]))[0, 1] > 0.8
            )
    for answer, done in zip(data, earned(credit, data), strict=True):
        assert done.shape == (len(answer.states), 2)
        assert not done[0].any()
    with_credit = fit_value(data, config, "advantage", seed=0).r2_within_prompt
    without = fit_value(data, config, "relative", seed=0).r2_within_prompt
    assert with_credit > 0.5 > 0.2 > without


def test_others_are_those_of_the_same_prompt() -> None:
    data = [SampledAnswer(p, torch.zeros(2, H), torch.zeros(1)) for p in ("a", "a", "a", "b")]
    found = above_others(data, torch.tensor([[1.0], [2.0], [6.0], [3.0]]))
    assert found[:, 0].tolist() == [-3.0, -1.5, 4.5, 0.0]


def test_win_rates_say_which_answer_is_better_not_by_how_much() -> None:
    state = torch.zeros(2, H).half()
    rewards = [[0.0, 5.0], [1.0, 4.0], [9.0, -4.0], [3.0, 0.0], [3.1, 0.0], [7.0, 7.0]]
    prompts = ["a", "a", "a", "b", "b", "alone"]
    data = [SampledAnswer(p, state, torch.tensor(r)) for p, r in zip(prompts, rewards, strict=True)]
    terms = torch.tensor(rewards)
    found = soft_win_rates(data, terms, 1e-6)
    for column in range(2):
        spread = torch.cat([terms[:3] - terms[:3].mean(0), terms[3:5] - terms[3:5].mean(0)])
        assert found[:, column].std() == pytest.approx(
            torch.cat([spread[:, column], torch.zeros(1)]).std().item(), rel=1e-4
        )
    order = torch.tensor([[-1, 1], [0, 0], [1, -1], [-1, 0], [1, 0], [0, 0]])
    assert torch.equal(found.sign().int(), order.int())
    assert found[0, 0] == pytest.approx(found[3, 0].item())  # however much worse
    smooth = soft_win_rates(data, terms, 10.0)
    assert smooth[0, 0].abs() > 5 * smooth[3, 0].abs()


def test_a_fit_to_win_rates_ranks_answers_like_one_to_rewards(config: WarmStartConfig) -> None:
    data = answers()
    ranked = fit_value(data, config.model_copy(update={"win_margin": 0.25}), "advantage", seed=0)
    assert ranked.r2_within_prompt > 0.5
    plain = fit_value(data, config, "advantage", seed=0)
    states = torch.cat([a.states for a in data])
    with torch.no_grad():
        assert not torch.equal(ranked.candidate(states), plain.candidate(states))
