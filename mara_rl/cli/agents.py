"""``mara-rl agents``: registered agents, their export, and which one is champion."""

import contextlib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from mara_rl.cli.options import SingleNode
from mara_rl.common.errors import ConfigError

if TYPE_CHECKING:
    from mara_rl.agents.agent import AgentSpec
    from mara_rl.tracking.registry import AgentRegistry, AgentVersion

app = typer.Typer(no_args_is_help=True, help="List, show, import, export and promote agents.")

_Ref = Annotated[
    str,
    typer.Argument(
        metavar="REF",
        help="models:/name@alias, models:/name/version, runs:/id/path, a folder or a .pth file.",
    ),
]


@app.command("list")
def list_agents(single_node: SingleNode = False) -> None:
    """List the registered agents with their candidate and champion."""
    agents = _registry(single_node).list()
    rows = [(a.name, str(a.candidate or "–"), str(a.champion or "–")) for a in agents]
    _print_table(("agent", "candidate", "champion"), rows)


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="NAME|REF", help="A registered agent, or a REF.")],
    single_node: SingleNode = False,
) -> None:
    """Show the versions of a registered agent, or one agent with its settings."""
    from mara_rl.agents.agent_refs import fetch_agent
    from mara_rl.tracking.registry import is_registry_ref, is_version_ref

    if is_registry_ref(name):
        registry = _registry(single_node)
        rows = _spec_rows(registry.resolve(name).spec)
        if is_version_ref(name):
            rows += _version_rows(registry.find(name))
        _print_table(("", ""), rows)
    elif Path(name).exists():
        _print_table(("", ""), _spec_rows(fetch_agent(name).spec))
    else:
        versions = _registry(single_node).show(name)
        _print_table(
            ("version", "alias", "preference rate", "created", "run"),
            [
                (
                    str(version.version),
                    ", ".join(version.aliases),
                    _rate(version),
                    f"{version.created:%Y-%m-%d %H:%M} UTC",
                    version.run_id,
                )
                for version in versions
            ],
        )


@app.command()
def export(
    ref: _Ref,
    out: Annotated[Path, typer.Option(help="New folder for the agent.")],
    single_node: SingleNode = False,
) -> None:
    """Write an agent to a folder of its own: agent.safetensors, agent.json and a card.

    One with the published agents' head and rule also as a .pth file that their code reads.
    """
    from mara_rl.agents.agent_files import save_agent
    from mara_rl.agents.agent_refs import load_local_agent, local_metadata, locate_agent
    from mara_rl.agents.published_actors import is_published_kind, save_published_actor
    from mara_rl.tracking.registry import is_registry_ref

    with contextlib.ExitStack() as stack:
        if is_registry_ref(ref):
            source = stack.enter_context(_registry(single_node).fetched(ref))
        else:
            source = locate_agent(ref)
        agent, metadata = load_local_agent(source), local_metadata(source)
    save_agent(agent, out, metadata=metadata | {"exported_from": ref})
    if is_published_kind(agent.spec):
        save_published_actor(agent, out / f"{out.name.removesuffix('_actor')}_actor.pth")
    print(f"wrote {ref} to {out}")


@app.command("import")
def import_agent(
    ref: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="A folder, a .pth file, or owner/repository[/file.pth] of a hub."
        ),
    ],
    llm: Annotated[
        str | None, typer.Option(help="The LLM it was trained on, where it does not say so itself.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="The registered name; mara-<llm> unless given.")
    ] = None,
    single_node: SingleNode = False,
) -> None:
    """Register an agent from elsewhere as a new candidate."""
    import tempfile

    from mara_rl.agents.agent import Agent
    from mara_rl.agents.agent_files import save_agent
    from mara_rl.agents.agent_refs import load_local_agent, local_metadata, locate_agent
    from mara_rl.llm.policy_llm import llm_hidden_size
    from mara_rl.tracking.registry import model_name_for
    from mara_rl.tracking.tracking_run import TrackingRun

    source = locate_agent(ref)
    agent, metadata = load_local_agent(source), local_metadata(source)
    spec = agent.spec
    if llm is None and not spec.llm:
        raise typer.BadParameter(f"{ref} does not say which LLM it belongs to: give --llm")
    if llm is not None:
        spec.check_llm(llm, llm_hidden_size(llm))
        spec = spec.model_copy(update={"llm": llm})
    named = Agent(spec)
    named.network.load_state_dict(agent.network.state_dict())
    registry = _registry(single_node)
    name = name or model_name_for(spec.llm)
    with (
        tempfile.TemporaryDirectory() as scratch,
        TrackingRun.start(registry.uri, "imported agents", name, {"source": ref}) as run,
    ):
        save_agent(named, Path(scratch) / "agent", metadata={**metadata, "imported_from": ref})
        uri = run.log_agent(Path(scratch) / "agent")
        version = registry.register(name, uri, {"llm": spec.llm, "source": ref})
    print(f"registered models:/{name}@candidate (version {version})")


