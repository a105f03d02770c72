"""The API as the official client sees it, over a tiny LLM on a loopback port."""

import json
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import numpy as np
import openai
import pytest
import requests
from endpoints import AGENT, LLM, LengthScorer, make_backend, running_endpoint
from small_agents import random_agent

from mara_rl.common.errors import RetryableError
from mara_rl.decoding.blend import Blend
from mara_rl.decoding.decoder import Decoder
from mara_rl.decoding.request import DecodeRequest, DecodeSettings
from mara_rl.llm.policy_llm import load_policy_llm
from services.endpoint.decode_plan import ApiLimits

ASK = [{"role": "user", "content": "How do I bake bread?"}]
KEY = "a-key-for-the-tests"
JSON = {"Content-Type": "application/json"}
HALF = "a \ud83d"


@pytest.fixture(scope="module")
def llm(tiny_llms):
    return load_policy_llm(str(tiny_llms["llama"]), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def agents(llm):
    return {
        AGENT: random_agent(llm, "relative", top_k=6),
        "mara-other@candidate": random_agent(llm, "anchored", top_k=6),
        "published": random_agent(llm, "paper", top_k=6, rule="threshold", fallback="first"),
    }


@pytest.fixture(scope="module")
def server(llm, agents):
    """URL and endpoint that the tests of this file share; with scores, without keys."""
    backend = make_backend(llm, agents=agents, scorer=LengthScorer())
    with running_endpoint(backend) as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key="unused", max_retries=0)


def client_of(url: str, key: str = KEY) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


def chat(client, model=AGENT, mara=None, **options):
    options = {"messages": ASK, "max_tokens": 10} | options
    extra = {} if mara is None else {"extra_body": {"mara": mara}}
    return client.chat.completions.create(model=model, **options, **extra)


def expected(llm, agents, *, model=AGENT, prompt_ids=None, strength=1.0, **settings):
    """What the decoder answers when asked directly."""
    blend = None if model == LLM else Blend.of([agents[model]], strength=strength)
    chosen = DecodeSettings(**{"max_new_tokens": 10, "trace": True} | settings)
    request = DecodeRequest.of(llm, ASK[0]["content"], chosen, blend=blend, prompt_ids=prompt_ids)
    return Decoder(llm, 1).run([request])[0]


def settle(endpoint, seconds=10.0):
    """Wait until no slot is in use."""
    deadline = time.monotonic() + seconds
    while endpoint.backend().loop.in_use:
        assert time.monotonic() < deadline, "a slot is not given back"
        time.sleep(0.01)


@pytest.mark.parametrize("model", [LLM, AGENT, "published"])
def test_a_chat_answer_is_the_decoders(client, llm, agents, model):
    answer = chat(client, model)
    wanted = expected(llm, agents, model=model)
    choice = answer.choices[0]
    assert choice.message.content == wanted.text
    assert choice.message.role == "assistant"
    assert choice.finish_reason == wanted.finish_reason
    prompt = len(llm.prompt_ids(ASK[0]["content"]))
    assert answer.usage.prompt_tokens == prompt
    assert answer.usage.completion_tokens == len(wanted.token_ids)
    assert answer.usage.total_tokens == prompt + len(wanted.token_ids)
    assert answer.model == model
    assert answer.object == "chat.completion"
    assert answer.system_fingerprint == (LLM if model == LLM else f"{model.partition('@')[0]}/1")
    assert "mara" not in choice.model_extra


def test_a_stream_is_what_openai_sends(client, llm, agents):
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}, n=2))
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    *growing, last = chunks
    assert last.choices == []
    assert last.usage.completion_tokens == 20
    wanted = expected(llm, agents).text
    for index in range(2):
        mine = [chunk.choices[0] for chunk in growing if chunk.choices[0].index == index]
        assert mine[0].delta.role == "assistant"
        assert "".join(choice.delta.content or "" for choice in mine) == wanted
        assert [choice.finish_reason for choice in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1].finish_reason == "length"
        assert mine[-1].delta.content is None
    assert all(chunk.usage is None for chunk in chat(client, stream=True))


