"""Field names and types of Kubernetes manifests, without a cluster.

Built-in kinds are those of Kubernetes' own Python client, which is made from the API's description.
Of KubeRay's kinds, the fields that this project uses are written down here (version 1.5.1).
"""

import re
from typing import Annotated, Any, Literal

from kubernetes.client import models
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt

_PLAIN = {"str": str, "int": int, "bool": bool, "float": (int, float)}
_KINDS = {
    ("v1", "Service"): "V1Service",
    ("v1", "PersistentVolumeClaim"): "V1PersistentVolumeClaim",
    ("apps/v1", "Deployment"): "V1Deployment",
    ("apps/v1", "StatefulSet"): "V1StatefulSet",
    ("networking.k8s.io/v1", "NetworkPolicy"): "V1NetworkPolicy",
}


def check_manifest(manifest: dict[str, Any]) -> None:
    """Raise ValueError naming the first field that the manifest's kind does not know or take."""
    kind = (manifest.get("apiVersion"), manifest.get("kind"))
    if kind in _KINDS:
        check_fields(manifest, _KINDS[kind], manifest["kind"])
    elif kind in _CUSTOM:
        _CUSTOM[kind].model_validate(manifest)
    else:
        raise ValueError(f"unknown kind {kind}")


def check_fields(value: Any, kind: str, path: str) -> None:
    """Raise ValueError unless ``value`` is a ``kind`` of Kubernetes' client."""
    if found := re.fullmatch(r"list\[(.+)\]", kind):
        _expect(isinstance(value, list), path, "a list", value)
        for index, item in enumerate(value):
            check_fields(item, found[1], f"{path}[{index}]")
    elif found := re.fullmatch(r"dict\[str, (.+)\]", kind):
        _expect(isinstance(value, dict), path, "a mapping", value)
        for key, item in value.items():
            check_fields(item, found[1], f"{path}.{key}")
    elif kind in _PLAIN:
        right = isinstance(value, _PLAIN[kind]) and (kind == "bool" or not isinstance(value, bool))
        _expect(right, path, kind, value)
    elif kind != "object":  # a number or text, such as a port
        model = getattr(models, kind)
        _expect(isinstance(value, dict), path, "a mapping", value)
        attributes = {name: attribute for attribute, name in model.attribute_map.items()}
        for name, item in value.items():
            _expect(name in attributes, path, f"one of {sorted(attributes)}", name)
            check_fields(item, model.openapi_types[attributes[name]], f"{path}.{name}")
        # The client's models refuse what lacks a required field.
        given = {attributes[name]: item for name, item in value.items()}
        model(**given)


def _expect(right: bool, path: str, expected: str, value: Any) -> None:
    if not right:
        raise ValueError(f"{path}: expected {expected}, not {value!r}")


def _fields(kind: str) -> Any:
    def check(value: dict[str, Any]) -> dict[str, Any]:
        check_fields(value, kind, kind)
        return value

    return AfterValidator(check)


Metadata = Annotated[dict[str, Any], _fields("V1ObjectMeta")]
PodTemplate = Annotated[dict[str, Any], _fields("V1PodTemplateSpec")]


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class AuthOptions(_Fields):
    mode: Literal["token", "disabled"]


class HeadGroupSpec(_Fields):
    rayStartParams: dict[str, str]
    template: PodTemplate


class WorkerGroupSpec(_Fields):
    groupName: str
    replicas: int
    minReplicas: int
    maxReplicas: int
    rayStartParams: dict[str, str]
    template: PodTemplate


class RayClusterSpec(_Fields):
    rayVersion: str
    authOptions: AuthOptions
    headGroupSpec: HeadGroupSpec
    workerGroupSpecs: list[WorkerGroupSpec] = Field(min_length=1)


class RayJobSpec(_Fields):
    entrypoint: str
    metadata: dict[str, str]
    entrypointNumCpus: float
    runtimeEnvYAML: str
    submissionMode: Literal["K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"]
    backoffLimit: int
    shutdownAfterJobFinishes: bool
    ttlSecondsAfterFinished: PositiveInt
    activeDeadlineSeconds: PositiveInt
    rayClusterSpec: RayClusterSpec


class RayServiceSpec(_Fields):
    serveConfigV2: str
    rayClusterConfig: RayClusterSpec


class RayJob(_Fields):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: RayJobSpec


class RayService(_Fields):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayService"]
    metadata: Metadata
    spec: RayServiceSpec


_CUSTOM: dict[tuple[Any, Any], type[BaseModel]] = {
    ("ray.io/v1", "RayJob"): RayJob,
    ("ray.io/v1", "RayService"): RayService,
}
