"""Small agents with weights drawn from a fixed seed."""

import torch

from mara_rl.agents.agent import Agent, AgentSpec
from mara_rl.llm.policy_llm import PolicyLLM

SIZE = 12


def make_agent(head: str = "relative", **fields) -> Agent:
    torch.manual_seed(0)
    agent = Agent(AgentSpec(hidden_size=SIZE, head=head, llm="some/llm", **fields))
    torch.nn.init.normal_(agent.network.output_linear.weight)
    return agent


def logits(agent: Agent) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    h, prefix = torch.randn(2, 7, SIZE, generator=generator)
    with torch.inference_mode():
        return agent.accept_logit(h, torch.linspace(-2, 2, 7), prefix)


def random_agent(policy: PolicyLLM, /, head: str, **spec: object) -> Agent:
    """An agent that accepts about half of what it sees, whatever its head."""
    agent = Agent(AgentSpec(hidden_size=policy.hidden_size, head=head, **spec))
    for weight in agent.network.parameters():
        torch.nn.init.normal_(weight, std=0.15)
    with torch.no_grad():
        states = policy.model.base_model(
            torch.tensor([policy.prompt_ids("What is the time in Lima?")])
        ).last_hidden_state
        agent.network.output_linear.bias -= agent.network(states[0]).mean(0)
    return agent.eval()
