"""What each way of training an agent brings on a public prompt set.

    python benchmarks/safe_rlhf.py --train safe_rlhf_prompts_train.jsonl \
        --dev safe_rlhf_prompts_dev.jsonl --out results

trains the agents of `RUNS` with the quickstart's preset on prompts of the one file and compares
them, with the LLM alone and with best-of-N, on those of the other. Training one takes 5 to 15
minutes on 2 CPU cores, comparing it 5. Run it again to go on where it stopped. Settings are tried
on `tune.jsonl`, prompts of the training file that no agent is trained on:

    python benchmarks/safe_rlhf.py --train … --dev results/tune.jsonl --out tried \
        --runs both-0 --replicates 4 --set ppo.kl_coeff=0.2 --set ppo.iterations=8
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from ablation import VARIANTS, run

from mara_rl.common.atomic_write import write_atomically
from mara_rl.evaluation.plots import frontier

TRAIN_PROMPTS, TUNE_PROMPTS = 576, 200  # as many as the packaged ones
# The second attempt: few answers to few prompts, the rest of the tokens and larger steps for PPO.
CHEAP = [
    "warm_start.answers=432",
    "warm_start.answers_per_prompt=3",
    "warm_start.distil_epochs=8",
    "ppo.lr=1.0e-4",
]
RUNS = {
    **{f"cheap-{seed}": [*CHEAP, "ppo.iterations=28", f"seed={seed}"] for seed in (0, 1, 2)},
    "cheap-half-0": [*CHEAP, "ppo.iterations=10"],
    "ppo-half-0": [*VARIANTS["ppo"], "ppo.iterations=18"],
    **{f"both-{seed}": [f"seed={seed}"] for seed in (0, 1, 2)},
    "warm-0": VARIANTS["warm"],
    "ppo-0": VARIANTS["ppo"],
    "relative-half-0": [*CHEAP, "ppo.iterations=10", "agent.head=relative"],
    "anchored-half-0": [*CHEAP, "ppo.iterations=10", "agent.head=anchored"],
    # as the paper's agents begin
    "ppo-paper-half-0": [*VARIANTS["ppo"], "ppo.iterations=18", "agent.head=paper"],
}
STRENGTHS = (0.5, 1.5, 2.0)
EXACT = ("cheap-0", "cheap-half-0", "ppo-0", "ppo-half-0", "both-0")
SCRATCH = ("ppo-0", "ppo-half-0", "ppo-0-exact", "ppo-half-0-exact")
BASELINES = ("base", "best-of-4", "best-of-16", *SCRATCH)


def split(source: Path, folder: Path) -> tuple[Path, Path]:
    """Files of prompts to train on and to tune on, drawn from ``source``."""
    # Not splitlines(): a prompt may hold U+2028 and the like unescaped.
    lines = [line for line in source.read_text(encoding="utf-8").split("\n") if line.strip()]
    order = np.random.default_rng(0).permutation(len(lines))
    files = folder / "train.jsonl", folder / "tune.jsonl"
    parts = order[:TRAIN_PROMPTS], order[TRAIN_PROMPTS : TRAIN_PROMPTS + TUNE_PROMPTS]
    for file, part in zip(files, parts, strict=True):
        file.write_text("".join(lines[i] + "\n" for i in part), encoding="utf-8")
    return files


def plan(agents: dict[str, Path], dev: Path, train: Path, replicates: int) -> dict[str, Any]:
    """The evaluation: LLM, best-of-N, agents by either way, and the first agent's strengths."""
    first = str(next(iter(agents.values())))
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
            **{
                f"{name}-exact": {"kind": "agent", "agent": str(agent), "exact": True}
                for name, agent in agents.items()
                if name in EXACT
            },
            "sampled-strength-1": sampled,
            "sampled-strength-2": {**sampled, "strength": 2.0},
            **{
                f"strength-{s}": {"kind": "agent", "agent": first, "strength": s} for s in STRENGTHS
            },
        },
    }


def compare(settings: dict[str, Any], out: Path) -> dict[str, Any]:
    """The summary of the evaluation; answers and scores are made once."""
    file = out / "plan.yaml"
    file.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    command = str(Path(sys.executable).with_name("mara-rl"))
    folder = out / "evaluation"
    subprocess.run(
        [command, "evaluate", str(file), "--out", str(folder)], stdout=sys.stderr, check=True
    )
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def looks(out: Path, settings: dict[str, Any]) -> int:
    """How many different evaluations have been made in ``out``, this one counted."""
    file = out / "looks.json"
    seen = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    sha256 = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    if sha256 not in seen:
        write_atomically(file, json.dumps([*seen, sha256]))
    return len({*seen, sha256})


