import pytest
import torch

from mara_rl.common.errors import DataError
from mara_rl.score_models.pairs import Pair
from mara_rl.score_models.score_head import PairFeatures, fit_gate, fit_head


def plain_pairs(count, **fields):
    return [Pair(prompt=f"p{i}", chosen="x", rejected="y", **fields) for i in range(count)]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_head_finds_the_direction_and_is_standardised(sign):
    torch.manual_seed(0)
    worse = torch.randn(300, 6) * torch.tensor([1.0, 10.0, 1.0, 1.0, 1.0, 0.1]) + 5
    better = worse + torch.randn(300, 6) * 0.1
    better[:, 2] += 1
    features = PairFeatures(better, worse, torch.randn(300, 6))
    head = fit_head(plain_pairs(300), features, 0.1, gated=False, sign=sign)
    scores = [head(answers, features.prompt) for answers in (better, worse)]
    assert torch.cat(scores).mean() == pytest.approx(0, abs=1e-3)
    assert torch.cat(scores).std() == pytest.approx(1, abs=1e-3)
    assert (sign * (scores[0] - scores[1]) > 0).float().mean() > 0.95


@pytest.fixture
def turning():
    """Pairs whose better answer has more of feature 0 if answerable, else less of it."""
    torch.manual_seed(0)
    answerable = torch.arange(200) % 2 == 0
    pairs = [
        Pair(prompt=f"p{i}", chosen="x", rejected="y", answerable=bool(a))
        for i, a in enumerate(answerable)
    ]
    worse, prompt = torch.randn(200, 4), torch.randn(200, 4)
    better = worse.clone()
    better[:, 0] += torch.where(answerable, 1.0, -1.0)
    prompt[:, 3] += torch.where(answerable, -4.0, 4.0)
    return pairs, PairFeatures(better, worse, prompt)


def test_gated_head_learns_what_a_linear_one_cannot(turning):
    pairs, features = turning

    def accuracy(head):
        margins = head(features.better, features.prompt) - head(features.worse, features.prompt)
        return (margins > 0).float().mean()

    assert accuracy(fit_head(pairs, features, 0.01, gated=True)) > 0.95
    assert accuracy(fit_head(pairs, features, 0.01, gated=False)) < 0.6


def test_gate_is_negative_for_answerable_prompts(turning):
    pairs, features = turning
    gate = fit_gate(pairs, features.prompt)(features.prompt).squeeze(1)
    answerable = torch.tensor([pair.answerable for pair in pairs])
    assert ((gate < 0) == answerable).float().mean() > 0.95


@pytest.mark.parametrize("answerable", [True, False])
def test_gate_needs_both_kinds_of_prompts(answerable):
    features = PairFeatures(*torch.randn(3, 10, 4))
    with pytest.raises(DataError, match="gate"):
        fit_head(plain_pairs(10, answerable=answerable), features, 0.1, gated=True)
