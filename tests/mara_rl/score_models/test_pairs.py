import random

import pytest

from mara_rl.common.errors import DataError
from mara_rl.score_models.pairs import Pair, draw_prompts, read_rows, write_rows

GOOD = '{"prompt": "p", "chosen": "c", "rejected": ""}'


def test_rows_round_trip_and_other_fields_are_ignored(tmp_path):
    rows = [{"prompt": "p\u2028q", "chosen": "c", "rejected": "r", "kind": "k", "id": 3}]
    write_rows(tmp_path / "new" / "pairs.jsonl", rows)
    read = read_rows(tmp_path / "new" / "pairs.jsonl", Pair)
    assert read == [Pair(prompt="p\u2028q", chosen="c", rejected="r", kind="k")]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["pairs.jsonl"]


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('{"prompt": "p", "chosen": "c"}', "rejected"),
        ('{"prompt": " ", "chosen": "c", "rejected": "r"}', "prompt"),
        ('{"prompt": "p", "chosen": 1, "rejected": "r"}', "chosen"),
        ("[1, 2]", "row"),
        ('{"prompt": ', "row"),
    ],
)
def test_wrong_row_is_named(tmp_path, line, named):
    path = tmp_path / "pairs.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n")
    with pytest.raises(DataError, match=f"pairs.jsonl, line 3: {named}: "):
        read_rows(path, Pair)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe"])
def test_empty_or_undecodable_file_is_named(tmp_path, content):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"pairs\.jsonl"):
        read_rows(path, Pair)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl could not be read"):
        read_rows(tmp_path / "none.jsonl", Pair)


def test_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        write_rows(tmp_path / "rows.jsonl", [{"a": 1}, {"a": object()}])
    assert list(tmp_path.iterdir()) == []


def test_drawn_prompts_are_different_short_and_follow_the_seed(tmp_path):
    path = tmp_path / "prompts.jsonl"
    texts = [f"prompt {i % 8}" for i in range(20)] + ["long " * 60]
    write_rows(path, [{"prompt": text, "id": "x"} for text in texts])
    drawn = draw_prompts(path, 8, random.Random(0))
    assert len(set(drawn)) == 8
    assert drawn == draw_prompts(path, 8, random.Random(0))
    with pytest.raises(DataError, match=r"8 different prompts.*expected 9"):
        draw_prompts(path, 9, random.Random(0))
