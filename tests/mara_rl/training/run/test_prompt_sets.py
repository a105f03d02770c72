"""What a run says of its prompts."""

import io

from rich.console import Console

from mara_rl.common.display import Display
from mara_rl.prompts.prompt_files import PromptRecord
from mara_rl.training.run.prompt_sets import tell_of_shared_prompts


def warning(train: list[str], heldout: list[str]) -> str:
    out = io.StringIO()
    records = ([PromptRecord(text, text) for text in texts] for texts in (train, heldout))
    tell_of_shared_prompts(*records, Display(Console(file=out, width=200)))
    return out.getvalue()


def test_heldout_prompts_that_training_sees_are_named() -> None:
    assert warning(["What is rain?"], ["What is snow?"]) == ""
    assert warning(["What is rain?", "a"], ["what is  RAIN", "What is snow?"]) == (
        "prompts.heldout: 1 of 2 prompts are in prompts.train as well (the first: "
        "'what is  RAIN'); the comparison will flatter the agent\n"
    )