def test_events_on_the_wire(server):
    body = {"model": AGENT, "messages": ASK, "max_tokens": 3, "stream": True}
    answer = requests.post(f"{server[0]}/v1/chat/completions", json=body, timeout=30)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-request-id"]
    by_proxy = {"X-Request-Id": "from-the-proxy"}  # which tells the client itself
    answer_2 = requests.get(f"{server[0]}/health", headers=by_proxy, timeout=30)
    assert "x-request-id" not in answer_2.headers
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(event.removeprefix("data: "))["id"] for event in events[:-2])


def test_seeds_temperature_and_choices(client, llm, agents):
    sampled = {"temperature": 1.5, "seed": 7}
    one = chat(client, **sampled).choices[0].message.content
    assert one == chat(client, **sampled).choices[0].message.content
    assert one == expected(llm, agents, rule="sample", temperature=1.5, seed=7).text
    both = [choice.message.content for choice in chat(client, n=2, **sampled).choices]
    assert both[0] == one
    assert both[1] == chat(client, temperature=1.5, seed=8).choices[0].message.content
    free = {chat(client, temperature=1.5).choices[0].message.content for _ in range(4)}
    assert len(free) > 1  # left out, the seed is random
    greedy = expected(llm, agents, model="published", rule="argmax_induced").text
    assert chat(client, "published", temperature=0).choices[0].message.content == greedy


