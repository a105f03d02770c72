"""What a run asks the cluster for, and under which names its parts run there."""

import pytest

from mara_rl.common.errors import ConfigError
from mara_rl.training.config import load_config
from mara_rl.training.run.run_names import queue_name, score_sources
from mara_rl.training.run.session import resource_plan


def test_the_plan_holds_every_actor_with_its_custom_resources() -> None:
    config = load_config(
        "quickstart",
        [
            "rollouts.num_runners=2",
            "rollouts.num_gpus=0.5",
            "rollouts.resources.a100=1",
            "learner.num_learners=1",
            "learner.resources.big=0.5",
            "scores.cost.num_replicas=2",
            "scores.cost.resources.a10=0.5",
        ],
    )
    assert resource_plan(config) == [
        ("reward", {"CPU": 0.1}),
        ("cost", {"CPU": 0.1, "a10": 0.5}),
        ("cost", {"CPU": 0.1, "a10": 0.5}),
        ("runners", {"CPU": 1, "GPU": 0.5, "a100": 1}),
        ("runners", {"CPU": 1, "GPU": 0.5, "a100": 1}),
        ("learners", {"CPU": 1, "big": 0.5}),
    ]


def test_shared_score_services_are_not_in_the_plan() -> None:
    config = load_config("quickstart", ["scores.reward.app=shared"])
    assert [name for name, _ in resource_plan(config)] == ["cost", "runners"]
    assert score_sources(config, "mine", shared_cluster=True) == {
        "reward": "shared",
        "cost": "mine-cost",
    }
    assert score_sources(config, "mine", shared_cluster=False) == {
        "reward": "shared",
        "cost": "cost",
    }


def test_a_score_service_of_elsewhere_is_known_by_its_url() -> None:
    config = load_config("quickstart", ["scores.cost.url=https://scores.example.com/cost"])
    assert [name for name, _ in resource_plan(config)] == ["reward", "runners"]
    assert score_sources(config, "mine", shared_cluster=True) == {
        "reward": "mine-reward",
        "cost": "https://scores.example.com/cost",
    }


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["url=http://a/cost", "app=cost"], r": scores\.cost: app and url are both set; expected"),
        (["url=cost"], r"scores\.cost\.url: string should match pattern"),
        (["url=http://a/cost?key=x"], r"scores\.cost\.url: string should match pattern"),
        (["url=http://me:secret@a/"], r"scores\.cost\.url: names a user or password; .*_KEY$"),
    ],
)
def test_a_url_is_one_without_secrets_and_instead_of_an_application(
    overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("quickstart", [f"scores.cost.{override}" for override in overrides])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "rollouts.resources.GPU=1",
            r"rollouts\.resources: not a custom .* num_gpus",
        ),
        ("learner.resources.x=0", r"learner\.resources\.x: input should be greater than 0"),
        ("scores.cost.resources=3", r"scores\.cost\.resources: input should be a valid dict"),
        ("scores.cost.num_gpus=2", r"scores\.cost\.num_gpus: .* less than or equal to 1, not 2"),
        ("rollouts.num_gpus=1.5", r"rollouts\.num_gpus: .* less than or equal to 1, not 1\.5"),
    ],
)
def test_wrong_resources_are_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("quickstart", [override])


def test_a_run_has_a_queue_of_its_own_unless_the_config_names_one() -> None:
    assert queue_name(load_config("quickstart"), "mine", "0123456789abcdef") == "mine-01234567"
    named = load_config("quickstart", ["prompts.queue=all"])
    assert queue_name(named, "mine", "0123456789abcdef") == "all"
