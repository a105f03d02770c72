import pytest
import torch

from mara_rl.score_models.bradley_terry import (
    Accuracy,
    accuracy_by_kind,
    fit_direction,
    folds_of,
    out_of_fold_margins,
    part_of,
)
from mara_rl.score_models.pairs import Pair


def pairs_of(prompts, kind=""):
    return [Pair(prompt=p, chosen="x", rejected="y", kind=kind) for p in prompts]


def test_fit_is_at_the_minimum_of_its_loss():
    torch.manual_seed(0)
    differences = torch.randn(200, 5).double() + 0.3
    weights = fit_direction(differences, 0.1).requires_grad_()
    loss = (1 + (-differences @ weights).exp()).log().mean() + 0.05 * weights.square().sum()
    (gradient,) = torch.autograd.grad(loss, weights)
    assert gradient.abs().max() < 1e-5


def test_weights_count_pairs_as_if_repeated():
    torch.manual_seed(0)
    differences = torch.randn(60, 3).double() + 0.2
    counts = torch.randint(1, 4, (60,))
    weighted = fit_direction(differences, 0.1, counts)
    repeated = fit_direction(differences.repeat_interleave(counts, dim=0), 0.1)
    assert torch.allclose(weighted, repeated, atol=1e-5)


def test_wilson_interval_and_ties():
    low, high = Accuracy(50, 100).interval
    assert (low, high) == pytest.approx((0.4038, 0.5962), abs=1e-3)
    assert Accuracy(10, 10).interval[1] == pytest.approx(1.0)
    assert Accuracy(10, 10).interval[0] < 0.75
    pairs = [*pairs_of("ab", "one"), *pairs_of("c", "two")]
    table = accuracy_by_kind(pairs, torch.tensor([1.0, 0.0, -2.0]))
    assert table == {"all": (1.5, 3), "one": (1.5, 2), "two": (0.0, 1)}


def test_folds_keep_a_prompt_together_and_follow_the_seed():
    pairs = pairs_of([f"p{i % 50}" for i in range(200)])
    folds = folds_of(pairs, 5, seed=0)
    assert folds.unique().tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(folds[:50], folds[50:100])
    assert torch.equal(folds, folds_of(pairs, 5, seed=0))
    assert not torch.equal(folds, folds_of(pairs, 5, seed=1))


def test_parts_share_no_prompt_and_lose_none():
    pairs = pairs_of([f"p{i % 90}" for i in range(200)])
    a, b = part_of(pairs, 0, 70), part_of(pairs, 70, 100)
    assert not {p.prompt for p in a} & {p.prompt for p in b}
    assert len(a) + len(b) == 200
    assert len(a) > len(b) > 20


def test_out_of_fold_margins_never_judge_what_was_fitted():
    folds = torch.tensor([0, 1, 2, 0, 1])
    values = torch.arange(5.0)

    def fit(fitted, judged):
        assert not (fitted & judged).any()
        assert (fitted | judged).all()
        return values[judged]

    assert torch.equal(out_of_fold_margins(folds, fit), values)