def test_stop_texts_end_an_answer(client, llm, agents):
    whole = expected(llm, agents).text
    stop = whole[4:6]
    for given in (stop, ["never", stop]):
        choice = chat(client, stop=given).choices[0]
        assert choice.message.content == whole[: whole.index(stop)]
        assert choice.finish_reason == "stop"
    chunks = list(chat(client, stop=stop, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole[: whole.index(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model", [LLM, AGENT])
def test_logprobs_are_those_of_the_induced_distribution(client, llm, agents, model, stream):
    answer = chat(client, model, logprobs=True, top_logprobs=3, stream=stream)
    if stream:
        parts = [chunk.choices[0].logprobs for chunk in answer]
        content = [entry for part in parts if part for entry in part.content]
    else:
        content = answer.choices[0].logprobs.content
    wanted = expected(llm, agents, model=model)
    assert len(content) == len(wanted.token_ids)
    for entry, token, step in zip(content, wanted.token_ids, wanted.trace, strict=True):
        taken = step.candidates[step.choice]
        of_llm = model == LLM or len(step.candidates) == 1
        probability = taken.llm_prob if of_llm else taken.induced_prob
        assert entry.token == llm.tokenizer.decode([token])
        assert entry.bytes == list(entry.token.encode())
        assert math.exp(entry.logprob) == pytest.approx(probability, rel=1e-4)
        assert 1 <= len(entry.top_logprobs) <= 3
        listed = [other.logprob for other in entry.top_logprobs]
        assert listed == sorted(listed, reverse=True)
        assert entry.logprob <= listed[0] + 1e-9
    assert chat(client, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []


def test_completions_go_on_with_raw_text(client, llm, agents):
    ids = llm.tokenizer("Once upon a time")["input_ids"]
    wanted = expected(llm, agents, prompt_ids=ids).text
    answer = client.completions.create(
        model=AGENT, prompt=["Once upon a time", "x"], max_tokens=10, logprobs=2
    )
    assert answer.object == "text_completion"
    assert [choice.index for choice in answer.choices] == [0, 1]
    choice = answer.choices[0]
    assert choice.text == wanted
    assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs) == 10
    assert all(len(listed) <= 2 for listed in choice.logprobs.top_logprobs)
    assert choice.logprobs.text_offset[0] == 0
    assert answer.usage.prompt_tokens == len(ids) + 1
    same = client.completions.create(model=AGENT, prompt=ids, max_tokens=10)
    assert same.choices[0].text == wanted
    chunks = list(client.completions.create(model=AGENT, prompt=ids, max_tokens=10, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == wanted
    assert chunks[-1].choices[0].finish_reason == "length"
    assert client.completions.create(model=LLM, prompt="a").usage.completion_tokens <= 16


def test_prompts_that_are_too_many_or_of_no_token_are_named(server, client, llm, monkeypatch):
    with pytest.raises(openai.BadRequestError, match="20 prompts with 1 answers") as caught:
        client.completions.create(model=LLM, prompt=["x"] * 20)
    assert caught.value.param == "prompt"
    with pytest.raises(openai.BadRequestError, match="4 prompts with 5 answers") as caught:
        client.completions.create(model=LLM, prompt=["x"] * 4, n=5)
    assert caught.value.param == "n"
    # Some tokenizers drop white space; a decoder could not begin.
    backend = server[1].backend()
    monkeypatch.setattr(backend.llm, "tokenizer", lambda text: {"input_ids": []})
    with pytest.raises(openai.BadRequestError, match="prompt: no token") as caught:
        client.completions.create(model=LLM, prompt=" ")
    assert caught.value.param == "prompt"


def test_a_long_prompt_holds_up_nobody_while_it_becomes_tokens(server, client, monkeypatch):
    backend = server[1].backend()
    tokenizer, begun, health_seen = backend.llm.tokenizer, threading.Event(), threading.Event()

    def slow(text, **more):
        begun.set()
        assert health_seen.wait(10)
        return tokenizer(text, **more)

    monkeypatch.setattr(backend.llm, "tokenizer", Mock(wraps=tokenizer, side_effect=slow))
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.completions.create, model=LLM, prompt="a", max_tokens=1)
        assert begun.wait(10)
        assert requests.get(f"{server[0]}/health", timeout=5).status_code == 200
        health_seen.set()
        assert answer.result().usage.completion_tokens == 1


def test_a_trace_says_how_each_token_was_chosen(client, llm, agents):
    wanted = expected(llm, agents)
    choice = chat(client, mara={"trace": True}).choices[0]
    found = choice.mara
    assert found["examined"] == wanted.examined
    assert found["kl"] == pytest.approx(wanted.kl, abs=1e-3)
    assert len(found["trace"]) == len(wanted.token_ids)
    for entry, step in zip(found["trace"], wanted.trace, strict=True):
        assert entry["choice"] == step.choice
        assert entry["num_candidates"] == len(step.candidates)
        taken = entry["candidates"][entry["choice"]]
        assert taken["token"] == entry["token"]
        assert taken["llm_prob"] == pytest.approx(step.candidates[step.choice].llm_prob, abs=1e-4)
    chunks = [chunk.choices[0] for chunk in chat(client, mara={"trace": True}, stream=True)]
    streamed = [entry for part in chunks if part.delta.content for entry in part.mara["trace"]]
    assert streamed == found["trace"]
    assert "".join(entry["text"] for entry in streamed) == choice.message.content


def test_strength_and_blends(client, llm, agents):
    plain = chat(client, LLM).choices[0].message.content
    top_k = agents[AGENT].spec.top_k
    assert chat(client, mara={"strength": 0}).choices[0].message.content == (
        expected(llm, agents, model=LLM, top_k=top_k).text
    )
    stronger = chat(client, mara={"strength": 2.5}).choices[0].message.content
    assert stronger == expected(llm, agents, strength=2.5).text != plain
    alone = chat(client, LLM, mara={"blend": {AGENT: 1.0}})
    assert alone.choices[0].message.content == chat(client).choices[0].message.content
    mixed = chat(client, mara={"blend": {AGENT: 0.5, "mara-other@candidate": 0.5}})
    assert mixed.system_fingerprint == "mara-tiny/1+mara-other/1"


def test_scores_and_the_best_of_several(client):
    choice = chat(client, mara={"scores": True}).choices[0]
    assert choice.mara["scores"]["reward"] == len(choice.message.content)
    *_, last = chat(client, mara={"scores": True}, stream=True)
    assert last.choices[0].mara["scores"] == choice.mara["scores"]
    sampled = {"temperature": 2.0, "seed": 3, "max_tokens": 30}
    all_of_them = chat(client, n=6, mara={"scores": True}, **sampled).choices
    lengths = [one.mara["scores"]["reward"] for one in all_of_them]
    best = chat(client, n=2, mara={"best_of": 6, "scores": True}, **sampled)
    assert [one.mara["scores"]["reward"] for one in best.choices] == sorted(lengths)[:-3:-1]
    assert best.usage.completion_tokens > sum(map(len, (c.message.content for c in best.choices)))
    rank_by = {"reward": -1, "cost": 0}
    worst = chat(client, mara={"best_of": 6, "rank_by": rank_by, "scores": True}, **sampled)
    assert worst.choices[0].mara["scores"]["reward"] == min(lengths)


def test_models_are_the_llm_and_its_agents(client):
    listed = {model.id: model for model in client.models.list()}
    assert set(listed) == {LLM, AGENT, "mara-other@candidate", "published"}
    assert (listed[LLM].kind, listed[AGENT].kind) == ("llm", "agent")
    assert client.models.retrieve(AGENT) == listed[AGENT]
    assert client.models.retrieve(LLM) == listed[LLM]
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("mara-tiny/9")
    assert caught.value.code == "model_not_found"


BAD = {
    "tools": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    "unknown": ({"extra_body": {"top_k": 3}}, "top_k"),
    "modalities": ({"modalities": ["audio"]}, "modalities"),
    "penalty": ({"frequency_penalty": 0.5}, "frequency_penalty"),
    "bias": ({"logit_bias": {"5": 1}}, "logit_bias"),
    "format": ({"response_format": {"type": "json_object"}}, "response_format.type"),
    "hot": ({"temperature": 2.5}, "temperature"),
    "tiny temperature": ({"temperature": 1e-9}, "temperature"),
    "top_p": ({"top_p": 0.5}, "top_p"),
    "n": ({"n": 0}, "n"),
    "number as text": ({"temperature": "1"}, "temperature"),
    "truth as a number": ({"extra_body": {"n": True}}, "n"),
    "seed as text": ({"extra_body": {"seed": "3"}}, "seed"),
    "truth as text": ({"extra_body": {"logprobs": "true"}}, "logprobs"),
    "strength as text": ({"extra_body": {"mara": {"strength": "2"}}}, "mara.strength"),
    "many": ({"n": 99}, "n"),
    "stop": ({"stop": ["a"] * 5}, "stop"),
    "empty stop": ({"stop": ""}, "stop.0"),
    "no messages": ({"messages": []}, "messages"),
    "empty": ({"messages": [{"role": "user", "content": " "}]}, "messages"),
    "assistant last": ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
    "tool role": ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
        "messages.0.content",
    ),
    "tool calls": (
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}, *ASK]},
        "messages.0.tool_calls",
    ),
    "name": ({"messages": [{"role": "user", "content": "x", "name": "Ada"}]}, "messages.0.name"),
    "long": ({"messages": [{"role": "user", "content": "x" * 400}]}, "messages"),
    "max_tokens": ({"max_tokens": 5000}, "max_tokens"),
    "max_completion_tokens": (
        {"max_tokens": openai.omit, "max_completion_tokens": 5000},
        "max_completion_tokens",
    ),
    "no room": ({"max_tokens": 250}, "messages"),
    "both lengths": ({"max_completion_tokens": 5}, "max_tokens"),
    "top_logprobs": ({"top_logprobs": 2}, "top_logprobs"),
    "stream_options": ({"stream_options": {"include_usage": True}}, "stream_options"),
    "seed": ({"seed": -1}, "seed"),
    "mara": ({"extra_body": {"mara": {"tracing": True}}}, "mara.tracing"),
    "strength": ({"extra_body": {"mara": {"strength": "NaN"}}}, "mara.strength"),
    "base strength": ({"model": LLM, "extra_body": {"mara": {"strength": 2}}}, "mara.strength"),
    "paper strength": (
        {"model": "published", "extra_body": {"mara": {"strength": 2}}},
        "mara.strength",
    ),
    "many best_of": ({"temperature": 1, "extra_body": {"mara": {"best_of": 17}}}, "mara.best_of"),
    "blend": ({"extra_body": {"mara": {"blend": {"published": 1}}}}, "mara.blend"),
    "rank_by": (
        {"temperature": 1, "extra_body": {"mara": {"best_of": 2, "rank_by": {"x": 1}}}},
        "mara.rank_by",
    ),
    "rank_by of one": ({"extra_body": {"mara": {"rank_by": {"reward": 1}}}}, "mara.rank_by"),
    "greedy best_of": ({"extra_body": {"mara": {"best_of": 2}}}, "mara.best_of"),
    "small best_of": (
        {"n": 3, "temperature": 1, "extra_body": {"mara": {"best_of": 2}}},
        "mara.best_of",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_not_supported_is_refused_by_name(client, case):
    options, param = BAD[case]
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, **{"model": AGENT, **options})
    error = caught.value
    assert error.param is not None
    assert error.param.startswith(param)
    assert error.type == "invalid_request_error"
    assert error.body["message"].count("\n") == 0


def test_an_answer_may_be_sent_back_as_the_client_has_it(client):
    said = chat(client).choices[0].message
    plain = {"role": "assistant", "content": said.content}
    whole = chat(client, messages=[*ASK, plain, *ASK])
    for again in (said, said.model_dump()):
        answer = chat(client, messages=[*ASK, again, *ASK])
        assert answer.choices == whole.choices
        assert answer.usage == whole.usage
    assert whole.usage.prompt_tokens > 2 * chat(client).usage.prompt_tokens


def test_values_that_ask_for_nothing_are_let_pass(client, llm, agents):
    answer = chat(
        client,
        top_p=1,
        n=1,
        frequency_penalty=0,
        presence_penalty=0.0,
        logit_bias={},
        tools=[],
        tool_choice="none",
        response_format={"type": "text"},
        store=False,
        user="somebody",
    )
    assert answer.choices[0].message.content == expected(llm, agents).text


def test_bodies_that_are_no_request(server):
    url = f"{server[0]}/v1/chat/completions"
    for body in (b"", b"{", b"[]", b'"text"', b"\xff\xfe", b'{"model": 1}'):
        answer = requests.post(url, data=body, timeout=30)
        assert answer.status_code == 400, body
        assert answer.json()["error"]["type"] == "invalid_request_error"
    assert requests.get(url, timeout=30).status_code == 405
    missing = requests.get(f"{server[0]}/v1/nothing", timeout=30)
    assert missing.status_code == 404
    assert "/v1/nothing" in missing.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "given", "param"),
    [
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": HALF}]},
            "messages.0.content",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": HALF}]}]},
            "messages.0.content.0.text",
        ),
        (
            "chat/completions",
            {"messages": ASK, "mara": {"rank_by": {HALF: 1}}},
            "mara.rank_by.a \N{REPLACEMENT CHARACTER}",
        ),
        ("completions", {"prompt": HALF}, "prompt"),
        ("completions", {"prompt": ["whole", HALF]}, "prompt.1"),
    ],
)
def test_half_of_a_character_is_refused(server, path, given, param):
    """JavaScript's slice() leaves such texts; a tokenizer takes none of them."""
    body = json.dumps({"model": AGENT, **given})  # in which it is an escape, as they send it
    answer = requests.post(f"{server[0]}/v1/{path}", data=body, headers=JSON, timeout=30)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert "half of a character" in error["message"]
    assert error["param"].startswith(param)


