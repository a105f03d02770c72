"""Decoding and rollouts of an LLM of 7B shape on a GPU.

Run with `python benchmarks/gpu.py`. The weights are random, in bfloat16, so nothing has to be
downloaded; the output layer is scaled (`--logit-scale`), so that candidates differ as a trained
LLM's do. The rates of a line are taken in turn in one process; quote the ratios.

- generate: greedy `generate` of transformers as it comes, left-padded where prompts are several.
- aligned: `Decoder` with an agent (head advantage, random weights) and its own rule.
- bare: forwards of one token in each of S slots; rollout: steps of the vector environment.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from decode import aligned, generate
from rollout import bare_rate, make_env, rollout_rate
from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

from mara_rl.agents.agent import Agent, AgentSpec
from mara_rl.decoding.blend import Blend
from mara_rl.decoding.decoder import Decoder
from mara_rl.decoding.request import DecodeSettings
from mara_rl.llm.policy_llm import PolicyLLM, smollm2_folder
from mara_rl.llm.slot_engine import SlotEngine
from mara_rl.prompts import packaged_prompts


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
    decoder = Decoder(llm, batch)
    chunks = [prompts[i : i + batch] for i in range(0, len(prompts), batch)]
    rates = []
    for chunk in [chunks[0], *chunks]:  # the first time warms up
        count, seconds = generate(llm, chunk, tokens)
        ours, our_seconds, _ = aligned(llm, decoder, blend, chunk, settings)
        rates.append((count / seconds, ours / our_seconds))
    plain, steered = np.array(rates[1:]).T
    engine = decoder.engine
    print(
        f"batch {batch}: generate {plain.mean():.1f} tokens/s, aligned greedy "
        f"{steered.mean():.1f}, {engine.candidate_tokens / engine.forwards:.1f} candidates a "
        f"forward; aligned / generate tokens per second, ratio {np.median(steered / plain):.3f}",
        flush=True,
    )


def forwards(llm: PolicyLLM, slots: int, width: int, steps: int) -> None:
    """Milliseconds of a look at ``width`` candidates in each of ``slots``."""
    at, none = torch.arange(slots), torch.zeros(slots, dtype=torch.long)
    tokens = torch.randint(100, 1000, (slots * width,))
    engine = SlotEngine(llm, slots)
    engine.prefill(range(slots), [[5] * 60] * slots)
    for step in range(steps + 3):
        if step == 3:
            torch.cuda.synchronize()
            started_s = time.perf_counter()
        engine.look(at, none + width, tokens, none)
    torch.cuda.synchronize()
    milliseconds = (time.perf_counter() - started_s) / steps * 1e3
    weights = sum(p.numel() * p.element_size() for p in llm.model.base_model.parameters())
    print(
        f"{slots} x {width}: {milliseconds:.2f} ms a forward "
        f"({weights / milliseconds / 1e9:.2f} TB/s of weights)",
        flush=True,
    )


def rollouts(llm: PolicyLLM, slots: int, steps: int) -> None:
    agent = Agent(AgentSpec(hidden_size=llm.hidden_size, head="relative"))
    rollout = rollout_rate(make_env(llm, slots), agent, steps, np.random.default_rng(0))
    bare = bare_rate(llm, slots, 64, steps)
    print(
        f"S={slots}: bare {bare:.0f} token-forwards/s, rollout {rollout:.0f}, "
        f"ratio of rollout to bare forward rate {rollout / bare:.2f}",
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
