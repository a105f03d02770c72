import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from mara_rl.common.errors import DataError
from mara_rl.prompts.prompt_files import PromptRecord, prompt_hash, read_prompts


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_jsonl_keeps_order_ids_and_other_fields(tmp_path):
    file = write(
        tmp_path / "p.jsonl",
        '{"prompt": "two lines\\nand ümlaut", "id": 7, "topic": "a"}',
        "",
        '{"prompt": "second"}',
    )
    assert read_prompts(file) == [
        PromptRecord("7", "two lines\nand ümlaut", {"topic": "a"}),
        PromptRecord(prompt_hash("second"), "second", {}),
    ]


def test_jsonl_lines_end_at_newlines_only(tmp_path):
    file = write(tmp_path / "p.jsonl", '{"prompt": "line\u2028separator"}')
    assert read_prompts(file)[0].text == "line\u2028separator"


def test_published_json_form(tmp_path):
    rows = [{"instruction": "How?", "category": 3}, {"instruction": "Why?"}]
    file = write(tmp_path / "train.json", json.dumps(rows))
    assert [(p.text, p.extra) for p in read_prompts(file)] == [
        ("How?", {"category": 3}),
        ("Why?", {}),
    ]


def test_parquet(tmp_path):
    file = tmp_path / "p.parquet"
    parquet.write_table(pa.table({"prompt": ["x", "y"], "id": ["a", None], "score": [1, 2]}), file)
    assert read_prompts(file) == [
        PromptRecord("a", "x", {"score": 1}),
        PromptRecord(prompt_hash("y"), "y", {"score": 2}),
    ]


def test_ids_depend_on_the_text_alone(tmp_path):
    jsonl = write(tmp_path / "p.jsonl", '{"prompt": "same"}')
    published = write(tmp_path / "p.json", '[{"instruction": "other"}, {"instruction": "same"}]')
    assert read_prompts(jsonl)[0].prompt_id == read_prompts(published)[1].prompt_id
    assert prompt_hash("same") != prompt_hash("other")


def test_duplicates_are_dropped_and_counted(tmp_path, caplog):
    file = write(
        tmp_path / "p.jsonl",
        '{"prompt": "a", "id": "1"}',
        '{"prompt": "a", "id": "1"}',
        '{"prompt": "a", "id": "2"}',
        '{"prompt": "b"}',
    )
    assert [p.text for p in read_prompts(file)] == ["a", "b"]
    assert "dropped 2 duplicate prompts" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', r"p\.jsonl, line 2: not JSON"),
        ("p.jsonl", '{"prompt": "a"}\n[1]\n', "line 2: expected an object, got list"),
        ("p.jsonl", '{"text": "a"}', "line 1: field 'prompt' is missing"),
        ("p.jsonl", '{"prompt": 3}', "line 1: prompt is int, expected a string"),
        ("p.jsonl", '{"prompt": null}', "line 1: prompt is NoneType, expected a string"),
        ("p.jsonl", '{"prompt": " \\n"}', "line 1: prompt is empty"),
        ("p.jsonl", '{"prompt": "\\ud800"}', "line 1: prompt is not valid Unicode"),
        ("p.jsonl", '{"prompt": "a", "id": "\\ud800"}', "line 1: id is not valid Unicode"),
        ("p.jsonl", '{"prompt": "a", "t": ["\\ud800"]}', "line 1: t is not valid Unicode"),
        ("p.jsonl", '{"prompt": "a", "\\ud800": 1}', r"line 1: .ud800 is not valid Unicode"),
        ("p.jsonl", '{"prompt": "a", "id": true}', "line 1: id is True, expected a string or"),
        ("p.jsonl", '{"prompt":"a","id":1}\n{"prompt":"b","id":1}', "line 2: id '1' already names"),
        ("p.jsonl", "\n\n", r"p\.jsonl: no prompts in it"),
        ("p.json", "", r"p\.json: no prompts in it"),
        ("p.json", "[]", r"p\.json: no prompts in it"),
        ("p.json", '{"instruction": "a"}', r"p\.json: expected a list of objects, got dict"),
        (
            "p.json",
            '[{"instruction": "a"}, {"prompt": "b"}]',
            "item 2: field 'instruction' is miss",
        ),
        ("p.json", "[", r"p\.json: not JSON"),
        ("p.parquet", "no parquet", r"p\.parquet: not a parquet file"),
        (
            "p.csv",
            "prompt\na",
            r"p\.csv: unknown kind of file, expected \.jsonl, \.json, \.parquet",
        ),
    ],
)
def test_bad_files_are_refused_with_place_and_reason(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message) as caught:
        read_prompts(write(tmp_path / name, content))
    assert "\n" not in str(caught.value)


def test_missing_and_undecodable_files(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_prompts(tmp_path / "none.jsonl")
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        read_prompts(tmp_path / "latin.jsonl")


def test_parquet_without_the_column(tmp_path):
    parquet.write_table(pa.table({"text": ["x"]}), tmp_path / "p.parquet")
    with pytest.raises(DataError, match="row 1: field 'prompt' is missing"):
        read_prompts(tmp_path / "p.parquet")
