"""The docs: snippets run as they are written, and the endpoint's fields are those it takes."""

import re
from pathlib import Path

import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as OpenAIChat
from openai.types.completion_create_params import CompletionCreateParamsBase as OpenAICompletion

from services.endpoint.openai_requests import ChatRequest, CompletionRequest, MaraOptions, Message

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.slow
@pytest.mark.parametrize("page", ["python-api.md"])
def test_snippets_run_one_after_the_other(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(snippets) > 5
    names: dict[str, object] = {}
    for snippet in snippets:
        exec(compile(snippet, page, "exec"), names)
    assert "Paris" in capsys.readouterr().out


def test_the_page_of_the_endpoint_lists_every_field() -> None:
    page = (DOCS / "endpoint.md").read_text(encoding="utf-8")
    both, chat, completions, mara = (
        {name for row in re.findall(r"^\|(.*?)\|", table, re.MULTILINE) for name in names(row)}
        for table in re.findall(r"^\| field \|.*\n((?:\|.*\n)+)", page, re.MULTILINE)
    )
    assert both | chat == set(ChatRequest.model_fields)
    assert both | completions == set(CompletionRequest.model_fields)
    assert both == set(ChatRequest.model_fields) & set(CompletionRequest.model_fields) - {
        "logprobs"  # which is another in each
    }
    assert mara == set(MaraOptions.model_fields)
    messages = re.search(r"^\| `messages` \|.*$", page, re.MULTILINE)
    assert messages is not None
    assert set(Message.model_fields) - {"role", "content"} < names(messages[0])
    refused = re.search(r"^Refused by name: (.*?), and all others", page, re.MULTILINE | re.DOTALL)
    assert refused is not None
    # All that the official client may send is either supported or refused, and said to be.
    offered = {*OpenAIChat.__annotations__, *OpenAICompletion.__annotations__, "stream"}
    assert names(refused[1]) == offered - both - chat - completions


def names(text: str) -> set[str]:
    """What stands in backquotes."""
    return set(re.findall(r"`(\w+)`", text))
