"""Bad arguments and files: one line each."""

import re
from pathlib import Path

import pytest
from evaluate_command import common, write_rows


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
