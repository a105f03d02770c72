import json
from pathlib import Path

import pytest

from mara_rl.common.errors import DataError
from mara_rl.evaluation.answers import Answer, AnswerFile, read_foreign_answers, write_answers
from mara_rl.evaluation.plan import EvaluationPlan
from mara_rl.evaluation.prompt_set import PromptSet, load_prompt_set
from mara_rl.prompts.prompt_files import PromptRecord

RECORDS = [PromptRecord("a", "What is rain?"), PromptRecord("b", "How are you?")]
PROMPTS = PromptSet(RECORDS, 0, [], False, RECORDS)


def answer(name: str, replicate: int = 0) -> Answer:
    return Answer(id=name, replicate=replicate, text=f"{name}\u2028{replicate}\r\n", kl=0.5)


def test_what_was_appended_is_read_back(tmp_path):
    path = tmp_path / "m.jsonl"
    with AnswerFile(path) as file:
        file.append(answer("a"))
    with AnswerFile(path) as file:
        assert file.done == {("a", 0): answer("a")}
        file.append(answer("b"))
        assert file.table(["b", "a"], 1) == [[answer("b")], [answer("a")]]
    before = path.read_bytes()
    write_answers(path, [[answer("a")], [answer("b")]])
    assert path.read_bytes() == before


@pytest.mark.parametrize("keep", [1, 10, -1])
def test_a_torn_last_line_is_cut_off(tmp_path, keep):
    path = tmp_path / "m.jsonl"
    with AnswerFile(path) as file:
        file.append(answer("a"))
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:keep])
    with AnswerFile(path) as file:
        assert list(file.done) == [("a", 0)]
        file.append(answer("b"))
    assert path.read_bytes().count(b"\n") == 2
    assert list(AnswerFile(path).done) == [("a", 0), ("b", 0)]


def test_a_spoilt_line_is_named(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"id": "a", "replicate": 0}\n')
    with pytest.raises(DataError, match=r"m.jsonl, line 1: text: missing"):
        AnswerFile(path)


def foreign(tmp_path, rows, name="x.jsonl") -> str:
    path = tmp_path / name
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(json.dumps(rows) if name.endswith(".json") else lines)
    return str(path)


def test_answers_made_elsewhere_are_joined_by_id_or_prompt(tmp_path):
    rows = [
        {"id": "b", "text": "Fine."},
        {"instruction": "What is rain?", "output": "Water."},
        {"prompt": "What is rain?", "id": "a", "answer": "Drops."},
        {"id": "b", "response": "Well."},
    ]
    for name in ("x.jsonl", "x.json"):
        table = read_foreign_answers(foreign(tmp_path, rows, name), PROMPTS)
        assert [[a.text for a in row] for row in table] == [
            ["Water.", "Drops."],
            ["Fine.", "Well."],
        ]
        assert [a.replicate for a in table[0]] == [0, 1]


A, B = {"id": "a", "text": "x"}, {"id": "b", "text": "y"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no answers in it"),
        ([A, {"id": "c", "text": "z"}], "line 2: id 'c' is none of the 2 prompts"),
        ([A, {"prompt": "Hm?", "text": "z"}], r"line 2: prompt 'Hm\?'… is none of the 2"),
        ([A, {"id": "b", "prompt": "Hm?", "text": "z"}], r"line 2: prompt .* not that of id 'b'"),
        ([A, {"text": "z"}], "line 2: neither id nor prompt"),
        ([A, {"id": "b"}], "line 2: no answer text"),
        ([A], "no answer to 1 of 2 prompts .*'b'"),
        ([A, B, A], "1 to 2 answers a prompt"),
        ([A, 3], "line 2: expected an object"),
        ([A, {"id": "b", "text": "\ud83d"}], "line 2: not text"),
        ([A, {"prompt": [{"role": "user"}], "text": "z"}], "line 2: prompt .* is none of the 2"),
    ],
)
def test_answers_of_another_prompt_set_are_refused(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        read_foreign_answers(foreign(tmp_path, rows), PROMPTS)


def test_a_file_that_is_missing_or_no_json(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_foreign_answers(str(tmp_path / "none"), PROMPTS)
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(DataError, match="line 1: not JSON"):
        read_foreign_answers(str(tmp_path / "bad.jsonl"), PROMPTS)


def test_files_that_other_programs_wrote(tmp_path):
    """A byte order mark is no matter, another encoding is named."""
    path = foreign(tmp_path, [A, B])
    text = Path(path).read_text(encoding="utf-8")
    Path(path).write_text(text, encoding="utf-8-sig")
    assert len(read_foreign_answers(path, PROMPTS)) == len(RECORDS)
    Path(path).write_text(text.replace("}", ', "note": "é"}', 1), encoding="latin-1")
    with pytest.raises(DataError, match=r"not UTF-8 text \('utf-8' codec can't decode byte"):
        read_foreign_answers(path, PROMPTS)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("each", [1, 2])
def test_a_prompt_file_that_holds_everything_twice(tmp_path, named, each):
    """An answer to each line is one to each prompt, not two."""
    texts = ["One?", "Two?"] * 2
    records = [PromptRecord(f"{i % 2}{i // 2 if named else ''}", t) for i, t in enumerate(texts)]
    prompts = PromptSet(records[:2], 2, [], False, records)
    answers = [{"answer": f"{i} {part}"} for i in range(4) for part in range(each)]
    by_text = [{"prompt": texts[int(a["answer"][0])]} | a for a in answers]
    by_id = [{"id": records[int(a["answer"][0])].prompt_id} | a for a in answers]
    for rows in (by_text, by_id):
        table = read_foreign_answers(foreign(tmp_path, rows), prompts)
        assert [[a.text for a in row] for row in table] == [
            [f"{i} {part}" for part in range(each)] for i in range(2)
        ]
    once = read_foreign_answers(foreign(tmp_path, by_text[: 2 * each]), prompts)
    assert [len(row) for row in once] == [1, 1]


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("change", [{}, {"max_prompts": 2}, {"drop_seen": True}])
def test_answers_to_prompts_that_were_left_out_are_passed_over(tmp_path, change, named):
    """A file has an answer to every line of the prompt file, duplicates and all."""
    texts = ["One?", "Two?", "One?", "two", "Three?", "Four?"]
    prompts, trained = tmp_path / "prompts.jsonl", tmp_path / "train.jsonl"
    ids = [{"id": i} if named else {} for i in range(len(texts))]
    lines = [json.dumps({"prompt": text, **i}) + "\n" for text, i in zip(texts, ids, strict=True)]
    prompts.write_text("".join(lines))
    trained.write_text(json.dumps({"prompt": "four"}) + "\n")
    plan = EvaluationPlan(
        prompts=str(prompts),
        training_prompts=str(trained),
        methods={"base": {"kind": "base"}},
        **change,
    )
    rows = [
        {"prompt": text, "answer": f"{number} {part}"}
        for number, text in enumerate(texts)
        for part in "ab"
    ]
    kept = load_prompt_set(plan)
    found = read_foreign_answers(foreign(tmp_path, rows), kept)
    places = [texts.index(text) for text in kept.texts]
    assert [[a.text for a in row] for row in found] == [[f"{i} a", f"{i} b"] for i in places]
    # As it is where each prompt was answered once.
    once = [row for number, row in enumerate(rows) if number not in (4, 5)]
    assert read_foreign_answers(foreign(tmp_path, once), kept) == found