@contextlib.contextmanager
def clocked(out: Path, what: str) -> Iterator[None]:
    """Add what the block takes, ended or not, to the seconds in ``seconds.json``."""
    file = out / "seconds.json"
    began_s = time.monotonic()
    try:
        yield
    finally:
        spent = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        spent[what] = spent.get(what, 0.0) + time.monotonic() - began_s
        write_atomically(file, json.dumps(spent))


def interval(value: dict[str, Any], key: str = "value", digits: int = 2) -> str:
    figures = (f"{value[name]:+.{digits}f}" for name in (key, "low", "high"))
    return "{} [{}, {}]".format(*figures)


def table(summary: dict[str, Any], baseline: str, forwards: dict[str, int]) -> str:
    """Markdown: each method against ``baseline``, by both judges."""
    judges = list(summary["judges"])
    heads = ["method", "training tokens"]
    heads += [f"{what}, {judge}" for judge in judges for what in ("both axes", "weighted reward")]
    heads += [f"safe, {judges[-1]}", "refused", "KL a token", "forwards a token", "tokens/s"]
    lines = [f"| {' | '.join(heads)} |", f"{'|---' * len(heads)}|"]
    for name, method in summary["methods"].items():
        cells = [name, f"{forwards[name]:,}" if name in forwards else "–"]
        for judge in judges:
            found = summary["pairwise"][judge][name].get(baseline)
            both = interval(found, "rate", 1) if found else "–"
            cells += [both, interval(found["weighted"]) if found else "–"]
        cells.append(f"{100 * method['judges'][judges[-1]]['safe_share']['value']:.0f} %")
        cells.append(f"{100 * method['answers']['refusal_share']:.0f} %")
        for key, digits in (("kl_per_token", 3), ("forwards_per_token", 2), ("tokens_per_s", 0)):
            value = method["decoding"].get(key)
            cells.append("–" if value is None else f"{value:.{digits}f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(summary: dict[str, Any], out: Path) -> None:
    """``frontier-JUDGE.svg``: weighted reward against KL under each judge.

    Further seeds and heads are left out, so that it can be read.
    """
    methods = summary["methods"].items()
    further = r"(cheap|both)-[12]|(relative|anchored|ppo-paper|warm)-.*|.*-half-0-exact"
    left_out = re.compile(further)
    shown = {name: method for name, method in methods if not left_out.fullmatch(name)}
    for judge in summary["judges"]:
        if drawing := frontier({**summary, "methods": shown}, judge):
            grey = drawing.replace("currentColor", "#777777")  # on pages dark and light
            write_atomically(out / f"frontier-{judge}.svg", grey)


def trained(
    names: Sequence[str], overrides: Sequence[str], train: Path, tune: Path, out: Path
) -> tuple[dict[str, Path], dict[str, int]]:
    """By run: the agent's folder, and the tokens that training it put through the LLM."""
    agents, forwards = {}, {}
    sets = [f"prompts.train={train}", f"prompts.heldout={tune}", "evaluation.max_prompts=8"]
    for name in names:
        with clocked(out, name):
            folder = run([*RUNS[name], *sets, *overrides], out / "runs" / name)
        agents[name] = folder / "agent"
        newest = max((folder / "checkpoints").iterdir())
        state = json.loads((newest / "state.json").read_text(encoding="utf-8"))
        forwards[name] = state["token_forwards"]
    return agents, forwards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=Path, required=True, help="jsonl to draw prompts from")
    parser.add_argument("--dev", type=Path, required=True, help="jsonl to compare on")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--replicates", type=int, default=16, help="samples of the LLM a prompt")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    arguments = parser.parse_args()
    out = arguments.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    train, tune = split(arguments.train, out)
    agents, forwards = trained(arguments.runs, arguments.overrides, train, tune, out)
    settings = plan(agents, arguments.dev.absolute(), train, arguments.replicates)
    looked = looks(out, settings)
    with clocked(out, "evaluation"):
        summary = compare(settings, out)
    draw(summary, out)
    for file in (arguments.train, arguments.dev):
        print(f"{file.name}: sha256 {hashlib.sha256(file.read_bytes()).hexdigest()}")
    seconds = json.loads((out / "seconds.json").read_text(encoding="utf-8"))
    print(f"looks at {arguments.dev.name} from here: {looked}")
    parts = ", ".join(f"{name} {spent / 60:.0f}" for name, spent in seconds.items())
    total_h = sum(seconds.values()) / 3600
    print(f"minutes: {parts}; {total_h:.1f} hours on {os.cpu_count()} cores in all")
    for baseline in BASELINES:
        if baseline in summary["methods"]:
            print(f"\nagainst {baseline}\n\n{table(summary, baseline, forwards)}")


if __name__ == "__main__":
    main()
