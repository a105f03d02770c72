"""``mara-rl train``: a training run, new or resumed."""

from typing import Annotated

import typer

from mara_rl.cli.options import Overrides, SingleNode

# An NFS server keeps the lock of a machine that is gone for some 90 s; a driver whose cluster is
# gone lives for 60 s.
_HANDOVER_S = 120.0


def train(
    config: Annotated[
        str | None, typer.Argument(help="A preset (quickstart, …) or a YAML file.")
    ] = None,
    overrides: Overrides = None,
    resume: Annotated[
        str | None, typer.Option("--resume", help="Continue a run, by name or folder.")
    ] = None,
    run_name: Annotated[
        str | None,
        typer.Option(
            "--run",
            help="Name of the run: started if it is new, continued if it is not, left alone if it "
            "is done. For jobs that may be submitted again.",
        ),
    ] = None,
    single_node: SingleNode = False,
) -> None:
    """Train an agent: warm start, PPO, held-out comparison, registry."""
    from rich.console import Console

    from mara_rl.common.display import Display
    from mara_rl.common.errors import MaraError
    from mara_rl.training.config import load_config
    from mara_rl.training.run.run_folder import RunFolder, remove_folder

    if (config is None) == (resume is None):
        raise typer.BadParameter("give either a config to start or --resume RUN, not both")
    if resume is not None:
        if overrides or run_name is not None:
            given = "--set" if overrides else "--run"
            raise typer.BadParameter(f"{given} cannot change a run that is resumed")
        folder, settings = RunFolder.open(resume)
    elif config is not None:
        settings = load_config(config, overrides or [])
        folder = RunFolder.named(run_name, settings) if run_name else RunFolder.create(settings)
    display = Display(Console())
    display.line(f"run {folder.name} in {folder.path}")
    from mara_rl.training.faults.stop_request import Interrupted
    from mara_rl.training.training_run import train as run

    wait_s = _HANDOVER_S if run_name is not None else 0.0
    if wait_s and folder.is_claimed():
        display.line(f"another process trains here: waiting for its end, {wait_s:g} s at most")
    with folder.claimed(wait_s):
        if run_name is not None:  # what was waited for may have made room for another run
            RunFolder.named(run_name, settings)
        done = folder.outcome()
        if run_name is not None and done is not None:
            display.line(f"done before: {done.agent_uri}")
            return
        try:
            run(settings, folder, display, single_node=single_node)
        except Interrupted as stopped:
            display.line(f"interrupted: continue with `mara-rl train --resume {folder.name}`")
            raise typer.Exit(stopped.status) from stopped
        except MaraError:
            if resume is None and folder.mlflow_run_id is None:
                remove_folder(folder.path)  # nothing began: there is nothing to resume
            raise
