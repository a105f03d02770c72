"""Command lines in `deploy/`, the README and the docs parse with the programs' own options."""

import importlib
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import typer
import yaml

from mara_rl.cli.app import app
from mara_rl.training.config import load_config

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS: dict[str, Callable[[], Any]] = {
    "mara-rl": lambda: typer.main.get_command(app),
    "ray": lambda: importlib.import_module("ray.scripts.scripts").cli,
    "serve": lambda: importlib.import_module("ray.serve.scripts").cli,
    "mlflow": lambda: importlib.import_module("mlflow.cli").cli,
}
USAGE_ERRORS = (click.UsageError, typer.BadParameter.__mro__[1])  # typer has a click of its own
PLACEHOLDERS = {"N": "1", "ID": "mine-1", "RUN": "mine", "NAME": "mine"}


def page_lines(path: Path) -> Iterator[str]:
    """Shell lines of a page: fenced blocks without a language or of a shell's, and code spans."""
    text = path.read_text(encoding="utf-8")
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if language in ("", "sh", "bash", "console"):
            yield from block.replace("\\\n", " ").splitlines()
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for span in re.findall(r"`([^`\n]+)`", prose):
        if len(span.split()) > 1:
            yield span


def deploy_lines() -> Iterator[tuple[str, str]]:
    """Command lines of the files in `deploy/`."""
    submit = (ROOT / "deploy" / "submit.sh").read_text().replace("\\\n", " ")
    [line] = re.findall(r"^exec (.*)$", submit, re.MULTILINE)
    line = re.sub(r"\$\{\w+:-(\w+)\}", r"\1", line)  # the default of a variable
    yield "deploy/submit.sh", line.replace('"$@"', "deploy/smoke.yaml --set seed=1")
    ray_up = yaml.safe_load((ROOT / "deploy" / "ray-cluster.yaml").read_text())
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        for line in ray_up[key]:
            yield "deploy/ray-cluster.yaml", line
    compose = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
    for name, service in compose["services"].items():
        yield f"deploy/compose.yaml {name}", shlex.join(service["command"])
    for path in sorted((ROOT / "deploy" / "kuberay").glob("*.yaml")):
        for manifest in yaml.safe_load_all(path.read_text()):
            if "entrypoint" in manifest.get("spec", {}):
                yield path.name, manifest["spec"]["entrypoint"]
            template = manifest.get("spec", {}).get("template", {})
            for container in template.get("spec", {}).get("containers", []):
                yield path.name, shlex.join([*container["command"], *container["args"]])
    for path in [*(ROOT / "deploy").glob("*"), *(ROOT / "deploy" / "kuberay").glob("*")]:
        if path.is_file():  # commands in comments
            for span in re.findall(r"^#.*`([^`]+)`", path.read_text(), re.MULTILINE):
                yield path.name, span


def command_lines() -> list[Any]:
    found = [*deploy_lines()]
    found += [(page.name, line) for page in PAGES for line in page_lines(page)]
    cases = []
    for source, line in found:
        try:
            words = shlex.split(line.removeprefix("$ "), comments=True)
        except ValueError:
            continue  # output, or prose with an apostrophe
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            del words[0]
        if words and words[0] in (*PROGRAMS, "deploy/submit.sh") and words[1:] != []:
            cases.append(pytest.param(words, id=f"{source}: {line.strip()[:70]}"))
    return cases


def parse(words: list[str]) -> None:
    """Raise an error of usage unless the program takes these arguments; nothing is run.

    Without arguments, as prose names a command, it only has to exist.
    """
    command, arguments = PROGRAMS[words[0]](), [PLACEHOLDERS.get(word, word) for word in words[1:]]
    context = command.context_class(command, info_name=words[0])
    while arguments and hasattr(command, "resolve_command"):
        name, command, arguments = command.resolve_command(context, arguments)
        context = command.context_class(command, info_name=name, parent=context)
    if arguments:
        command.make_context(context.info_name, list(arguments), parent=context.parent)


@pytest.mark.parametrize("words", command_lines())
def test_it_parses(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    if words[0] == "deploy/submit.sh":
        assert len(words) >= 3
        words = ["mara-rl", "train", *words[2:], "--run", words[1]]
    parse(words)
    if words[:3] == ["ray", "job", "submit"] and "--" in words:
        words = words[words.index("--") + 1 :]
        if words[0] in PROGRAMS:
            parse(words)
    if words[:2] == ["mara-rl", "train"] and "--run" in words:
        overrides = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
        load_config(words[2], overrides)


def test_the_lines_are_found() -> None:
    assert len(command_lines()) > 60


@pytest.mark.parametrize(
    "line",
    [
        "mara-rl train quickstart --ruin mine",
        "mara-rl stat mine",
        "ray job submit --wrking-dir . -- mara-rl doctor",
        "ray start --head --prt=1",
        "serve depoly deploy/serve.yaml",
        "mlflow server --host",
    ],
)
def test_a_wrong_line_is_found(line: str) -> None:
    with pytest.raises(USAGE_ERRORS):
        parse(line.split())
