"""Credit: which share of an answer's reward each of its tokens has earned.

A state late in an answer says little of what the answer's beginning was worth. Rewards are
therefore spread over tokens first (return decomposition, after RUDDER, arXiv 1806.07857): a network
c is fitted so that the mean of c over an answer's tokens gives its reward, up to what the prompt is
worth. What is still to be earned after a token then depends on later tokens alone.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mara_rl.agents.agent import AcceptNetwork
from mara_rl.common.network_fit import fit_network
from mara_rl.decoding.answer import CandidateStates
from mara_rl.training.config import WarmStartConfig

_PROMPTS_PER_STEP = 16


@dataclass(frozen=True)
class SampledAnswer:
    """States (T + 1, H), float16, along one sampled answer, and the terms of its reward.

    ``terms`` (C,): one per score, already weighted; their sum is the terminal reward.
    ``candidates``: what was passed by, where that was looked at.
    """

    prompt: str
    states: Tensor
    terms: Tensor
    candidates: CandidateStates | None = None


def above_others(answers: Sequence[SampledAnswer], values: Tensor) -> Tensor:
    """Values (N, C) of answers above their mean over the prompt's other answers.

    Without others, above the mean over all answers.
    """
    rows = _prompt_numbers(answers)
    totals = torch.zeros(int(rows.max()) + 1, values.shape[1]).index_add(0, rows, values)[rows]
    others = rows.bincount()[rows, None] - 1
    mean = torch.where(others > 0, (totals - values) / others.clamp_min(1), values.mean(0))
    return values - mean


def soft_win_rates(answers: Sequence[SampledAnswer], terms: Tensor, margin: float) -> Tensor:
    """How terms (N, C) compare with those of the prompt's other answers (N, C).

    Mean of tanh(difference / margin) over the others, differences in standard deviations of the
    term: clearly better counts 1, however much better. Scaled to spread within prompts as the terms
    do, so that the same β allows the same KL.
    """
    rows = _prompt_numbers(answers)
    scaled = terms / terms.std(0).clamp_min(1e-9)
    compared = torch.zeros_like(terms)
    deviations = torch.zeros_like(terms)
    for number in range(int(rows.max()) + 1):
        own = (rows == number).nonzero()[:, 0]
        wins = torch.tanh((scaled[own, None] - scaled[None, own]) / margin).sum(1)
        compared[own] = wins / max(1, len(own) - 1)
        deviations[own] = terms[own] - terms[own].mean(0)
    return compared * (deviations.std(0) / compared.std(0).clamp_min(1e-9))


def fit_credit(
    answers: Sequence[SampledAnswer],
    config: WarmStartConfig,
    *,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> AcceptNetwork:
    """The network c, with an output per term: its mean over an answer's tokens is the reward.

    Fitted within prompts: what all answers to one have in common is left out on both sides.
    Raises DataError when the error is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    terms = torch.stack([a.terms.float() for a in answers])
    network = seeded_network(answers[0].states.shape[-1], terms.shape[1], seed)
    prompts = _prompt_numbers(answers)
    members = [(prompts == number).nonzero()[:, 0] for number in range(int(prompts.max()) + 1)]

    def losses() -> Iterator[Tensor]:
        for chosen in torch.randperm(len(members), generator=generator).split(_PROMPTS_PER_STEP):
            rows = torch.cat([members[number] for number in chosen.tolist()])
            states = [answers[row].states[1:] for row in rows.tolist()]
            counts = torch.tensor([len(part) for part in states])
            owner = torch.arange(len(rows)).repeat_interleave(counts)
            credit = network(torch.cat(states))
            sums = credit.new_zeros(len(rows), credit.shape[1]).index_add(0, owner, credit)
            error = terms[rows] - sums / counts[:, None]
            same = prompts[rows][:, None] == prompts[rows]
            yield (error - (same / same.sum(1, keepdim=True)) @ error).square().mean()

    fit_network(
        network.parameters(),
        losses,
        name="warm_start: the credit regression",
        epochs=config.credit_epochs,
        cycle_batches=math.ceil(len(members) / _PROMPTS_PER_STEP),
        lr=config.credit_lr,
        weight_decay=config.weight_decay,
        progress=progress,
    )
    return network


@torch.no_grad()
def earned(credit: AcceptNetwork, answers: Sequence[SampledAnswer]) -> list[Tensor]:
    """What each answer has earned by each of its states, above the prompt's others (T + 1, C).

    The others' mean is taken off evenly over the tokens.
    """
    sums = []
    for answer in answers:
        shares = credit(answer.states) / (len(answer.states) - 1)
        shares[0] = 0.0  # the prompt's state has earned nothing
        sums.append(shares.cumsum(0))
    totals = torch.stack([part[-1] for part in sums])
    common = totals - above_others(answers, totals)
    return [
        part - torch.linspace(0, 1, len(part))[:, None] * mean
        for part, mean in zip(sums, common, strict=True)
    ]


def seeded_network(hidden_size: int, outputs: int, seed: int) -> AcceptNetwork:
    """A network that says 0 of every state, its inner layers drawn with ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AcceptNetwork(hidden_size, outputs=outputs, zero_output=True)


def _prompt_numbers(answers: Sequence[SampledAnswer]) -> Tensor:
    number = {prompt: i for i, prompt in enumerate(dict.fromkeys(a.prompt for a in answers))}
    return torch.tensor([number[a.prompt] for a in answers])