def test_too_large_a_body_is_refused_however_it_is_sent(llm):
    limits = ApiLimits(max_body_bytes=2000)
    with running_endpoint(make_backend(llm), limits=limits) as (url, _):
        for body in (b"x" * 3000, iter([b"x" * 1500] * 3)):
            answer = requests.post(f"{url}/v1/chat/completions", data=body, timeout=30)
            assert answer.status_code == 413
            assert answer.json()["error"]["code"] == "body_too_large"


def test_keys_are_needed_and_limited(llm):
    limits = ApiLimits(max_concurrent=1)
    backend = make_backend(llm, step_s=0.02)
    with running_endpoint(backend, keys=[KEY], limits=limits) as (url, endpoint):
        for open_path in ("/health", "/metrics", "/"):
            assert requests.get(url + open_path, timeout=30).ok
        with pytest.raises(openai.AuthenticationError) as caught:
            client_of(url, "not-the-right-one").models.list()
        assert caught.value.code == "invalid_api_key"
        bad = requests.post(f"{url}/v1/completions", data=b"{", timeout=30)
        assert bad.status_code == 401  # said before anything of the body
        assert bad.headers["www-authenticate"] == "Bearer"
        client = client_of(url)
        stream = chat(client, stream=True, max_tokens=150)
        next(iter(stream))
        with pytest.raises(openai.RateLimitError) as busy:
            chat(client)
        assert busy.value.response.headers["retry-after"]
        stream.close()
        settle(endpoint)
        assert chat(client).choices


