"""Forwards of the slot engine with plain linear layers and with packed ones.

Run with `python benchmarks/packed_linear.py`. Medians of one process, first plain, then packed.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from mara_rl.llm.packed_linear import pack_linears
from mara_rl.llm.policy_llm import SMOLLM2, PolicyLLM, load_policy_llm
from mara_rl.llm.slot_engine import SlotEngine

SHAPES = [(1, 1), (1, 6), (16, 1), (96, 1)]  # slots, candidates of each
PROMPT_TOKENS = 50


def looker(llm: PolicyLLM, slots: int, candidates: int) -> Callable[[], Tensor]:
    """A forward that looks at candidates behind a prompt, always the same."""
    engine = SlotEngine(llm, slots)
    prompt = list(range(100, 100 + PROMPT_TOKENS))
    engine.prefill(list(range(slots)), [prompt] * slots)
    tokens = torch.randint(
        100, 5000, (slots * candidates,), generator=torch.Generator().manual_seed(0)
    )
    at, counts = torch.arange(slots), torch.full((slots,), candidates)
    return lambda: engine.look(at, counts, tokens, torch.zeros_like(at))


def milliseconds(forward: Callable[[], Tensor], rounds: int) -> float:
    """Median time of a forward."""
    times = []
    for _ in range(rounds + 2):
        started_s = time.perf_counter()
        forward()
        times.append((time.perf_counter() - started_s) * 1e3)
    return median(times[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llm", default=SMOLLM2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for dtype in ("bfloat16", "float32"):
        llm = load_policy_llm(arguments.llm, device="cpu", dtype=dtype, pack=False)
        plain = {}
        for shape in SHAPES:
            forward = looker(llm, *shape)
            plain[shape] = milliseconds(forward, arguments.rounds), forward()
        pack_linears(llm.model)
        for shape, (before_ms, expected) in plain.items():
            forward = looker(llm, *shape)
            after_ms = milliseconds(forward, arguments.rounds)
            difference = (forward() - expected).abs().max() / expected.abs().max()
            print(
                f"{llm.name} {dtype}, {shape[0]} slots x {shape[1]}: plain {before_ms:.1f} ms, "
                f"packed {after_ms:.1f} ms, ratio {after_ms / before_ms:.2f}, "
                f"largest relative difference {difference:.1e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
