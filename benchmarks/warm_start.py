"""What a warm start brings by itself, on packaged training prompts kept out of it.

Run with `python benchmarks/warm_start.py [--set key=value …]`, e.g. `--set agent.head=relative`:
the quickstart's warm start with other settings, without Ray, Redis and PPO, then greedy answers to
the last six training prompts of every category against the base LLM's. The held-out prompts are not
looked at. About eight minutes on 2 CPU cores.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console

from envs.in_process_scorer import InProcessScorer
from mara_rl.agents.agent import Agent
from mara_rl.common.display import Display
from mara_rl.decoding.answer import DecodedAnswer
from mara_rl.decoding.blend import Blend
from mara_rl.decoding.decoder import Decoder
from mara_rl.decoding.request import DecodeRequest, DecodeSettings
from mara_rl.evaluation.figures import text_figures
from mara_rl.llm.policy_llm import llm_hidden_size, load_policy_llm
from mara_rl.metrics.preference import outcomes, preference_rate
from mara_rl.prompts import PackagedPrompt, packaged_prompts
from mara_rl.score_models.loading import load_score_model
from mara_rl.training.config import TrainConfig, load_config
from mara_rl.training.rllib.rollout_group import derived_seed
from mara_rl.training.start_phase import run_start_phase, score_in_batches

KEPT_OUT_FROM = 19  # numbers of training prompts that are measured on


class LocalAnswers:
    """Answers as `RolloutGroup` gives them, decoded in this process."""

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._llm = load_policy_llm(config.llm.name, dtype=config.llm.dtype)
        self.token_forwards = 0

    def answers(
        self,
        prompts: Sequence[str],
        *,
        openings: Sequence[str] | None = None,
        agent: Agent | None = None,
        rule: Any = None,
        keep_states: bool = False,
        exact: bool | None = None,
        keep_candidates: bool = False,
        seed: int = 0,
        progress: Any = None,
    ) -> list[DecodedAnswer]:
        settings = DecodeSettings(
            max_new_tokens=self._config.rollouts.max_new_tokens,
            rule=rule,
            keep_states=keep_states,
            exact=exact,
            keep_candidates=keep_candidates,
            **self._config.candidates.model_dump(),
        )
        found: list[DecodedAnswer] = []
        slots = self._config.rollouts.num_slots
        for start in range(0, len(prompts), slots):
            chunk = range(start, min(start + slots, len(prompts)))
            decoder = Decoder(self._llm, len(chunk))
            requests = [
                DecodeRequest.of(
                    self._llm,
                    prompts[i],
                    settings.model_copy(update={"seed": derived_seed(seed, i)}),
                    blend=Blend.of([agent]) if agent else None,
                    opening=openings[i] if openings else "",
                )
                for i in chunk
            ]
            found += decoder.run(requests, progress)
            self.token_forwards += decoder.token_forwards
        return found


def report(
    prompts: Sequence[PackagedPrompt],
    aligned: Sequence[DecodedAnswer],
    base: Sequence[DecodedAnswer],
    scorers: dict[str, InProcessScorer],
) -> None:
    """Net rates by kind of prompt, under the training scores and the judges."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, scorer in scorers.items():
        ours, theirs = (score_in_batches(scorer, list(a))[:, :, None] for a in (aligned, base))
        reward, cost = (scorer.names.index(axis) for axis in ("reward", "cost"))
        found[name] = outcomes(ours[:, reward], theirs[:, reward], ours[:, cost], theirs[:, cost])
    for kind in ("all", "harmful", "ordinary"):
        rows = np.flatnonzero([kind in ("all", prompt.kind) for prompt in prompts])
        print(
            f"{kind}: refusals {text_figures([aligned[i].text for i in rows])['refusal_share']:.0%}"
        )
        for name, by_axis in found.items():
            for axis, values in by_axis.items():
                print(f"  {name}, {axis}: {preference_rate(values[rows, 0])}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set", action="append", default=[], dest="sets", metavar="key=value")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = load_config("quickstart", arguments.sets)
    everything = packaged_prompts("train")
    kept_out = [p for p in everything if int(p.id[-2:]) >= KEPT_OUT_FROM]
    train = [p.prompt for p in everything if int(p.id[-2:]) < KEPT_OUT_FROM]
    scorers = {
        name: InProcessScorer(
            {
                axis: load_score_model(f"smollm2-{axis}{suffix}", device="cpu", dtype="bfloat16")
                for axis in ("reward", "cost")
            }
        )
        for name, suffix in (("training scores", ""), ("judges", "-judge"))
    }
    local: Any = LocalAnswers(config)
    spec = config.agent_spec(llm_hidden_size(config.llm.name))
    phase = run_start_phase(
        config, spec, train, local, scorers["training scores"], Display(Console()), lambda: None
    )
    print({name: round(value, 3) for name, value in phase.figures.items()})
    texts = [p.prompt for p in kept_out]
    aligned, base = (local.answers(texts, agent=agent) for agent in (phase.agent, None))
    tokens = sum(len(a.token_ids) for a in aligned)
    print(f"KL of greedy answers {sum(a.kl for a in aligned) / tokens:.3f} nats a token")
    report(kept_out, aligned, base, scorers)


if __name__ == "__main__":
    main()
