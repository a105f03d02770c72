"""From an `EndpointConfig` to an `Endpoint`, in the process that will answer."""

import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path

from mara_rl.common.errors import ConfigError
from services.endpoint.decode_plan import Backend
from services.endpoint.endpoint import Endpoint
from services.endpoint.endpoint_config import EndpointConfig
from services.endpoint.request_record import JsonLines
from services.http.api_keys import KEYS_VARIABLE, ApiKeys, configured_keys


def make_endpoint(
    config: EndpointConfig,
    *,
    deployed: int,
    others_loaded: Callable[[], bool] = lambda: False,
) -> Endpoint:
    """An endpoint whose backend is still to be loaded; ``deployed`` in seconds since 1970.

    ``others_loaded`` says whether other replicas can answer.

    Raises ConfigError where it would answer without a key and that is not allowed.
    """
    keys = configured_keys(config.keys_file)
    if not keys and not config.anonymous:
        raise ConfigError(
            f"no API keys: set {KEYS_VARIABLE} or keys_file, or anonymous: true for a server that "
            "only this machine reaches"
        )
    return Endpoint(
        functools.partial(_backend, config, deployed),
        ApiKeys(keys, max_concurrent=config.limits.max_concurrent),
        config.limits,
        log_text=config.log_text,
        others_loaded=others_loaded,
    )


def log_requests(config: EndpointConfig) -> None:
    """Write what this process logs, each request among it, as JSON lines where the config says."""
    handler = logging.FileHandler(config.log_file) if config.log_file else logging.StreamHandler()
    handler.setFormatter(JsonLines())
    for package in ("mara_rl", "services"):
        logger = logging.getLogger(package)
        logger.handlers = [handler]
        logger.setLevel(logging.INFO)
        logger.propagate = False


def _backend(config: EndpointConfig, deployed: int) -> Backend:
    import torch

    from mara_rl.agents.agent_refs import fetch_agent
    from mara_rl.decoding.decoder import Decoder
    from mara_rl.llm.policy_llm import load_policy_llm
    from mara_rl.tracking.registry import AgentRegistry, is_registry_ref
    from services.endpoint.decode_loop import DecodeLoop
    from services.endpoint.registry_catalog import RegistryCatalog, served_name
    from services.endpoint.token_report import TokenReport
    from services.scoring.score_client import ScoreClient, ScoreClientConfig

    torch.set_num_threads(config.torch_threads)
    device = "cuda" if config.num_gpus else "cpu"
    llm = load_policy_llm(config.llm, device=device, dtype=config.dtype)
    uri = config.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    registry = AgentRegistry(uri) if uri else None
    llm_name, fixed, registered = served_llm_name(config.llm), {}, []
    for given in config.agents:
        name, ref = served_name(given)
        from_registry = is_registry_ref(ref)
        if from_registry and registry is None:
            raise ConfigError(f"agent {ref!r}: no MLflow to ask; set tracking_uri")
        if ref == f"models:/{name}":  # follows its alias, like all of the registry
            registered.append(name)
        elif name in fixed or name == llm_name:
            other = "the LLM is" if name == llm_name else "two are"
            raise ConfigError(f"agents: {other} served as {name!r}; expected name=REF for one")
        else:
            resolve = registry.resolve if registry and from_registry else fetch_agent
            fixed[name] = functools.partial(resolve, ref)
    catalog = RegistryCatalog(
        llm,
        fixed,
        registry,
        created=deployed,
        poll_s=config.poll_s,
        allow_other_llm=config.allow_other_llm,
    )
    for name in registered:
        if catalog.loaded(name) is None:
            catalog.load(name)
    scorer = None
    if config.score_apps:
        scorer = ScoreClient(
            ScoreClientConfig(
                sources=config.score_apps, deadline_s=config.score_timeout_s, partial=True
            )
        )
    loop = DecodeLoop(
        Decoder(llm, config.slots),
        max_waiting=config.max_waiting,
        step_timeout_s=config.step_timeout_s,
    )
    loop.start()
    return Backend(
        llm_name,
        llm,
        loop,
        catalog,
        scorer,
        TokenReport(llm),
        deployed,
    )


def served_llm_name(name: str) -> str:
    """What requests call the LLM: its hub id or shipped name, of a folder or file the last part."""
    path = Path(name).expanduser()
    return path.resolve().name if path.exists() or path.is_absolute() else name
