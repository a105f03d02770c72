"""Value warm start: fit Q to base answers, then lean the agent towards higher Q before PPO.

Answers sampled from the base LLM alone, with their terminal rewards, are Monte Carlo returns of
every prefix they passed through. Q regresses them from the prefix's hidden state; an agent whose
accept log-odds are logit r_k + (Q(h_k) − Q(h_prefix)) / β is close to the optimum of reward − β·KL.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mara_rl.agent import AcceptNetwork, Agent
from mara_rl.errors import DataError
from mara_rl.training.config import WarmStartConfig


@dataclass(frozen=True)
class BaseAnswer:
    """States (T + 1, H), float16, along one sampled base answer, and its terminal reward."""

    prompt: str
    states: Tensor
    reward: float


@dataclass(frozen=True)
class ValueFit:
    """A fitted Q and its R² on answers to prompts it never saw."""

    network: AcceptNetwork
    r2: float
    r2_within_prompt: float
    epochs: int


def fit_value(
    answers: Sequence[BaseAnswer],
    config: WarmStartConfig,
    *,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> ValueFit:
    """Fit Q(h) (one output) by least squares; keeps the epoch best on held-out prompts.

    A tenth of the prompts is held out. ``progress`` is told of every epoch done. Raises DataError
    for answers to fewer than two prompts, and when no epoch's error was finite.
    """
    generator = torch.Generator().manual_seed(seed)
    prompts = sorted({a.prompt for a in answers})
    if len(prompts) < 2:
        raise DataError(f"warm_start: answers to {len(prompts)} prompt; expected at least two")
    order = torch.randperm(len(prompts), generator=generator).tolist()
    held = {prompts[i] for i in order[: max(1, len(prompts) // 10)]}
    train = [a for a in answers if a.prompt not in held]
    test = [a for a in answers if a.prompt in held]
    states, targets = _rows(train)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = AcceptNetwork(states.shape[-1], outputs=1)
    nn.init.zeros_(network.output_linear.weight)
    nn.init.constant_(network.output_linear.bias, targets.mean().item())
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=config.lr, weight_decay=config.weight_decay
    )
    best_loss, best_epoch, best = float("inf"), 0, _copy(network)
    for epoch in range(1, config.epochs + 1):
        for rows in torch.randperm(len(targets), generator=generator).split(config.batch_size):
            loss = (network(states[rows])[:, 0] - targets[rows]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        test_loss = _squared_error(network, test)
        if test_loss < best_loss:
            best_loss, best_epoch, best = test_loss, epoch, _copy(network)
        if progress is not None:
            progress(1)
        if epoch - best_epoch >= 3:
            break
    if best_epoch == 0:
        raise DataError("warm_start: the value regression never had a finite error")
    network.load_state_dict(best)
    return ValueFit(network, *_explained(network, test), best_epoch)


def lean(agent: Agent, value: AcceptNetwork, answers: Sequence[BaseAnswer], beta: float) -> None:
    """Set the agent's network so that its term is the difference of Q that accepting makes, over β.

    ``relative``: g = Q / β exactly. ``anchored``: an MLP fitted to Q(h_k) − Q(h_prefix) on the
    tokens of the answers. Raises ValueError for other heads, which cannot start at the base LLM.
    """
    if agent.spec.head == "relative":
        network = value
    elif agent.spec.head == "anchored":
        network = _fitted_differences(value, answers)
    else:
        raise ValueError(f"head {agent.spec.head!r}: expected 'relative' or 'anchored'")
    state = network.state_dict()
    for key in ("output_linear.weight", "output_linear.bias"):
        state[key] = torch.cat([torch.zeros_like(state[key]), state[key] / beta])
    agent.network.load_state_dict(state)


def _fitted_differences(value: AcceptNetwork, answers: Sequence[BaseAnswer]) -> AcceptNetwork:
    with torch.no_grad():
        differences = [value(a.states)[:, 0].diff() for a in answers]
    states = torch.cat([a.states[1:] for a in answers])
    targets = torch.cat(differences)
    network = AcceptNetwork(states.shape[-1], outputs=1)
    network.load_state_dict(value.state_dict())
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        for rows in torch.randperm(len(targets), generator=generator).split(512):
            loss = (network(states[rows])[:, 0] - targets[rows]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network


def _rows(answers: Sequence[BaseAnswer]) -> tuple[Tensor, Tensor]:
    states = torch.cat([a.states for a in answers])
    targets = torch.cat([torch.full((len(a.states),), a.reward) for a in answers])
    return states, targets


@torch.no_grad()
def _squared_error(network: AcceptNetwork, answers: Sequence[BaseAnswer]) -> float:
    states, targets = _rows(answers)
    return (network(states)[:, 0] - targets).square().mean().item()


@torch.no_grad()
def _explained(network: AcceptNetwork, answers: Sequence[BaseAnswer]) -> tuple[float, float]:
    """R² over all prefixes, and over the last prefixes of each prompt around the prompt's mean."""
    states, targets = _rows(answers)
    error = targets - network(states)[:, 0]
    r2 = 1 - (error.var() / targets.var().clamp_min(1e-9)).item()
    by_prompt: dict[str, list[tuple[float, float]]] = {}
    for a in answers:
        last = network(a.states[-1:])[0, 0].item()
        by_prompt.setdefault(a.prompt, []).append((last, a.reward))
    pairs = [torch.tensor(rows) for rows in by_prompt.values() if len(rows) > 1]
    if not pairs:
        return r2, float("nan")
    centred = torch.cat([rows - rows.mean(0) for rows in pairs])
    within = torch.corrcoef(centred.T)[0, 1].item()
    return r2, within * abs(within)


def _copy(network: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in network.state_dict().items()}
