"""Decoding and rollouts of an LLM of 7B shape on a GPU, with and without CUDA graphs.

Run with `python benchmarks/gpu.py`. The weights are random, in bfloat16, so nothing has to be
downloaded; the output layer is scaled until candidate sets are about as large as a trained LLM's
(`candidates a set`). The rates of a line are taken in turn in one process; quote the ratios.

- generate: greedy `generate` of transformers as it comes, left-padded where prompts are several.
- aligned: `Decoder` with an agent (head advantage, random weights) and its own rule.
- bare: forwards of one token in each of S slots; rollout: steps of the vector environment.
"""

import argparse
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from decode import aligned, generate
from rollout import NoScorer, bare_rate, rollout_rate
from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

from envs.list_prompt_source import ListPromptSource
from envs.protocols import Prompt
from envs.vector_env import TokenAcceptRejectVectorEnv
from mara_rl.agent import Agent, AgentSpec
from mara_rl.decoding.blend import Blend
from mara_rl.decoding.decoder import Decoder
from mara_rl.decoding.request import DecodeSettings
from mara_rl.policy_llm import PolicyLLM, smollm2_folder
from mara_rl.prompts import packaged_prompts
from mara_rl.slot_engine import SlotEngine
from mara_rl.slot_graphs import MAX_TOKENS


def random_7b(tokenizer: Path, logit_scale: float) -> PolicyLLM:
    """Mistral-7B's shape with weights from a fixed seed, and another LLM's tokenizer."""
    torch.manual_seed(0)
    names = AutoTokenizer.from_pretrained(str(tokenizer))
    config = MistralConfig(vocab_size=len(names), sliding_window=None)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = MistralForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        model.lm_head.weight *= logit_scale
    return PolicyLLM("random weights in the shape of Mistral-7B", model, names)


def random_agent(llm: PolicyLLM) -> Agent:
    """Head advantage; its terms have a standard deviation of about 1."""
    agent = Agent(AgentSpec(hidden_size=llm.hidden_size, head="advantage")).to(llm.device)
    torch.nn.init.normal_(agent.network.output_linear.weight, std=0.5)
    return agent.eval()


def decoding(llm: PolicyLLM, agent: Agent, prompts: list[str], tokens: int, batch: int) -> None:
    settings, blend = DecodeSettings(max_new_tokens=tokens), Blend.of([agent])
    with_graphs, without = Decoder(llm, batch), Decoder(llm, batch)
    assert with_graphs.engine.graphs is not None
    assert without.engine.graphs is not None
    without.engine.graphs.max_tokens = 0
    chunks = [prompts[i : i + batch] for i in range(0, len(prompts), batch)]
    rates: dict[str, list[float]] = {"generate": [], "graphs": [], "plain": []}
    for chunk in [chunks[0], *chunks]:  # the first time warms up
        count, seconds = generate(llm, chunk, tokens)
        rates["generate"].append(count / seconds)
        for name, decoder in (("graphs", with_graphs), ("plain", without)):
            count, seconds, _ = aligned(llm, decoder, blend, chunk, settings)
            rates[name].append(count / seconds)
    plain, ours, eager = (np.array(rates[name][1:]) for name in ("generate", "graphs", "plain"))
    engine = with_graphs.engine
    print(
        f"batch {batch}: generate {plain.mean():.1f} tokens/s, aligned greedy {ours.mean():.1f}, "
        f"without graphs {eager.mean():.1f}; {engine.candidate_tokens / engine.forwards:.1f} "
        f"candidates a forward, {engine.graphs.captured} graphs; without graphs "
        f"{median(eager / plain):.3f} of generate; "
        f"aligned / generate tokens per second, ratio {median(ours / plain):.3f}",
        flush=True,
    )


def forwards(llm: PolicyLLM, slots: int, width: int, steps: int) -> None:
    """Milliseconds of a look at ``width`` candidates in each of ``slots``."""
    at, none = torch.arange(slots), torch.zeros(slots, dtype=torch.long)
    tokens = torch.randint(100, 1000, (slots * width,))
    found = []
    for max_tokens in (0, MAX_TOKENS):
        engine = SlotEngine(llm, slots)
        assert engine.graphs is not None
        engine.graphs.max_tokens = max_tokens
        engine.prefill(range(slots), [[5] * 60] * slots)
        for step in range(steps + 3):
            if step == 3:
                torch.cuda.synchronize()
                started_s = time.perf_counter()
            engine.look(at, none + width, tokens, none)
        torch.cuda.synchronize()
        found.append((time.perf_counter() - started_s) / steps * 1e3)
    weights = sum(p.numel() * p.element_size() for p in llm.model.base_model.parameters())
    print(
        f"{slots} x {width}: {found[0]:.2f} ms a forward, with graphs {found[1]:.2f} "
        f"({weights / found[1] / 1e9:.2f} TB/s of weights)",
        flush=True,
    )


def rollouts(llm: PolicyLLM, slots: int, steps: int) -> None:
    agent = Agent(AgentSpec(hidden_size=llm.hidden_size, head="relative"))
    prompts = [Prompt(p.prompt, p.id) for p in packaged_prompts("train")]
    env = TokenAcceptRejectVectorEnv(
        slots,
        llm=llm,
        max_new_tokens=40,
        prefix=True,
        prompts=lambda: ListPromptSource(prompts),
        scorer=NoScorer(),
    )
    graphs = env.task.walk.engine.graphs
    assert graphs is not None
    rng, found = np.random.default_rng(0), []
    for max_tokens in (0, MAX_TOKENS):
        graphs.max_tokens = max_tokens
        found.append(rollout_rate(env, agent, steps, rng))
    bare = bare_rate(llm, slots, 64, steps)
    print(
        f"S={slots}: bare {bare:.0f} token-forwards/s, rollout {found[1]:.0f} (without graphs "
        f"{found[0]:.0f}), ratio of rollout to bare forward rate {found[1] / bare:.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, help="folder; SmolLM2's unless given")
    parser.add_argument("--logit-scale", type=float, default=4.0)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device")
    llm = random_7b(arguments.tokenizer or smollm2_folder(), arguments.logit_scale)
    print(f"{llm.name} in bfloat16 on {torch.cuda.get_device_name()}, torch {torch.__version__}")
    for slots, width in ((1, 1), (1, 6), (1, 40), (16, 1), (16, 4), (64, 1), (64, 4)):
        forwards(llm, slots, width, arguments.steps)
    agent, prompts = random_agent(llm), [p.prompt for p in packaged_prompts("heldout")]
    for batch in arguments.batches:
        chosen = prompts[: max(3 * batch, 6)]
        decoding(llm, agent, chosen, arguments.tokens, batch)
    for slots in (16, 64):
        rollouts(llm, slots, arguments.steps)


if __name__ == "__main__":
    main()
