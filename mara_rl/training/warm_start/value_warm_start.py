"""Value warm start: fit values to base answers, then lean the agent towards higher ones.

Answers sampled from the base LLM alone, with their terminal rewards, are Monte Carlo returns of
every prefix they passed through. Two outputs of one network regress the reward to go from a state:
q with the state's own token still to be credited, v after it. An agent whose accept log-odds are
logit r_k + (q(h_k) − v(h_prefix)) / β is close to the optimum of reward − β·KL.

The agent needs differences within one answer only. What is fitted is therefore the reward above the
mean of the same prompt's other answers (the leave-one-out baseline): what a prompt is worth cancels
there, and so does the noise of fitting it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mara_rl.agents.agent import AcceptNetwork, Agent, Head
from mara_rl.common.errors import DataError
from mara_rl.training.config import WarmStartConfig
from mara_rl.training.warm_start.network_fit import fit_network
from mara_rl.training.warm_start.token_credit import (
    BaseAnswer,
    above_others,
    earned,
    fit_credit,
    seeded_network,
    standings,
)

_EARLY_TOKENS = 3.0  # after so many the extra weight has fallen by e


@dataclass(frozen=True)
class ValueFit:
    """Fitted networks (one output each) and their R² on answers to prompts they never saw.

    Attributes:
        value: the terminal reward expected of a prefix.
        candidate: q, the reward to go above the prompt's baseline, the last token's credit in it.
        prefix: v, the same after that credit; shares all but the output with ``candidate``.
        r2: of ``value`` over all prefixes.
        r2_within_prompt: of Σ q(h_t) − v(h_{t−1}) over whole answers, around the prompt's mean.
    """

    value: AcceptNetwork
    candidate: AcceptNetwork
    prefix: AcceptNetwork
    r2: float
    r2_within_prompt: float


def fit_value(
    answers: Sequence[BaseAnswer],
    config: WarmStartConfig,
    head: Head,
    *,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> ValueFit:
    """Fit values for an agent with ``head`` by least squares.

    Rewards are spread over tokens first (`fit_credit`), unless ``config.credit_epochs`` is 0 or the
    head is ``relative``, whose one value for both states is a whole answer's: then q = v. Where
    ``config.win_margin`` is set, q and v are of `standings` instead of rewards.

    One network is fitted with an output per term of the reward and kind of value; then the terms
    are summed. Terms that disagree teach the shared layers more than their sum does. The learning
    rate falls rather than epochs being chosen among, because the error on few held-out prompts is
    too noisy to choose by. An answer's first tokens weigh more: whether to answer at all is decided
    there, and each answer has but one of them. A tenth of the prompts is held out to measure R².
    ``progress`` is told of every epoch done, see `total_epochs`.

    Raises DataError for answers to fewer than two prompts, and when the error is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    prompts = sorted({a.prompt for a in answers})
    if len(prompts) < 2:
        raise DataError(f"warm_start: answers to {len(prompts)} prompt; expected at least two")
    order = torch.randperm(len(prompts), generator=generator).tolist()
    held = {prompts[i] for i in order[: max(1, len(prompts) // 10)]}
    train = [a for a in answers if a.prompt not in held]
    rewards = terms = torch.stack([a.terms.float() for a in train])
    if config.win_margin is not None:
        terms = standings(train, rewards, config.win_margin)
        train = [replace(a, terms=row) for a, row in zip(train, terms, strict=True)]
    spread = [torch.zeros(len(a.states), terms.shape[1]) for a in train]
    if _credits(config, head):
        spread = earned(fit_credit(train, config, seed=seed, progress=progress), train)
    states = torch.cat([a.states for a in train])
    targets = torch.cat(
        [
            torch.cat([advantage - _before(done), advantage - done, whole.expand(len(done), -1)], 1)
            for advantage, done, whole in zip(
                above_others(train, terms), spread, rewards, strict=True
            )
        ]
    )
    places = torch.cat([torch.arange(len(a.states)) for a in train])
    weights = 1 + config.early_weight * torch.exp(-places / _EARLY_TOKENS)
    weights = (weights / weights.mean())[:, None]
    network = seeded_network(states.shape[-1], targets.shape[-1], seed)
    network.output_linear.bias.data.copy_(targets.mean(0))

    def losses() -> Iterator[Tensor]:
        for rows in torch.randperm(len(targets), generator=generator).split(config.batch_size):
            yield (weights[rows] * (network(states[rows]) - targets[rows]).square()).mean()

    fit_network(
        network,
        losses,
        name="value regression",
        epochs=config.epochs,
        batches=math.ceil(len(targets) / config.batch_size),
        lr=config.lr,
        weight_decay=config.weight_decay,
        progress=progress,
    )
    count = terms.shape[1]
    candidate, prefix, value = (
        _summed(network, slice(first, first + count)) for first in (0, count, 2 * count)
    )
    explained = _explained(value, candidate, prefix, [a for a in answers if a.prompt in held])
    return ValueFit(value, candidate, prefix, *explained)


def total_epochs(config: WarmStartConfig, head: Head) -> int:
    """How many epochs `fit_value` runs."""
    return config.epochs + (config.credit_epochs if _credits(config, head) else 0)


def _credits(config: WarmStartConfig, head: Head) -> bool:
    return config.credit_epochs > 0 and head != "relative"


def _before(done: Tensor) -> Tensor:
    """What was earned before each state's token (T + 1, C); the first state is the prompt's."""
    return torch.cat([done[:1], done[:-1]])


def _summed(network: AcceptNetwork, outputs: slice) -> AcceptNetwork:
    """The network whose one output is the sum of these outputs."""
    state = network.state_dict()
    for key in ("output_linear.weight", "output_linear.bias"):
        state[key] = state[key][outputs].sum(0, keepdim=True)
    summed = AcceptNetwork(network.linear1.in_features, outputs=1)
    summed.load_state_dict(state)
    return summed


def lean(agent: Agent, fit: ValueFit, answers: Sequence[BaseAnswer], beta: float) -> None:
    """Set the agent's network so that accepting counts for what it changes in value, over β.

    ``advantage`` and ``relative``: exactly. ``anchored``: by an MLP fitted to q(h_k) − v(h_prefix)
    on the tokens of the answers. Raises ValueError for ``paper``, which cannot start at the base
    LLM.
    """
    network, taken_off = fit.candidate, fit.prefix
    if agent.spec.head == "paper":
        raise ValueError("head 'paper': expected one that is anchored to the LLM")
    if agent.spec.head == "anchored":
        network = _fitted_differences(fit, answers)
    state = network.state_dict()
    for key in ("output_linear.weight", "output_linear.bias"):
        other = torch.zeros_like(state[key])
        if agent.spec.head == "advantage":
            other = taken_off.state_dict()[key] / beta
        state[key] = torch.cat([other, state[key] / beta])
    agent.network.load_state_dict(state)


def _fitted_differences(fit: ValueFit, answers: Sequence[BaseAnswer]) -> AcceptNetwork:
    targets = torch.cat([_steps(fit.candidate, fit.prefix, a) for a in answers])
    states = torch.cat([a.states[1:] for a in answers])
    network = AcceptNetwork(states.shape[-1], outputs=1)
    network.load_state_dict(fit.candidate.state_dict())
    generator = torch.Generator().manual_seed(0)

    def losses() -> Iterator[Tensor]:
        for rows in torch.randperm(len(targets), generator=generator).split(512):
            yield (network(states[rows])[:, 0] - targets[rows]).square().mean()

    fit_network(
        network,
        losses,
        name="fit of value differences",
        epochs=4,
        batches=math.ceil(len(targets) / 512),
        lr=3e-4,
        weight_decay=1e-2,
    )
    return network


@torch.no_grad()
def _steps(candidate: AcceptNetwork, prefix: AcceptNetwork, answer: BaseAnswer) -> Tensor:
    """q(h_t) − v(h_{t−1}) of an answer's tokens (T,)."""
    return candidate(answer.states[1:])[:, 0] - prefix(answer.states[:-1])[:, 0]


@torch.no_grad()
def _explained(
    value: AcceptNetwork,
    candidate: AcceptNetwork,
    prefix: AcceptNetwork,
    answers: Sequence[BaseAnswer],
) -> tuple[float, float]:
    """R² of the networks as in `ValueFit`; the second NaN without a prompt answered twice."""
    states = torch.cat([a.states for a in answers])
    targets = torch.cat([a.terms.sum().float().expand(len(a.states)) for a in answers])
    error = targets - value(states)[:, 0]
    r2 = 1 - (error.var() / targets.var().clamp_min(1e-9)).item()
    by_prompt: dict[str, list[tuple[float, float]]] = {}
    for a in answers:
        expected = _steps(candidate, prefix, a).sum().item()
        by_prompt.setdefault(a.prompt, []).append((expected, a.terms.sum().item()))
    pairs = [torch.tensor(rows) for rows in by_prompt.values() if len(rows) > 1]
    if not pairs:
        return r2, float("nan")
    centred = torch.cat([rows - rows.mean(0) for rows in pairs])
    within = torch.corrcoef(centred.T)[0, 1].item()
    return r2, within * abs(within)
