"""What the value warm start and PPO each bring, at equal LLM token-forwards, over several seeds.

Run with `make bench-ablation`; nine quickstart runs of about 13 minutes each on 2 CPU
cores. It can be stopped and started: a run that is finished is not run again, another goes on.

- both: the quickstart as shipped.
- warm: all token-forwards go into the answers of the warm start's two rounds; no PPO.
- ppo: PPO from an agent that does nothing yet; base answers only for the score scales. Its
  learning rate is higher, as it starts from nothing: the preset's is for refining a warm start.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mara_rl.common.home import mara_home
from mara_rl.metrics.preference import PreferenceRate

# Base answers and iterations chosen for about equal token-forwards; the table shows the real ones.
VARIANTS = {
    "both": [],
    "warm": ["warm_start.answers=1984", "ppo.iterations=0"],
    "ppo": ["warm_start=null", "ppo.iterations=36", "ppo.lr=1.0e-4"],
}
RUN = "quickstart-1"
AXES = ("both", "helpful", "harmless")


def run(sets: Sequence[str], home: Path) -> Path:
    """Train and evaluate the quickstart with these settings, or go on with it; its folder."""
    command = [str(Path(sys.executable).with_name("mara-rl")), "train", "quickstart", "--run", RUN]
    for setting in [*sets, "ppo.minutes=null"]:
        command += ["--set", setting]
    subprocess.run(
        command, env={**os.environ, "MARA_HOME": str(home)}, stdout=sys.stderr, check=True
    )
    return home / RUN


def line(variant: str, seed: int, folder: Path) -> str:
    """One row of the table: rates by the training scores and by the judges."""
    figures = json.loads((folder / "evaluation" / "summary.json").read_text(encoding="utf-8"))
    newest = max((folder / "checkpoints").iterdir())
    state = json.loads((newest / "state.json").read_text(encoding="utf-8"))
    cells = [f"{variant} {seed}", f"{state['token_forwards']:,}"]
    agent = figures["methods"]["agent"]
    for judge in ("training", "independent"):
        rates = agent["versus_baseline"][judge]
        cells += [str(PreferenceRate.of(rates[axis])) for axis in AXES]
    cells.append(f"{agent['decoding']['kl_per_token']:.3f}")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments = parser.parse_args()
    heads = ["run, seed", "token-forwards", *AXES, *(f"{axis}, judges" for axis in AXES)]
    heads.append("KL per token")
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|", flush=True)
    for seed in arguments.seeds:
        for variant in arguments.variants:
            home = mara_home() / "ablation" / f"{variant}-{seed}"
            folder = run([*VARIANTS[variant], f"seed={seed}"], home)
            print(line(variant, seed, folder), flush=True)


if __name__ == "__main__":
    main()
