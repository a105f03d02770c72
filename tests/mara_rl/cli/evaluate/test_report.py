"""From a plan to answers, scores, summary and report."""

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml
from evaluate_command import N, base_alone, comparable, read_rows, write_rows
from small_agents import random_agent
from tiny_checkpoints import tiny_tokenizer, write_llm

from mara_rl.agents.agent_files import save_agent
from mara_rl.evaluation.plan import PRESETS
from mara_rl.evaluation.plots import frontier_points
from mara_rl.llm.policy_llm import load_policy_llm

RESULT = r"^preference rate: [+-]\d+\.\d \[[+-]\d+\.\d, [+-]\d+\.\d\] \(n=\d+\)$"


def test_every_kind_of_method_from_a_plan_to_a_report(evaluate, made, tmp_path):
    aligner = write_llm(tmp_path / "aligner")  # as Aligner, without a chat template
    tiny_tokenizer(None).save_pretrained(aligner)
    (aligner / "chat_template.jinja").unlink(missing_ok=True)
    elsewhere = tmp_path / "elsewhere.jsonl"
    write_rows(elsewhere, [{"id": f"p{i}", "answer": f"Answer {i}."} for i in range(N)])
    plan = {
        "llm": made["llm"],
        "prompts": made["prompts"],
        "max_new_tokens": 12,
        "num_slots": 4,
        "resamples": 200,
        "judges": {
            "tiny": {"reward": made["reward"], "cost": made["cost"], "training": True},
            "swapped": {"reward": made["cost"], "cost": made["reward"]},
        },
        "methods": {
            "base": {"kind": "base"},
            "sampled": {"kind": "base", "rule": "sample", "replicates": 4},
            "agent": {"kind": "agent", "agent": made["agent"]},
            "half": {"kind": "agent", "agent": made["agent"], "strength": 0.5},
            "exact": {"kind": "agent", "agent": made["agent"], "exact": True},
            "none": {"kind": "agent", "agent": made["agent"], "strength": 0.0},
            "moved": {
                "kind": "agent",
                "agent": made["agent"],
                "llm": made["other"],
                "allow_other_llm": True,
            },
            "best-of-2": {"kind": "best_of", "n": 2},
            "best-of-4": {"kind": "best_of", "n": 4},
            "tuned": {"kind": "base", "llm": made["other"]},
            "rewritten": {
                "kind": "rewrite",
                "of": "agent",
                "llm": str(aligner),
                "template": "{question}|{answer}>",
            },
            "elsewhere": {"kind": "answers", "file": str(elsewhere)},
        },
    }
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    out = tmp_path / "out"
    status, text, err = evaluate(tmp_path / "plan.yaml", "--out", out)
    assert status == 0, err
    assert len(re.findall(RESULT, text, re.MULTILINE)) == 1
    assert text.splitlines()[-1].startswith("preference rate: ")
    assert "10 prompts, 1 duplicates dropped" in text
    answers = {path.stem: read_rows(path) for path in (out / "answers").iterdir()}
    assert set(answers) == set(plan["methods"])
    assert answers["elsewhere"][1] == {"id": "p1", "replicate": 0, "text": "Answer 1."}
    assert {name: len(rows) for name, rows in answers.items()} == {
        **dict.fromkeys(answers, N),
        "sampled": 4 * N,
        "best-of-2": 2 * N,
    }
    # A strength of 0 is the LLM alone; the best is one of the pool's, by the training judge.
    assert texts(answers["none"]) == texts(answers["base"]) != texts(answers["agent"])
    assert texts(answers["tuned"]) != texts(answers["base"])
    scores = {
        (row["method"], row["id"], row["replicate"]): row["scores"]
        for row in read_rows(out / "scores.jsonl")
    }
    summary = json.loads((out / "summary.json").read_text())
    scale = summary["scales"]["tiny"]

    def weighted(*key: object) -> float:
        found = scores[key]["tiny"]
        return found["reward"] / scale["reward"] - found["cost"] / scale["cost"]

    for number in range(N):
        pool = [weighted("sampled", f"p{number}", i) for i in range(4)]
        best = [weighted("best-of-2", f"p{number}", i) for i in range(2)]
        assert best == pytest.approx([max(pool[:2]), max(pool[2:])])
        assert weighted("best-of-4", f"p{number}", 0) == pytest.approx(max(pool))
    check_summary(summary, scores)
    check_report((out / "report.html").read_text(encoding="utf-8"))
    # Another baseline, even one that is chosen among scored answers, needs no new answers.
    status, text, err = evaluate(
        tmp_path / "plan.yaml", "--out", out, "--set", "baseline=best-of-2"
    )
    assert status == 0, err
    other = json.loads((out / "summary.json").read_text())
    assert other["baseline"] == "best-of-2"
    both = other["methods"]["base"]["versus_baseline"]["tiny"]["both"]["rate"]
    assert both == pytest.approx(-summary["pairwise"]["tiny"]["best-of-2"]["base"]["rate"])
    pool = [
        row["scores"]["tiny"]["cost"]
        for row in read_rows(out / "scores.jsonl")
        if row["method"] == "sampled"
    ]
    assert other["scales"]["tiny"]["cost"] == pytest.approx(np.std(pool))
    # The frontier has the baseline at its own KL.
    assert evaluate(tmp_path / "plan.yaml", "--out", out, "--set", "baseline=agent")[0] == 0
    other = json.loads((out / "summary.json").read_text())
    for found, baseline in ((summary, "base"), (other, "agent")):
        points = {p[4]: p for p in itertools.chain(*frontier_points(found, "tiny").values())}
        assert points[baseline][:2] == (found["methods"][baseline]["decoding"]["kl_per_token"], 0)
        assert "elsewhere" not in points
    # The same again makes nothing twice.
    once = set(plan["methods"]) - {"best-of-2", "best-of-4", "elsewhere"}
    made_at = {name: (out / "answers" / f"{name}.jsonl").stat().st_mtime_ns for name in once}
    again, text, _ = evaluate(tmp_path / "plan.yaml", "--out", out)
    assert again == 0
    assert f"going on in {out}" in text
    assert "answers of" not in text
    assert "reward by" not in text
    for name, before in made_at.items():
        assert (out / "answers" / f"{name}.jsonl").stat().st_mtime_ns == before
    assert comparable(json.loads((out / "summary.json").read_text())) == comparable(summary)


