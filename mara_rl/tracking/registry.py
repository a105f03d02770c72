"""The registry of agents: versions, the aliases ``candidate`` and ``champion``, rollback."""

import contextlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from mara_rl.agents.agent import Agent
from mara_rl.agents.agent_files import SPEC_FILE, WEIGHTS_FILE, load_agent
from mara_rl.agents.agent_refs import fetch_agent
from mara_rl.common.errors import ConfigError, DataError
from mara_rl.tracking.promotion import PromotionEvidence, refusal
from mara_rl.tracking.store import mlflow_calls, mlflow_client, slug, tracking_uri

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

CANDIDATE = "candidate"
CHAMPION = "champion"
_VERSION_REF = r"models:/([^/@]+)(?:@([\w-]+)|/(\d+))"
_LOGGED_REF = r"models:/(m-\w+)"  # a model as a run logged it, registered or not
_KIND = ("kind", "mara-agent")  # tells agents from other models of a shared registry


@dataclass(frozen=True, slots=True)
class AgentVersion:
    """One version of a registered agent."""

    name: str
    version: int
    aliases: tuple[str, ...]
    run_id: str
    created: datetime
    tags: dict[str, str]


@dataclass(frozen=True, slots=True)
class RegisteredAgent:
    """A registered agent with the versions its aliases name."""

    name: str
    candidate: int | None
    champion: int | None


@dataclass(frozen=True, slots=True)
class PromotionResult:
    """Whether a version is champion now, and the one line that says so or why not."""

    promoted: bool
    line: str


