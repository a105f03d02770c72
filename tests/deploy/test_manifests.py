"""The files of `deploy/`: known fields, and names that fit each other. No cluster is asked."""

import importlib
import re
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from dockerfile_parse import DockerfileParser
from kubernetes_kinds import check_manifest
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from mara_rl import __version__
from mara_rl.training.config import load_config, preset_names
from mara_rl.training.run.session import resource_plan
from services.endpoint.endpoint_config import EndpointConfig
from services.scoring.score_service import ScoreServiceConfig

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERAY = sorted((DEPLOY / "kuberay").glob("*.yaml"))
ARGS = {
    "services.scoring.score_service:score_application": ScoreServiceConfig,
    "services.scoring.score_api:keyed_score_application": ScoreServiceConfig,
    "services.endpoint.application:application": EndpointConfig,
}


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def manifests() -> list[dict[str, Any]]:
    return [manifest for path in KUBERAY for manifest in documents(path)]


def pods(value: Any) -> Iterator[dict[str, Any]]:
    """The pod specs anywhere in a manifest."""
    if isinstance(value, dict):
        if "containers" in value:
            yield value
        for inner in value.values():
            yield from pods(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from pods(inner)


def containers() -> list[dict[str, Any]]:
    return [container for pod in pods(manifests()) for container in pod["containers"]]


def by_kind(kind: str) -> list[dict[str, Any]]:
    return [manifest for manifest in manifests() if manifest["kind"] == kind]


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.name)
def test_fields_and_types_are_those_of_the_kind(path: Path) -> None:
    found = documents(path)
    assert found
    for manifest in found:
        check_manifest(manifest)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("spec", "replicas"), "1", r"Deployment\.spec\.replicas: expected int, not '1'"),
        (("spec", "replica"), 1, r"Deployment\.spec: expected one of .* not 'replica'"),
        (("spec", "template", "spec", "containers", 0, "ports"), {}, "ports: expected a list"),
    ],
)
def test_a_wrong_field_is_found(place: tuple[Any, ...], value: Any, message: str) -> None:
    deployment = next(
        m for m in documents(DEPLOY / "kuberay/mlflow.yaml") if m["kind"] == "Deployment"
    )
    holder: Any = deployment
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    with pytest.raises(ValueError, match=message):
        check_manifest(deployment)


def test_a_wrong_field_of_a_ray_job_is_found() -> None:
    [job] = documents(DEPLOY / "kuberay/rayjob.yaml")
    for holder, key in ((job["spec"], "entryPoint"), (job["spec"]["rayClusterSpec"], "image")):
        holder[key] = "x"
        with pytest.raises(ValueError, match=key):
            check_manifest(job)
        del holder[key]
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    head["ports"][0]["containerPort"] = "6379"
    with pytest.raises(ValueError, match="expected int, not '6379'"):
        check_manifest(job)


@pytest.mark.parametrize(
    "path", ["deploy/serve.yaml", "deploy/scores.yaml", "deploy/kuberay/rayservice.yaml"]
)
def test_serve_configs_are_valid_and_what_they_import_takes_their_arguments(path: str) -> None:
    [config] = documents(ROOT / path)
    if "serveConfigV2" in config.get("spec", {}):
        config = yaml.safe_load(config["spec"]["serveConfigV2"])
    schema = ServeDeploySchema.model_validate(config)
    served = {application.name for application in schema.applications}
    for application in schema.applications:
        module, _, name = application.import_path.partition(":")
        assert callable(getattr(importlib.import_module(module), name))
        args = ARGS[application.import_path].model_validate(application.args)
        if isinstance(args, EndpointConfig):
            assert set(args.score_apps.values()) <= served


def test_the_ray_service_serves_what_serve_yaml_says() -> None:
    [service] = documents(DEPLOY / "kuberay/rayservice.yaml")
    [config] = documents(DEPLOY / "serve.yaml")
    assert yaml.safe_load(service["spec"]["serveConfigV2"]) == config


def test_the_ray_service_has_cpus_for_its_replicas() -> None:
    [service] = documents(DEPLOY / "kuberay/rayservice.yaml")
    asked = 0.0
    for application in yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]:
        config = ARGS[application["import_path"]].model_validate(application["args"])
        asked += config.num_cpus * (config.max_replicas or config.num_replicas)
    [group] = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    [worker] = group["template"]["spec"]["containers"]
    assert asked <= float(worker["resources"]["requests"]["cpu"]) * group["minReplicas"]