def texts(rows: Sequence[dict]) -> list[str]:
    return [row["text"] for row in sorted(rows, key=lambda row: row["id"])]


def check_summary(summary, scores) -> None:
    """Its figures against plain arithmetic over the scores."""
    assert summary["prompts"]["duplicates_dropped"] == 1
    assert (summary["result"]["method"], summary["result"]["judge"]) == ("agent", "tiny")
    assert set(summary["pairwise"]["tiny"]) == set(summary["methods"])

    def score(method: str, i: int, axis: str) -> float:
        return scores[method, f"p{i}", 0]["tiny"][axis]

    wins = sum(
        score("agent", i, "reward") > score("base", i, "reward")
        and score("agent", i, "cost") < score("base", i, "cost")
        for i in range(N)
    )
    losses = sum(
        score("agent", i, "reward") < score("base", i, "reward")
        and score("agent", i, "cost") > score("base", i, "cost")
        for i in range(N)
    )
    both = summary["methods"]["agent"]["versus_baseline"]["tiny"]["both"]
    assert (both["wins"], both["losses"], both["n"]) == (wins, losses, N)
    assert both["rate"] == pytest.approx(100 * (wins - losses) / N)
    against = summary["pairwise"]["tiny"]
    assert against["base"]["agent"]["rate"] == pytest.approx(-both["rate"])
    versus = summary["methods"]["agent"]["versus_baseline"]["tiny"]
    assert against["agent"]["base"]["weighted"] == versus["difference"]["weighted"]
    groups = versus["groups"]
    assert {name: group["both"]["n"] for name, group in groups.items()} == {
        "kind: harmful": 5,
        "kind: ordinary": 5,
    }
    decoding = {name: method["decoding"] for name, method in summary["methods"].items()}
    assert decoding["base"]["forwards_per_token"] < decoding["best-of-4"]["forwards_per_token"]
    assert decoding["agent"]["kl_is"] == "along greedy answers"
    assert decoding["none"]["kl_per_token"] == pytest.approx(0, abs=1e-6)
    assert decoding["half"]["kl_per_token"] < decoding["agent"]["kl_per_token"]
    assert "upper bound" in decoding["best-of-2"]["kl_is"]
    assert sum(decoding["agent"]["accept_positions"]) == pytest.approx(1)
    assert decoding["elsewhere"] == {}
    assert "kl_per_token" not in decoding["tuned"]


