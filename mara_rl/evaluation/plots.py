"""Plots for the report: SVG text that takes its ink from the page around it, dark or light."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mara_rl.evaluation.judged import Judged
from mara_rl.evaluation.summary import BOUND_KL, GREEDY_KL, SAMPLED_KL, TEMPERED_KL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK = "#010203"  # stands for the page's text colour until `_svg` puts it in
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#999999")
_WIN, _TIE, _LOSE = "#228833", "#99999966", "#ee6677"
_WIDTH = 7.2  # inches
_KL_MARKS = {SAMPLED_KL: "o", TEMPERED_KL: "s", GREEDY_KL: "s", BOUND_KL: "^"}


def win_bars(figures: Mapping[str, Any], judge: str) -> str | None:
    """Wins, ties and losses of every method against the baseline, with the net rate's interval."""
    rows = _versus(figures, judge)
    if not rows:
        return None
    figure, axes = _figure(0.9 + 0.55 * len(rows))
    for place, (_, versus) in enumerate(reversed(rows)):
        rate = versus["both"]
        left = 0.0
        shares = [100 * rate[key] / rate["n"] for key in ("wins", "ties", "losses")]
        for share, colour in zip(shares, (_WIN, _TIE, _LOSE), strict=True):
            axes.barh(place, share, left=left, height=0.62, color=colour)
            if share >= 7:
                axes.text(left + share / 2, place, f"{share:.0f}", ha="center", va="center")
            left += share
        text = f"{rate['rate']:+.1f} [{rate['low']:+.1f}, {rate['high']:+.1f}]"
        axes.text(102, place, text, va="center")
    axes.set_yticks(range(len(rows)), [name for name, _ in reversed(rows)])
    axes.set_xlim(0, 140)
    axes.set_xticks(range(0, 101, 25))
    axes.set_xlabel("prompts, percent: better on both axes | tie | worse on both; net rate")
    return _svg(figure, f"Wins, ties and losses under judge {judge}")


def rate_intervals(figures: Mapping[str, Any], judge: str) -> str | None:
    """Net rates on both axes and on each, with their intervals."""
    rows = _versus(figures, judge)
    if not rows:
        return None
    figure, axes = _figure(0.9 + 0.75 * len(rows))
    for place, (_, versus) in enumerate(reversed(rows)):
        for shift, key, colour in zip(
            (0.22, 0.0, -0.22), ("both", "helpful", "harmless"), COLOURS, strict=False
        ):
            rate = versus[key]
            axes.plot([rate["low"], rate["high"]], [place + shift] * 2, color=colour, lw=2)
            label = key if place == 0 else None
            axes.plot(rate["rate"], place + shift, "o", color=colour, ms=5, label=label)
    axes.axvline(0, color=_INK, lw=0.8)
    axes.set_yticks(range(len(rows)), [name for name, _ in reversed(rows)])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlabel("net rate over the baseline, points, 95 % interval")
    _legend(axes, columns=3)
    return _svg(figure, f"Net rates under judge {judge}")


def frontier_points(
    figures: Mapping[str, Any], judge: str
) -> dict[str, list[tuple[float, float, float, float, str, str]]]:
    """KL a token, gain in weighted reward, its interval, the method's name and the mark of what
    its KL is, by family.
    """
    points: dict[str, list[tuple[float, float, float, float, str, str]]] = {}
    for name, method in figures["methods"].items():
        if name == figures["baseline"]:
            gain = {"value": 0.0, "low": 0.0, "high": 0.0}
        else:
            gain = method["versus_baseline"][judge]["difference"]["weighted"]
        kl = method["decoding"].get("kl_per_token")
        if kl is None:
            continue
        mark = _KL_MARKS.get(method["decoding"].get("kl_is"), "o")
        point = (kl, gain["value"], gain["low"], gain["high"], name, mark)
        points.setdefault(_family(method), []).append(point)
    return points