def test_the_ray_job_trains_a_preset_that_fits_its_workers() -> None:
    [job] = documents(DEPLOY / "kuberay/rayjob.yaml")
    words = job["spec"]["entrypoint"].split()
    assert words[:2] == ["mara-rl", "train"]
    assert words[3:] == ["--run", job["spec"]["metadata"]["run"]]
    plan = resource_plan(load_config(words[2]))
    plan.append(("driver", {"CPU": job["spec"]["entrypointNumCpus"]}))
    [group] = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    requests = group["template"]["spec"]["containers"][0]["resources"]["requests"]
    for resource, name in (("CPU", "cpu"), ("GPU", "nvidia.com/gpu")):
        asked = sum(bundle.get(resource, 0) for _, bundle in plan)
        assert asked <= float(requests[name]) * group["replicas"], name


def test_versions_of_images_and_of_ray_are_those_of_the_package() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    ray_up = yaml.safe_load((DEPLOY / "ray-cluster.yaml").read_text())
    images = {container["image"] for container in containers()}
    images |= {service["image"] for service in compose.values()} | {ray_up["docker"]["image"]}
    assert {image.partition(":")[0] for image in images} == {"mara-rl", "redis"}
    assert len(images) == 2, "one version of each"
    assert f"mara-rl:{__version__}" in images
    pinned = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    clusters = [m["spec"]["rayClusterSpec"] for m in by_kind("RayJob")]
    clusters += [m["spec"]["rayClusterConfig"] for m in by_kind("RayService")]
    assert [cluster["rayVersion"] for cluster in clusters] == [pinned[1]] * 2


def test_services_policies_and_addresses_meet_at_ports_that_are_open() -> None:
    for service in by_kind("Service"):
        name, selector = service["metadata"]["name"], service["spec"]["selector"]
        [workload] = [
            m
            for m in by_kind("Deployment") + by_kind("StatefulSet")
            if m["spec"]["template"]["metadata"]["labels"].items() >= selector.items()
        ]
        assert workload["metadata"]["name"] == name
        assert workload["spec"]["selector"]["matchLabels"] == selector
        [container] = workload["spec"]["template"]["spec"]["containers"]
        by_name = {port["name"]: port["containerPort"] for port in container["ports"]}
        for port in service["spec"]["ports"]:
            assert by_name[port["targetPort"]] == port["port"]
            [policy] = [m for m in by_kind("NetworkPolicy") if m["metadata"]["name"] == name]
            assert policy["spec"]["podSelector"]["matchLabels"] == selector
            assert [p["port"] for p in policy["spec"]["ingress"][0]["ports"]] == [port["port"]]
    ports = {s["metadata"]["name"]: s["spec"]["ports"][0]["port"] for s in by_kind("Service")}
    uris = {
        env["value"]
        for container in containers()
        for env in container.get("env", [])
        if env["name"] == "MLFLOW_TRACKING_URI"
    }
    assert uris == {f"http://mlflow:{ports['mlflow']}"}
    [mlflow] = [c for c in containers() if c["name"] == "mlflow"]
    assert f"--port={ports['mlflow']}" in mlflow["args"]
    allowed = next(arg for arg in mlflow["args"] if arg.startswith("--allowed-hosts="))
    assert f"mlflow:{ports['mlflow']}" in allowed.partition("=")[2].split(",")


def test_pods_that_use_redis_or_mlflow_bear_the_label_that_lets_them_in() -> None:
    [allowed] = {
        tuple(rule["podSelector"]["matchLabels"].items())
        for policy in by_kind("NetworkPolicy")
        for rule in policy["spec"]["ingress"][0]["from"]
    }
    for manifest in by_kind("RayJob") + by_kind("RayService"):
        cluster = manifest["spec"].get("rayClusterSpec") or manifest["spec"]["rayClusterConfig"]
        assert cluster["authOptions"]["mode"] == "token"
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            assert allowed[0] in group["template"]["metadata"]["labels"].items()


def test_secrets_and_volumes_are_those_that_the_docs_create() -> None:
    text = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8").replace("\\\n", " ")
    created = {
        (found[1], key)
        for found in re.finditer(r"kubectl create secret generic (\S+)(.*)", text)
        for key in re.findall(r"--from-literal=([\w-]+)=", found[2])
    }
    used = set()
    for container in containers():
        for env in container.get("env", []):
            reference = env.get("valueFrom", {}).get("secretKeyRef")
            if reference:
                used.add((reference["name"], reference["key"]))
    assert used == created
    claims = {claim["metadata"]["name"] for claim in by_kind("PersistentVolumeClaim")}
    mounted = {
        volume["persistentVolumeClaim"]["claimName"]
        for pod in pods(manifests())
        for volume in pod.get("volumes", [])
        if "persistentVolumeClaim" in volume
    }
    assert mounted == claims


