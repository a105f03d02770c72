"""One evaluation a folder: going on in it, and what is refused there."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml
from evaluate_command import N, answered, base_alone, common, comparable, read_rows, write_rows

from mara_rl.common.file_lock import file_lock
from mara_rl.llm.policy_llm import load_policy_llm


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
    kept = read_rows(tmp_path / "out" / "answers" / "elsewhere.jsonl")
    assert kept == [{"id": f"p{i}", "replicate": 0, "text": f"y {i}"} for i in range(N)]


def test_the_best_of_answers_made_elsewhere(evaluate, made, tmp_path):
    file, out = tmp_path / "elsewhere.jsonl", tmp_path / "out"
    write_rows(file, [*answered("x"), *answered("y")])

    def best_of(n: int) -> tuple[int, str, str]:
        best = f"methods.best={{kind: best_of, n: {n}, of: elsewhere}}"
        answers = ("--answers", f"elsewhere={file}", "--set", best)
        return evaluate(*base_alone(made), *answers, "--out", out)

    status, _, err = best_of(2)
    assert status == 0, err
    chosen = read_rows(out / "answers" / "best.jsonl")
    assert all(row["text"] in (f"x {i}", f"y {i}") for i, row in enumerate(chosen))
    status, _, err = best_of(3)
    assert (status, "methods.best.n: 3, but the file of 'elsewhere' has 2" in err) == (1, True), err


def test_a_larger_best_of_is_added_and_a_smaller_one_looked_at(evaluate, made, tmp_path):
    out = tmp_path / "out"

    def best_of(n: int) -> tuple[list[dict], list[dict], dict]:
        """Samples on file and scored, and the figures of the methods."""
        arguments = [*base_alone(made)[:-2], "--methods", f"base,best-of-{n}", "--out", out]
        status, _, err = evaluate(*arguments)
        assert status == 0, err
        scored = [r for r in read_rows(out / "scores.jsonl") if r["method"] == "sampled"]
        summary = json.loads((out / "summary.json").read_text())
        return read_rows(out / "answers" / "sampled.jsonl"), scored, summary["methods"]

    two, scored_two, figures_two = best_of(2)
    four, scored_four, figures_four = best_of(4)
    assert (len(two), len(scored_two), len(scored_four)) == (2 * N, 2 * N, 4 * N)
    assert four[: 2 * N] == two
    assert figures_four["sampled"]["replicates"] == 4
    again, scored_again, figures_again = best_of(2)
    assert (again, scored_again) == (four, scored_two)
    for name, found in figures_two.items():
        assert figures_again[name]["judges"] == found["judges"]
        assert figures_again[name]["decoding"] == found["decoding"]


def test_the_same_files_may_be_named_otherwise(evaluate, made, tmp_path, monkeypatch):
    file, out = tmp_path / "x.jsonl", tmp_path / "out"
    write_rows(file, answered("x"))
    arguments = [*common(made), "--llm", made["llm"], "--methods", "base,agent", "--out", out]
    assert evaluate(*arguments, "--answers", f"x={file}")[0] == 0
    monkeypatch.chdir(made["root"])
    moved = ["--prompts", "prompts.jsonl", "--agent", "./agent", *arguments[4:]]
    status, text, err = evaluate(*moved, "--answers", f"x={os.path.relpath(file)}")
    assert status == 0, err
    assert "answers of" not in text


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


def test_one_process_at_a_time_has_the_folder(evaluate, made, tmp_path):
    arguments = [*common(made), "--methods", "base,agent", "--out", tmp_path]
    assert evaluate(*arguments)[0] == 0
    answers = (tmp_path / "answers" / "agent.jsonl").read_bytes()
    with file_lock(tmp_path / "lock", "refused"):
        status, _, err = evaluate(*arguments)
    assert status == 1
    assert f"{tmp_path} is being evaluated by another process" in " ".join(err.split())
    assert (tmp_path / "answers" / "agent.jsonl").read_bytes() == answers
    assert evaluate(*arguments)[0] == 0
