"""``mara-rl rewards``: train, evaluate and use score models."""

import contextlib
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    import torch

    from mara_rl.score_models.base import ScoreModel
    from mara_rl.score_models.bradley_terry import Accuracy
    from mara_rl.score_models.pairs import Pair

app = typer.Typer(no_args_is_help=True, help="Train, evaluate and use reward and cost models.")

Model = Annotated[str, typer.Option(help="Shipped name, folder or hub id.")]
Pairs = Annotated[
    list[Path], typer.Option(help="JSON lines: prompt, chosen, rejected[, kind]; may be repeated.")
]
Seed = Annotated[int, typer.Option(help="Controls everything random.")]
Part = Annotated[
    tuple[int, int],
    typer.Option(
        help="Use only the prompts from this to that percent of a fixed random order; models "
        "fitted to 0 50 and to 50 100 share none.",
    ),
]


@app.command()
def train(
    pairs: Pairs,
    out: Annotated[Path, typer.Option(help="New folder for the model.")],
    score_type: Annotated[
        Literal["reward", "cost"], typer.Option(help="cost: the chosen answer scores lower.")
    ] = "reward",
    backbone: Annotated[str, typer.Option(help="LLM whose first layers are used.")] = (
        "smollm2-135m-instruct"
    ),
    num_layers: Annotated[int, typer.Option(min=1, help="Decoder layers kept.")] = 20,
    pooling: Annotated[
        Literal["mean", "last"], typer.Option(help="Response tokens the head reads.")
    ] = "mean",
    adapter: Annotated[
        Literal["none", "lora"], typer.Option(help="none: fit the head alone (fast).")
    ] = "none",
    gated: Annotated[
        bool, typer.Option(help="Let what counts depend on whether a prompt is `answerable`.")
    ] = False,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the pairs, for lora.")] = 1,
    learning_rate: Annotated[float, typer.Option(min=1e-8, help="Step size, for lora.")] = 2e-4,
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Of the layers while fitting.")
    ] = "float32",
    l2: Annotated[
        list[float] | None,
        typer.Option(min=0, help="Regularisation to try; may be repeated. Default: 0.03 to 3."),
    ] = None,
    folds: Annotated[int, typer.Option(min=2, help="Folds of the cross-validation.")] = 5,
    part: Part = (0, 100),
    seed: Seed = 0,
) -> None:
    """Fit a score model to preference pairs and print its cross-validated accuracy."""
    from mara_rl.common.errors import ConfigError
    from mara_rl.score_models.fit import L2_GRID, fit_slice
    from mara_rl.score_models.layer_slice import SliceSpec, save_slice

    if out.exists():
        raise ConfigError(f"--out {out} already exists; expected a new folder")
    rows = _read_pairs(pairs, part)
    spec = SliceSpec(
        score_type=score_type,
        backbone=backbone,
        num_layers=num_layers,
        pooling=pooling,
        adapter=adapter,
        gated=gated,
    )
    device = _prepare_torch()
    # Features of all pairs once; for LoRA in every fold as well, beside the training itself.
    total = len(rows) * (1 if adapter == "none" else 1 + folds + epochs * folds)
    with _progress("pairs", total) as advance:
        result = fit_slice(
            rows,
            spec,
            folds=folds,
            seed=seed,
            epochs=epochs,
            learning_rate=learning_rate,
            l2_grid=l2 or L2_GRID,
            device=device,
            dtype=dtype,
            on_pairs=advance,
        )
    save_slice(out, spec, result.head, result.adapter)
    for tried, accuracy in result.by_l2.items():
        typer.echo(f"l2 {tried:g}: {accuracy}")
    typer.echo(f"cross-validated accuracy, {folds} folds, l2 {result.l2:g}:")
    _print_accuracies(result.accuracies)
    typer.echo(f"wrote {out}")


@app.command()
def evaluate(
    model: Model,
    pairs: Pairs,
    part: Part = (0, 100),
) -> None:
    """Print how often a model scores the chosen answer better, by kind of pair."""
    import torch

    from mara_rl.score_models.bradley_terry import accuracy_by_kind
    from mara_rl.score_models.loading import load_score_model

    rows = _read_pairs(pairs, part)
    scorer = load_score_model(model, device=_prepare_torch())
    texts = [(r.prompt, r.chosen) for r in rows] + [(r.prompt, r.rejected) for r in rows]
    better, worse = torch.tensor(_scores(scorer, texts)).chunk(2)
    sign = 1.0 if scorer.score_type == "reward" else -1.0
    _print_accuracies(accuracy_by_kind(rows, sign * (better - worse)))


