"""``mara-rl generate`` over a tiny LLM."""

import re
import sys

import pytest
from small_agents import make_agent, random_agent

from mara_rl.agents.agent_files import save_agent
from mara_rl.cli import app
from mara_rl.llm.policy_llm import PolicyLLM, load_policy_llm


@pytest.fixture
def llm(tiny_llms) -> PolicyLLM:
    return load_policy_llm(str(tiny_llms["llama"]), dtype="float32")


@pytest.fixture
def agent(llm, tmp_path) -> str:
    made = random_agent(llm, "relative", top_k=6, llm=llm.name)
    save_agent(made, tmp_path / "agent")
    return str(tmp_path / "agent")


@pytest.fixture
def generate(monkeypatch, capsys):
    """Runs ``mara-rl generate …`` and returns its exit status, output and error output."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mara-rl", "generate", *map(str, arguments)])
        status = 0
        try:
            app.main()
        except SystemExit as end:
            status = int(end.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return run


def test_base_and_aligned_answers(generate, llm, agent):
    limit = ("--max-new-tokens", 12)
    status, base, _ = generate("Hello", "--base", "--llm", llm.name, *limit)
    assert status == 0
    status, aligned, _ = generate("Hello", "--agent", agent, *limit)  # the LLM the agent names
    assert status == 0
    assert aligned != base
    assert generate("Hello", "--agent", agent, "--strength", 0, *limit)[1] == base
    blended = ("--agent", agent, "--agent", agent, "--weight", 0.25, "--weight", 0.75)
    assert generate("Hello", *blended, *limit)[1] == aligned
    sampled = ("--agent", agent, "--rule", "sample", *limit)
    assert (
        generate("Hello", *sampled, "--seed", 1)[1] == generate("Hello", *sampled, "--seed", 1)[1]
    )
    stop = aligned[2:4]
    assert generate("Hello", "--agent", agent, "--stop", stop, *limit)[1] == (
        aligned[: aligned.index(stop)] + "\n"
    )


def test_a_trace_shows_each_token(generate, agent):
    status, out, _ = generate("Hello", "--agent", agent, "--trace", "--max-new-tokens", 5)
    assert status == 0
    assert "accept a" in out
    [(tokens, examined)] = re.findall(r"(\d+) tokens .* ([\d.]+) candidates examined a token", out)
    rows = re.findall(r"(\d+) of (\d+)", out)
    assert len(rows) == int(tokens)
    assert all(1 <= int(looked) <= int(all_of_them) for looked, all_of_them in rows)
    assert 1 <= float(examined) <= 6


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("--base", "--agent", "x"), 2, "leave out --agent"),
        (("--base", "--strength", 0.5), 2, "leave out --agent, --weight and --strength"),
        (("--weight", 1), 2, "--weight goes with --agent"),
        (
            ("--agent", "{agent}", "--max-new-tokens", 9, "--temperature", 0.7),
            1,
            "temperature: 0.7 changes nothing for rule 'argmax_induced'",
        ),
        (
            ("--base", "--llm", "{llm}", "--max-new-tokens", 9, "--seed", 3),
            1,
            "draws nothing; expected --rule sample",
        ),
        (("--agent", "/no/such"), 1, "'/no/such': no such file or folder"),
        (("--base", "--llm", "{llm}", "--system", "a \udcff"), 1, "system's message is not valid"),
        (
            ("--agent", "{agent}", "--top-k", 3, "--max-new-tokens", 9),
            1,
            "top_k: 3 asked for, the agent was trained with 6",
        ),
        (("--agent", "{agent}", "--rule", "best"), 1, "rule: .*'best'"),
        (("--agent", "{agent}", "--strength", "nan"), 1, "strength nan"),
        (("--agent", "{agent}", "--max-new-tokens", 500), 1, "exceeds the LLM's context of 256"),
        (("--agent", "{agent}", "--llm", "{other}"), 1, "trained on LLM '.*llama', used with"),
        (("--agent", "{small}", "--llm", "{llm}"), 1, "hidden size 12; LLM .* hidden size 32"),
        (("--base", "--llm", "/no/such/model.gguf"), 1, "no such file /no/such/model.gguf"),
        (("--base", "--llm", "{llm}", "--dtype", "int3"), 2, "expected one of float32"),
    ],
)
def test_bad_input_is_named(generate, llm, agent, tiny_llms, tmp_path, arguments, status, message):
    save_agent(make_agent(), tmp_path / "small")
    names = {
        "agent": agent,
        "llm": llm.name,
        "other": tiny_llms["qwen3"],
        "small": tmp_path / "small",
    }
    filled = [str(argument).format(**names) for argument in arguments]
    found, _, err = generate("Hello", *filled)
    assert found == status
    plain = " ".join(re.sub(r"[│╭╮╰╯─]", " ", err).split())
    assert re.search(message, plain), err
    assert "Traceback" not in err


def test_without_an_agent_it_says_how_to_get_one(generate, monkeypatch, tmp_path):
    monkeypatch.setenv("MARA_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    status, _, err = generate("Hello")
    assert status == 1
    assert "mara-rl train quickstart" in err
