"""What ``pip install`` brings: these packages and no other, and a core that works by itself."""

import functools
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from email.parser import Parser
from pathlib import Path

import pytest
from linked_packages import link_packages
from packaging.requirements import Requirement

import mara_rl

ROOT = Path(__file__).parents[1]
PACKAGES = ("envs", "mara_rl", "services")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for package in PACKAGES:  # a copy: building leaves files beside them
        shutil.copytree(ROOT / package, source / package)
    for file in ("LICENSE", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / file, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-q", "--no-deps"]
    subprocess.run([*pip, "--wheel-dir", folder, source], check=True)
    [path] = folder.iterdir()
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def installed(
    wheel: zipfile.ZipFile, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, str]]:
    """The environment of a Python that has ``pip install mara-rl[extra]`` alone."""
    about = Parser().parsestr(wheel.read(f"{info(wheel)}/METADATA").decode())
    requirements = [Requirement(text) for text in about.get_all("Requires-Dist", [])]

    @functools.cache
    def environment(extra: str) -> dict[str, str]:
        needed = [r for r in requirements if not r.marker or r.marker.evaluate({"extra": extra})]
        packages = link_packages(tmp_path_factory.mktemp("installed") / "packages", needed)
        wheel.extractall(packages)
        return {**os.environ, "PYTHONPATH": str(packages)}

    return environment


def info(wheel: zipfile.ZipFile) -> str:
    return f"mara_rl-{mara_rl.__version__}.dist-info"


def python(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-S", *arguments]
    return subprocess.run(
        command, env=environment, cwd="/", capture_output=True, text=True, check=False
    )


def test_nothing_but_the_packages_is_installed(wheel: zipfile.ZipFile) -> None:
    top = {name.partition("/")[0] for name in wheel.namelist()}
    assert top == {*PACKAGES, info(wheel)}
    kinds = {Path(name).suffix for name in wheel.namelist() if name.endswith((".py", ".pyc"))}
    assert kinds == {".py"}
    assert f"{info(wheel)}/licenses/LICENSE" in wheel.namelist()
    for data in (
        "mara_rl/training/presets/quickstart.yaml",
        "mara_rl/evaluation/report.html.jinja",
        "mara_rl/prompts/train.jsonl",
        "mara_rl/score_models/shipped/smollm2-cost/model.safetensors",
        "services/endpoint/playground.html",
    ):
        assert data in wheel.namelist()


GENERATE = """
import sys
from mara_rl import MARAGenerator
from mara_rl.agents.agent import Agent, AgentSpec

llm = sys.argv[1]
mara = MARAGenerator(Agent(AgentSpec(hidden_size=32, head="anchored", llm=llm)), llm)
raw = mara.get_raw_output("Name a fox.", max_new_tokens=6)
aligned = mara.get_proxy_output("Name a fox.", max_new_tokens=6)
assert raw["answer"] == aligned["answer"], (raw, aligned)
unwanted = {"ray", "mlflow", "redis", "gymnasium", "fastapi"} & set(sys.modules)
assert not unwanted, unwanted
"""


def test_the_core_alone_generates(
    installed: Callable[[str], dict[str, str]], tiny_llms: dict[str, Path]
) -> None:
    done = python(installed(""), "-c", GENERATE, str(tiny_llms["llama"]))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("extra", "modules"),
    [
        ("serve", "services.endpoint.application, services.scoring.score_api"),
        ("track", "mara_rl.tracking.registry, mara_rl.evaluation.evaluation"),
    ],
)
def test_an_extra_brings_what_it_is_for(
    installed: Callable[[str], dict[str, str]], extra: str, modules: str
) -> None:
    done = python(installed(extra), "-c", f"import {modules}")
    assert done.returncode == 0, done.stderr


def test_a_command_that_needs_more_says_how_to_get_it(
    installed: Callable[[str], dict[str, str]],
) -> None:
    run = "from mara_rl.cli.app import main; main()"
    version = python(installed(""), "-c", run, "--version")
    assert version.stdout == f"mara-rl {mara_rl.__version__}\n"
    for arguments, missing in (
        (["train", "quickstart"], "gymnasium"),
        (["agents", "list"], "mlflow"),
        (["serve"], "gymnasium"),
        (["prompts", "status"], "redis"),
    ):
        done = python(installed(""), "-c", run, *arguments)
        assert done.returncode == 1
        reason = f"{missing} is not installed: pip install 'mara-rl[all]'"
        assert done.stderr == f"error: {reason}\n"
