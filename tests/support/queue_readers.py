"""What other processes do in the queue tests; importable, so that they can be spawned."""

import signal

from services.prompt_queue.prompt_source import PromptSourceConfig, RedisPromptSource


def hold_one(config: PromptSourceConfig) -> None:
    """Take a prompt and keep it until killed."""
    source = RedisPromptSource(config)
    source.next()
    signal.pause()


def take_and_deliver(config: PromptSourceConfig, number: int) -> list[str]:
    """Take prompts, mark them delivered, return their ids."""
    source = RedisPromptSource(config.model_copy(update={"prefetch": 1}))
    prompts = [source.next() for _ in range(number)]
    config.open_queue().mark_delivered([prompt.entry_id for prompt in prompts])
    return [prompt.prompt_id for prompt in prompts]
