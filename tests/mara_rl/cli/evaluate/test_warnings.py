"""What makes figures doubtful is said beside them."""

from evaluate_command import common, write_rows

from mara_rl.evaluation.console import warnings


def test_refusals_nobody_can_judge_are_warned_of():
    def figures(share: float, kinds: dict) -> dict:
        return {
            "prompts": {"seen_in_training": [], "n": 40, "left_out": {}}
            | {"source": "packaged", "training_prompts": "packaged"},
            "flags": {},
            "judges": {"one": {"training": False}},
            "methods": {
                "agent": {"kind": "agent", "answers": {"refusal_share": share, "by_kind": kinds}}
            },
        }

    assert warnings(figures(0.3, {})) == warnings(figures(0.4, {"harmful": {}})) == []
    assert warnings(figures(0.4, {}))[0].startswith("agent refuses 40%; the prompts have no kind")


def test_where_leaks_were_not_looked_for_is_warned_of():
    def lines(source: str, training: str | None, kind: str) -> list[str]:
        sources = {"source": source, "training_prompts": training}
        return warnings(
            {
                "prompts": {"seen_in_training": [], "n": 40, "left_out": {}} | sources,
                "flags": {},
                "judges": {"one": {"training": False}},
                "methods": {"m": {"kind": kind, "answers": {"refusal_share": 0, "by_kind": {}}}},
            }
        )

    [line] = lines("mine.jsonl", "packaged", "agent")
    assert "--set training_prompts=FILE" in line
    for source, training, kind in (
        ("packaged", "packaged", "agent"),
        ("mine.jsonl", "train.jsonl", "agent"),
        ("mine.jsonl", None, "agent"),  # as the user wants it
        ("mine.jsonl", "packaged", "base"),
    ):
        assert lines(source, training, kind) == []


def test_prompts_seen_in_training_are_warned_of_or_dropped(evaluate, made, tmp_path):
    training = tmp_path / "train.jsonl"
    write_rows(training, [{"prompt": "QUESTION 4"}, {"prompt": "Question 5?"}])
    arguments = [*common(made), "--methods", "base,agent", "--set", f"training_prompts={training}"]
    status, text, _ = evaluate(*arguments, "--out", tmp_path / "kept")
    assert status == 0
    assert "2 seen in training (kept: see --drop-seen)" in text
    assert "warning: 2 of 10 prompts were seen in training" in text
    status, text, _ = evaluate(*arguments, "--drop-seen", "--out", tmp_path / "dropped")
    assert status == 0
    assert "8 prompts, 1 duplicates dropped, 2 seen in training (dropped)" in text
    assert text.rstrip().endswith("(n=8)")
