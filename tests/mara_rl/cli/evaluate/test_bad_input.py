"""Bad arguments and files: one line each."""

import re
from pathlib import Path

import pytest
import torch
from evaluate_command import answered, base_alone, common, read_rows, write_rows

from mara_rl.decoding.decoder import Decoder


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
        (["--set", "llm=5"], "llm: .*valid string, not 5"),
        (["--set", "methods.base=foo", "--allow-other-llm"], "methods.base: .*not 'foo'"),
        (["--prompts", "{root}/surrogate.jsonl"], "line 1: id is not valid Unicode"),
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
    write_rows(root / "surrogate.jsonl", [{"id": "\ud800", "prompt": "a"}])
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


def test_an_llm_that_is_no_name_without_an_agent(evaluate):
    """Which names the champion that is looked for."""
    status, _, err = evaluate("--set", "llm=5")
    assert (status, err) == (1, "error: plan: llm: input should be a valid string, not 5\n")


def test_a_gpu_that_is_too_small_is_named(evaluate, made, tmp_path, monkeypatch):
    def step(_: Decoder) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 has …")

    monkeypatch.setattr(Decoder, "step", step)
    status, _, err = evaluate(*base_alone(made), "--out", tmp_path)
    assert (status, err.count("\n")) == (1, 1)
    assert "method 'base': the GPU's memory is too small for num_slots: 32; lower it" in err


def test_what_failed_leaves_no_empty_folder_and_says_how_to_go_on(
    evaluate, made, tmp_path, monkeypatch
):
    monkeypatch.setenv("MARA_HOME", str(tmp_path))
    write_rows(tmp_path / "x.jsonl", answered("x")[1:])
    status, text, _ = evaluate(*base_alone(made), "--answers", f"x={tmp_path / 'x.jsonl'}")
    assert (status, "goes on from here" in text) == (1, False)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
    # The first answers are made, those of the second method end it.
    methods = ("--set", f"methods.other={{kind: base, llm: {made['other']}}}")
    made_answers = Decoder.step

    def step(decoder: Decoder) -> object:
        if decoder.llm.name == made["other"]:
            raise torch.OutOfMemoryError
        return made_answers(decoder)

    monkeypatch.setattr(Decoder, "step", step)
    status, text, _ = evaluate(*base_alone(made), *methods)
    folder = tmp_path / "evaluation-1"
    assert status == 1
    assert f"stopped: the same command with --out {folder} goes on from here" in text
    kept = read_rows(folder / "answers" / "base.jsonl")
    monkeypatch.setattr(Decoder, "step", made_answers)
    status, text, err = evaluate(*base_alone(made), *methods, "--out", folder)
    assert status == 0, err
    assert "answers of base" not in text
    assert read_rows(folder / "answers" / "base.jsonl") == kept