@app.command()
def promote(
    name: Annotated[str, typer.Argument(help="A registered agent.")],
    version: Annotated[int, typer.Option(min=1, help="The version to make champion.")],
    force: Annotated[bool, typer.Option("--force", help="Skip the gate, e.g. to go back.")] = False,
    reason: Annotated[str | None, typer.Option(help="Why; kept with the version.")] = None,
    single_node: SingleNode = False,
) -> None:
    """Make a version champion if its recorded preference rate suffices.

    A refusal is a printed line and exit status 0.
    """
    from mara_rl.tracking.promotion import PromotionEvidence

    if force != (reason is not None):
        raise typer.BadParameter("--force and --reason go together")
    registry = _registry(single_node)
    evidence = None
    if not force:  # which needs none, and a tag that is spoilt must not stand in its way
        evidence = PromotionEvidence.from_tags(registry.find(f"models:/{name}/{version}").tags)
    print(registry.promote(name, version, evidence=evidence, force_reason=reason).line)


def registry_uri(single_node: bool) -> str:
    """Where MLflow is. Raises ConfigError in a cluster where only this machine would know."""
    from mara_rl.tracking.store import tracking_uri

    # Ray sets RAY_ADDRESS inside jobs: a registry of one node would be lost on the cluster.
    in_cluster = "RAY_ADDRESS" in os.environ
    if in_cluster and not single_node and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise ConfigError(
            "MLFLOW_TRACKING_URI is not set, but RAY_ADDRESS is: expected an MLflow server that "
            "the whole cluster reaches (--single-node: use the registry of this machine alone)"
        )
    return tracking_uri(allow_local=True)


def _registry(single_node: bool) -> "AgentRegistry":
    from mara_rl.tracking.registry import AgentRegistry

    return AgentRegistry(registry_uri(single_node))


def _spec_rows(spec: "AgentSpec") -> list[tuple[str, str]]:
    return [(field, str(value)) for field, value in spec.model_dump().items()]


def _version_rows(version: "AgentVersion") -> list[tuple[str, str]]:
    return [
        ("version", f"{version.name} {version.version}"),
        ("alias", ", ".join(version.aliases)),
        ("run", version.run_id),
        ("created", f"{version.created:%Y-%m-%d %H:%M} UTC"),
        *(("tag " + key, value) for key, value in sorted(version.tags.items()) if value),
    ]


def _rate(version: "AgentVersion") -> str:
    from mara_rl.tracking.promotion import PromotionEvidence

    evidence = PromotionEvidence.from_tags(version.tags)
    if evidence is None or math.isnan(evidence.rate):
        return "–"
    other = "base" if evidence.against == "base" else f"version {evidence.champion_version}"
    figures = f"{evidence.rate:+.1f} [{evidence.low:+.1f}, {evidence.high:+.1f}]"
    return f"{figures} (n={evidence.n}) against {other}"


def _print_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """A table on a terminal, tab-separated lines elsewhere."""
    console = Console()
    if not console.is_terminal:
        for row in rows:
            print("\t".join(row))
        return
    table = Table(*header, show_header=any(header))
    for row in rows:
        table.add_row(*row)
    console.print(table, markup=False)