def test_a_full_queue_says_when_to_come_again(llm):
    backend = make_backend(llm, slots=1, max_waiting=0, step_s=0.02)
    with running_endpoint(backend) as (url, endpoint):
        client = client_of(url)
        stream = chat(client, stream=True, max_tokens=150)
        next(iter(stream))
        with pytest.raises(openai.RateLimitError) as caught:
            chat(client)
        assert caught.value.code == "queue_full"
        assert caught.value.response.headers["retry-after"]
        stream.close()
        settle(endpoint)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(llm, stream):
    backend = make_backend(llm, slots=1, step_s=0.02)
    with running_endpoint(backend) as (url, endpoint):
        client = client_of(url)
        first = chat(client, stream=True, max_tokens=200)
        next(iter(first))
        hasty = client.with_options(timeout=0.3)
        with pytest.raises(openai.APITimeoutError):  # while it waits for the slot
            list(chat(hasty, stream=stream, max_tokens=200))
        first.close()
        settle(endpoint)
        assert backend.loop.finished["cancelled"] == 2
        assert backend.loop.waiting == 0
        assert 'status="499"' in requests.get(f"{url}/metrics", timeout=30).text


def test_while_it_loads_and_when_that_fails(llm):
    go_on = []

    def slow():
        while not go_on:
            time.sleep(0.01)
        if go_on[0] == "fail":
            raise OSError("no such file\nsecond line")
        return make_backend(llm)

    with running_endpoint(slow) as (url, _):
        for path in ("/health", "/v1/models"):
            answer = requests.get(url + path, timeout=30)
            assert answer.status_code == 503
            assert answer.headers["retry-after"]
            assert answer.json()["error"]["code"] == "loading"
        with pytest.raises(openai.InternalServerError) as caught:
            chat(client_of(url))
        assert caught.value.status_code == 503
        go_on.append("load")
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=8)
        assert chat(client, LLM).choices  # the client itself tries again
    go_on.clear()
    with running_endpoint(slow) as (url, endpoint):
        go_on.append("fail")
        deadline = time.monotonic() + 10
        while (answer := requests.get(f"{url}/health", timeout=30)).status_code == 503:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert answer.status_code == 500
        assert answer.json()["error"]["message"] == "loading failed: no such file"
        with pytest.raises(RuntimeError, match="no such file"):
            endpoint.check()