class AgentRegistry:
    """Agents in the MLflow registry at ``uri``.

    Its methods raise RetryableError when the server is away, ConfigError when it refuses access,
    DataError for a name, version or alias that does not exist.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._client = mlflow_client(uri)

    def register(self, model_name: str, model_uri: str, tags: Mapping[str, str]) -> int:
        """Register what `TrackingRun.log_agent` returned; the new version, now ``candidate``."""
        from mlflow.exceptions import MlflowException

        found = re.fullmatch(_LOGGED_REF, model_uri)
        if not found:
            raise DataError(f"model URI {model_uri!r}; expected models:/m-…, as log_agent gives it")
        with mlflow_calls(self.uri):
            logged = self._client.get_logged_model(found[1])
            try:
                self._client.create_registered_model(model_name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            self._client.set_registered_model_tag(model_name, *_KIND)
            created = self._client.create_model_version(
                model_name,
                logged.artifact_location,
                run_id=logged.source_run_id,
                tags=dict(tags),
                model_id=found[1],
            )
            self._client.set_registered_model_alias(model_name, CANDIDATE, created.version)
        return int(created.version)

    def registered(self, model_name: str, *, run_id: str, sha256: str) -> int | None:
        """The version with these weights that a run registered before it was cut off, if it did.

        Its tag ``sha256`` tells (see `source_tags`). It is made ``candidate`` where the run came to
        its end before that, unless a newer version is.
        """
        with mlflow_calls(self.uri):
            page = self._client.search_model_versions(
                f"name = '{model_name}' and run_id = '{run_id}'"
            )
            versions = [int(v.version) for v in page if v.tags.get("sha256") == sha256]
            if not versions:
                return None
            version = max(versions)
            if self._aliases(model_name).get(CANDIDATE, 0) < version:
                self._client.set_registered_model_alias(model_name, CANDIDATE, str(version))
        return version

    def resolve(self, ref: str) -> Agent:
        """The agent ``ref`` names, on the CPU.

        ``models:/name@alias``, ``models:/name/version``, ``runs:/<id>/<path>``, or what
        `fetch_agent` takes. Only ``agent.safetensors`` and ``agent.json`` are fetched; code that
        lies in the registry is not run.
        """
        if not is_registry_ref(ref):
            return fetch_agent(ref)
        with self.fetched(ref) as folder:
            return load_agent(folder)

    @contextlib.contextmanager
    def fetched(self, ref: str) -> Iterator[Path]:
        """A temporary folder with the two files of a ``models:/…`` or ``runs:/…`` agent."""
        with tempfile.TemporaryDirectory() as scratch:
            with mlflow_calls(self.uri):
                self._download(ref, self._location(ref), scratch)
            yield Path(scratch)

    def list(self) -> Sequence[RegisteredAgent]:
        """All registered agents, by name."""
        with mlflow_calls(self.uri):
            agents, token = [], None
            while True:
                page = self._client.search_registered_models(
                    filter_string=f"tags.{_KIND[0]} = '{_KIND[1]}'",
                    order_by=["name ASC"],
                    page_token=token,
                )
                agents += [_registered(model) for model in page]
                token = page.token
                if not token:
                    return agents

    def show(self, name: str) -> Sequence[AgentVersion]:
        """All versions of an agent, the newest first."""
        with mlflow_calls(self.uri):
            aliases = self._aliases(name)
            versions, token = [], None
            while True:
                page = self._client.search_model_versions(f"name = '{name}'", page_token=token)
                versions += [_version(found, aliases) for found in page]
                token = page.token
                if not token:
                    break
        return sorted(versions, key=lambda version: -version.version)

    def find(self, ref: str) -> AgentVersion:
        """The version that ``models:/name@alias`` or ``models:/name/version`` names."""
        with mlflow_calls(self.uri):
            found = self._find(ref)
            return _version(found, self._aliases(found.name))

    def champion(self, name: str) -> int | None:
        """The champion's version; None without one, or when ``name`` is not registered yet."""
        from mlflow.exceptions import MlflowException

        with mlflow_calls(self.uri):
            try:
                return self._aliases(name).get(CHAMPION)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                return None

    def promote(
        self,
        name: str,
        version: int,
        *,
        evidence: PromotionEvidence | None,
        force_reason: str | None = None,
    ) -> PromotionResult:
        """Make ``version`` champion if ``evidence`` suffices (see `refusal`), or by force.

        The evidence becomes tags of the version, whatever the outcome. ``force_reason`` skips the
        gate, e.g. to roll back; it is kept in the tag ``forced``, which is empty where evidence
        sufficed. Raises ConfigError when the reason is empty.
        """
        if force_reason is not None and not force_reason.strip():
            raise ConfigError("reason is empty; expected why the gate is to be skipped")
        champion = self.champion(name)
        with mlflow_calls(self.uri):
            self._client.get_model_version(name, str(version))  # unknown: say so first
            if champion == version:
                return PromotionResult(True, f"{name} version {version} is champion already")
            self._tag(name, version, evidence.tags() if evidence else {})
            reason = refusal(evidence, champion)
            if reason is not None and force_reason is None:
                line = f"{name} version {version} stays candidate: {reason}"
                return PromotionResult(False, line)
            now = datetime.now(UTC).isoformat(timespec="seconds")
            tags = {"promoted_at": now, "promoted_over": str(champion or "")}
            self._tag(name, version, tags | {"forced": (force_reason or "").strip()})
            self._client.set_registered_model_alias(name, CHAMPION, str(version))
        before = f", before it version {champion}" if champion else ""
        forced = f" (forced: {force_reason.strip()})" if force_reason else ""
        return PromotionResult(True, f"{name} version {version} is champion{before}{forced}")

    def tag(
        self, name: str, version: int, tags: Mapping[str, str], *, instead_of: str | None = None
    ) -> None:
        """Set tags of a version; those that begin with ``instead_of`` and are not set now go."""
        with mlflow_calls(self.uri):
            if instead_of is not None:
                for key in self._client.get_model_version(name, str(version)).tags:
                    if key.startswith(instead_of) and key not in tags:
                        self._client.delete_model_version_tag(name, str(version), key)
            self._tag(name, version, tags)

    def _tag(self, name: str, version: int, tags: Mapping[str, str]) -> None:
        for key, value in tags.items():
            self._client.set_model_version_tag(name, str(version), key, value)

    def _aliases(self, name: str) -> dict[str, int]:
        model = self._client.get_registered_model(name)
        return {alias: int(version) for alias, version in model.aliases.items()}

    def _find(self, ref: str) -> "ModelVersion":
        found = re.fullmatch(_VERSION_REF, ref)
        if not found:
            raise DataError(f"agent {ref!r}: expected models:/name@alias or models:/name/version")
        name, alias, version = found.groups()
        if alias:
            return self._client.get_model_version_by_alias(name, alias)
        return self._client.get_model_version(name, version)

    def _location(self, ref: str) -> str:
        """The URI of the folder ``ref`` names. MLflow's own resolution of these URIs asks the
        process-wide tracking URI, which need not be ours."""
        if found := re.fullmatch(_LOGGED_REF, ref):
            return self._client.get_logged_model(found[1]).artifact_location
        if ref.startswith("models:/"):
            version = self._find(ref)
            return self._client.get_model_version_download_uri(version.name, version.version)
        run_id, _, path = ref.removeprefix("runs:/").partition("/")
        if not run_id or not path:
            raise DataError(f"agent {ref!r}: expected runs:/<run id>/<path>")
        run = self._client.get_run(run_id)
        for output in run.outputs.model_outputs if run.outputs else []:
            logged = self._client.get_logged_model(output.model_id)
            if logged.name == path:
                return logged.artifact_location
        return f"{run.info.artifact_uri}/{path}"

    def _download(self, ref: str, location: str, folder: str) -> None:
        """Fetch the two files of an MLflow model, or of a plain agent folder, into ``folder``."""
        from mlflow.artifacts import download_artifacts, list_artifacts

        listed = list_artifacts(artifact_uri=location, tracking_uri=self.uri)
        names = {Path(file.path).name for file in listed}
        root = f"{location}/artifacts" if "MLmodel" in names else location
        if "MLmodel" not in names and SPEC_FILE not in names:
            raise DataError(f"agent {ref!r} holds {sorted(names)}; expected an agent")
        for name in (SPEC_FILE, WEIGHTS_FILE):
            download_artifacts(
                artifact_uri=f"{root}/{name}", dst_path=folder, tracking_uri=self.uri
            )


