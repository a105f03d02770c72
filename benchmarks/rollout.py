"""LLM token-forwards per second in rollouts against the LLM's bare forward rate.

Run with `make bench-rollout`. Both rates are taken in turn in one process, on the same LLM, dtype,
threads and slots; quote the ratio, the absolute figures depend on the machine.

- bare: forwards of S single tokens over a KV cache as long as the rollouts', logits for every
  token, nothing else.
- rollout: steps of the vector environment that the RLlib module drives, accepting with the base
  LLM's own probabilities (an untrained agent), scores left out.
"""

import argparse
import time

import numpy as np
import torch

from envs.list_prompt_source import ListPromptSource
from envs.observation import BASE_LOGIT
from envs.protocols import Prompt
from envs.vector_env import TokenAcceptRejectVectorEnv
from mara_rl.agents.agent import Agent, AgentSpec
from mara_rl.llm.policy_llm import SMOLLM2, PolicyLLM, load_policy_llm
from mara_rl.llm.slot_engine import SlotEngine
from mara_rl.prompts import packaged_prompts


class NoScorer:
    """Every answer scores 0."""

    names = ("reward", "cost")

    def score(self, pairs: list[tuple[str, str]]) -> np.ndarray:
        return np.zeros((len(pairs), 2))


def make_env(llm: PolicyLLM, slots: int) -> TokenAcceptRejectVectorEnv:
    """On the packaged training prompts, without scores."""
    prompts = [Prompt(p.prompt, p.id) for p in packaged_prompts("train")]
    return TokenAcceptRejectVectorEnv(
        slots,
        llm=llm,
        max_new_tokens=40,
        prefix=True,
        prompts=lambda: ListPromptSource(prompts),
        scorer=NoScorer(),
    )


def bare_rate(llm: PolicyLLM, slots: int, length: int, steps: int) -> float:
    """Token-forwards per second of `SlotEngine.propose` with logits for all slots."""
    engine = SlotEngine(llm, slots)
    engine.prefill(range(slots), [[5] * length] * slots)
    tokens = torch.randint(100, 1000, (slots,))
    for _ in range(2):
        engine.logits(engine.propose(tokens))
    started_s = time.perf_counter()
    for _ in range(steps):
        engine.logits(engine.propose(tokens))
    return slots * steps / (time.perf_counter() - started_s)


def rollout_rate(
    env: TokenAcceptRejectVectorEnv, agent: Agent, steps: int, rng: np.random.Generator
) -> float:
    """Token-forwards per second of the environment, prompt tokens included."""
    observation, _ = env.reset(seed=0)
    engine = env.task.walk.engine
    for warm_up in (True, False):
        first = engine.prefill_tokens + engine.candidate_tokens
        started_s = time.perf_counter()
        for _ in range(8 if warm_up else steps):
            with torch.inference_mode():
                logit = agent.accept_logit(
                    torch.from_numpy(observation["h"]),
                    torch.from_numpy(observation["x"][:, BASE_LOGIT]),
                    torch.from_numpy(observation["h_prefix"]),
                )
            accept = rng.random(env.num_envs) < torch.sigmoid(logit).numpy()
            observation, *_ = env.step(accept.astype(np.int64))
        seconds = time.perf_counter() - started_s
    return (engine.prefill_tokens + engine.candidate_tokens - first) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llm", default=SMOLLM2)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--slots", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    llm = load_policy_llm(args.llm, dtype=args.dtype)
    agent = Agent(AgentSpec(hidden_size=llm.hidden_size, head="relative"))
    print(f"{args.llm} {args.dtype} on {llm.device}, {args.threads} threads")
    for slots in args.slots:
        env = make_env(llm, slots)
        rng = np.random.default_rng(0)
        rates = [
            (bare_rate(llm, slots, 64, args.steps), rollout_rate(env, agent, args.steps, rng))
            for _ in range(3)
        ]
        bare, rollout = (float(np.median([rate[i] for rate in rates])) for i in (0, 1))
        ratio = float(np.median([r / b for b, r in rates]))
        print(
            f"S={slots}: bare {bare:.0f}/s, rollout {rollout:.0f}/s, "
            f"ratio of rollout to bare forward rate {ratio:.2f}"
        )


if __name__ == "__main__":
    main()