def test_beside_replicas_that_have_loaded_requests_wait_for_it(llm):
    others, go_on = [], threading.Event()

    def slow():
        assert go_on.wait(30)
        return make_backend(llm)

    with (
        running_endpoint(slow, others_loaded=lambda: bool(others)) as (url, _),
        ThreadPoolExecutor() as pool,
    ):
        assert requests.get(f"{url}/v1/models", timeout=30).status_code == 503
        others.append("another")
        asked = [
            pool.submit(requests.get, f"{url}{p}", timeout=30) for p in ("/health", "/v1/models")
        ]
        asked.append(pool.submit(chat, client_of(url), LLM))
        time.sleep(0.5)
        assert not any(answer.done() for answer in asked)
        go_on.set()
        assert [answer.result().status_code for answer in asked[:2]] == [200, 200]
        assert asked[2].result().choices


def test_when_the_decoder_breaks_requests_end_and_health_fails(llm):
    backend = make_backend(llm, slots=1, step_s=0.02)
    with running_endpoint(backend) as (url, _):
        client = client_of(url)
        stream = iter(chat(client, stream=True, max_tokens=200))
        next(stream)

        def broken_step():
            raise ValueError("bad kernel")

        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(chat, client)
            time.sleep(0.1)
            backend.loop._decoder.step = broken_step
            with pytest.raises(openai.APIError, match="bad kernel"):
                list(stream)
            with pytest.raises(openai.InternalServerError, match="bad kernel"):
                waiting.result()
        assert requests.get(f"{url}/health", timeout=30).status_code == 500


