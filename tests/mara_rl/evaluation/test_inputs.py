"""A folder holds the answers of certain inputs, and of no others."""

import json
from typing import Any

import pytest

from mara_rl.common.errors import ConfigError
from mara_rl.evaluation.answers import Answer, AnswerFile
from mara_rl.evaluation.inputs import claim, locked


def inputs(*, device: str = "cuda", replicates: int = 2, **change: Any) -> dict[str, Any]:
    method = {"kind": "base", "replicates": replicates, "dtype": "bfloat16", "device": device}
    return {"llm": "a", "prompts": {"n": 2}, "methods": {"m": method}} | change


def answered(folder, count: int) -> None:
    with AnswerFile(folder / "answers" / "m.jsonl") as file:
        for number in range(count):
            file.append(Answer(id=f"p{number // 2}", replicate=number % 2, text="x"))


def test_a_folder_that_was_left_before_anything_was_in_it_is_taken(tmp_path):
    with locked(tmp_path / "out"):
        pass
    with locked(tmp_path / "out"):
        assert not claim(tmp_path / "out", inputs())
    with locked(tmp_path / "out"):
        assert not claim(tmp_path / "out", inputs(llm="b")), "nothing was answered yet"


def test_how_answers_are_decoded_counts_while_some_are_missing(tmp_path):
    with locked(tmp_path):
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


def test_more_answers_to_a_prompt_may_be_added_and_fewer_looked_at(tmp_path):
    """Each has a seed of its own; how it is decoded counts while one of those asked for lacks."""
    with locked(tmp_path):
        claim(tmp_path, inputs(replicates=4))
        answered(tmp_path, 3)  # both to p0, the first to p1
        assert claim(tmp_path, inputs(replicates=3))
        assert claim(tmp_path, inputs(replicates=1, device="cpu"))
        for fewer in (2, 3):
            with pytest.raises(ConfigError, match=r"methods\.m\.device: 'cuda', not 'cpu'"):
                claim(tmp_path, inputs(replicates=fewer, device="cpu"))


def test_surplus_answers_do_not_stand_for_those_that_lack(tmp_path):
    with locked(tmp_path):
        claim(tmp_path, inputs(replicates=2))
        with AnswerFile(tmp_path / "answers" / "m.jsonl") as file:
            for replicate in (0, 1):  # as many as there are prompts, all to one
                file.append(Answer(id="p0", replicate=replicate, text="x"))
        with pytest.raises(ConfigError, match=r"methods\.m\.device"):
            claim(tmp_path, inputs(replicates=1, device="cpu"))


@pytest.mark.parametrize(
    ("name", "check"),
    [("llm", "llm_sha256"), ("agent", "agent_sha256"), ("file", "sha256")],
)
def test_the_same_content_may_be_named_otherwise(tmp_path, name, check):
    def of(path: str, sha256: str) -> dict[str, Any]:
        return {"llm": "a", "prompts": {"n": 2}, "methods": {"m": {name: path, check: sha256}}}

    with locked(tmp_path):
        claim(tmp_path, of("./x", "1"))
        answered(tmp_path, 1)
        assert claim(tmp_path, of("/here/x", "1"))
        with pytest.raises(ConfigError, match=rf"methods\.m\.{check}: '1', not '2'"):
            claim(tmp_path, of("/here/x", "2"))
        with pytest.raises(ConfigError, match=rf"methods\.m\.{name}: '/here/x', not 'x/y'"):
            claim(tmp_path, of("x/y", ""))  # of a hub: known by its name alone


def test_prompts_are_known_by_their_checksum(tmp_path):
    with locked(tmp_path):
        claim(tmp_path, inputs(prompts={"source": "./x", "n": 2, "checksum": "1"}))
        answered(tmp_path, 1)
        assert claim(tmp_path, inputs(prompts={"source": "x", "n": 2, "checksum": "1"}))
        with pytest.raises(ConfigError, match=r"prompts\.source: 'x', not 'y'"):
            claim(tmp_path, inputs(prompts={"source": "y", "n": 2, "checksum": "2"}))


def test_answers_made_elsewhere_bind_nothing_but_their_name(tmp_path):
    def of(kind: str, **change: Any) -> dict[str, Any]:
        return inputs(methods={"m": {"kind": kind, "file": "x", "sha256": "1"} | change})

    with locked(tmp_path):
        claim(tmp_path, of("answers"))
        answered(tmp_path, 4)
        assert not claim(tmp_path, of("answers", sha256="2") | {"llm": "b"})
        assert not claim(tmp_path, inputs(methods={}))
        with pytest.raises(ConfigError, match=r"methods\.m\.kind: 'answers', not 'base'"):
            claim(tmp_path, of("base"))


@pytest.mark.parametrize("content", ["{", "[1]", '{"a": 1}'])
def test_what_is_no_evaluation_is_not_touched(tmp_path, content):
    (tmp_path / "inputs.json").write_text(content)
    with locked(tmp_path), pytest.raises(ConfigError, match=r"inputs.json: .*another --out"):
        claim(tmp_path, inputs())
    assert (tmp_path / "inputs.json").read_text() == content
    (tmp_path / "inputs.json").rename(tmp_path / "other.json")
    with pytest.raises(ConfigError, match="holds no evaluation"), locked(tmp_path):
        pass
