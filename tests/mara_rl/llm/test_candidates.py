"""Candidate sets against a plain reading of the paper's truncation."""

import torch

from mara_rl.llm.candidates import FORCED_LOGIT, CandidateRule, candidate_sets


def plain_candidates(logits: torch.Tensor, top_k: int, top_p: float) -> list[tuple[int, float]]:
    """top-k, then top-p on the renormalised mass, as one would write it for a single row."""
    probs = torch.softmax(logits.double(), -1)
    order = sorted(range(len(probs)), key=lambda i: -probs[i])[:top_k]
    mass = sum(probs[i] for i in order)
    kept, before = [], 0.0
    for i in order:
        if kept and before >= top_p:
            break
        kept.append(i)
        before += float(probs[i] / mass)
    total = sum(probs[i] for i in kept)
    return [(i, float(probs[i] / total)) for i in kept]


def test_sets_equal_the_plain_truncation() -> None:
    logits = torch.randn(64, 50) * torch.linspace(0.02, 8, 64)[:, None]
    sets = candidate_sets(logits, CandidateRule(top_k=12, top_p=0.9))
    sizes = set()
    for row in range(len(logits)):
        expected = plain_candidates(logits[row], 12, 0.9)
        n = int(sets.counts[row])
        sizes.add(n)
        assert sets.ids[row, :n].tolist() == [i for i, _ in expected]
        torch.testing.assert_close(
            sets.probs[row, :n], torch.tensor([p for _, p in expected]), rtol=1e-5, atol=1e-6
        )
        assert (sets.probs[row, n:] == 0).all()
    assert {1, 11} <= sizes, "the cases must reach from a single candidate to nearly all of top-k"


def test_base_probabilities_reproduce_the_distribution() -> None:
    sets = candidate_sets(torch.randn(8, 30) * 2, CandidateRule(top_k=10, top_p=0.95))
    for row in range(8):
        n = int(sets.counts[row])
        accept = torch.sigmoid(sets.base_logits[row, :n].double())
        accept[n - 1] = 1.0
        induced = accept * torch.cat([torch.ones(1), (1 - accept).cumprod(0)[:-1]])
        torch.testing.assert_close(induced.float(), sets.probs[row, :n], rtol=1e-4, atol=1e-6)
        assert (sets.base_logits[row, n - 1 :] == FORCED_LOGIT).all()


def test_the_token_that_crosses_top_p_is_kept() -> None:
    probs = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    assert candidate_sets(probs.log(), CandidateRule(top_k=4, top_p=0.79)).counts.tolist() == [2]
    assert candidate_sets(probs.log(), CandidateRule(top_k=4, top_p=0.81)).counts.tolist() == [3]
    assert candidate_sets(probs.log(), CandidateRule(top_k=4, top_p=1e-9)).counts.tolist() == [1]


def test_top_k_above_the_vocabulary_takes_it_whole() -> None:
    sets = candidate_sets(torch.zeros(1, 5), CandidateRule(top_k=40, top_p=1.0))
    assert sets.ids.shape == (1, 5)
    assert sets.counts.tolist() == [5]
