"""Many requests of every kind at the endpoint, some cancelled, some malformed.

Run with `make bench-soak`: 2,000 requests, 32 at a time, at a `mara-rl serve` of its own with
SmolLM2, or at ``--url``. Exits with status 1 where a request of a kind ends as it should not (a 5xx
other than 503 while loading is never right), where slots are left in use, or where the server's
memory grows. What is asked follows from ``--seed`` alone.
"""

import argparse
import asyncio
import contextlib
import json
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import httpx2
from serve_process import serving

PROMPTS = ["Hi", "How do I bake bread?", "Why is the sky blue?", "Name three rivers.", "Grüße 🎈"]
MEMORY_SLACK = (0.04, 25e6)  # share, bytes


@dataclass
class Soak:
    """A running soak, and what has come of it.

    Attributes:
        statuses: by kind of request; "left" where the client went before the end.
        wrong: what ended as it should not, one line each.
        memory: the server's resident bytes along the way.
    """

    client: httpx2.AsyncClient
    models: list[str]
    max_tokens: int
    statuses: dict[str, Counter[str]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)

    async def one(self, seed: int) -> None:
        """One request, all of it drawn from ``seed``."""
        draw = random.Random(seed)
        kind = draw.choices(list(KINDS), [weight for weight, _, _ in KINDS.values()])[0]
        _, expected, ask = KINDS[kind]
        began_s = time.monotonic()
        try:
            found = await ask(self, draw)
        except httpx2.HTTPError as error:
            found = type(error).__name__
        self.seconds.append(time.monotonic() - began_s)
        self.statuses.setdefault(kind, Counter())[found] += 1
        if found not in expected:
            self.wrong.append(f"{kind} (seed {seed}) ended with {found}; expected {expected}")

    def body(self, draw: random.Random, **more: Any) -> dict[str, Any]:
        return {
            "model": draw.choice(self.models),
            "messages": [{"role": "user", "content": draw.choice(PROMPTS)}],
            "max_tokens": draw.randint(1, self.max_tokens),
            **more,
        }

    async def post(self, body: Any, path: str = "chat/completions") -> str:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        kind = {"Content-Type": "application/json"}
        answer = await self.client.post(f"/v1/{path}", content=content, headers=kind)
        error = answer.json().get("error") if answer.status_code >= 400 else None
        if error is not None and not error["message"]:
            return f"{answer.status_code} without a message"
        return str(answer.status_code)

    async def stream(self, body: dict[str, Any], *, leave_after: int | None = None) -> str:
        """The status of a stream, "left" where it was left after so many events."""
        async with self.client.stream("POST", "/v1/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                return str(answer.status_code)
            last = ""
            count = 0
            async for line in answer.aiter_lines():
                if not line:
                    continue
                count, last = count + 1, line
                if leave_after is not None and count > leave_after:
                    return "left"
            return "200" if last == "data: [DONE]" else f"broke off: {last[:80]}"

    async def metric(self, name: str) -> float:
        """Of all replicas together; waits for the first report after a start."""
        async with asyncio.timeout(30):
            while True:
                text = (await self.client.get("/metrics")).text
                found = re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)
                if found:
                    return sum(map(float, found))
                await asyncio.sleep(0.1)

    async def run(self, count: int, concurrent: int, seed: int) -> None:
        places = asyncio.Semaphore(concurrent)

        async def place(number: int) -> None:
            async with places:
                await self.one(seed + number)
            if number % max(1, count // 40) == 0:
                self.memory.append(await self.metric("process_resident_memory_bytes"))

        await asyncio.gather(*(place(number) for number in range(count)))

    async def left_in_use(self) -> float:
        """Slots and places still taken once nothing runs any more."""
        deadline_s = time.monotonic() + 30
        while True:
            used = await self.metric("mara_slots_in_use") + await self.metric(
                "mara_waiting_answers"
            )
            if not used or time.monotonic() > deadline_s:
                return used
            await asyncio.sleep(0.1)

    def memory_growth(self) -> float:
        """Bytes by which the last quarter is above the second; the first is warming up."""
        quarter = max(1, len(self.memory) // 4)
        return median(self.memory[-quarter:]) - median(self.memory[quarter : 2 * quarter])


async def leave_early(soak: Soak, draw: random.Random) -> str:
    """Ask for much and hang up before or while the answer comes."""
    body = soak.body(draw, stream=draw.random() < 0.5, max_tokens=soak.max_tokens * 8)
    if body["stream"] and draw.random() < 0.7:
        return await soak.stream(body, leave_after=draw.randint(0, 4))
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(draw.uniform(0.01, 0.3)):
            return await soak.post(body)
    return "left"


async def malformed(soak: Soak, draw: random.Random) -> str:
    whole = json.dumps(soak.body(draw)).encode()
    broken = [b"", b"[]", b"null", whole[: draw.randrange(1, len(whole))], bytes(range(256))]
    return await soak.post(draw.choice(broken))


async def refused(soak: Soak, draw: random.Random) -> str:
    fields: list[dict[str, Any]] = [
        {"tools": [{"type": "function"}]},
        {"temperature": -1},
        {"n": 1000},
        {"stop": [""]},
        {"max_tokens": 10**9},
        {"messages": []},
        {"mara": {"strength": "much"}},
        {"nonsense": draw.random()},
    ]
    return await soak.post(soak.body(draw, **draw.choice(fields)))


async def completion(soak: Soak, draw: random.Random) -> str:
    body = soak.body(draw, prompt=draw.sample(PROMPTS, draw.randint(1, 2)), logprobs=1)
    del body["messages"]
    return await soak.post(body, "completions")


async def models(soak: Soak, draw: random.Random) -> str:
    path = draw.choice(["models", f"models/{soak.models[-1]}", "models/nobody/1"])
    status = (await soak.client.get(f"/v1/{path}")).status_code
    return "200" if status == (404 if "nobody" in path else 200) else str(status)


def chat(**more: Any) -> Callable[[Soak, random.Random], Awaitable[str]]:
    return lambda soak, draw: soak.post(soak.body(draw, **more))


def streamed(**more: Any) -> Callable[[Soak, random.Random], Awaitable[str]]:
    return lambda soak, draw: soak.stream(soak.body(draw, stream=True, **more))


Kind = tuple[float, set[str], Callable[[Soak, random.Random], Awaitable[str]]]
DONE, BUSY = {"200", "429"}, {"429"}
KINDS: dict[str, Kind] = {  # weight, how it may end, the request
    "chat": (10, DONE, chat()),
    "sampled": (10, DONE, chat(temperature=1.0, n=2)),
    "log-probabilities": (5, DONE, chat(logprobs=True, top_logprobs=5)),
    "stream": (20, DONE, streamed()),
    "stream with trace": (10, DONE, streamed(mara={"trace": True})),
    "stop text": (5, DONE, streamed(stop=["e", "zz"])),
    "completion": (8, DONE, completion),
    "models": (4, {"200"}, models),
    "client leaves": (14, {"left", "200"} | BUSY, leave_early),
    "malformed": (6, {"400"}, malformed),
    "refused": (6, {"400"}, refused),
    "unknown model": (1, {"404"}, chat(model="nobody@champion")),
    "too large": (1, {"413"}, chat(user="x" * (2 << 20))),
}


async def soak_url(url: str, arguments: argparse.Namespace) -> Soak:
    limits = httpx2.Limits(max_connections=arguments.concurrent + 8)
    headers = {"Authorization": f"Bearer {arguments.key}"} if arguments.key else {}
    async with httpx2.AsyncClient(
        base_url=url, limits=limits, timeout=300, headers=headers
    ) as client:
        listed = (await client.get("/v1/models")).json()["data"]
        soak = Soak(client, [model["id"] for model in listed], arguments.max_tokens)
        began_s = time.monotonic()
        await soak.run(arguments.requests, arguments.concurrent, arguments.seed)
        seconds = time.monotonic() - began_s
        left = await soak.left_in_use()
    if left:
        soak.wrong.append(f"{left:g} slots or places are still taken")
    for kind, (_, allowed, _) in KINDS.items():
        counts = soak.statuses.get(kind, Counter())
        if allowed == DONE and counts["200"] * 2 < counts.total():
            soak.wrong.append(
                f"{kind}: {counts['200']} of {counts.total()} answered; expected half"
            )
    growth, level = soak.memory_growth(), median(soak.memory)
    share, least = MEMORY_SLACK
    if growth > max(share * level, least):
        soak.wrong.append(f"memory grew by {growth / 1e6:.0f} MB over {level / 1e6:.0f} MB")
    total = sum((counts for counts in soak.statuses.values()), Counter())
    print(f"{arguments.requests} requests, {arguments.concurrent} at a time, in {seconds:.0f} s")
    for kind, counts in sorted(soak.statuses.items()):
        print(f"  {kind:20}", ", ".join(f"{name}: {n}" for name, n in counts.most_common()))
    print(f"  {'all':20}", ", ".join(f"{name}: {n}" for name, n in total.most_common()))
    print(
        f"slots left in use: {left:g}; server memory {level / 1e6:.0f} MB, "
        f"last quarter {growth / 1e6:+.1f} MB against the second"
    )
    return soak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", help="a running server; one is started unless given")
    parser.add_argument("--key", default="", help="its API key, if it needs one")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--concurrent", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=8, help="of an answer, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--agent", action="append", help="agents for the server that is started")
    arguments = parser.parse_args()
    agents = [part for agent in arguments.agent or [] for part in ("--agent", agent)]
    server = contextlib.nullcontext(arguments.url) if arguments.url else serving(*agents)
    with server as url:
        soak = asyncio.run(soak_url(url, arguments))
    for line in soak.wrong[:20]:
        print(f"WRONG: {line}")
    sys.exit(1 if soak.wrong else 0)


if __name__ == "__main__":
    main()
