"""The figures on the terminal: one table a judge, what to be wary of, and the result line."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

from mara_rl.common.display import Display
from mara_rl.evaluation.figures import BROKEN_SHARE
from mara_rl.metrics.preference import PreferenceRate, result_line
from mara_rl.prompts.prompt_files import PACKAGED

_NAMED = 5  # prompts left out, on a line
_WIDTH = 100  # of tables at least: in a narrower terminal lines run on, in files they are whole


def show(figures: Mapping[str, Any], display: Display) -> None:
    """Print everything a person needs to judge the outcome; the result line comes last, once."""
    console = display.console
    console.width = max(console.width, _WIDTH)
    for judge, about in figures["judges"].items():
        console.print(_table(figures, judge, about), markup=False)
    for row in figures["published"]:
        rate = row["measured"]
        display.line(
            f"{row['method']} over {row['against']} on {row['prompt_set']}: "
            f"{points(rate)} measured, {row['published']:+.2f} published ({row['source']})"
        )
    for line in warnings(figures):
        display.line(f"warning: {line}")
    if figures["result"] is not None:
        display.line(result_line(PreferenceRate.of(figures["result"])))


def warnings(figures: Mapping[str, Any]) -> list[str]:
    """What a reader must know before trusting the figures."""
    prompts = figures["prompts"]
    lines = [f"{name}: {text}" for name, text in figures["flags"].items()]
    if prompts["seen_in_training"] and not prompts["seen_were_dropped"]:
        lines.append(
            f"{len(prompts['seen_in_training'])} of {prompts['n']} prompts were seen in training"
        )
    if left_out := prompts["left_out"]:
        named = [f"{name!r} ({axis})" for name, axis in left_out.items()]
        more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
        lines.append(
            f"{len(left_out)} of {prompts['n'] + len(left_out)} prompts are left out, a score is "
            f"not finite: {', '.join(named[:_NAMED])}{more}"
        )
    agents = any(method["kind"] == "agent" for method in figures["methods"].values())
    if agents and prompts["source"] != PACKAGED and prompts["training_prompts"] == PACKAGED:
        lines.append(
            "prompts that training has seen were looked for in the packaged ones alone; name what "
            "the agents were trained on by --set training_prompts=FILE"
        )
    for name, method in figures["methods"].items():
        share = method["answers"]["refusal_share"]
        if share > BROKEN_SHARE and not method["answers"]["by_kind"]:
            lines.append(
                f"{name} refuses {share:.0%}; the prompts have no kind, so whether it should is "
                "not known"
            )
    if prompts["n"] < 30:
        lines.append(f"{prompts['n']} prompts are too few to conclude anything from")
    if all(judge["training"] for judge in figures["judges"].values()):
        lines.append("every judge was a training reward: gains may be those of pleasing it alone")
    return lines


def points(rate: Mapping[str, Any]) -> str:
    """``+34.0 [+21.0, +47.0]``."""
    return str(PreferenceRate.of(rate))


def _table(figures: Mapping[str, Any], judge: str, about: Mapping[str, Any]) -> Table:
    role = "was a training reward" if about["training"] else "was not a training reward"
    table = Table(
        title=f"judge {judge} ({role}): net rates over {figures['baseline']}, points",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("method", overflow="fold")
    for name in ("both axes", "helpful", "harmless", "reward", "safe", "refused", "KL", "forwards"):
        table.add_column(name, justify="right", no_wrap=True)
    result = figures["result"] or {"method": None, "baseline": None}
    for name, method in figures["methods"].items():
        versus = method["versus_baseline"].get(judge)
        decoding = method["decoding"]
        table.add_row(
            name + (" (!)" if method["flag"] else ""),
            *(_rates(versus) if versus else ("baseline", "", "", "")),
            f"{method['judges'][judge]['safe_share']['value']:.0%}",
            f"{method['answers']['refusal_share']:.0%}",
            _optional(decoding.get("kl_per_token"), 3),
            _optional(decoding.get("forwards_per_token"), 2),
        )
        kinds = method["answers"]["by_kind"]
        if len(kinds) > 1 and name in (result["method"], result["baseline"]):
            for kind, answers in kinds.items():
                group = versus["groups"].get(f"kind: {kind}") if versus else None
                refused = f"{answers['refusal_share']:.0%}"
                table.add_row(f"  {kind}", *(_rates(group) if group else [""] * 4), "", refused)
    return table


def _rates(versus: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """Net rates on both axes, helpful and harmless; difference in weighted reward."""
    return (
        points(versus["both"]),
        f"{versus['helpful']['rate']:+.1f}",
        f"{versus['harmless']['rate']:+.1f}",
        f"{versus['difference']['weighted']['value']:+.2f}",
    )


def _optional(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