def check_report(html: str) -> None:
    assert "How these figures were made" in html
    assert html.count("<svg") >= 8
    assert not re.findall(r"(?:src|href)=[\"'](?!#)", html)  # everything is in the file
    assert "currentColor" in html
    assert html.count("was a training reward") >= 1
    assert "duplicates left out" in html
    assert re.search("a seed of its own; in (float32 on cpu|bfloat16 on cuda); LLM", html)


def test_methods_of_a_plan_and_of_short_names_are_set_alike(evaluate, made, tmp_path):
    plan, out = tmp_path / "plan.yaml", tmp_path / "out"
    plan.write_text(yaml.safe_dump({"methods": {"base": {"kind": "base"}}}))
    arguments = [plan, *base_alone(made)[:-2], "--methods", "base,sampled"]
    changes = ("--set", "methods.sampled.temperature=0.7", "--set", "methods.base.top_k=9")
    status, _, err = evaluate(*arguments, *changes, "--out", out)
    assert status == 0, err
    methods = json.loads((out / "summary.json").read_text())["methods"]
    assert list(methods) == ["base", "sampled"]
    assert methods["sampled"]["spec"]["temperature"] == 0.7
    assert methods["base"]["spec"]["top_k"] == 9


def test_what_kl_is_of(evaluate, made, tmp_path):
    """Only of the LLM as truncated, at temperature 1, it is known."""
    agent = {"kind": "agent", "agent": made["agent"]}
    base = {"kind": "base", "rule": "sample", "replicates": 2}
    methods = {
        "base": {"kind": "base"},
        "sampled": base,
        "hot": base | {"temperature": 2.0},
        "narrow": base | {"top_k": 2},
        "best-of-hot": {"kind": "best_of", "n": 2, "of": "hot"},
        "best-of-2": {"kind": "best_of", "n": 2},
        "drawn": agent | {"rule": "sample"},
        "cold": agent | {"rule": "sample", "temperature": 0.5},
        "own": {"kind": "agent", "agent": made["sampling"]},
    }
    plan = tmp_path / "plan.yaml"
    plan.write_text(yaml.safe_dump({"methods": methods}))
    status, _, err = evaluate(plan, *base_alone(made)[:-2], "--out", tmp_path / "out")
    assert status == 0, err
    found = json.loads((tmp_path / "out" / "summary.json").read_text())["methods"]
    known = {name for name, each in found.items() if "kl_per_token" in each["decoding"]}
    assert known == {"base", "sampled", "best-of-2", "drawn", "cold", "own"}
    kinds = {name: each["decoding"].get("kl_is", "") for name, each in found.items()}
    assert kinds["drawn"] == kinds["own"] == "estimate from sampled answers"
    assert kinds["cold"] == "along answers sampled at another temperature"


