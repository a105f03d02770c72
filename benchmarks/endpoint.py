"""What the endpoint costs over its own decoder, in this process: tokens per second, first token.

Run with `make bench-endpoint`. Both sides decode the same prompts with the same agent, LLM, dtype
and threads, in turn: `Decoder.run` here while the server idles, then as many streams of
`mara-rl serve`, read by a client here. Quote the ratios; absolute figures depend on the machine.
The agent is untrained (head anchored: it accepts as the LLM itself would) unless one is given.
"""

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path
from statistics import median

import httpx2
import torch
from serve_process import serving

from mara_rl.agents.agent import Agent, AgentSpec
from mara_rl.agents.agent_files import load_agent, save_agent
from mara_rl.decoding.blend import Blend
from mara_rl.decoding.decoder import Decoder
from mara_rl.decoding.request import DecodeRequest, DecodeSettings
from mara_rl.llm.policy_llm import SMOLLM2, PolicyLLM, load_policy_llm
from mara_rl.prompts import packaged_prompts


def in_process(
    llm: PolicyLLM, decoder: Decoder, agent: Agent, prompts: list[str], tokens: int
) -> tuple[int, float, float]:
    """Tokens, seconds, and seconds to the first token of each answer (median)."""
    settings = DecodeSettings(max_new_tokens=tokens, stream=True)
    blend = Blend.of([agent])
    began_s = time.perf_counter()
    requests = [DecodeRequest.of(llm, prompt, settings, blend=blend) for prompt in prompts]
    answers = [decoder.submit(request) for request in requests]
    first: dict[int, float] = {}
    while not decoder.idle:
        for growth in decoder.step():
            first.setdefault(id(growth.answer), time.perf_counter() - began_s)
    seconds = time.perf_counter() - began_s
    return sum(len(answer.token_ids) for answer in answers), seconds, median(first.values())


async def one_stream(client: httpx2.AsyncClient, prompt: str, tokens: int) -> tuple[int, float]:
    """Tokens of a streamed answer, and seconds to the first."""
    body = {
        "model": "bench",
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began_s, first_s, usage = time.perf_counter(), 0.0, {"completion_tokens": 0}
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if not first_s and event["choices"] and event["choices"][0]["delta"].get("content"):
                first_s = time.perf_counter() - began_s
            usage = event.get("usage") or usage
    return usage["completion_tokens"], first_s


async def served(url: str, prompts: list[str], tokens: int) -> tuple[int, float, float]:
    """As `in_process`, over HTTP with one stream a prompt."""
    async with httpx2.AsyncClient(base_url=url, timeout=600) as client:
        await client.get("/health")
        began_s = time.perf_counter()
        found = await asyncio.gather(*(one_stream(client, prompt, tokens) for prompt in prompts))
        seconds = time.perf_counter() - began_s
    return sum(count for count, _ in found), seconds, median(first for _, first in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--agent", type=Path, help="folder of a trained agent")
    parser.add_argument("--llm", default=SMOLLM2)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    llm = load_policy_llm(arguments.llm, dtype="float32", device="cpu")
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.agent
        if folder is None:
            spec = AgentSpec(hidden_size=llm.hidden_size, head="anchored", llm=llm.name)
            folder = Path(scratch) / "agent"
            save_agent(Agent(spec).eval(), folder)
        agent = load_agent(folder)
        most = max(arguments.streams)
        options = ["--llm", arguments.llm, "--dtype", "float32", "--slots", str(most)]
        options += ["--threads", str(arguments.threads), "--agent", f"bench={folder.resolve()}"]
        prompts = [prompt.prompt for prompt in packaged_prompts("heldout")]
        with serving(*options) as url:
            print(
                f"{llm.name} in float32, {arguments.threads} threads, {arguments.tokens} tokens, "
                f"{arguments.rounds} rounds, agent {agent.spec.head}"
            )
            for streams in arguments.streams:
                decoder = Decoder(llm, most)
                here, there = [], []
                for turn in range(arguments.rounds + 1):  # the first one warms up
                    start = turn * streams % (len(prompts) - streams)
                    chunk = prompts[start : start + streams]
                    own = in_process(llm, decoder, agent, chunk, arguments.tokens)
                    other = asyncio.run(served(url, chunk, arguments.tokens))
                    assert own[0] == other[0], "the two sides answer differently"
                    if turn:
                        here.append(own)
                        there.append(other)
                overhead = [other[1] / own[1] - 1 for own, other in zip(here, there, strict=True)]
                print(
                    f"{streams} streams: decoder {_rate(here):.1f} tokens/s, endpoint "
                    f"{_rate(there):.1f}; overhead {median(overhead):+.1%} (rounds: "
                    f"{', '.join(f'{value:+.1%}' for value in overhead)}); first token after "
                    f"{median(own[2] for own in here) * 1000:.0f} ms in process, "
                    f"{median(other[2] for other in there) * 1000:.0f} ms served",
                    flush=True,
                )


def _rate(turns: list[tuple[int, float, float]]) -> float:
    return sum(count for count, _, _ in turns) / sum(seconds for _, seconds, _ in turns)


if __name__ == "__main__":
    main()
