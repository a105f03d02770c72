"""Agents that can be asked for by name: some given at the start, others from the registry."""

import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

from mara_rl.agents.agent import Agent
from mara_rl.common.errors import ConfigError, DataError, RetryableError
from mara_rl.llm.policy_llm import PolicyLLM
from mara_rl.tracking.registry import CANDIDATE, CHAMPION, AgentRegistry, AgentVersion
from services.endpoint.agent_catalog import ServedAgent

logger = logging.getLogger(__name__)

_MAX_VERSIONS = 32  # loaded at a time beside those that an alias names; some 4–18 MB each
_NAME = re.compile(r"([\w.-]+)(?:@([\w-]+)|/(\d{1,9}))")


class RegistryCatalog:
    """An `AgentCatalog` of fixed agents and those of an MLflow registry.

    Registered agents that fit the LLM are listed by their aliases ``name@champion`` and
    ``name@candidate``; ``name/version`` is loaded when it is first asked for. A thread follows the
    aliases: when one moves, the new version is loaded and from then on given out, while what was
    given out before stays valid. While MLflow is away all that is loaded goes on.
    """

    def __init__(
        self,
        llm: PolicyLLM,
        fixed: Mapping[str, Callable[[], Agent]],
        registry: AgentRegistry | None,
        *,
        created: int,
        poll_s: float = 2.0,
        allow_other_llm: bool = False,
    ) -> None:
        """
        Args:
            fixed: names of agents from elsewhere, and how to load them.
            registry: where names of registered agents are looked up; None: nowhere.
            created: what fixed agents say of when they were made, in seconds since 1970.
            poll_s: how often aliases are looked up.
            allow_other_llm: let agents of another LLM of the same hidden size answer.

        Raises what loading a fixed agent raises, DataError where one does not fit the LLM.
        """
        self._llm = llm
        self._registry = registry
        self._poll_s = poll_s
        self._allow_other_llm = allow_other_llm
        self._fixed = {
            name: ServedAgent(name, self._fitted(load()), created) for name, load in fixed.items()
        }
        self._aliases: dict[str, ServedAgent] = {}
        self._versions: OrderedDict[str, ServedAgent] = OrderedDict()  # the last one used last
        self._refused: dict[str, str] = {}  # versions that cannot be used, and why
        self._away: str | None = None
        self._state = threading.Lock()
        self._asking = threading.Lock()  # one call of MLflow at a time: its limits are process-wide
        self._closed = threading.Event()
        self._thread = threading.Thread(
            target=self._follow, args=(registry,), name="agent-catalog", daemon=True
        )
        if registry is not None:
            self._refresh(registry)
            self._thread.start()

    def names(self) -> Sequence[tuple[str, ServedAgent]]:
        with self._state:
            return [*self._fixed.items(), *sorted(self._aliases.items())]

    def loaded(self, name: str) -> ServedAgent | None:
        with self._state:
            found = self._fixed.get(name) or self._aliases.get(name) or self._versions.get(name)
            if name in self._versions:
                self._versions.move_to_end(name)
            return found

    def load(self, name: str) -> ServedAgent:
        registry, parts = self._registry, _NAME.fullmatch(name)
        alias = parts and parts[2]
        if registry is None or parts is None or alias not in (None, CHAMPION, CANDIDATE):
            known = ", ".join(known for known, _ in self.names()) or "none"
            raise DataError(f"model {name!r} does not exist; agents are: {known}")
        if self._away is not None:
            raise RetryableError(f"model {name!r} is not loaded, and the registry is away")
        with self._asking:
            try:
                listed = registry.find(f"models:/{name}")
            except DataError as error:  # MLflow's own words tell where it is
                raise DataError(f"model {name!r} does not exist in the registry") from error
            return self._load_version(registry, listed)

    def close(self) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def _refresh(self, registry: AgentRegistry) -> None:
        """Look up all aliases, load what they name. MLflow being away is logged, not raised."""
        aliases: dict[str, ServedAgent] = {}
        try:
            with self._asking:
                for registered in registry.list():
                    named = {CHAMPION: registered.champion, CANDIDATE: registered.candidate}
                    for alias, version in named.items():
                        found = self._usable(registry, registered.name, version)
                        if found is not None:
                            aliases[f"{registered.name}@{alias}"] = found
        except (RetryableError, ConfigError) as error:
            if self._away is None:
                logger.warning("%s; loaded agents go on", error)
            self._away = str(error)
            return
        self._away = None
        with self._state:
            self._aliases = aliases

    def _follow(self, registry: AgentRegistry) -> None:
        while not self._closed.wait(self._poll_s):
            try:
                self._refresh(registry)
            except Exception:  # the next look-up may do better; meanwhile agents go on
                logger.exception("looking up the aliases of agents failed")

    def _usable(
        self, registry: AgentRegistry, name: str, version: int | None
    ) -> ServedAgent | None:
        """A version that an alias names; None where it does not fit, which is looked at once."""
        key = f"{name}/{version}"
        if version is None or key in self._refused:
            return None
        found = self.loaded(key)
        if found is not None:
            return found
        try:
            listed = registry.find(f"models:/{key}")
            if not self._may_fit(listed):
                raise DataError(f"trained on LLM {listed.tags['llm']!r}")
            return self._load_version(registry, listed)
        except DataError as error:
            logger.info("agent %s is not served: %s", key, error)
            self._refused[key] = str(error)
            return None

    def _may_fit(self, listed: AgentVersion) -> bool:
        """By its tags, so that agents of other LLMs are not even fetched."""
        trained_on = listed.tags.get("llm", "")
        own, other = (name.rpartition("/")[2].lower() for name in (trained_on, self._llm.name))
        return self._allow_other_llm or not own or own == other

    def _load_version(self, registry: AgentRegistry, listed: AgentVersion) -> ServedAgent:
        key = f"{listed.name}/{listed.version}"
        found = self.loaded(key)
        if found is not None:
            return found
        agent = self._fitted(registry.resolve(f"models:/{key}"))
        served = ServedAgent(key, agent, int(listed.created.timestamp()))
        with self._state:
            self._versions[key] = served
            in_use = {named.version for named in self._aliases.values()}
            spare = [old for old in self._versions if old not in in_use and old != key]
            for old in spare[: max(0, len(spare) - _MAX_VERSIONS)]:
                del self._versions[old]
        return served

    def _fitted(self, agent: Agent) -> Agent:
        """Ready for the LLM. Raises DataError where it does not fit."""
        llm = self._llm
        agent.spec.check_llm(llm.name, llm.hidden_size, allow_other_llm=self._allow_other_llm)
        return agent.to(llm.device).eval()


def served_name(ref: str) -> tuple[str, str]:
    """The name an agent given as ``ref`` or ``name=ref`` is served by, and the ref.

    ``models:/name@alias`` is served as ``name@alias``; of a path the last part counts that is not
    just ``agent``. Raises ConfigError where that leaves no name.
    """
    given, equals, rest = ref.partition("=")
    if equals:
        name, ref = given, rest
    elif ref.startswith("models:/"):
        name = ref.removeprefix("models:/")
    else:
        parts = [part for part in re.split(r"[/\\]", ref.removesuffix(".pth")) if part.strip(".")]
        name = next((part for part in reversed(parts) if part != "agent"), "")
    if not re.fullmatch(r"[\w.@/-]+", name) or not ref:
        raise ConfigError(f"agent {ref!r}: no name to serve it by; expected name=REF")
    return name, ref