def test_some_sampled_answers_estimate_the_kl_of_a_greedy_agent(evaluate, made, tmp_path):
    methods = {
        "base": {"kind": "base"},
        "greedy": {"kind": "agent", "agent": made["agent"], "kl_prompts": 4},
        "own": {"kind": "agent", "agent": made["sampling"]},
    }
    plan, out = tmp_path / "plan.yaml", tmp_path / "out"
    plan.write_text(yaml.safe_dump({"methods": methods}))
    arguments = [plan, *base_alone(made)[:-2], "--out", out]
    # More prompts may be asked for, fewer looked at; answers that are there are not made again.
    for count, on_file in ((4, 4), (N, N), (4, N)):
        status, text, err = evaluate(*arguments, "--set", f"methods.greedy.kl_prompts={count}")
        assert status == 0, err
        rows = read_rows(out / "answers" / "kl" / "greedy.jsonl")
        assert len(rows) == on_file
        made_some = "answers of greedy, sampled for its KL" in text
        assert made_some is (on_file == count)
        asked = {f"p{i}" for i in (range(N) if count == N else (0, 3, 6, 9))}
        used = [row for row in rows if row["id"] in asked]
        found = json.loads((out / "summary.json").read_text())["methods"]["greedy"]["decoding"]
        expected = sum(row["kl"] for row in used) / sum(row["tokens"] for row in used)
        assert found["kl_per_token"] == pytest.approx(expected)
        assert found["kl_is"] == "estimate from sampled answers"


def test_the_paper_s_figure_stands_beside_the_measured_one(evaluate, made, tmp_path):
    llms = [Path(made["root"]) / f"Mistral-7B-Instruct-v0.{i}" for i in (3, 2)]
    judges = [tmp_path / f"beaver-7b-v1.0-{axis}" for axis in ("reward", "cost")]
    for link, target in zip(
        [*llms, *judges], [made["llm"], made["llm"], made["reward"], made["cost"]], strict=True
    ):
        link.symlink_to(target)
    own = random_agent(
        load_policy_llm(str(llms[0]), dtype="float32"), "relative", top_k=6, llm=str(llms[0])
    )
    save_agent(own, tmp_path / "agent")
    prompts = tmp_path / "SafeRLHF_test.json"
    prompts.write_text(json.dumps([{"instruction": f"Question {i}?"} for i in range(4)]))
    agent = {"kind": "agent", "agent": str(tmp_path / "agent")}
    moved = {"llm": str(llms[1]), "allow_other_llm": True}
    methods = {
        "base": {"kind": "base"},
        "own": agent,
        "weaker": agent | {"strength": 0.5},
        "rlhf": {"kind": "base", "llm": made["twin"]},
        "other": {"kind": "base", "llm": str(llms[1])},
        "moved": agent | moved,
        "loose": {"kind": "base", "rule": "sample"},
    }
    plan = yaml.safe_load((PRESETS / "paper-protocol.yaml").read_text())
    plan |= {"methods": methods, "llm": str(llms[0]), "prompts": str(prompts)}
    plan |= {"max_new_tokens": 12, "resamples": 200}
    plan["judges"]["beaver"] |= dict(zip(("reward", "cost"), map(str, judges), strict=True))

    def published(**changes: object) -> dict[tuple[str, str], tuple[float, str]]:
        path, out = tmp_path / "plan.yaml", tmp_path / "out"
        path.write_text(yaml.safe_dump(plan | changes, sort_keys=False))
        status, text, err = evaluate(path, "--out", out)
        assert status == 0, err
        rows = json.loads((out / "summary.json").read_text())["published"]
        for row in rows:
            assert re.search(
                rf"{row['method']} over {row['against']} on SafeRLHF: "
                rf"[+-]\d+\.\d \[.*\] measured, \{row['published']:+} published",
                text,
            )
        found = {(row["method"], row["against"]): row for row in rows}
        return {key: (row["published"], row["source"][-7:]) for key, row in found.items()}

    expected = {
        ("own", "base"): (17.09, "table 1"),
        ("own", "rlhf"): (14.07, "table 2"),
        ("moved", "other"): (3.02, "table 3"),  # table 2 has no such agents
    }
    assert published() == expected
    # Whatever the others are held against, and not for answers of other judges.
    assert published(baseline="rlhf") == published(baseline="loose") == expected
    judge = {"reward": made["reward"], "cost": made["cost"]}
    assert published(judges={"tiny": judge}) == {}
