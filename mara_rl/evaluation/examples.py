"""Before and after: answers to show, chosen by rule and not by eye."""

from typing import Any

import numpy as np

from mara_rl.evaluation.judged import Judged

RANKS = {"best": 1.0, "upper quartile": 0.75, "median": 0.5, "lower quartile": 0.25, "worst": 0.0}


def chosen_examples(judged: Judged, method: str) -> list[dict[str, Any]]:
    """Prompts at fixed ranks of the change in weighted reward from the baseline to ``method``.

    Under the first judge, by a prompt's mean over its answers; shown is each one's first answer,
    with its scores under every judge. Fewer prompts than ranks give each prompt once.
    """
    plan, baseline = judged.plan, judged.plan.baseline_name
    judge = next(iter(plan.judges))
    change = judged.weighted(judge, method).mean(1) - judged.weighted(judge, baseline).mean(1)
    order = np.argsort(change, kind="stable")
    examples, used = [], set()
    for name, quantile in RANKS.items():
        row = int(order[round(quantile * (len(order) - 1))])
        if row in used:
            continue
        used.add(row)
        prompt = judged.prompts.prompts[row]
        examples.append(
            {
                "rank": name,
                "id": prompt.prompt_id,
                "kind": str(prompt.extra.get("kind") or ""),
                "prompt": prompt.text,
                "change": float(change[row]),
                "answers": {
                    system: {
                        "text": judged.tables[system][row][0].text,
                        "scores": {
                            name: {
                                axis: float(values[row, 0])
                                for axis, values in by_method[system].items()
                            }
                            for name, by_method in judged.scores.items()
                        },
                    }
                    for system in (baseline, method)
                },
            }
        )
    return examples
