"""What each way of training an agent brings on a public prompt set.

    python benchmarks/safe_rlhf.py --train safe_rlhf_prompts_train.jsonl \
        --dev safe_rlhf_prompts_dev.jsonl --out results

trains the agents of `RUNS` with the quickstart's preset on prompts of the one file and compares
them, with the LLM alone and with best-of-N, on those of the other. About two hours on 2 CPU cores.
Run it again to go on where it stopped. Settings are tried on `tune.jsonl`, prompts of the training
file that no agent is trained on: `--dev results/tune.jsonl --out tried`.
"""

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from ablation import VARIANTS, run

TRAIN_PROMPTS, TUNE_PROMPTS = 576, 200  # as many as the packaged ones
RUNS = {
    **{f"both-{seed}": [f"seed={seed}"] for seed in (0, 1, 2)},
    "warm-0": VARIANTS["warm"],
    "ppo-0": VARIANTS["ppo"],
    "relative-0": ["agent.head=relative", "warm_start.distil_epochs=0"],
    "anchored-0": ["agent.head=anchored"],
}
STRENGTHS = (0.5, 1.5, 2.0)


def split(source: Path, folder: Path) -> tuple[Path, Path]:
    """Files of prompts to train on and to tune on, drawn from ``source``."""
    lines = source.read_text(encoding="utf-8").splitlines()
    order = np.random.default_rng(0).permutation(len(lines))
    files = folder / "train.jsonl", folder / "tune.jsonl"
    parts = order[:TRAIN_PROMPTS], order[TRAIN_PROMPTS : TRAIN_PROMPTS + TUNE_PROMPTS]
    for file, part in zip(files, parts, strict=True):
        file.write_text("".join(lines[i] + "\n" for i in part), encoding="utf-8")
    return files


def plan(agents: dict[str, Path], dev: Path, train: Path, replicates: int) -> dict[str, Any]:
    """The evaluation: LLM, best-of-N, agents, and one agent's strengths."""
    first = str(agents["both-0"])
    sampled = {"kind": "agent", "agent": first, "rule": "sample"}
    return {
        "dtype": "bfloat16",
        "prompts": str(dev),
        "training_prompts": str(train),
        "num_slots": 96,
        "weights": {"reward": 1.0, "cost": -1.25},
        "judges": {
            "training": {
                "reward": "smollm2-reward",
                "cost": "smollm2-cost",
                "training": True,
                "dtype": "bfloat16",
            },
            "independent": {
                "reward": "smollm2-reward-judge",
                "cost": "smollm2-cost-judge",
                "dtype": "bfloat16",
            },
        },
        "methods": {
            "base": {"kind": "base"},
            "sampled": {"kind": "base", "rule": "sample", "replicates": replicates},
            **{f"best-of-{n}": {"kind": "best_of", "n": n} for n in (4, 16) if n <= replicates},
            **{name: {"kind": "agent", "agent": str(agent)} for name, agent in agents.items()},
            "sampled-strength-1": sampled,
            **{f"sampled-strength-{s}": {**sampled, "strength": s} for s in STRENGTHS},
            **{
                f"strength-{s}": {"kind": "agent", "agent": first, "strength": s} for s in STRENGTHS
            },
            "exact": {"kind": "agent", "agent": first, "exact": True},
        },
    }


def compare(settings: dict[str, Any], baseline: str, out: Path) -> dict[str, Any]:
    """The summary of the evaluation against ``baseline``; answers and scores are made once."""
    file = out / f"plan-{baseline}.yaml"
    file.write_text(yaml.safe_dump({**settings, "baseline": baseline}, sort_keys=False))
    folder = out / "evaluation"
    command = str(Path(sys.executable).with_name("mara-rl"))
    subprocess.run(
        [command, "evaluate", str(file), "--out", str(folder)], stdout=sys.stderr, check=True
    )
    summary = (folder / "summary.json").read_text(encoding="utf-8")
    (out / f"summary-{baseline}.json").write_text(summary, encoding="utf-8")
    return json.loads(summary)


def interval(value: dict[str, Any], key: str = "value", digits: int = 2) -> str:
    figures = (f"{value[name]:+.{digits}f}" for name in (key, "low", "high"))
    return "{} [{}, {}]".format(*figures)


def table(summary: dict[str, Any], forwards: dict[str, int]) -> str:
    """Markdown: each method against the summary's baseline, by both judges."""
    judges = list(summary["judges"])
    heads = ["method", "tokens through the LLM in training"]
    heads += [f"{what}, {judge}" for judge in judges for what in ("both axes", "weighted reward")]
    heads += ["KL a token", "LLM forwards a token", "tokens/s"]
    lines = [f"| {' | '.join(heads)} |", f"{'|---' * len(heads)}|"]
    for name, method in summary["methods"].items():
        cells = [name, f"{forwards[name]:,}" if name in forwards else "–"]
        for judge in judges:
            versus = method.get("versus_baseline", {}).get(judge)
            cells += (
                [
                    interval(versus["both"], "rate", 1),
                    interval(versus["difference"]["weighted"]),
                ]
                if versus
                else ["–", "–"]
            )
        decoding = method["decoding"]
        for key, digits in (("kl_per_token", 3), ("forwards_per_token", 2), ("tokens_per_s", 0)):
            value = decoding.get(key)
            cells.append("–" if value is None else f"{value:.{digits}f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=Path, required=True, help="jsonl to draw prompts from")
    parser.add_argument("--dev", type=Path, required=True, help="jsonl to compare on")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--replicates", type=int, default=16, help="samples of the LLM a prompt")
    arguments = parser.parse_args()
    out = arguments.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    train, tune = split(arguments.train, out)
    for file in (arguments.train, arguments.dev):
        print(f"{file.name}: sha256 {hashlib.sha256(file.read_bytes()).hexdigest()}")
    agents, forwards = {}, {}
    for name in arguments.runs:
        sets = [f"prompts.train={train}", f"prompts.heldout={tune}", "evaluation.max_prompts=8"]
        folder = run([*RUNS[name], *sets], out / "runs" / name)
        agents[name] = folder / "agent"
        newest = max((folder / "checkpoints").iterdir())
        state = json.loads((newest / "state.json").read_text(encoding="utf-8"))
        forwards[name] = state["token_forwards"]
    settings = plan(agents, arguments.dev.absolute(), train, arguments.replicates)
    for baseline in (
        "base",
        *(name for name in ("best-of-4", "ppo-0") if name in settings["methods"]),
    ):
        print(f"\nagainst {baseline}\n")
        print(table(compare(settings, baseline, out), forwards), flush=True)


if __name__ == "__main__":
    main()
