"""An agent's chain of decisions against its choice among all candidates."""

from dataclasses import replace

import pytest
import torch

from mara_rl.agents.agent import Agent, AgentSpec, Head
from mara_rl.common.errors import DataError
from mara_rl.decoding.answer import CandidateStates
from mara_rl.decoding.rules import induced_probabilities, reweighted_logits
from mara_rl.training.warm_start.distillation import distil
from mara_rl.training.warm_start.token_credit import SampledAnswer

H = 16


def random_answers(n: int) -> list[SampledAnswer]:
    """Answers of six tokens; two of them, the second and the fifth, had candidates."""
    generator = torch.Generator().manual_seed(2)
    made = []
    for i in range(n):
        states = torch.randn(7, H, generator=generator)
        counts = torch.randint(2, 7, (2,), generator=generator)
        prefix = states[[1, 4]].repeat_interleave(counts, 0)
        near = prefix + 0.3 * torch.randn(prefix.shape, generator=generator)
        probs = [
            torch.randn(int(k), generator=generator).softmax(0).sort(descending=True).values
            for k in counts
        ]
        known = CandidateStates(torch.tensor([1, 4]), counts, torch.cat(probs), near.half())
        made.append(SampledAnswer(f"prompt {i}", states.half(), torch.zeros(2), known))
    return made


def improved_agent(head: Head) -> Agent:
    torch.manual_seed(0)
    agent = Agent(AgentSpec(hidden_size=H, head=head, llm="tiny"))
    torch.nn.init.normal_(agent.network.output_linear.weight, std=1.5)
    return agent


def reference(agent: Agent, answer: SampledAnswer) -> list[float]:
    """KL(π* ‖ π) of one set after the other, by the decoder's own rules."""
    known = answer.candidates
    assert known is not None
    found, first = [], 0
    for position, count in zip(known.positions.tolist(), known.counts.tolist(), strict=True):
        probs = known.probs[None, first : first + count]
        states = known.states[first : first + count]
        first += count
        seen = torch.ones(1, count, dtype=torch.bool)
        last = torch.arange(count)[None] == count - 1
        with torch.no_grad():
            wanted, _ = induced_probabilities(
                reweighted_logits(probs, agent.terms(states)[0][None]), seen, last
            )
            base = torch.logit(probs / probs.flip(1).cumsum(1).flip(1), eps=1e-6)[0]
            logits = agent.accept_logit(states, base, answer.states[position].expand(count, -1))
            induced, _ = induced_probabilities(logits[None], seen, last)
        found.append((wanted * (wanted.log() - induced.log())).sum().item())
    return found


@pytest.mark.parametrize("head", ["anchored", "relative", "advantage"])
def test_divergence_is_that_of_the_decoders_rules(head: Head) -> None:
    agent = improved_agent(head)
    one = random_answers(1)[0]
    before, after = distil(agent, [one, replace(one, prompt="another")], epochs=0, seed=0)
    assert before == after
    expected = reference(agent, one)
    assert before == pytest.approx(sum(expected) / len(expected), rel=1e-3)
    assert before > 0.01


@pytest.mark.parametrize("head", ["anchored", "advantage"])
def test_the_chain_comes_nearer_on_prompts_it_never_saw(head: Head) -> None:
    answers = random_answers(600)
    agent, again = improved_agent(head), Agent(AgentSpec(hidden_size=H, head=head, llm="tiny"))
    again.load_state_dict(agent.state_dict())
    done: list[int] = []
    before, after = distil(agent, answers, epochs=4, seed=1, progress=done.append)
    assert after < 0.7 * before
    assert done == [1, 1, 1, 1]
    assert distil(again, answers, epochs=4, seed=1) == (before, after)


def test_answers_without_candidates_are_passed_over() -> None:
    answers = random_answers(20)
    plain = [replace(a, candidates=None) for a in answers]
    agent, again = (improved_agent("advantage") for _ in range(2))
    again.load_state_dict(agent.state_dict())
    assert distil(agent, [*plain, *answers], epochs=1, seed=0) == distil(
        again, answers, epochs=1, seed=0
    )
    with pytest.raises(DataError, match="warm_start: no answer had a choice of candidates"):
        distil(agent, plain, epochs=1, seed=0)