def test_no_secret_stands_in_a_manifest() -> None:
    for container in containers():
        for env in container.get("env", []):
            secret = re.search("PASSWORD|TOKEN|KEY|AUTH|REDIS_URL", env["name"])
            assert not secret or "valueFrom" in env, env["name"]
    assert not by_kind("Secret")


def test_pods_run_without_root_and_without_privileges() -> None:
    assert len(list(pods(manifests()))) == 6
    for pod in pods(manifests()):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"]
            volumes = {volume["name"] for volume in pod.get("volumes", [])} | {"data"}
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes


def test_long_lived_services_have_probes() -> None:
    for manifest in by_kind("Deployment") + by_kind("StatefulSet"):
        for container in manifest["spec"]["template"]["spec"]["containers"]:
            assert {"startupProbe", "readinessProbe", "livenessProbe"} <= container.keys()


def test_environment_names_are_read_by_somebody() -> None:
    sources = [
        p.read_text() for part in ("mara_rl", "services") for p in (ROOT / part).rglob("*.py")
    ]
    code = "\n".join(sources)
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    names = {env["name"] for container in containers() for env in container.get("env", [])}
    names |= {name for service in compose.values() for name in service.get("environment", {})}
    elsewhere = {
        "HF_HOME": "huggingface_hub",
        "HF_TOKEN": "huggingface_hub",
        "RAY_AUTH_MODE": "ray",
        "RAY_AUTH_TOKEN": "ray",
        "REDISCLI_AUTH": "redis-cli",
    }
    for name in names - elsewhere.keys():
        assert f'"{name}"' in code, name


