from typing import Any

import pytest

from mara_rl.common.errors import ConfigError
from mara_rl.evaluation.method_names import methods_of
from mara_rl.evaluation.plan import (
    ALIGNER_TEMPLATE,
    RewriteMethod,
    checked_plan,
    read_plan,
)
from mara_rl.evaluation.published import published_set
from mara_rl.training.config import load_config

AGENT = {"kind": "agent", "agent": "a"}
SAMPLED = {"kind": "base", "rule": "sample", "replicates": 4}


def test_short_names_become_methods():
    names = ["base", "agent", "strength-0.5", "exact", "agent-sampled", "best-of-4", "best-of-2"]
    methods = methods_of(names, {"agent": "x"})
    assert list(methods) == [*names, "sampled"]
    assert methods["strength-0.5"] == {"kind": "agent", "agent": "x", "strength": 0.5}
    assert methods["sampled"]["replicates"] == 4
    assert methods["best-of-2"]["of"] == "sampled"
    checked_plan({"methods": methods})


def test_several_agents_have_methods_of_their_own():
    methods = methods_of(["agent", "exact", "strength-2"], {"one": "x", "two": "y"})
    assert list(methods) == [
        "one", "two", "one-exact", "two-exact", "one-strength-2", "two-strength-2",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["base", "base"], "two are named 'base'"),
        (["best"], "unknown 'best'; expected base, sampled"),
        (["best-of-1"], "'best-of-1'; expected best-of-N with N of 2"),
        (["strength-much"], "'strength-much'; expected e.g. strength-0.5"),
        (["agent"], "'agent' needs an agent"),
    ],
)
def test_bad_short_names(names, message):
    with pytest.raises(ConfigError, match=message):
        methods_of(names, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": {}}, "methods: .*at least 1"),
        ({"baseline": "none"}, "baseline: 'none' is none of base"),
        ({"methods": {"a b": {"kind": "base"}}}, "methods"),
        (
            {"methods": {"base": {"kind": "base", "replicates": 2}}},
            "replicates: 2 without rule: sample",
        ),
        ({"methods": {"b": {"kind": "best_of", "n": 2, "of": "x"}}}, r"methods.b.of: 'x'"),
        (
            {"methods": {"s": SAMPLED, "b": {"kind": "best_of", "n": 8, "of": "s"}}},
            r"methods.b.n: 8, but 's' has 4 answers",
        ),
        ({"judges": {}}, "judges"),
        ({"weights": {"reward": 1}}, "weights: .*expected reward and cost"),
        ({"scales": {"reward": 1, "cost": 0}}, "scales: .*above 0"),
        (
            {
                "methods": {"sampled": SAMPLED, "b": {"kind": "best_of", "n": 2}},
                "judges": {"j": {"reward": "r", "cost": "c"}},
            },
            "best_of chooses by the judges with training: true",
        ),
        ({"color": "red"}, "unknown key 'color'"),
    ],
)
def test_a_plan_that_cannot_work_is_named(change, message):
    values: dict[str, Any] = {"methods": {"base": {"kind": "base"}}}
    with pytest.raises(ConfigError, match=message):
        checked_plan(values | change)


def test_the_tested_method_is_the_first_agent_else_the_first_other():
    base, agent = {"kind": "base"}, AGENT
    tuned = {"kind": "base", "llm": "other"}
    plan = checked_plan({"methods": {"base": base, "tuned": tuned, "agent": agent}})
    assert (plan.baseline_name, plan.tested) == ("base", "agent")
    assert checked_plan({"methods": {"base": base, "tuned": tuned}}).tested == "tuned"
    assert checked_plan({"methods": {"base": base}}).tested is None
    assert checked_plan({"methods": {"base": base, "x": agent}, "baseline": "x"}).tested == "base"


def test_a_key_that_stands_twice_is_refused(tmp_path):
    plan = tmp_path / "plan.yaml"
    plan.write_text("methods:\n  base: {kind: base}\n  base: {kind: base, rule: sample}\n")
    with pytest.raises(ConfigError, match=r"key 'base' stands twice \(line 3\)"):
        read_plan(str(plan), [])


def test_overrides_and_presets():
    values = read_plan(
        "paper-protocol",
        ["llm=mistralai/Mistral-7B-Instruct-v0.3", "prompts=x/safe_rlhf_test.json"],
    )
    plan = checked_plan(values)
    assert (plan.max_new_tokens, plan.judges["beaver"].training) == (2048, True)
    assert published_set(plan) == "SafeRLHF"
    assert published_set(plan.model_copy(update={"prompts": "mine.json"})) is None
    with pytest.raises(ConfigError, match="published: 'Safe'; expected one of SafeRLHF"):
        published_set(plan.model_copy(update={"published": "Safe"}))
    with pytest.raises(ConfigError, match="neither a preset"):
        read_plan("paper", [])


def test_single_keys_of_what_has_a_default():
    overrides = ["judges.training.safe_below=1", "weights.cost=-2", "methods.base.kind=base"]
    plan = checked_plan(read_plan(None, overrides))
    default = checked_plan(read_plan(None, ["methods.base.kind=base"]))
    assert default == checked_plan({"methods": {"base": {"kind": "base"}}})
    training = default.judges["training"].model_copy(update={"safe_below": 1.0})
    assert plan.judges == default.judges | {"training": training}
    assert plan.weights == {"reward": 1.0, "cost": -2.0}


def test_the_quickstart_preset_measures_what_the_quickstart_does():
    plan, config = checked_plan(read_plan("quickstart", [])), load_config("quickstart")
    assert (plan.llm, plan.dtype) == (config.llm.name, config.llm.dtype)
    assert plan.max_new_tokens == config.rollouts.max_new_tokens
    for axis, score in config.scores.items():
        judge = plan.judges["training"]
        assert (judge.model(axis), judge.dtype) == (score.model, score.dtype)
        assert plan.weights[axis] == score.weight
        assert config.evaluation.judges[axis] == plan.judges["independent"].model(axis)


def test_a_rewriting_prompt_takes_braces_in_answers_as_they_are():
    method = RewriteMethod(of="base", llm="x")
    text = method.text("a {answer} b?", "{question} c")
    assert text == ALIGNER_TEMPLATE.replace("{question} | {answer}", "a {answer} b? | {question} c")
    with pytest.raises(ValueError, match=r"lacks \{answer\}"):
        RewriteMethod(of="base", llm="x", template="{question}")
