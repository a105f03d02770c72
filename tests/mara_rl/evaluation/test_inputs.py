"""A folder holds the answers of certain inputs, and of no others."""

import json
from typing import Any

import pytest

from mara_rl.errors import ConfigError
from mara_rl.evaluation.answers import Answer, AnswerFile
from mara_rl.evaluation.inputs import claim, opened


def inputs(*, device: str = "cuda", **change: Any) -> dict[str, Any]:
    method = {"kind": "base", "replicates": 2, "dtype": "bfloat16", "device": device}
    return {"llm": "a", "prompts": {"n": 2}, "methods": {"m": method}} | change


def answered(folder, count: int) -> None:
    with AnswerFile(folder / "answers" / "m.jsonl") as file:
        for number in range(count):
            file.append(Answer(id=f"p{number // 2}", replicate=number % 2, text="x"))


def test_a_folder_that_was_left_before_anything_was_in_it_is_taken(tmp_path):
    with opened(tmp_path / "out"):
        pass
    with opened(tmp_path / "out"):
        assert not claim(tmp_path / "out", inputs())
    with opened(tmp_path / "out"):
        assert not claim(tmp_path / "out", inputs(llm="b")), "nothing was answered yet"


def test_how_answers_are_decoded_counts_while_some_are_missing(tmp_path):
    with opened(tmp_path):
        claim(tmp_path, inputs())
        answered(tmp_path, 3)
        with pytest.raises(ConfigError, match=r"methods\.m\.device: 'cuda', not 'cpu'"):
            claim(tmp_path, inputs(device="cpu"))
        answered(tmp_path, 4)
        assert claim(tmp_path, inputs(device="cpu"))
        kept = json.loads((tmp_path / "inputs.json").read_text())
        assert kept["methods"]["m"]["device"] == "cuda", "which made them"
        with pytest.raises(ConfigError, match="holds an evaluation with llm: 'a', not 'b'"):
            claim(tmp_path, inputs(llm="b"))


@pytest.mark.parametrize("content", ["{", "[1]", '{"a": 1}'])
def test_what_is_no_evaluation_is_not_touched(tmp_path, content):
    (tmp_path / "inputs.json").write_text(content)
    with opened(tmp_path), pytest.raises(ConfigError, match=r"inputs.json: .*another --out"):
        claim(tmp_path, inputs())
    assert (tmp_path / "inputs.json").read_text() == content
    (tmp_path / "inputs.json").rename(tmp_path / "other.json")
    with pytest.raises(ConfigError, match="holds no evaluation"), opened(tmp_path):
        pass
