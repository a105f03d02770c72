"""Small agents with weights drawn from a fixed seed."""

import torch

from mara_rl.agent import Agent, AgentSpec

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
