"""Value warm start: fit Q to base answers, then lean the agent towards higher Q before PPO.

Answers sampled from the base LLM alone, with their terminal rewards, are Monte Carlo returns of
every prefix they passed through. Q regresses them from the prefix's hidden state; an agent whose
accept log-odds are logit r_k + (Q(h_k) − Q(h_prefix)) / β is close to the optimum of reward − β·KL.

The agent needs differences of Q within one answer only. Its Q is therefore fitted to the reward
above the mean of the same prompt's other answers (the leave-one-out baseline): what a prompt is
worth cancels there, and so does the noise of fitting it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mara_rl.agent import AcceptNetwork, Agent
from mara_rl.errors import DataError
from mara_rl.training.config import WarmStartConfig


@dataclass(frozen=True)
class BaseAnswer:
    """States (T + 1, H), float16, along one sampled base answer, and the terms of its reward.

    ``terms`` (C,): one per score, already weighted; their sum is the terminal reward.
    """

    prompt: str
    states: Tensor
    terms: Tensor


@dataclass(frozen=True)
class ValueFit:
    """Fitted networks (one output each) and their R² on answers to prompts they never saw.

    ``value`` is Q; ``advantage`` is Q above the prompt's baseline. ``r2`` is of ``value`` over all
    prefixes, ``r2_within_prompt`` of ``advantage`` at answers' ends, around the prompt's mean.
    """

    value: AcceptNetwork
    advantage: AcceptNetwork
    r2: float
    r2_within_prompt: float


def fit_value(
    answers: Sequence[BaseAnswer],
    config: WarmStartConfig,
    *,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> ValueFit:
    """Fit Q(h), with and without the prompt's baseline, by least squares.

    One network is fitted with an output per term of the reward, once with and once without the
    baseline; then the terms are summed. Terms that disagree teach the shared layers more than their
    sum does. The last epochs run at a falling learning rate rather than being chosen among, because
    the error on few held-out prompts is too noisy to choose by. A tenth of the prompts is held out
    to measure R². ``progress`` is told of every epoch done.

    Raises DataError for answers to fewer than two prompts, and when the error is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    prompts = sorted({a.prompt for a in answers})
    if len(prompts) < 2:
        raise DataError(f"warm_start: answers to {len(prompts)} prompt; expected at least two")
    order = torch.randperm(len(prompts), generator=generator).tolist()
    held = {prompts[i] for i in order[: max(1, len(prompts) // 10)]}
    train = [a for a in answers if a.prompt not in held]
    states = torch.cat([a.states for a in train])
    returns = torch.cat([_advantages(train), torch.stack([a.terms.float() for a in train])], dim=1)
    targets = torch.cat([r.expand(len(a.states), -1) for a, r in zip(train, returns, strict=True)])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = AcceptNetwork(states.shape[-1], outputs=targets.shape[-1], zero_output=True)
    network.output_linear.bias.data.copy_(targets.mean(0))
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=config.lr, weight_decay=config.weight_decay
    )
    steps = config.epochs * math.ceil(len(targets) / config.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.lr, total_steps=steps + 1, pct_start=0.1
    )
    for _ in range(config.epochs):
        for rows in torch.randperm(len(targets), generator=generator).split(config.batch_size):
            loss = (network(states[rows]) - targets[rows]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if not torch.isfinite(loss):
            raise DataError("warm_start: the value regression's error is not finite")
        if progress is not None:
            progress(1)
    terms = targets.shape[-1] // 2
    advantage, value = (_summed(network, slice(first, first + terms)) for first in (0, terms))
    explained = _explained(value, advantage, [a for a in answers if a.prompt in held])
    return ValueFit(value, advantage, *explained)


def _advantages(answers: Sequence[BaseAnswer]) -> Tensor:
    """Terms (N, C) above their mean over the prompt's other answers; if none, over all answers."""
    terms = torch.stack([a.terms.float() for a in answers])
    number = {prompt: i for i, prompt in enumerate(dict.fromkeys(a.prompt for a in answers))}
    rows = torch.tensor([number[a.prompt] for a in answers])
    totals = torch.zeros(len(number), terms.shape[1]).index_add(0, rows, terms)[rows]
    others = rows.bincount()[rows, None] - 1
    baseline = torch.where(others > 0, (totals - terms) / others.clamp_min(1), terms.mean(0))
    return terms - baseline


def _summed(network: AcceptNetwork, outputs: slice) -> AcceptNetwork:
    """The network whose one output is the sum of these outputs."""
    state = network.state_dict()
    for key in ("output_linear.weight", "output_linear.bias"):
        state[key] = state[key][outputs].sum(0, keepdim=True)
    summed = AcceptNetwork(network.linear1.in_features, outputs=1)
    summed.load_state_dict(state)
    return summed


def lean(agent: Agent, q: AcceptNetwork, answers: Sequence[BaseAnswer], beta: float) -> None:
    """Set the agent's network so that its term is the difference of Q that accepting makes, over β.

    ``relative``: g = Q / β exactly. ``anchored``: an MLP fitted to Q(h_k) − Q(h_prefix) on the
    tokens of the answers. Raises ValueError for other heads, which cannot start at the base LLM.
    """
    if agent.spec.head == "relative":
        network = q
    elif agent.spec.head == "anchored":
        network = _fitted_differences(q, answers)
    else:
        raise ValueError(f"head {agent.spec.head!r}: expected 'relative' or 'anchored'")
    state = network.state_dict()
    for key in ("output_linear.weight", "output_linear.bias"):
        state[key] = torch.cat([torch.zeros_like(state[key]), state[key] / beta])
    agent.network.load_state_dict(state)


def _fitted_differences(q: AcceptNetwork, answers: Sequence[BaseAnswer]) -> AcceptNetwork:
    with torch.no_grad():
        differences = [q(a.states)[:, 0].diff() for a in answers]
    states = torch.cat([a.states[1:] for a in answers])
    targets = torch.cat(differences)
    network = AcceptNetwork(states.shape[-1], outputs=1)
    network.load_state_dict(q.state_dict())
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        for rows in torch.randperm(len(targets), generator=generator).split(512):
            loss = (network(states[rows])[:, 0] - targets[rows]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network


@torch.no_grad()
def _explained(
    value: AcceptNetwork, advantage: AcceptNetwork, answers: Sequence[BaseAnswer]
) -> tuple[float, float]:
    """R² of both networks as in `ValueFit`; the second NaN without a prompt answered twice."""
    states = torch.cat([a.states for a in answers])
    targets = torch.cat([a.terms.sum().float().expand(len(a.states)) for a in answers])
    error = targets - value(states)[:, 0]
    r2 = 1 - (error.var() / targets.var().clamp_min(1e-9)).item()
    by_prompt: dict[str, list[tuple[float, float]]] = {}
    for a in answers:
        last = advantage(a.states[-1:])[0, 0].item()
        by_prompt.setdefault(a.prompt, []).append((last, a.terms.sum().item()))
    pairs = [torch.tensor(rows) for rows in by_prompt.values() if len(rows) > 1]
    if not pairs:
        return r2, float("nan")
    centred = torch.cat([rows - rows.mean(0) for rows in pairs])
    within = torch.corrcoef(centred.T)[0, 1].item()
    return r2, within * abs(within)