@app.command()
def score(
    model: Model,
    prompt: Annotated[str | None, typer.Option(help="The prompt, with --response.")] = None,
    response: Annotated[str | None, typer.Option(help="The answer to score.")] = None,
    file: Annotated[Path | None, typer.Option(help="JSON lines: prompt, response.")] = None,
) -> None:
    """Score one answer, or print the rows of a file with `score` added."""
    from mara_rl.score_models.loading import load_score_model
    from mara_rl.score_models.pairs import Response, read_rows

    if (file is None) == (prompt is None) or (prompt is None) != (response is None):
        raise typer.BadParameter("expected either --prompt with --response, or --file")
    if file is None:
        scorer = load_score_model(model, device=_prepare_torch())
        typer.echo(f"{scorer.score([(prompt or '', response or '')])[0]:.6f}")
        return
    rows = read_rows(file, Response)
    scorer = load_score_model(model, device=_prepare_torch())
    scores = _scores(scorer, [(row.prompt, row.response) for row in rows])
    for row, value in zip(rows, scores, strict=True):
        typer.echo(json.dumps(row.model_dump() | {"score": value}, ensure_ascii=False))


@app.command("build-pairs")
def build_pairs(
    harmless: Annotated[Path, typer.Option(help="Prompts (JSON lines) that deserve an answer.")],
    harmful: Annotated[Path, typer.Option(help="Prompts (JSON lines) of which most do not.")],
    out: Annotated[Path, typer.Option(help="Folder for reward_pairs.jsonl and cost_pairs.jsonl.")],
    prompts: Annotated[int, typer.Option(min=2, help="Prompts drawn from each file.")] = 128,
    packaged: Annotated[
        bool, typer.Option(help="Use all packaged training prompts beside those.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=4, help="Length of the answers.")] = 40,
    llm: Annotated[str, typer.Option(help="LLM that answers.")] = "smollm2-135m-instruct",
    seed: Seed = 0,
) -> None:
    """Make preference pairs from an LLM's own answers: sampled, damaged, swapped and refused."""
    from mara_rl.llm.policy_llm import load_policy_llm
    from mara_rl.prompts import packaged_prompts
    from mara_rl.score_models.own_pairs import (
        ANSWERS_PER_PROMPT,
        helpful_pairs,
        safe_pairs,
        sample_own_answers,
    )
    from mara_rl.score_models.pairs import draw_prompts, write_rows

    rng = random.Random(seed)
    rows = [(text, True) for text in draw_prompts(harmless, prompts, rng)]
    rows += [(text, False) for text in draw_prompts(harmful, prompts, rng)]
    if packaged:
        rows += [(row.prompt, row.kind == "ordinary") for row in packaged_prompts("train")]
    loaded = load_policy_llm(llm, device=_prepare_torch())
    with _progress("answers", ANSWERS_PER_PROMPT * len(rows)) as advance:
        answers = sample_own_answers(
            loaded, rows, max_new_tokens=max_new_tokens, seed=seed, on_batch=advance
        )
    for name, pairs in (
        ("reward_pairs.jsonl", helpful_pairs(answers, seed=seed)),
        ("cost_pairs.jsonl", safe_pairs(answers, seed=seed)),
    ):
        write_rows(out / name, [pair.model_dump() for pair in pairs])
        typer.echo(f"wrote {len(pairs)} pairs to {out / name}")


def _prepare_torch() -> "torch.device":
    """The device to use; on the CPU, with one thread a core."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    return torch.device("cpu")


def _read_pairs(paths: list[Path], part: tuple[int, int]) -> "list[Pair]":
    from mara_rl.common.errors import DataError
    from mara_rl.score_models.bradley_terry import part_of
    from mara_rl.score_models.pairs import Pair, read_rows

    rows = part_of((pair for path in paths for pair in read_rows(path, Pair)), *part)
    if not rows:
        raise DataError(f"--part {part[0]} {part[1]} leaves no pairs; expected a range of 0 to 100")
    return rows


def _scores(scorer: "ScoreModel", texts: list[tuple[str, str]]) -> list[float]:
    scores: list[float] = []
    with _progress("answers scored", len(texts)) as advance:
        for first in range(0, len(texts), 64):
            chunk = texts[first : first + 64]
            scores += scorer.score(chunk)
            advance(len(chunk))
    return scores


def _print_accuracies(accuracies: "dict[str, Accuracy]") -> None:
    for kind, accuracy in accuracies.items():
        typer.echo(f"{kind}: {accuracy}")


@contextlib.contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], object]]:
    """A progress bar with rate and time left on stderr, nothing where that is not a terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:.1f}/s" if task.speed else "–/s")

    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.advance(task, count)
