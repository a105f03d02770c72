"""``report.html``: one file with everything in it, for a browser or a mail."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mara_rl.common.atomic_write import write_atomically
from mara_rl.evaluation import plots
from mara_rl.evaluation.console import points, warnings
from mara_rl.evaluation.judged import Judged
from mara_rl.metrics.preference import PreferenceRate, result_line


def write_report(path: Path, figures: Mapping[str, Any], judged: Judged) -> None:
    """Write the report of a summary."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("mara_rl.evaluation", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"points": points, "percent": _percent}
    result = figures["result"]
    text = environment.get_template("report.html.jinja").render(
        figures=figures,
        line=result_line(PreferenceRate.of(result)) if result else None,
        warnings=warnings(figures),
        judge_plots={judge: _judge_plots(figures, judged, judge) for judge in figures["judges"]},
        positions=plots.accept_positions(figures),
    )
    write_atomically(path, text)


def _judge_plots(figures: Mapping[str, Any], judged: Judged, judge: str) -> dict[str, str]:
    made = {
        "Wins, ties and losses": plots.win_bars(figures, judge),
        "Net rates": plots.rate_intervals(figures, judge),
        "Reward against KL": plots.frontier(figures, judge),
    }
    if judged.plan.tested is not None:
        made["Scores"] = plots.score_scatter(judged, judge, judged.plan.tested)
    return {title: svg for title, svg in made.items() if svg is not None}


def _percent(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f} %"
