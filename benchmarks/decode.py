"""Aligned decoding against `transformers.generate`, and against one candidate after the other.

Run with `make bench-decode`. The rates of a line are taken in turn in one process, on the same LLM,
dtype, threads and prompts; quote the ratios, the absolute figures depend on the machine.

- generate: greedy `generate` of transformers as it comes, left-padded where prompts are several;
  and on the LLM as we load it, its linear layers packed for the CPU (`packed generate`).
- aligned: `Decoder` with the agent's own rule.
- serial: one candidate a forward (`CandidateWalk`), with an actor seeded so that it examines as
  many candidates per decision as published (5.4).
- worst case: an LLM of the same shape with random weights and p = 1, whose candidate sets all have
  k candidates of nearly the same probability, with an untrained agent (head anchored): almost all
  of them are looked at before a choice is certain.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

import torch
from transformers import AutoModelForCausalLM

from envs.candidate_walk import ACCEPT, CandidateWalk
from mara_rl.agents.agent import Agent, AgentSpec
from mara_rl.agents.agent_files import load_agent
from mara_rl.common.home import mara_home
from mara_rl.decoding.blend import Blend
from mara_rl.decoding.decoder import Decoder
from mara_rl.decoding.request import DecodeRequest, DecodeSettings
from mara_rl.llm.packed_linear import pack_linears
from mara_rl.llm.policy_llm import SMOLLM2, PolicyLLM, load_policy_llm
from mara_rl.llm.slot_engine import SlotEngine
from mara_rl.prompts import packaged_prompts

EXAMINED = 5.4
PARTS = ("generate", "serial", "worst")
WORST_TOKENS, WORST_CHUNKS = 12, 4


def generate(llm: PolicyLLM, prompts: list[str], tokens: int) -> tuple[int, float]:
    """Tokens that greedy `generate` gives, and its seconds."""
    ids = [llm.prompt_ids(prompt) for prompt in prompts]
    width = max(map(len, ids))
    pad = llm.tokenizer.pad_token_id or 0
    padded = torch.tensor([[pad] * (width - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    started_s = time.perf_counter()
    out = llm.model.generate(
        padded.to(llm.device),
        attention_mask=mask.to(llm.device),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=sorted(llm.eos_ids),
        pad_token_id=pad,
    )
    count = 0
    for row in out[:, width:].tolist():
        ends = [place for place, token in enumerate(row) if token in llm.eos_ids]
        count += ends[0] + 1 if ends else len(row)
    return count, time.perf_counter() - started_s


def aligned(
    llm: PolicyLLM, decoder: Decoder, blend: Blend, prompts: list[str], settings: DecodeSettings
) -> tuple[int, float, int]:
    """Tokens of aligned answers, seconds, and candidates that a serial rule would examine."""
    started_s = time.perf_counter()
    answers = decoder.run(
        [
            DecodeRequest.of(llm, p, settings, blend=blend, allow_other_candidates=True)
            for p in prompts
        ]
    )
    seconds = time.perf_counter() - started_s
    return sum(len(a.token_ids) for a in answers), seconds, sum(a.examined for a in answers)


def serial(
    llm: PolicyLLM, agent: Agent, prompts: list[str], tokens: int
) -> tuple[int, float, list[list[int]], int]:
    """Tokens by rule `threshold`, one candidate a forward; seconds, the tokens, the forwards."""
    started_s = time.perf_counter()
    engine = SlotEngine(llm, len(prompts))
    walk = CandidateWalk(engine, agent.spec.candidates)
    for slot, prompt in enumerate(prompts):
        walk.start(slot, llm.prompt_ids(prompt))
    moves = torch.zeros(len(prompts), dtype=torch.long)
    walk.step(moves)
    while walk.active.any():
        base = walk.sets.base_logits.gather(1, walk.index[:, None])[:, 0]
        with torch.inference_mode():
            logit = agent.accept_logit(walk.h, base.to(walk.h.device), walk.h_prefix).cpu()
        accept = (logit > 0) | walk.forced
        pending = walk.pending_ids().tolist()
        done = [
            slot
            for slot, (over, token) in enumerate(zip(accept.tolist(), pending, strict=True))
            if walk.active[slot]
            and over
            and (token in llm.eos_ids or len(walk.tokens[slot]) == tokens - 1)
        ]
        for slot in done:
            walk.tokens[slot].append(pending[slot])
        walk.stop(done)
        if walk.active.any():
            walk.step(torch.where(accept, ACCEPT, walk.index + 1))
    seconds = time.perf_counter() - started_s
    return sum(map(len, walk.tokens)), seconds, walk.tokens, engine.forwards


def seeded_actor(llm: PolicyLLM, prompts: list[str], settings: DecodeSettings) -> Agent:
    """A random actor of the published shape, its bias set so that it examines `EXAMINED`."""
    torch.manual_seed(0)
    agent = Agent(AgentSpec(hidden_size=llm.hidden_size, head="paper", rule="threshold"))
    for weight in agent.network.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    agent.eval().to(llm.device)
    blend, low, high = Blend.of([agent]), -30.0, 30.0
    for _ in range(12):
        middle = (low + high) / 2
        agent.network.output_linear.bias.data = torch.tensor([-middle, middle], device=llm.device)
        decoder = Decoder(llm, len(prompts))
        requests = [DecodeRequest.of(llm, p, settings, blend=blend) for p in prompts]
        answers = decoder.run(requests)
        examined = sum(a.examined for a in answers) / sum(len(a.token_ids) for a in answers)
        if abs(examined - EXAMINED) < 0.15:
            break
        low, high = (middle, high) if examined > EXAMINED else (low, middle)
    return agent


def random_llm(like: PolicyLLM, *, pack: bool) -> PolicyLLM:
    """An LLM of the shape and dtype of another with weights drawn from a fixed seed."""
    torch.manual_seed(0)
    with like.device:
        model = AutoModelForCausalLM.from_config(like.model.config, dtype=like.model.dtype)
    llm = PolicyLLM(f"random weights in the shape of {like.name}", model, like.tokenizer)
    if pack:
        pack_linears(llm.model)
    return llm


def chunks(prompts: list[str], batch: int) -> Iterator[list[str]]:
    for start in range(0, len(prompts), batch):
        yield prompts[start : start + batch]


def against_generate(
    llm: PolicyLLM,
    stock: PolicyLLM,
    agent: Agent,
    prompts: list[str],
    settings: DecodeSettings,
    batch: int,
) -> None:
    tokens = settings.max_new_tokens
    ratios, packed_ratios, sizes, forwards = [], [], [], []
    decoder, blend = Decoder(llm, batch), Blend.of([agent])
    aligned(llm, decoder, blend, prompts[:batch], settings)
    for other in (stock, llm):
        generate(other, prompts[:batch], tokens)
    for chunk in chunks(prompts, batch):
        before = decoder.engine.forwards
        count, seconds = generate(stock, chunk, tokens)
        ours, our_seconds, _ = aligned(llm, decoder, blend, chunk, settings)
        packed_count, packed_seconds = generate(llm, chunk, tokens)
        ratios.append((ours / our_seconds) / (count / seconds))
        packed_ratios.append((ours / our_seconds) / (packed_count / packed_seconds))
        sizes.append((count / seconds, ours / our_seconds))
        forwards.append((decoder.engine.forwards - before) / ours * len(chunk))
    plain, steered = (sum(column) / len(sizes) for column in zip(*sizes, strict=True))
    looked = decoder.engine.candidate_tokens / max(1, decoder.engine.forwards)
    print(
        f"batch {batch}: generate {plain:.1f} tokens/s, aligned greedy {steered:.1f}, "
        f"{looked / batch:.2f} candidates a slot and forward, "
        f"{median(forwards):.2f} forwards a token; "
        f"{median(packed_ratios):.3f} of packed generate; "
        f"aligned / generate tokens per second, ratio {median(ratios):.3f}",
        flush=True,
    )


def against_serial(
    llm: PolicyLLM, actor: Agent, prompts: list[str], settings: DecodeSettings, batch: int
) -> None:
    blend, decoder = Blend.of([actor]), Decoder(llm, batch)
    speedups, saved, examined_all, tokens_all = [], [], 0, 0
    for chunk in chunks(prompts, batch):
        before = decoder.engine.forwards
        count, seconds, examined = aligned(llm, decoder, blend, chunk, settings)
        forwards = decoder.engine.forwards - before
        slow, slow_seconds, _, slow_forwards = serial(llm, actor, chunk, settings.max_new_tokens)
        speedups.append((count / seconds) / (slow / slow_seconds))
        saved.append(1 - forwards / slow_forwards)
        examined_all, tokens_all = examined_all + examined, tokens_all + count
    print(
        f"batch {batch}: seeded actor examines {examined_all / tokens_all:.2f} candidates per "
        f"decision; forwards saved against one at a time {median(saved):.0%}, "
        f"speed-up {median(speedups):.2f}",
        flush=True,
    )


def worst_case(like: PolicyLLM, prompts: list[str], top_k: int, batches: Sequence[int]) -> None:
    llm, stock = random_llm(like, pack=True), random_llm(like, pack=False)
    agent = Agent(AgentSpec(hidden_size=llm.hidden_size, head="anchored", top_k=top_k, top_p=1.0))
    blend = Blend.of([agent.eval().to(llm.device)])
    settings = DecodeSettings(max_new_tokens=WORST_TOKENS)
    for batch in batches:
        decoder = Decoder(llm, batch)
        aligned(llm, decoder, blend, prompts[:batch], settings)
        generate(stock, prompts[:batch], WORST_TOKENS)
        shares, examined_all, tokens_all = [], 0, 0
        for chunk in list(chunks(prompts, batch))[:WORST_CHUNKS]:
            count, seconds = generate(stock, chunk, WORST_TOKENS)
            ours, our_seconds, examined = aligned(llm, decoder, blend, chunk, settings)
            shares.append((ours / our_seconds) / (count / seconds))
            examined_all, tokens_all = examined_all + examined, tokens_all + ours
        print(
            f"batch {batch}: worst case, {llm.name}, {WORST_TOKENS} tokens, k {top_k}, p 1: "
            f"{examined_all / tokens_all:.1f} candidates examined per decision; aligned greedy has "
            f"{median(shares):.3f} of the tokens per second of generate",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--agent",
        type=Path,
        default=mara_home() / "quickstart-1" / "agent",
        help="folder of a trained agent; that of the first quickstart unless given",
    )
    parser.add_argument("--llm", default=SMOLLM2)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--top-k", type=int, default=40)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument(
        "--parts",
        choices=PARTS,
        nargs="+",
        default=PARTS,
        help="what to measure; all unless given",
    )
    arguments = parser.parse_args()
    if not arguments.agent.is_dir():
        parser.error(f"--agent {arguments.agent}: no such folder; `make quickstart` trains one")
    torch.set_num_threads(arguments.threads)
    llm = load_policy_llm(arguments.llm, dtype=arguments.dtype)
    agent = load_agent(arguments.agent).to(llm.device)
    prompts = [p.prompt for p in packaged_prompts("heldout")[: arguments.prompts]]
    settings = DecodeSettings(
        max_new_tokens=arguments.tokens, top_k=arguments.top_k, top_p=arguments.top_p
    )
    print(
        f"{llm.name} in {arguments.dtype} on {llm.device}, {arguments.threads} threads, "
        f"{len(prompts)} prompts, {arguments.tokens} tokens, "
        f"k {arguments.top_k}, p {arguments.top_p}, agent {agent.spec.head}/{agent.spec.rule}"
    )
    if "generate" in arguments.parts:
        stock = load_policy_llm(arguments.llm, dtype=arguments.dtype, pack=False)
        for batch in arguments.batches:
            against_generate(llm, stock, agent, prompts, settings, batch)
    if "serial" in arguments.parts:
        actor_settings = DecodeSettings(max_new_tokens=arguments.tokens)
        actor = seeded_actor(llm, prompts, actor_settings)
        for batch in arguments.batches:
            against_serial(llm, actor, prompts, actor_settings, batch)
    if "worst" in arguments.parts:
        worst_case(llm, prompts, arguments.top_k, arguments.batches)


if __name__ == "__main__":
    main()