def frontier(figures: Mapping[str, Any], judge: str) -> str | None:
    """Weighted reward against KL a token; strengths of one agent joined by a line."""
    points = frontier_points(figures, judge)
    if sum(len(family) for family in points.values()) < 2:
        return None
    figure, axes = _figure(3.6)
    for colour, family in zip(_cycle(len(points)), points.values(), strict=True):
        family.sort()
        kls, gains, lows, highs, names, marks = zip(*family, strict=True)
        axes.plot(kls, gains, color=colour, lw=1.2)
        axes.vlines(kls, lows, highs, color=colour, lw=1.6, alpha=0.6)
        for kl_at, gain_at, name, mark in zip(kls, gains, names, marks, strict=True):
            axes.plot(kl_at, gain_at, mark, color=colour)
            axes.annotate(name, (kl_at, gain_at), (6, 5), textcoords="offset points")
    axes.margins(x=0.12)
    axes.set_xlabel(
        "KL to the LLM, nats a token; squares: along greedy answers, triangles: a bound"
    )
    axes.set_ylabel("weighted reward over the baseline")
    return _svg(figure, f"Reward against KL under judge {judge}")


def score_scatter(judged: Judged, judge: str, method: str) -> str:
    """Reward against cost of the baseline's answers and of ``method``'s."""
    figure, axes = _figure(4.0)
    for colour, name in zip(COLOURS, (judged.plan.baseline_name, method), strict=False):
        scores = judged.scores[judge][name]
        axes.scatter(
            scores["cost"].ravel(),
            scores["reward"].ravel(),
            s=14,
            color=colour,
            label=name,
            alpha=0.65,
            linewidths=0,
        )
        axes.plot(
            scores["cost"].mean(),
            scores["reward"].mean(),
            "P",
            color=colour,
            ms=11,
            markeredgecolor=_INK,
        )
    axes.axvline(judged.plan.judges[judge].safe_below, color=_INK, lw=0.8, ls=":")
    axes.set_xlabel("cost (left of the dotted line: safe); crosses: means")
    axes.set_ylabel("reward")
    _legend(axes, columns=2)
    return _svg(figure, f"Scores under judge {judge}")


def accept_positions(figures: Mapping[str, Any]) -> str | None:
    """Which candidate of a position each method takes."""
    found = {
        name: method["decoding"]["accept_positions"]
        for name, method in figures["methods"].items()
        if len(method["decoding"].get("accept_positions", [])) > 1
    }
    if not found:
        return None
    figure, axes = _figure(3.2)
    shown, width = 8, 0.8 / len(found)
    for number, (colour, (name, shares)) in enumerate(
        zip(_cycle(len(found)), found.items(), strict=True)
    ):
        bars = [*shares[:shown], *[0.0] * (shown - len(shares)), sum(shares[shown:])]
        places = np.arange(shown + 1) - 0.4 + width * (number + 0.5)
        axes.bar(places, 100 * np.array(bars), width, color=colour, label=name)
    axes.set_xticks(range(shown + 1), [*map(str, range(1, shown + 1)), f">{shown}"])
    axes.set_xlabel("candidate taken, by the LLM's order")
    axes.set_ylabel("tokens, percent")
    _legend(axes, columns=3)
    return _svg(figure, "Accept positions")


def _versus(figures: Mapping[str, Any], judge: str) -> list[tuple[str, Mapping[str, Any]]]:
    methods = figures["methods"].items()
    return [(n, m["versus_baseline"][judge]) for n, m in methods if m["versus_baseline"]]


def _family(method: Mapping[str, Any]) -> str:
    """Methods that one line joins: an agent at several strengths, a pool at several N."""
    spec = method["spec"]
    if method["kind"] == "agent":
        return f"agent {spec['agent']} {spec['exact']} {spec['rule']} {spec['llm']}"
    return "best of" if method["kind"] == "best_of" else f"{method['kind']} {id(method)}"


def _cycle(count: int) -> Sequence[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _figure(height: float) -> "tuple[Figure, Axes]":
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    ink = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    style: Any = {key: _INK for key in ink} | {"font.size": 10}  # noqa: C420
    style |= {"axes.spines.top": False, "axes.spines.right": False}
    with rc_context(style):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        axes = figure.add_subplot()
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    return figure, axes


def _legend(axes: "Axes", columns: int) -> None:
    axes.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns, frameon=False, labelcolor=_INK
    )


def _svg(figure: "Figure", title: str) -> str:
    from matplotlib import rc_context

    for axes in figure.axes:
        for label in axes.texts:
            label.set_color(_INK)
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg [^>]*?)width="[^"]*" height="[^"]*"|(<svg )', r"\1\2", text, count=1)
    text = re.sub(r"font: [^;\"]*px '[^\"]*?sans-serif", "font: 10px sans-serif", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
