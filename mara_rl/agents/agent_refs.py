"""Where agents come from without a registry: folders, published files, the model hub."""

from pathlib import Path
from typing import Any

from mara_rl.agents.agent import Agent
from mara_rl.agents.agent_files import SPEC_FILE, WEIGHTS_FILE, load_agent, read_agent_spec
from mara_rl.agents.published_actors import load_published_actor
from mara_rl.common.errors import ConfigError, DataError, first_line


def load_local_agent(path: Path) -> Agent:
    """An agent from a folder (`load_agent`) or a ``.pth`` file (`load_published_actor`).

    Raises DataError when neither is there.
    """
    if path.is_dir():
        return load_agent(path)
    if path.is_file():
        return load_published_actor(path)
    raise DataError(f"agent {str(path)!r}: no such file or folder")


def fetch_agent(ref: str) -> Agent:
    """An agent by local path, or from the model hub: `locate_agent`, loaded.

    Raises DataError for what is not an agent, ConfigError when nothing is there.
    """
    return load_local_agent(locate_agent(ref))


def locate_agent(ref: str) -> Path:
    """The folder or ``.pth`` file of an agent by local path, or fetched from the model hub.

    On the hub: ``owner/repository`` with our two files, or ``owner/repository/file.pth``. A local
    path goes first. Raises DataError for what can be neither, ConfigError when nothing is there.
    """
    if Path(ref).exists():
        return Path(ref)
    owner, _, rest = ref.partition("/")
    repository, _, file = rest.partition("/")
    if not owner or not repository or ref.startswith((".", "/", "~")):
        raise DataError(f"agent {ref!r}: no such file or folder")
    from huggingface_hub import hf_hub_download

    names = [file] if file else [SPEC_FILE, WEIGHTS_FILE]
    try:
        paths = [Path(hf_hub_download(f"{owner}/{repository}", name)) for name in names]
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise ConfigError(
            f"agent {ref!r}: no such file or folder, and the model hub did not give "
            f"{' and '.join(names)}: {reason}"
        ) from error
    return paths[0] if file else paths[0].parent


def local_metadata(path: Path) -> dict[str, Any]:
    """What an agent's folder says beside its spec; nothing for a ``.pth`` file."""
    return read_agent_spec(path)[1] if path.is_dir() else {}
