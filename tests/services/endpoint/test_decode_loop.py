"""The decode loop: what asyncio sees of a decoder that another thread steps."""

import asyncio
import threading
import time

import pytest
import torch
from small_agents import random_agent

from mara_rl.decoding.blend import Blend
from mara_rl.decoding.decoder import Decoder
from mara_rl.decoding.request import DecodeRequest, DecodeSettings
from mara_rl.llm.policy_llm import load_policy_llm
from services.endpoint.decode_loop import AnswerGroup, DecodeLoop, LoopStoppedError, QueueFullError

PROMPTS = ["Hi", "How do I bake bread?", "What is the time in Lima?", "a"]


@pytest.fixture(scope="module")
def llm(tiny_llms):
    return load_policy_llm(str(tiny_llms["llama"]), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def requests_of(llm):
    """Requests of the first so many prompts, half of them aligned."""
    blend = Blend.of([random_agent(llm, "relative", top_k=6)])

    def make(number: int, **settings: object) -> list[DecodeRequest]:
        chosen = DecodeSettings(**{"max_new_tokens": 12, "stream": True, "trace": True} | settings)
        return [
            DecodeRequest.of(llm, PROMPTS[i % 4], chosen, blend=blend if i % 2 else None)
            for i in range(number)
        ]

    return make


@pytest.fixture
def start(llm):
    """Starts loops that end with the test."""
    loops: list[DecodeLoop] = []

    def make(slots: int = 2, max_waiting: int = 8, **options: float) -> DecodeLoop:
        loop = DecodeLoop(Decoder(llm, slots), max_waiting=max_waiting, **options)
        loop.start()
        loops.append(loop)
        return loop

    yield make
    for loop in loops:
        loop.stop()


async def read(group: AnswerGroup) -> list:
    return [growth async for growth in group]


async def until(condition, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


def test_answers_are_those_of_the_decoder_token_by_token(llm, start, requests_of):
    expected = Decoder(llm, 2).run(requests_of(5))
    loop = start()

    async def run():
        groups = [loop.submit(requests_of(5)), loop.submit(requests_of(1))]
        return groups, await asyncio.gather(*map(read, groups))

    (group, other), (growths, _) = asyncio.run(run())
    assert [answer.token_ids for answer in group.answers] == [a.token_ids for a in expected]
    assert other.answers[0].token_ids == expected[0].token_ids
    for index, answer in enumerate(group.answers):
        tokens = [t for growth in growths if growth.index == index for t in growth.tokens]
        assert [token.token_id for token in tokens] == answer.token_ids
        assert [token.trace for token in tokens] == answer.trace
        assert "".join(token.text for token in tokens) == answer.text
    assert (loop.in_use, loop.waiting) == (0, 0)
    assert loop.tokens["base"] + loop.tokens["aligned"] == sum(
        len(a.token_ids) for a in [*group.answers, *other.answers]
    )
    assert loop.finished.total() == 6
    assert loop.examined["aligned"] == sum(a.examined for a in group.answers[1::2])


def test_cancelling_frees_slots_and_places_of_those_waiting(start, requests_of):
    loop = start(slots=2)

    async def run():
        long = loop.submit(requests_of(6, max_new_tokens=200))
        assert (loop.in_use, loop.waiting) == (2, 4)
        async for _ in long:
            break
        long.cancel()
        long.cancel()
        await until(lambda: loop.in_use == 0)
        assert loop.finished["cancelled"] == 6
        after = loop.submit(requests_of(1))
        await read(after)
        return after.answers[0]

    assert asyncio.run(run()).finish_reason in ("stop", "length")


def test_a_full_queue_refuses_all_or_none(start, requests_of):
    loop = start(slots=2, max_waiting=2)

    async def run():
        group = loop.submit(requests_of(3, max_new_tokens=200))
        with pytest.raises(QueueFullError, match="1 answers wait for 2 slots; expected at most 2"):
            loop.submit(requests_of(2))
        more = loop.submit(requests_of(1))
        group.cancel()
        await read(more)

    asyncio.run(run())


def test_one_answer_that_fails_leaves_the_others(llm, start, requests_of):
    loop = start(slots=2)
    step = loop._decoder.step

    def poisoned_step():
        growths = step()
        if not poisoned.is_set():
            poisoned.set()
            with torch.inference_mode():
                loop._decoder.engine._cache.layers[0].keys[0, :, 0] = float("nan")
        return growths

    poisoned = threading.Event()
    loop._decoder.step = poisoned_step

    async def run():
        bad, good = loop.submit(requests_of(2)[1:]), loop.submit(requests_of(4)[3:])
        bad_growths, _ = await asyncio.gather(read(bad), read(good))
        assert bad_growths[-1].finish_reason == "failed"
        assert good.answers[0].finish_reason in ("stop", "length")
        again = loop.submit(requests_of(2)[1:])
        await read(again)
        assert again.answers[0].finish_reason in ("stop", "length")

    asyncio.run(run())
    loop.check()


def test_a_broken_decoder_ends_all_requests_and_fails_the_health_check(start, requests_of):
    loop = start(slots=1)
    step = loop._decoder.step

    def breaking_step():
        if broken:
            raise ValueError("bad kernel\nand more")
        return step()

    broken: list[bool] = []
    loop._decoder.step = breaking_step

    async def run():
        groups = [loop.submit(requests_of(2, max_new_tokens=200)), loop.submit(requests_of(1))]
        loop.check()
        broken.append(True)
        for group in groups:
            with pytest.raises(LoopStoppedError, match="decoding broke: ValueError: bad kernel"):
                await read(group)
        with pytest.raises(LoopStoppedError, match="bad kernel"):
            loop.submit(requests_of(1))

    asyncio.run(run())
    assert (loop.in_use, loop.waiting) == (0, 0)
    with pytest.raises(RuntimeError, match="decoding broke: ValueError: bad kernel"):
        loop.check()


def test_a_step_that_does_not_end_fails_the_health_check(start, requests_of):
    loop = start(step_timeout_s=0.05)
    go_on = threading.Event()
    step = loop._decoder.step
    loop._decoder.step = lambda: (go_on.wait(), step())[1]

    async def run():
        group = loop.submit(requests_of(1))
        await asyncio.sleep(0.2)
        with pytest.raises(RuntimeError, match=r"runs for over 0\.05 s"):
            loop.check()
        go_on.set()
        await read(group)

    asyncio.run(run())
    loop.check()


def test_stopping_lets_answers_finish_for_a_while(start, requests_of):
    loop = start()

    async def run():
        group = loop.submit(requests_of(3))
        stopping = asyncio.create_task(asyncio.to_thread(loop.stop, drain_timeout_s=30.0))
        await until(lambda: not loop._accepting)
        with pytest.raises(LoopStoppedError, match="shutting down"):
            loop.submit(requests_of(1))
        await read(group)
        await stopping
        assert all(answer.finish_reason for answer in group.answers)

    asyncio.run(run())
    at_once = start()

    async def cut_off():
        group = at_once.submit(requests_of(3, max_new_tokens=200))
        await asyncio.to_thread(at_once.stop)
        with pytest.raises(LoopStoppedError, match="shutting down"):
            await read(group)

    asyncio.run(cut_off())
