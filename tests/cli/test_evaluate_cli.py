"""``mara-rl evaluate`` over tiny LLMs and tiny score models."""

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml
from endpoints import serving
from small_agents import make_agent, random_agent
from tiny_checkpoints import BeaverFolder, tiny_tokenizer, write_classifier, write_llm

from mara_rl.agent_files import save_agent
from mara_rl.cli import app
from mara_rl.errors import DataError, RetryableError
from mara_rl.evaluation import judging
from mara_rl.evaluation import run as evaluation_run
from mara_rl.evaluation.console import warnings
from mara_rl.evaluation.plan import PRESETS
from mara_rl.evaluation.plots import frontier_points
from mara_rl.file_lock import held
from mara_rl.policy_llm import load_policy_llm
from mara_rl.tracking.registry import AgentRegistry
from mara_rl.tracking.run import TrackingRun
from mara_rl.tracking.store import tracking_uri
from services.api_keys import ApiKeys
from services.score_api import create_score_api

RESULT = r"^preference rate: [+-]\d+\.\d \[[+-]\d+\.\d, [+-]\d+\.\d\] \(n=\d+\)$"
N = 10


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_llms) -> dict[str, str]:
    """Folders and files by name: two LLMs, an agent, two score models, prompts."""
    root = tmp_path_factory.mktemp("made")
    llm = load_policy_llm(str(tiny_llms["llama"]), device="cpu", dtype="float32")
    save_agent(random_agent(llm, "relative", top_k=6, llm=llm.name), root / "agent")
    save_agent(random_agent(llm, "relative", top_k=6, llm=llm.name, rule="sample"), root / "own")
    save_agent(make_agent(), root / "small")
    made = {
        "llm": llm.name,
        "other": str(tiny_llms["qwen3"]),
        "twin": str(root / "another-name"),
        "agent": str(root / "agent"),
        "sampling": str(root / "own"),
        "small": str(root / "small"),
        "reward": str(write_classifier(root / "reward", num_labels=1)),
        "cost": str(BeaverFolder(root / "cost").write()),
        "prompts": str(root / "prompts.jsonl"),
        "root": str(root),
    }
    rows = [
        {"id": f"p{i}", "prompt": f"Question {i}?", "kind": ("ordinary", "harmful")[i % 2]}
        for i in range(N)
    ]
    write_rows(made["prompts"], [*rows, {"id": "twin", "prompt": "question 3"}])
    Path(made["twin"]).symlink_to(made["llm"])
    made["common"] = "\n".join(
        ("--agent", made["agent"], "--prompts", made["prompts"], "--max-new-tokens", "12",
         "--judge", f"tiny={made['reward']},{made['cost']},training", "--set", "resamples=200")
    )  # fmt: skip
    return made


