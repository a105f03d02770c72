"""Rules over several candidates at once against looking at one after the other."""

import itertools

import pytest
import torch
from torch import Tensor

from mara_rl.decoding.rules import UNDECIDED, decide, reweighted_logits

ROWS, K = 400, 7


def sets() -> tuple[Tensor, Tensor]:
    """Accept log-odds (ROWS, K), some of them extreme, and the sizes of the sets (ROWS,)."""
    logits = torch.randn(ROWS, K) * torch.tensor([0.5, 2.0, 8.0])[torch.randint(3, (ROWS, 1))]
    return logits, torch.randint(1, K + 1, (ROWS,))


def induced(logits: Tensor, count: int) -> list[float]:
    mass, probabilities = 1.0, []
    for k in range(count):
        accept = 1.0 if k == count - 1 else torch.sigmoid(logits[k].double()).item()
        probabilities.append(mass * accept)
        mass *= 1 - accept
    return probabilities


def serial_argmax(logits: Tensor, count: int) -> int:
    probabilities = induced(logits, count)
    return max(range(count), key=lambda k: (probabilities[k], -k))


def serial_threshold(logits: Tensor, count: int, fallback: str) -> int:
    for k in range(count):
        if logits[k] > 0:
            return k
    return 0 if fallback == "first" else count - 1


def first_decision(rule: str, logits: Tensor, counts: Tensor, **options: object) -> Tensor:
    """What is decided as candidates come in, one more at each look; it must then stay so."""
    decided = torch.full((ROWS,), UNDECIDED)
    needed = counts.clone()
    for looked in range(1, K + 1):
        now, examined, _ = decide(
            rule, logits[:, :looked], counts.clamp_max(looked), counts, **options
        )
        kept = decided != UNDECIDED
        assert torch.equal(now[kept], decided[kept])
        known = now != UNDECIDED
        needed[known & ~kept] = looked
        if rule != "sample":  # a sample may be certain before its candidate is examined
            assert torch.equal(examined[known], needed.clamp_max(counts)[known])
        decided = now
    return decided


def test_argmax_of_the_induced_distribution() -> None:
    logits, counts = sets()
    expected = [serial_argmax(row, int(n)) for row, n in zip(logits, counts, strict=True)]
    assert first_decision("argmax_induced", logits, counts).tolist() == expected


@pytest.mark.parametrize("fallback", ["first", "last"])
def test_first_above_the_threshold(fallback: str) -> None:
    logits, counts = sets()
    expected = [
        serial_threshold(row, int(n), fallback) for row, n in zip(logits, counts, strict=True)
    ]
    decided = first_decision("threshold", logits, counts, fallback=fallback)
    assert decided.tolist() == expected


@pytest.mark.parametrize("temperature", [None, 0.3, 1.0, 2.5])
def test_sampling_inverts_the_tempered_distribution(temperature: float | None) -> None:
    logits, counts = sets()
    uniform = torch.rand(ROWS, dtype=torch.float64)
    expected = []
    for row, n, u in zip(logits, counts, uniform, strict=True):
        weights = [p ** (1 / (temperature or 1.0)) for p in induced(row, int(n))]
        cumulative = list(itertools.accumulate(weights))
        expected.append(next(k for k, c in enumerate(cumulative) if c > u * cumulative[-1]))
    tempered = None if temperature is None else torch.full((ROWS,), temperature).double()
    decided = first_decision("sample", logits, counts, uniform=uniform, temperature=tempered)
    assert decided.tolist() == expected


def test_looking_stops_early_where_the_choice_is_known() -> None:
    logits = torch.tensor([[0.1, 3.0, 3.0]])
    one, three = torch.tensor([1]), torch.tensor([3])
    assert decide("argmax_induced", logits[:, :1], one, three).choice.tolist() == [0]
    assert decide("argmax_induced", -logits[:, :1], one, three).choice.tolist() == [UNDECIDED]
    early = torch.tensor([0.2], dtype=torch.float64)
    assert decide("sample", logits[:, :1], one, three, uniform=early).choice.tolist() == [0]
    with pytest.raises(ValueError, match="needs uniform"):
        decide("sample", logits[:, :1], one, three)


def test_reweighted_logits_induce_the_reweighted_distribution() -> None:
    probs = torch.softmax(torch.randn(ROWS, K), 1)
    counts = torch.randint(1, K + 1, (ROWS,))
    probs = torch.where(torch.arange(K) < counts[:, None], probs, 0.0)
    terms = torch.randn(ROWS, K) * 3
    logits = reweighted_logits(probs, terms)
    weights = probs.double() * terms.double().exp()
    expected = weights / weights.sum(1, keepdim=True)
    for row, n in enumerate(counts.tolist()):
        torch.testing.assert_close(
            torch.tensor(induced(logits[row], n)).double(),
            expected[row, :n],
            rtol=1e-3,
            atol=1e-6,
        )
