"""Figures in MLflow: the run, the tags of the version, promotion by them."""

import json
import re
import sys
from pathlib import Path

import pytest
from evaluate_command import N, common

from mara_rl.cli import app
from mara_rl.common.errors import RetryableError
from mara_rl.evaluation import evaluation as evaluation_module
from mara_rl.tracking.promotion import PromotionEvidence, refusal
from mara_rl.tracking.registry import AgentRegistry
from mara_rl.tracking.store import tracking_uri
from mara_rl.tracking.tracking_run import TrackingRun


@pytest.fixture
def store(tmp_path, monkeypatch) -> str:
    """URI of an MLflow store of this test's own."""
    monkeypatch.setenv("MARA_HOME", str(tmp_path / "home"))
    for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    return tracking_uri(allow_local=True)


def test_figures_become_tags_that_promotion_goes_by(evaluate, made, store, tmp_path, monkeypatch):
    registry = AgentRegistry(store)
    with TrackingRun.start(store, "tests", "run", {}) as run:
        for _ in range(3):
            registry.register("mara-tiny", run.log_agent(Path(made["agent"])), {})
    others = common(made)[2:]  # without the agent
    arguments = [*others, "--methods", "base,agent,strength-0.5", "--track"]
    status, text, err = evaluate(
        *arguments, "--agent", "models:/mara-tiny/1", "--out", tmp_path / "out"
    )
    assert status == 0, err
    assert "tagged mara-tiny version 1 with agent's figures" in text
    result = json.loads((tmp_path / "out" / "summary.json").read_text())["result"]
    tags = registry.find("models:/mara-tiny/1").tags
    assert float(tags["preference.rate"]) == result["rate"]
    assert (tags["preference.n"], tags["preference.against"]) == (str(N), "base")
    assert tags["evaluation.tiny.both"].endswith("(training judge)")
    assert "checksum" in tags["evaluation.prompts"]
    found = re.search(r"tracked as MLflow run (\w+)", text)
    assert found
    assert tags["evaluation.run"] == found[1]
    monkeypatch.setattr(
        sys, "argv", ["mara-rl", "agents", "promote", "mara-tiny", "--version", "1"]
    )
    with pytest.raises(SystemExit) as end:
        app.main()
    assert end.value.code in (0, None)
    assert registry.champion("mara-tiny") is None  # ten prompts are too few
    # On another LLM than its own, what an agent does says nothing about promoting it.
    status, text, err = evaluate(
        *arguments, "--agent", "models:/mara-tiny/2", "--llm", made["twin"], "--allow-other-llm",
        "--out", tmp_path / "other",
    )  # fmt: skip
    assert status == 0, err
    assert "tagged" not in text
    assert not any(
        key.startswith("preference.") for key in registry.find("models:/mara-tiny/2").tags
    )
    # With the champion among the methods, it is what the others are held against.
    registry.promote("mara-tiny", 1, evidence=None, force_reason="for this test")
    status, text, err = evaluate(
        *others, "--agent", "new=models:/mara-tiny/3", "--agent", "old=models:/mara-tiny/1",
        "--methods", "base,agent", "--track", "--out", tmp_path / "three",
    )  # fmt: skip
    assert status == 0, err
    tags = registry.find("models:/mara-tiny/3").tags
    assert (tags["preference.against"], tags["preference.champion_version"]) == ("champion", "1")
    summary = json.loads((tmp_path / "three" / "summary.json").read_text())
    against = summary["pairwise"]["tiny"]["new"]
    assert float(tags["preference.rate"]) == against["old"]["rate"] != against["base"]["rate"]
    assert tags["preference.flaw"] == ""
    # Not with prompts that training has seen.
    status, text, err = evaluate(
        *others, "--agent", "models:/mara-tiny/3", "--methods", "base,agent", "--track",
        "--set", f"training_prompts={made['prompts']}", "--out", tmp_path / "four",
    )  # fmt: skip
    assert status == 0, err
    flaw = registry.find("models:/mara-tiny/3").tags["preference.flaw"]
    assert flaw == f"{N} of {N} prompts were seen in training (--drop-seen)"


def test_figures_of_two_evaluations_are_not_mixed(evaluate, made, store, tmp_path):
    registry = AgentRegistry(store)
    with TrackingRun.start(store, "tests", "run", {}) as run:
        registry.register("mara-tiny", run.log_agent(Path(made["agent"])), {})
    ref, agent = "models:/mara-tiny/1", ("--agent", "models:/mara-tiny/1", "--track")

    def tags(*arguments: str) -> dict[str, str]:
        status, _, err = evaluate(*arguments, *agent, "--out", tmp_path / "out")
        assert status == 0, err
        return registry.find(ref).tags

    others = common(made)[2:]
    first = tags(*others, "--methods", "base,agent")
    assert {"evaluation.tiny.both", "preference.rate"} <= first.keys()
    at = others.index("--judge")
    judge = ["--judge", f"other={made['reward']},{made['cost']}"]
    others = [*others[:at], *judge, *others[at + 2 :]]
    # Against answers that are sampled there is no evidence, but a flaw counts all the same.
    second = tags(*others, "--methods", "sampled,agent")
    assert "evaluation.other.both" in second
    assert "evaluation.tiny.both" not in second
    assert second["preference.rate"] == first["preference.rate"]
    third = tags(
        *others, "--methods", "sampled,agent", "--set", f"training_prompts={made['prompts']}"
    )
    reason = f"{N} of {N} prompts were seen in training (--drop-seen)"
    assert refusal(PromotionEvidence.from_tags(third), None) == reason
    assert third["preference.rate"] == "nan", "none of another evaluation"


def test_the_version_that_was_evaluated_gets_the_figures(
    evaluate, made, store, tmp_path, monkeypatch
):
    """Though its alias names another one by then."""
    registry = AgentRegistry(store)

    def register() -> None:
        with TrackingRun.start(store, "tests", "run", {}) as run:
            registry.register("mara-tiny", run.log_agent(Path(made["agent"])), {})

    register()
    made_report = evaluation_module.write_report
    monkeypatch.setattr(evaluation_module, "write_report", lambda *a: (made_report(*a), register()))
    status, text, err = evaluate(
        *common(made)[2:],
        "--agent", "models:/mara-tiny@candidate", "--methods", "base,agent", "--track",
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert status == 0, err
    assert "tagged mara-tiny version 1 with agent's figures" in text
    assert registry.find("models:/mara-tiny@candidate").version == 2


def test_a_logged_model_that_is_no_version_is_evaluated_and_not_tagged(
    evaluate, made, store, tmp_path
):
    with TrackingRun.start(store, "tests", "run", {}) as run:
        ref = run.log_agent(Path(made["agent"]))
    assert ref.startswith("models:/m-")
    status, text, err = evaluate(
        *common(made)[2:],
        "--agent", ref, "--methods", "base,agent", "--track", "--out", tmp_path / "out",
    )  # fmt: skip
    assert status == 0, err
    assert "tracked as MLflow run" in text
    assert "tagged" not in text


def test_the_result_is_shown_though_mlflow_goes_away(evaluate, made, store, tmp_path, monkeypatch):

    def away(*_: object) -> list[str]:
        raise RetryableError("no answer from MLflow")

    monkeypatch.setattr("mara_rl.evaluation.tracking.track", away)
    arguments = [*common(made), "--methods", "base,agent", "--track", "--out", tmp_path / "out"]
    status, text, err = evaluate(*arguments)
    assert (status, "no answer from MLflow" in err) == (1, True)
    assert text.splitlines()[-1].startswith("preference rate: ")
