"""The config schema: presets load, bad settings are named."""

from pathlib import Path

import pytest

from mara_rl.common.errors import ConfigError
from mara_rl.training.config import load_config, preset_names


@pytest.mark.parametrize("name", preset_names())
def test_presets_load(name: str) -> None:
    assert load_config(name).name == name


def test_the_8_gpu_presets_differ_in_llm_name_and_reward_weight_alone() -> None:
    base = load_config("llama-3.1-8b-beaver").model_dump()
    assert (base["scores"]["reward"]["weight"], base["rollouts"]["num_runners"]) == (1.0, 7)
    llms = {
        "gemma-2-9b-beaver": "google/gemma-2-9b-it",
        "llama-3.2-1b-beaver": "meta-llama/Llama-3.2-1B-Instruct",
        "llama-3.2-3b-beaver": "meta-llama/Llama-3.2-3B-Instruct",
        "mistral-7b-v0.3-beaver": "mistralai/Mistral-7B-Instruct-v0.3",
    }
    for name, llm in llms.items():
        base |= {"name": name}
        base["llm"]["name"], base["scores"]["reward"]["weight"] = llm, 2.0
        assert load_config(name).model_dump() == base


def test_a_config_of_an_earlier_version_loads(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("extends: quickstart\nscoring: {mode: deferred, deadline_s: 9}\n")
    assert load_config(str(path)) == load_config("quickstart", ["scoring.deadline_s=9"])
    path.write_text("extends: quickstart\nscoring: {mode: step}\n")
    with pytest.raises(ConfigError, match=r"unknown key 'scoring\.mode'"):
        load_config(str(path))


def test_overrides_reach_nested_settings() -> None:
    config = load_config("quickstart", ["ppo.kl_coeff=0.25", "scores.cost.weight=-2", "seed=7"])
    assert (config.ppo.kl_coeff, config.scores["cost"].weight, config.seed) == (0.25, -2, 7)
    assert load_config("quickstart", ["warm_start=null"]).warm_start is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ppo.speed=3", "unknown key 'ppo.speed'"),
        ("ppo.kl_coeff=lots", "ppo.kl_coeff: input should be a valid number"),
        ("seed=-1", "seed: input should be greater than or equal to 0, not -1"),
        ("seed", "expected key=value"),
        ("seed.x=1", "'seed' is a value, not a section"),
        ("ppo.kl_coeff=[1", "value is not YAML"),
        ("ppo.minibatch_size=100000", "ppo.minibatch_size: 100000 is more than"),
        ("agent.head=paper", "warm_start: needs an agent.head"),
        ("warm_start.openings=[' ']", "warm_start.openings.0: string should match pattern"),
        ("warm_start.rounds=1", "warm_start.distil_epochs: 2 with one round"),
        ("warm_start.rounds=400", "warm_start.answers: 1728 for 400 rounds; expected at least 8"),
        ("warm_start.opened_share=2", "warm_start.opened_share: input should be less than"),
        ("name=../up", "name: string should match pattern"),
        ("scores={}", "every weight is 0"),
    ],
)
def test_bad_overrides_are_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")) as caught:
        load_config("quickstart", [override])
    assert "\n" not in str(caught.value)


def test_unknown_preset_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither a preset .*quickstart.* nor a file"):
        load_config("quikstart")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1", encoding="utf-8")
    with pytest.raises(ConfigError, match="not YAML"):
        load_config(str(broken))
    broken.write_text("a: é", encoding="latin-1")
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        load_config(str(broken))
    broken.write_text("- 1", encoding="utf-8-sig")
    with pytest.raises(ConfigError, match="expected a mapping"):
        load_config(str(broken))
