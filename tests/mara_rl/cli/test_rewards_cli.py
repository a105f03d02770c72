import json
import random
import sys

import pytest
from tiny_checkpoints import write_llm

from mara_rl.cli import app
from mara_rl.prompts import packaged_prompts

WORDS = ["water", "rain", "fox", "cloud", "river", "stone", "light", "wind"]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return str(write_llm(tmp_path_factory.mktemp("llm")))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Pairs a head can tell apart: the better answer is words, the worse one digits."""
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [
        {
            "prompt": f"Tell me of {rng.choice(WORDS)} {i}",
            "chosen": " ".join(rng.choices(WORDS, k=4)),
            "rejected": str(rng.randrange(10**12)),
            "kind": "odd" if i % 2 else "even",
        }
        for i in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs ``mara-rl rewards …`` and returns its exit status, output and error output."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["mara-rl", "rewards", *map(str, arguments)])
        capsys.readouterr()
        try:
            app.main()
            status = 0
        except SystemExit as exit_:
            status = exit_.code or 0
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def train_options(pairs, backbone, out):
    return ("--pairs", pairs, "--out", out, "--backbone", backbone, "--num-layers", 2)


@pytest.mark.parametrize("score_type", ["reward", "cost"])
def test_train_evaluate_score(command, pairs, backbone, tmp_path, score_type):
    out = tmp_path / "model"
    status, output, _ = command(
        *("train", *train_options(pairs, backbone, out), "--score-type", score_type),
        *("--l2", 0.1, "--l2", 1),
    )
    assert status == 0
    tried = [line.split(":")[0] for line in output.splitlines() if line.startswith("l2 ")]
    assert tried == ["l2 0.1", "l2 1"]
    accuracy = float(output.split("all: ")[1].split(" %")[0])
    assert accuracy > 90
    assert "odd: " in output

    status, output, _ = command("evaluate", "--model", out, "--pairs", pairs)
    assert status == 0
    assert float(output.split("all: ")[1].split(" %")[0]) > 90
    assert "(n=60)" in output

    def score(response):
        options = ("--model", out, "--prompt", "Tell me", "--response", response)
        return float(command("score", *options)[1])

    sign = 1 if score_type == "reward" else -1
    assert sign * (score("water rain fox") - score("848302947")) > 0


def test_training_twice_gives_the_same_weights(command, pairs, backbone, tmp_path):
    for name in ("one", "two"):
        options = train_options(pairs, backbone, tmp_path / name)
        assert command("train", *options, "--adapter", "lora", "--folds", 2)[0] == 0
    files = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.safe*")]
    assert len(files) == 2
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    status, output, _ = command("evaluate", "--model", tmp_path / "one", "--pairs", pairs)
    assert status == 0
    assert float(output.split("all: ")[1].split(" %")[0]) > 90


def test_score_of_a_file_keeps_its_fields(command, pairs, backbone, tmp_path):
    command("train", *train_options(pairs, backbone, tmp_path / "m"))
    rows = [{"id": i, "prompt": "p", "response": "r" * i} for i in range(3)]
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, output, _ = command("score", "--model", tmp_path / "m", "--file", file)
    assert status == 0
    scored = [json.loads(line) for line in output.splitlines()]
    assert [{k: row[k] for k in ("id", "prompt", "response")} for row in scored] == rows
    assert len({row["score"] for row in scored}) == 3


def test_build_pairs_writes_both_files_alike_for_one_seed(command, backbone, tmp_path):
    for name in ("harmless", "harmful"):
        rows = [json.dumps({"prompt": f"{name} question {i}"}) for i in range(6)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))

    def build(out, seed):
        status, _, _ = command(
            *("build-pairs", "--harmless", tmp_path / "harmless.jsonl"),
            *("--harmful", tmp_path / "harmful.jsonl", "--out", tmp_path / out),
            *("--prompts", 3, "--max-new-tokens", 30, "--llm", backbone, "--seed", seed),
        )
        assert status == 0
        return [(tmp_path / out / f"{k}_pairs.jsonl").read_text() for k in ("reward", "cost")]

    def build_with_packaged(out):
        command(
            *("build-pairs", "--harmless", tmp_path / "harmless.jsonl", "--packaged"),
            *("--harmful", tmp_path / "harmful.jsonl", "--out", tmp_path / out),
            *("--prompts", 2, "--max-new-tokens", 4, "--llm", backbone),
        )
        text = (tmp_path / out / "cost_pairs.jsonl").read_text()
        rows = [json.loads(line) for line in text.splitlines()]
        return {row["prompt"]: row["answerable"] for row in rows}

    first = build("one", 0)
    assert first == build("two", 0)
    assert first != build("three", 1)
    kinds = {json.loads(line)["kind"] for text in first for line in text.splitlines()}
    assert kinds == {"topic", "hot", "damaged", "refusal", "declined", "answer"}
    answerable = build_with_packaged("packaged")
    for prompt in packaged_prompts("train"):
        assert answerable[prompt.prompt] == (prompt.kind == "ordinary")


def test_bad_input_is_one_line_that_names_it(command, pairs, backbone, tmp_path):
    out = tmp_path / "model"
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "p", "chosen": "c", "rejected": "r"}\n{"prompt": "p"}\n')
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    few = tmp_path / "few.jsonl"
    few.write_text('{"prompt": "p", "chosen": "c", "rejected": "r"}\n' * 9)
    cases = [
        (("train", *train_options(tmp_path / "none", backbone, out)), "none could not be read"),
        (("train", *train_options(bad, backbone, out)), "bad.jsonl, line 2: chosen"),
        (("train", *train_options(empty, backbone, out)), "empty.jsonl is empty"),
        (("train", *train_options(few, backbone, out)), "folds is 5"),
        (("train", *train_options(pairs, backbone, tmp_path)), "already exists"),
        (("train", *train_options(pairs, "no/such/llm", out)), "llm 'no/such/llm'"),
        (("train", *train_options(pairs, backbone, out)[:-1], 9), "num_layers is 9"),
        (("evaluate", "--model", tmp_path / "gone", "--pairs", pairs), "neither a shipped name"),
    ]
    for arguments, named in cases:
        status, output, error = command(*arguments)
        assert status == 1, arguments
        assert named in error
        assert error.count("\n") == 1
        assert output == ""
    assert not out.exists()


def test_score_wants_a_file_or_an_answer(command):
    assert command("score", "--model", "smollm2-cost")[0] == 2
    assert command("score", "--model", "smollm2-cost", "--prompt", "p")[0] == 2
