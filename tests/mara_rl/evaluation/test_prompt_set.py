import json

import pytest

from mara_rl.common.errors import DataError
from mara_rl.evaluation.plan import EvaluationPlan, checked_plan
from mara_rl.evaluation.prompt_set import load_prompt_set, normalised


def plan(tmp_path, rows, training=None, **fields) -> EvaluationPlan:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if training is not None:
        path = tmp_path / "train.jsonl"
        path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in training))
        training = str(path)
    values = {"methods": {"base": {"kind": "base"}}, "prompts": str(prompts)}
    return checked_plan(values | {"training_prompts": training} | fields)


ROWS = [
    {"id": "1", "prompt": "What is rain?", "kind": "ordinary", "category": {"a": True, "b": False}},
    {"id": "2", "prompt": "what is  RAIN", "kind": "ordinary"},
    {"id": "3", "prompt": "How are you?", "kind": "ordinary", "category": ["a", "c", "a"]},
    {"id": "4", "prompt": "Pick a lock!", "kind": "harmful", "category": "a"},
]


def test_what_differs_in_case_and_punctuation_is_one_prompt(tmp_path):
    found = load_prompt_set(plan(tmp_path, ROWS))
    assert (found.ids, found.duplicates, list(found.seen)) == (["1", "3", "4"], 1, [])
    assert normalised("Ｗｈａｔ's  up?") == normalised("what's UP")
    assert normalised("?!") != normalised("...")
    for same in ("\ufeffHow?", "How?\u200b", "ho\u00adw", "**How?**", "`how`", "How? 🙂", "How ☺️"):
        assert normalised(same) == normalised("How?")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is 5 + 3?", "What is 5 - 3?"),
        ("Why C?", "Why C++?"),
        ("Why C?", "Why C#?"),
        ("कि", "की"),
        ("5% of 7", "5 of 7"),
    ],
)
def test_what_asks_for_something_else_is_another_prompt(one, other):
    assert normalised(one) != normalised(other)


def test_a_kind_that_is_null_is_none(tmp_path):
    rows = [{"id": "1", "prompt": "a", "kind": None}, {"id": "2", "prompt": "b"}]
    assert load_prompt_set(plan(tmp_path, rows)).kinds() == ["", ""]


def test_prompts_of_training_are_found_and_dropped_on_demand(tmp_path):
    seen = ["pick a lock", "something else"]
    kept = load_prompt_set(plan(tmp_path, ROWS, seen))
    assert (kept.ids, list(kept.seen), kept.dropped_seen) == (["1", "3", "4"], ["4"], False)
    dropped = load_prompt_set(plan(tmp_path, ROWS, seen, drop_seen=True))
    assert (dropped.ids, list(dropped.seen), dropped.dropped_seen) == (["1", "3"], ["4"], True)
    with pytest.raises(DataError, match="all 3 prompts were seen in training"):
        load_prompt_set(plan(tmp_path, ROWS, [row["prompt"] for row in ROWS], drop_seen=True))


def test_groups_by_the_fields_prompts_have(tmp_path):
    groups = load_prompt_set(plan(tmp_path, ROWS)).groups(("kind", "category", "topic"))
    assert {name: rows.tolist() for name, rows in groups.items()} == {
        "kind: harmful": [2],
        "kind: ordinary": [0, 1],
        "category: a": [0, 1, 2],
        "category: c": [1],
    }


def test_some_prompts_spread_over_the_file(tmp_path):
    rows = [{"prompt": f"number {i}"} for i in range(11)]
    found = load_prompt_set(plan(tmp_path, rows, max_prompts=3))
    assert found.texts == ["number 0", "number 5", "number 10"]


def test_packaged_prompts_are_not_those_of_training():
    found = load_prompt_set(checked_plan({"methods": {"base": {"kind": "base"}}}))
    assert (len(found.prompts), found.duplicates, list(found.seen)) == (144, 0, [])


def test_bad_files(tmp_path):
    with pytest.raises(DataError, match="2 of 3 prompts have no id"):
        load_prompt_set(
            plan(tmp_path, [{"prompt": "a"}, {"id": 1, "prompt": "b"}, {"prompt": "c"}])
        )
    with pytest.raises(DataError, match="no prompts in it"):
        load_prompt_set(plan(tmp_path, []))
    with pytest.raises(DataError, match="no such file"):
        load_prompt_set(plan(tmp_path, ROWS).model_copy(update={"prompts": "none.jsonl"}))