@pytest.fixture
def evaluate(monkeypatch, capsys):
    """Runs ``mara-rl evaluate …`` and returns its exit status, output and error output."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mara-rl", "evaluate", *map(str, arguments)])
        status = 0
        try:
            app.main()
        except SystemExit as end:
            status = int(end.code or 0)
        return status, *capsys.readouterr()

    return run


def write_rows(path: object, rows: Sequence[object]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    Path(str(path)).write_text(text, encoding="utf-8")


def common(made) -> list[str]:
    return made["common"].split("\n")


def base_alone(made) -> list[str]:
    """`common` without the agent."""
    return ["--llm", made["llm"], *common(made)[2:], "--methods", "base"]


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


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
    assert set(answers) == set(plan["methods"]) - {"elsewhere"}
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
    before = {path: path.stat().st_mtime_ns for path in (out / "answers").glob("[!b]*.jsonl")}
    again, text, _ = evaluate(tmp_path / "plan.yaml", "--out", out)
    assert again == 0
    assert f"going on in {out}" in text
    assert "answers of" not in text
    assert "reward by" not in text
    assert {path: path.stat().st_mtime_ns for path in before} == before
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


def comparable(summary: dict) -> dict:
    """A summary without what differs from run to run: time and, by a few tokens, its cost."""
    kept = json.loads(json.dumps(summary))
    kept.pop("provenance")
    for method in kept["methods"].values():
        for figure in ("tokens_per_s", "forwards_per_token", "kl_per_token", "kl_per_answer"):
            method["decoding"].pop(figure, None)
    return kept


@pytest.mark.slow
def test_a_killed_run_goes_on_and_equals_one_that_was_not(evaluate, made, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    write_rows(prompts, [{"id": i, "prompt": f"Tell me about {i}."} for i in range(24)])
    arguments = [
        *common(made), "--prompts", str(prompts), "--methods", "base,agent,best-of-2",
        "--max-new-tokens", "80", "--set", "num_slots=4",
    ]  # fmt: skip
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen(
        [sys.executable, "-c", "from mara_rl.cli.app import main; main()", "evaluate", *arguments,
         "--out", str(killed)],
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    answers = killed / "answers" / "sampled.jsonl"
    deadline_s = time.monotonic() + 300
    while not (answers.is_file() and answers.read_bytes().count(b"\n") >= 5):
        assert process.poll() is None
        assert time.monotonic() < deadline_s
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = answers.read_bytes()
    assert kept.count(b"\n") < 48
    assert not (killed / "summary.json").exists()
    for folder in (killed, whole):
        status, text, err = evaluate(*arguments, "--out", folder)
        assert status == 0, err
        assert ("answers of base" in text) is (folder == whole)
    assert answers.read_bytes().startswith(kept[: kept.rindex(b"\n") + 1])
    for name in ("base", "agent", "sampled", "best-of-2"):
        rows = {}
        for folder in (killed, whole):
            found = read_rows(folder / "answers" / f"{name}.jsonl")
            rows[folder] = sorted((row["id"], row["replicate"], row["text"]) for row in found)
        assert rows[killed] == rows[whole]
    assert (killed / "scores.jsonl").read_text() == (whole / "scores.jsonl").read_text()
    summaries = [json.loads((f / "summary.json").read_text()) for f in (killed, whole)]
    assert comparable(summaries[0]) == comparable(summaries[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--agent", "{agent}", "--agent", "{agent}"], "--agent: two are named 'agent'"),
        (["--answers", "base={prompts}"], "methods: two are named 'base'"),
        (["--judge", "j={reward}"], r"--judge: j=.*expected NAME=REWARD,COST"),
        (["--judge", "j=no-such-model,{cost}"], "'no-such-model' is neither a shipped name"),
        (["--methods", "base,agents"], "unknown 'agents'"),
        (["--methods", "base,sampled"], "--agent: no method uses it"),
        (["--agent", "/no/such"], "'/no/such': no such file or folder"),
        (["--agent", "{small}", "--llm", "{llm}"], "method 'agent': .*hidden size 12"),
        (["--llm", "{other}"], "method 'agent': .*trained on LLM"),
        (["--prompts", "{root}/none.jsonl"], "no such file"),
        (["--prompts", "{root}/empty.jsonl"], "no prompts in it"),
        (["--prompts", "{root}/half.jsonl"], "1 of 2 prompts have no id"),
        (["--answers", "x={root}/empty.jsonl"], "no answers in it"),
        (["--answers", "x={root}/others.jsonl"], "id 'q' is none of the 11 prompts"),
        (["--other-llm", "x={root}/no-llm"], "method 'x': llm '.*no-llm' could not be loaded"),
        (["--set", "scales={{reward: .inf, cost: 1}}"], "scales.reward: .*finite"),
        (["--set", "judges.tiny.safe_below=1"], "--judge replaces all judges"),
        (["--max-new-tokens", "500"], "method 'base': .*exceeds the LLM's context"),
        (["--set", "seed=-1"], "seed: "),
        (["--set", "published=Else"], "published: 'Else'"),
        (["--out", "{root}"], "is not empty and holds no evaluation"),
    ],
)
def test_bad_input_is_one_line(evaluate, made, tmp_path, arguments, message):
    root = Path(made["root"])
    (root / "empty.jsonl").write_text("")
    write_rows(root / "half.jsonl", [{"id": 1, "prompt": "a"}, {"prompt": "b"}])
    write_rows(root / "others.jsonl", [{"id": "q", "answer": "x"}])
    filled = [argument.format(**made) for argument in arguments]
    options = dict(zip(*[iter(common(made))] * 2, strict=True))
    for option in ("--agent", "--judge"):  # those that repeat: the wrong one alone
        if option in filled:
            options.pop(option)
    given = [part for pair in options.items() for part in pair]
    out = [] if "--out" in filled else ["--out", str(tmp_path / "out")]
    status, _, err = evaluate(*given, *filled, *out)
    assert status == 1
    assert re.search(message, err), err
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_a_changed_plan_is_refused_in_the_same_folder_and_more_methods_are_not(
    evaluate, made, tmp_path
):
    out = ("--out", tmp_path / "out")
    assert evaluate(*base_alone(made), *out)[0] == 0
    base = (tmp_path / "out" / "answers" / "base.jsonl").read_bytes()
    prompts = tmp_path / "prompts.jsonl"
    write_rows(prompts, [{"id": f"p{i}", "prompt": f"Other {i}"} for i in range(N)])
    for change, message in (
        (("--seed", 1), "holds an evaluation with seed: 0, not 1"),
        (("--prompts", prompts), "holds an evaluation with prompts.source: "),
        (("--llm", made["other"]), "holds an evaluation with llm: "),
        (("--set", "methods.base.kind=base", "--set", "methods.base.llm=" + made["other"],
          "--methods", "sampled"), "holds an evaluation with methods.base.llm: None"),
    ):  # fmt: skip
        status, _, err = evaluate(*base_alone(made), *out, *change)
        assert (status, message in err) == (1, True), err
    more = ("--methods", "base,agent", "--agent", made["agent"])
    status, _, err = evaluate(*base_alone(made), *out, *more)
    assert status == 0, err
    assert (tmp_path / "out" / "answers" / "base.jsonl").read_bytes() == base


def test_a_wrong_input_does_not_bind_the_folder(evaluate, made, tmp_path):
    """What was never answered may be mended and tried again with the same --out."""
    out, file = ("--out", tmp_path / "out"), tmp_path / "elsewhere.jsonl"
    arguments = [*base_alone(made), "--answers", f"elsewhere={file}", *out]
    for rows, status in (([{"id": "q", "answer": "x"}], 1), (answered("x"), 0), (answered("y"), 0)):
        write_rows(file, rows)
        assert evaluate(*arguments)[0] == status
    scored = read_rows(tmp_path / "out" / "scores.jsonl")
    assert len([row for row in scored if row["method"] == "elsewhere"]) == N


def answered(text: str) -> list[dict]:
    return [{"id": f"p{i}", "answer": f"{text} {i}"} for i in range(N)]


def test_rewritten_answers_are_those_of_their_source(evaluate, made, tmp_path):
    file, plan = tmp_path / "elsewhere.jsonl", tmp_path / "plan.yaml"
    rewrite = {"kind": "rewrite", "of": "draft", "llm": made["llm"], "chat": True}
    rewrite["template"] = "{question}|{answer}"
    methods = {"base": {"kind": "base"}, "draft": {"kind": "answers", "file": str(file)}}
    plan.write_text(yaml.safe_dump({"methods": methods | {"better": rewrite}}))
    # The longest answer leaves five tokens of the context for what becomes of it.
    llm = load_policy_llm(made["llm"], device="cpu", dtype="float32")
    rows = answered("x")
    while len(llm.prompt_ids(f"Question 0?|{rows[0]['answer']}a")) <= llm.context_tokens - 5:
        rows[0]["answer"] += "a"
    write_rows(file, rows)
    arguments = [plan, *base_alone(made)[:-2], "--out", tmp_path / "out"]
    status, _, err = evaluate(*arguments)
    assert status == 0, err
    first = {row["id"]: row for row in read_rows(tmp_path / "out" / "answers" / "better.jsonl")}
    assert first["p0"]["tokens"] <= 5
    assert {row["tokens"] for row in first.values()} > {first["p0"]["tokens"]}
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert "forwards_per_token" not in summary["methods"]["better"]["decoding"]  # draft's: unknown
    write_rows(file, answered("another"))
    status, _, err = evaluate(*arguments)
    assert (status, "methods.better.of_sha256: " in err) == (1, True), err


def test_a_name_is_not_given_to_answers_of_another_kind(evaluate, made, tmp_path):
    arguments = [*base_alone(made), "--out", tmp_path / "out"]
    pool = ("--set", "methods.sampled={kind: base, rule: sample, replicates: 2}")
    chosen = ("--set", "methods.best={kind: best_of, n: 2}")
    other = ("--set", f"methods.best={{kind: base, llm: {made['other']}}}")
    assert evaluate(*arguments, *pool, *chosen)[0] == 0
    status, _, err = evaluate(*arguments, *pool, *other)
    assert (status, "methods.best.kind: 'best_of', not 'base'" in err) == (1, True), err


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


class FailingJudge:
    """Scores so many texts, then fails or says NaN."""

    def __init__(self, good: int, failure: str) -> None:
        self.good, self.failure, self.scored = good, failure, 0

    def score(self, pairs):
        self.scored += len(pairs)
        if self.scored > self.good:
            if self.failure == "raise":
                raise DataError("out of order")
            return [float("nan")] * len(pairs)
        return [float(len(answer)) for _, answer in pairs]


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (
            "raise",
            r"judge 'tiny': reward by .* failed: out of order \(what it had .* is kept\)",
        ),
        ("nan", r"judge 'tiny': reward of method 'base', prompt 'p\d+', by .* is nan"),
    ],
)
def test_a_judge_that_fails_half_way_keeps_what_it_had(
    evaluate, made, tmp_path, monkeypatch, failure, message
):
    monkeypatch.setenv("MARA_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(judging, "_BATCH", 2)
    judge = FailingJudge(6, failure)
    monkeypatch.setattr(judging, "load_score_model", lambda name, dtype: judge)
    arguments = (*base_alone(made), "--out", tmp_path / "out")
    status, _, err = evaluate(*arguments)
    assert (status, bool(re.search(message, err))) == (1, True), err
    better = FailingJudge(1000, failure)
    monkeypatch.setattr(judging, "load_score_model", lambda name, dtype: better)
    status, text, _ = evaluate(*arguments)
    assert status == 0
    assert "answers of base" not in text
    assert better.scored == (N - 6) + N  # the rest of the reward, and the cost


def test_judges_may_be_services_behind_urls(evaluate, made, tmp_path, monkeypatch):
    key = "a-key-of-this-test"
    monkeypatch.setenv("MARA_SCORE_KEY", key)
    with contextlib.ExitStack() as stack:
        urls = []
        for sign in (1.0, -1.0):

            async def score(pairs, sign=sign):
                return [sign * (len(prompt) + len(answer)) for prompt, answer in pairs]

            api = create_score_api(score, "lengths", ApiKeys([key]))
            urls.append(stack.enter_context(serving(api)))
        judges = {
            "tiny": {"reward": made["reward"], "cost": made["cost"]},
            "served": {"reward": urls[0], "cost": urls[1], "serve": True},
        }
        plan = tmp_path / "plan.yaml"
        plan.write_text(yaml.safe_dump({"judges": judges}))
        at = common(made).index("--judge")
        arguments = [plan, *common(made)[:at], *common(made)[at + 2 :], "--methods", "base,agent"]
        status, _, err = evaluate(*arguments, "--out", tmp_path / "out")
        assert status == 0, err
        lengths = {
            (method, row["id"]): len(f"Question {row['id'][1:]}?") + len(row["text"])
            for method in ("base", "agent")
            for row in read_rows(tmp_path / "out" / "answers" / f"{method}.jsonl")
        }
        for row in read_rows(tmp_path / "out" / "scores.jsonl"):
            length = lengths[row["method"], row["id"]]
            assert row["scores"]["served"] == {"reward": length, "cost": -length}
        monkeypatch.delenv("MARA_SCORE_KEY")
        status, _, err = evaluate(*arguments, "--out", tmp_path / "two")
        assert status == 1
        assert "judges.served.reward: score service http" in err
        assert "MARA_SCORE_KEY is not set" in err


def test_refusals_nobody_can_judge_are_told():
    def figures(share: float, kinds: dict) -> dict:
        return {
            "prompts": {"seen_in_training": [], "n": 40}
            | {"source": "packaged", "training_prompts": "packaged"},
            "flags": {},
            "judges": {"one": {"training": False}},
            "methods": {
                "agent": {"kind": "agent", "answers": {"refusal_share": share, "by_kind": kinds}}
            },
        }

    assert warnings(figures(0.3, {})) == warnings(figures(0.4, {"harmful": {}})) == []
    assert warnings(figures(0.4, {}))[0].startswith("agent refuses 40%; the prompts have no kind")


def test_where_leaks_were_not_looked_for_is_told():
    def told(source: str, training: str | None, kind: str) -> list[str]:
        sources = {"source": source, "training_prompts": training}
        return warnings(
            {
                "prompts": {"seen_in_training": [], "n": 40} | sources,
                "flags": {},
                "judges": {"one": {"training": False}},
                "methods": {"m": {"kind": kind, "answers": {"refusal_share": 0, "by_kind": {}}}},
            }
        )

    [line] = told("mine.jsonl", "packaged", "agent")
    assert "--set training_prompts=FILE" in line
    for source, training, kind in (
        ("packaged", "packaged", "agent"),
        ("mine.jsonl", "train.jsonl", "agent"),
        ("mine.jsonl", None, "agent"),  # as the user wants it
        ("mine.jsonl", "packaged", "base"),
    ):
        assert told(source, training, kind) == []


def test_one_process_at_a_time_has_the_folder(evaluate, made, tmp_path):
    arguments = [*common(made), "--methods", "base,agent", "--out", tmp_path]
    assert evaluate(*arguments)[0] == 0
    answers = (tmp_path / "answers" / "agent.jsonl").read_bytes()
    with held(tmp_path / "lock", "refused"):
        status, _, err = evaluate(*arguments)
    assert status == 1
    assert f"{tmp_path} is being evaluated by another process" in " ".join(err.split())
    assert (tmp_path / "answers" / "agent.jsonl").read_bytes() == answers
    assert evaluate(*arguments)[0] == 0


def test_prompts_seen_in_training_are_told_or_dropped(evaluate, made, tmp_path):
    training = tmp_path / "train.jsonl"
    write_rows(training, [{"prompt": "QUESTION 4"}, {"prompt": "Question 5?"}])
    arguments = [*common(made), "--methods", "base,agent", "--set", f"training_prompts={training}"]
    status, text, _ = evaluate(*arguments, "--out", tmp_path / "kept")
    assert status == 0
    assert "2 seen in training (kept: see --drop-seen)" in text
    assert "warning: 2 of 10 prompts were seen in training" in text
    status, text, _ = evaluate(*arguments, "--drop-seen", "--out", tmp_path / "dropped")
    assert status == 0
    assert "8 prompts, 1 duplicates dropped, 2 seen in training (dropped)" in text
    assert text.rstrip().endswith("(n=8)")


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
        ("moved", "rlhf"): (24.62, "table 2"),
        ("moved", "other"): (3.02, "table 3"),
    }
    assert published() == expected
    # Whatever the others are held against, and not for answers of other judges.
    assert published(baseline="rlhf") == published(baseline="loose") == expected
    judge = {"reward": made["reward"], "cost": made["cost"]}
    assert published(judges={"tiny": judge}) == {}


def test_figures_become_tags_that_promotion_goes_by(evaluate, made, tmp_path, monkeypatch):
    monkeypatch.setenv("MARA_HOME", str(tmp_path / "home"))
    for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    uri = tracking_uri(allow_local=True)
    registry = AgentRegistry(uri)
    with TrackingRun.start(uri, "tests", "run", {}) as run:
        for _ in range(3):
            registry.register("mara-tiny", run.log_agent(Path(made["agent"])), {})
    others = [part for part in common(made) if part not in ("--agent", made["agent"])]
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


def test_the_version_that_was_evaluated_gets_the_figures(evaluate, made, tmp_path, monkeypatch):
    """Though its alias names another one by then."""
    monkeypatch.setenv("MARA_HOME", str(tmp_path / "home"))
    for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    registry = AgentRegistry(uri := tracking_uri(allow_local=True))

    def register() -> None:
        with TrackingRun.start(uri, "tests", "run", {}) as run:
            registry.register("mara-tiny", run.log_agent(Path(made["agent"])), {})

    register()
    made_report = evaluation_run.write_report
    monkeypatch.setattr(evaluation_run, "write_report", lambda *a: (made_report(*a), register()))
    status, text, err = evaluate(
        *[part for part in common(made) if part not in ("--agent", made["agent"])],
        "--agent", "models:/mara-tiny@candidate", "--methods", "base,agent", "--track",
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert status == 0, err
    assert "tagged mara-tiny version 1 with agent's figures" in text
    assert registry.find("models:/mara-tiny@candidate").version == 2


def test_a_logged_model_that_is_no_version_is_evaluated_and_not_tagged(
    evaluate, made, tmp_path, monkeypatch
):
    monkeypatch.setenv("MARA_HOME", str(tmp_path / "home"))
    for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    with TrackingRun.start(tracking_uri(allow_local=True), "tests", "run", {}) as run:
        ref = run.log_agent(Path(made["agent"]))
    assert ref.startswith("models:/m-")
    status, text, err = evaluate(
        *[part for part in common(made) if part not in ("--agent", made["agent"])],
        "--agent", ref, "--methods", "base,agent", "--track", "--out", tmp_path / "out",
    )  # fmt: skip
    assert status == 0, err
    assert "tracked as MLflow run" in text
    assert "tagged" not in text


def test_the_result_is_shown_though_mlflow_goes_away(evaluate, made, tmp_path, monkeypatch):
    monkeypatch.setenv("MARA_HOME", str(tmp_path / "home"))
    for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)

    def away(*_: object) -> list[str]:
        raise RetryableError("no answer from MLflow")

    monkeypatch.setattr("mara_rl.evaluation.tracking.track", away)
    arguments = [*common(made), "--methods", "base,agent", "--track", "--out", tmp_path / "out"]
    status, text, err = evaluate(*arguments)
    assert (status, "no answer from MLflow" in err) == (1, True)
    assert text.splitlines()[-1].startswith("preference rate: ")
