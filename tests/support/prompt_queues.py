"""Prompt queues filled with made-up prompts, for the tests of the queue."""

from mara_rl.prompts.prompt_files import PromptRecord
from services.cluster.redis_server import connect
from services.prompt_queue.prompt_queue import PromptQueue


def records(number: int) -> list[PromptRecord]:
    return [PromptRecord(f"p{i}", f"text {i}") for i in range(number)]


def make_queue(url: str, prompts: int = 0, **settings) -> PromptQueue:
    queue = PromptQueue(connect(url), "test", **settings)
    queue.push(records(prompts))
    return queue


def ids(prompts) -> list[str]:
    return [prompt.prompt_id for prompt in prompts]


def entries(prompts) -> list[str]:
    return [prompt.entry_id for prompt in prompts]