class ComposeHealthcheck(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    test: list[str]
    interval: str = Field(pattern=r"^\d+s$")
    timeout: str = Field(pattern=r"^\d+s$")
    retries: int


class ComposeDependency(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    condition: Literal["service_started", "service_healthy", "service_completed_successfully"]


class ComposeService(BaseModel):
    """What of Compose's specification this project uses."""

    model_config = ConfigDict(extra="forbid", strict=True)
    image: str
    command: list[str]
    environment: dict[str, str] = {}
    volumes: list[str] = []
    ports: list[str] = []
    healthcheck: ComposeHealthcheck | None = None
    depends_on: dict[str, ComposeDependency] = {}
    shm_size: str | None = None
    init: bool = False
    restart: Literal["no", "always", "on-failure", "unless-stopped"]


def test_the_compose_file_is_sound_and_open_on_loopback_only() -> None:
    file = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    assert file.keys() == {"name", "services", "volumes"}
    services = TypeAdapter(dict[str, ComposeService]).validate_python(file["services"])
    for name, service in services.items():
        assert all(port.startswith("127.0.0.1:") for port in service.ports)
        assert {volume.partition(":")[0] for volume in service.volumes} <= file["volumes"].keys()
        for dependency, given in service.depends_on.items():
            healthy = given.condition == "service_healthy"
            assert not healthy or services[dependency].healthcheck is not None, name
    node = services["node"].environment
    assert re.fullmatch(r"redis://:\$\{REDIS_PASSWORD.*\}@redis:6379/0", node["MARA_REDIS_URL"])
    assert node["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    for variable in ("REDIS_PASSWORD", "RAY_AUTH_TOKEN", "MARA_API_KEY"):
        assert f"${{{variable}:?" in (DEPLOY / "compose.yaml").read_text(), "it must be given"


def test_gpus_are_given_to_a_service_that_there_is() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    extra = yaml.safe_load((DEPLOY / "compose.gpu.yaml").read_text())
    assert extra == {"services": {"node": {"gpus": "all"}}}
    assert extra["services"].keys() <= services.keys()


def test_llms_of_a_hub_can_be_loaded_wherever_llms_run() -> None:
    ray_pods = [c for c in containers() if c["name"].startswith("ray-")]
    assert len(ray_pods) == 4
    for container in ray_pods:
        environment = {env["name"]: env for env in container["env"]}
        assert environment["HF_HOME"]["value"].startswith("/runs/")
        assert environment["HF_TOKEN"]["valueFrom"]["secretKeyRef"]["optional"]
    node = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["node"]
    assert {"HF_HOME", "HF_TOKEN"} <= node["environment"].keys()


def test_the_dockerfile_is_pinned_and_runs_without_root() -> None:
    steps = DockerfileParser(str(DEPLOY / "Dockerfile")).structure
    steps = [step for step in steps if step["instruction"] != "COMMENT"]
    named = {step["instruction"] for step in steps}
    assert "ADD" not in named
    assert "MAINTAINER" not in named
    bases = [step["value"] for step in steps if step["instruction"] == "FROM"]
    assert len(bases) == 2
    [python] = [s["value"] for s in steps if s["value"].startswith("PYTHON=")]
    assert re.fullmatch(r"PYTHON=3\.1[12]\.\d+-slim-\w+", python)
    assert all(base.startswith("python:${PYTHON}") for base in bases)
    last = [step["instruction"] for step in steps]
    final = steps[len(last) - 1 - last[::-1].index("FROM") :]
    users = [step["value"] for step in final if step["instruction"] == "USER"]
    assert users == ["1000:1000"]
    user_at = next(i for i, step in enumerate(final) if step["instruction"] == "USER")
    assert "RUN" not in [step["instruction"] for step in final[user_at:]]
    [command] = [step["value"] for step in final if step["instruction"] in ("CMD", "ENTRYPOINT")]
    assert isinstance(yaml.safe_load(command), list), "exec form"
    for step in steps:
        if step["instruction"] == "RUN" and "apt-get install" in step["value"]:
            assert "--no-install-recommends" in step["value"]
            assert "rm -rf /var/lib/apt/lists/*" in step["value"]
            assert "apt-get update" in step["value"]
        if step["instruction"] == "RUN" and "pip install" in step["value"]:
            assert "-c constraints.txt" in step["value"]
    makefile = (ROOT / "Makefile").read_text()
    smollm2 = re.search(r"^SMOLLM2 := (\S+)$", makefile, re.MULTILINE)
    assert smollm2 is not None
    assert smollm2[1] in (DEPLOY / "Dockerfile").read_text(), "the default LLM is in the image"


def test_what_the_dockerfile_copies_is_there_and_not_ignored() -> None:
    steps = DockerfileParser(str(DEPLOY / "Dockerfile")).structure
    copies = [s["value"].split() for s in steps if s["instruction"] == "COPY"]
    sources = {name for words in copies if "--from=build" not in words for name in words[:-1]}
    allowed = set(re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
    assert sources == allowed
    assert all((ROOT / source).exists() for source in sources)
    built = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert {"mara_rl", "envs", "services"} <= sources
    assert built["project"]["readme"] in sources


def test_the_ray_cluster_file_is_what_ray_up_takes() -> None:
    config = yaml.safe_load((DEPLOY / "ray-cluster.yaml").read_text())
    validate_config(prepare_config(config))


def test_a_job_brings_the_code_and_the_shipped_models_and_no_more(tmp_path: Path) -> None:
    package = tmp_path / "working_dir.zip"
    excludes = get_runtime_env_default_excludes()
    create_package(str(ROOT), package, include_gitignore=True, excludes=excludes)
    with zipfile.ZipFile(package) as archive:
        names = set(archive.namelist())
    tops = {name.partition("/")[0] for name in names}
    assert {"mara_rl", "envs", "services", "deploy"} <= tops
    assert not tops & {".git", ".venv", "tests", "docs", "benchmarks", "runs"}
    assert "deploy/smoke.yaml" in names
    assert any(name.endswith(".safetensors") for name in names)
    assert package.stat().st_size < 20e6


def test_the_runtime_env_says_nothing_secret() -> None:
    runtime_env = yaml.safe_load((DEPLOY / "runtime_env.yaml").read_text())
    assert runtime_env.keys() == {"env_vars"}
    rayjob = yaml.safe_load((DEPLOY / "kuberay" / "rayjob.yaml").read_text())
    assert yaml.safe_load(rayjob["spec"]["runtimeEnvYAML"]) == runtime_env
    assert not [n for n in runtime_env["env_vars"] if re.search("PASSWORD|TOKEN|KEY|REDIS", n)]


def test_the_smoke_run_needs_what_any_cluster_has() -> None:
    config = load_config(str(DEPLOY / "smoke.yaml"))
    assert sum(bundle.get("CPU", 0) for _, bundle in resource_plan(config)) <= 2
    assert not any("GPU" in bundle for _, bundle in resource_plan(config))


@pytest.mark.parametrize("preset", preset_names())
def test_the_docs_give_each_preset_s_resources(preset: str) -> None:
    text = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    row = re.search(rf"^\| `{re.escape(preset)}` \|(.*)\|$", text, re.MULTILINE)
    assert row is not None, f"{preset} is not in the table"
    gpus, cpus = (float(cell) for cell in row[1].split("|")[-2:])
    plan = resource_plan(load_config(preset))
    assert gpus == sum(bundle.get("GPU", 0) for _, bundle in plan)
    assert cpus == pytest.approx(sum(bundle.get("CPU", 0) for _, bundle in plan))
