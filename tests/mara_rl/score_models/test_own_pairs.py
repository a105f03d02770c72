import random
from collections import Counter

import pytest

from mara_rl.llm.policy_llm import load_policy_llm
from mara_rl.score_models.own_pairs import (
    ANSWERS_PER_PROMPT,
    OwnAnswers,
    damaged,
    helpful_pairs,
    safe_pairs,
    sample_answers,
    sample_own_answers,
    written_refusal,
)

PROMPTS = [(f"What is number {i}?", i % 2 == 0) for i in range(5)]


@pytest.fixture(scope="module")
def llm(tiny_llm):
    return load_policy_llm(str(tiny_llm), device="cpu")


def test_answers_follow_the_seed_and_begin_with_the_opening(llm):
    prompts = [text for text, _ in PROMPTS]

    def answers(seed, **options):
        return sample_answers(
            llm, prompts, temperature=1.0, max_new_tokens=12, seed=seed, batch_size=2, **options
        )

    assert answers(0) == answers(0)
    assert answers(0) != answers(1)
    begun = answers(0, openings=["No."] * 5)
    assert all(answer.startswith("No.") for answer in begun)
    assert all(len(answer) <= 12 for answer in begun)


def test_every_prompt_gets_its_answers(llm):
    made = []
    rows = sample_own_answers(llm, PROMPTS, max_new_tokens=60, seed=0, on_batch=made.append)
    assert [(row.prompt, row.harmless) for row in rows] == PROMPTS
    assert sum(made) == ANSWERS_PER_PROMPT * len(PROMPTS)
    assert all(len({*row[2:]}) == 5 for row in rows)


def answers(name, harmless=True, plain="This is the plain answer to it."):
    cool = f"cool {name} words here"
    return OwnAnswers(name, harmless, cool, plain, "hot one here", "No. I", "No. We")


def test_a_refusal_is_the_worse_answer_to_harmless_prompts_alone():
    rows = [answers("one", plain="a b c d"), answers("two", harmless=False, plain="e f g h")]
    pairs = helpful_pairs(rows, seed=0)
    assert pairs == helpful_pairs(rows, seed=0)
    kinds = Counter((pair.prompt, pair.kind) for pair in pairs)
    assert kinds["one", "refusal"] == 3
    assert kinds["one", "declined"] == 0
    assert kinds["two", "refusal"] == 0
    declined = [(p.chosen, p.rejected) for p in pairs if p.kind == "declined"]
    assert ("No. I", "hot one here") in declined
    assert ("No. We", "cool one words here") in declined
    assert all(p.answerable == (p.prompt == "one") for p in pairs)
    topic = [(p.chosen, p.rejected) for p in pairs if p.kind == "topic" and p.prompt == "one"]
    assert topic == [("a b c d", "e f g h"), ("cool one words here", "cool two words here")]


def test_safe_pairs_turn_with_the_prompt_and_skip_answers_that_refuse():
    rows = [
        answers("fine"),
        answers("bad", harmless=False),
        answers("refused", harmless=False, plain="I'm sorry, I can't help with that."),
    ]
    pairs = safe_pairs(rows, seed=0)
    plain = "This is the plain answer to it."
    assert {p.prompt for p in pairs} == {"fine", "bad"}
    assert all(p.chosen == plain for p in pairs if p.kind == "answer")
    assert all(p.rejected == plain for p in pairs if p.kind == "refusal")


def test_damage_takes_many_forms():
    answer = "the quick brown fox jumps over a lazy dog today"
    rng = random.Random(0)
    results = [damaged(answer, "a prompt", rng) for _ in range(200)]
    assert results.count(answer) < 4
    assert "" in results
    assert "a prompt" in results
    assert len(set(results)) > 50
    assert damaged("too short", "a prompt", rng) == ""


def test_answers_that_are_alike_make_no_pair():
    rows = [OwnAnswers(name, False, "", "", "", "", "") for name in "ab"]
    assert all(pair.chosen != pair.rejected for pair in helpful_pairs(rows, seed=0))


def test_refusals_are_many():
    rng = random.Random(0)
    assert len({written_refusal(rng) for _ in range(500)}) > 200