def is_registry_ref(ref: str) -> bool:
    """Whether ``ref`` is one for MLflow to resolve, and not a local path."""
    return ref.startswith(("models:/", "runs:/"))


def is_version_ref(ref: str) -> bool:
    """Whether ``ref`` names a registered version: by number or by alias, not a logged model."""
    return re.fullmatch(_VERSION_REF, ref) is not None


def model_name_for(llm_name: str) -> str:
    """The registered name of agents for an LLM: ``mara-`` and a slug without ``/`` or ``:``.

    Of a folder the last part counts, of a hub id all. Raises ConfigError where nothing is left.
    """
    path = Path(llm_name).expanduser()
    name = slug(path.resolve().name if path.is_absolute() or llm_name.startswith(".") else llm_name)
    if not name:
        raise ConfigError(f"llm {llm_name!r}: expected a name with letters or digits")
    return f"mara-{name}"


def source_tags(*, llm: str, seed: int, run_id: str, sha256: str) -> dict[str, str]:
    """Tags that say where a version came from, the git commit of this code included if known.

    ``sha256`` is the agent's own, as `agent_sha256` gives it.
    """
    tags = {"llm": llm, "seed": str(seed), "run_id": run_id, "sha256": sha256}
    here = Path(__file__)
    # An installed package may lie inside a repository that is not its own.
    if shutil.which("git") and _git("ls-files", "--error-unmatch", here.name).returncode == 0:
        tags["git_sha"] = _git("describe", "--always", "--dirty", "--abbrev=40").stdout.strip()
    return tags


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    folder = Path(__file__).parent
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)


def resolve_agent(ref: str, *, allow_local: bool) -> Agent:
    """The agent ``ref`` names (see `AgentRegistry.resolve`); MLflow is asked only if need be.

    ``allow_local`` as for `tracking_uri`, which is where MLflow is found.
    """
    if is_registry_ref(ref):
        return AgentRegistry(tracking_uri(allow_local=allow_local)).resolve(ref)
    return fetch_agent(ref)


def _registered(model: "RegisteredModel") -> RegisteredAgent:
    aliases = {alias: int(version) for alias, version in model.aliases.items()}
    return RegisteredAgent(model.name, aliases.get(CANDIDATE), aliases.get(CHAMPION))


def _version(found: "ModelVersion", aliases: Mapping[str, int]) -> AgentVersion:
    version = int(found.version)
    return AgentVersion(
        name=found.name,
        version=version,
        aliases=tuple(sorted(alias for alias, named in aliases.items() if named == version)),
        run_id=found.run_id or "",
        created=datetime.fromtimestamp(found.creation_timestamp / 1000, UTC),
        tags=dict(found.tags),
    )