def test_scores_that_are_away_are_said_to_be(llm):
    class Away(LengthScorer):
        def score(self, pairs):
            raise RetryableError("score 'reward' is away")

    class Half(LengthScorer):
        def score(self, pairs):
            return np.where([[True, False]], super().score(pairs), np.nan)

    for scorer, scores in ((Away(), {"reward": None, "cost": None}), (Half(), None)):
        with running_endpoint(make_backend(llm, scorer=scorer)) as (url, _):
            client = client_of(url)
            found = chat(client, mara={"scores": True}).choices[0].mara
            assert found["scores_error"]
            assert found["scores"]["cost"] is None
            best_of = {"temperature": 1, "mara": {"best_of": 2}}
            if scores is None:
                assert chat(client, **best_of).choices
                continue
            assert found["scores"] == scores
            with pytest.raises(openai.InternalServerError) as caught:
                chat(client, **best_of)
            assert (caught.value.status_code, caught.value.code) == (503, "scores_unavailable")
    without = pytest.raises(openai.BadRequestError, match="no score services")
    with running_endpoint(make_backend(llm)) as (url, _), without:
        chat(client_of(url), mara={"scores": True})


def test_the_log_has_no_text_unless_it_is_asked_for(llm, caplog):
    caplog.set_level("INFO", "mara_rl.requests")
    for log_text in (False, True):
        caplog.clear()
        with running_endpoint(make_backend(llm), keys=[KEY], log_text=log_text) as (url, _):
            answer = chat(client_of(url), user="me").choices[0].message.content
            with pytest.raises(openai.BadRequestError):
                chat(client_of(url), messages="how to bake bread")
        ours = [r.record for r in caplog.records if r.name == "mara_rl.requests"]
        done, refused = (record for record in ours if record["method"] == "POST")
        assert done["status"] == 200
        assert done["completion_tokens"] == 10
        assert (done["model"], done["version"], done["user"]) == (AGENT, "mara-tiny/1", "me")
        assert done["first_token_s"] <= done["seconds"]
        assert refused["status"] == 400
        assert refused["error_code"] == "invalid_value"
        everything = json.dumps(ours)
        assert KEY not in everything
        assert ("bake bread" in everything) is log_text
        assert (json.dumps(answer)[1:-1] in everything) is log_text


def test_metrics_count_what_was_done(llm):
    with running_endpoint(make_backend(llm, slots=3)) as (url, _):
        client = client_of(url)
        chat(client), chat(client, LLM)
        with pytest.raises(openai.NotFoundError):
            chat(client, "nobody")
        answers = 'mara_answers_total{application="aligned",deployment="AlignedLLM",reason="length"'
        lines = metrics_with(url, f'{answers},replica="test"}}', "2.0")
        chat(client)
        later = metrics_with(url, f'{answers},replica="test"}}', "3.0")
    told = 'application="aligned",deployment="AlignedLLM"'  # by Ray, in a replica
    route = f'{told},replica="test",route="/v1/chat/completions"'
    assert lines[f'mara_requests_total{{{route},status="200"}}'] == "2.0"
    assert lines[f'mara_requests_total{{{route},status="404"}}'] == "1.0"
    assert lines[f"mara_request_seconds_count{{{route}}}"] == "3.0"
    assert lines[f'mara_slots{{{told},replica="test"}}'] == "3.0"
    assert lines[f'mara_slots_in_use{{{told},replica="test"}}'] == "0.0"
    assert lines[f'mara_waiting_answers{{{told},replica="test"}}'] == "0.0"
    aligned = f'{told},kind="aligned",replica="test"'
    assert lines[f"mara_tokens_total{{{aligned}}}"] == "10.0"
    assert later[f"mara_tokens_total{{{aligned}}}"] == "20.0"
    assert float(lines[f"mara_candidates_examined_total{{{aligned}}}"]) >= 10
    assert float(lines[f"mara_candidates_looked_total{{{aligned}}}"]) >= 10
    assert lines[f'mara_time_to_first_token_seconds_count{{{told},replica="test"}}'] == "2.0"
    assert float(lines[f'process_resident_memory_bytes{{{told},replica="test"}}']) > 1e7


def metrics_with(url: str, name: str, value: str) -> dict[str, str]:
    """The page of metrics by name once one of them has come to a value."""
    deadline = time.monotonic() + 10
    lines: dict[str, str] = {}
    while lines.get(name) != value:
        assert time.monotonic() < deadline, lines
        time.sleep(0.05)
        text = requests.get(f"{url}/metrics", timeout=30).text
        lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return lines
