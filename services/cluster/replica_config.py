"""How many replicas Ray Serve runs of a deployment, and what each reserves."""

from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, PositiveFloat, model_validator

from mara_rl.common.yaml_settings import Section


def _custom(resources: dict[str, float]) -> dict[str, float]:
    own = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": None, "object_store_memory": None}
    for name in resources.keys() & own.keys():
        raise ValueError(f"not a custom resource: {name}; expected {own[name] or 'another'}")
    return resources


CustomResources = Annotated[dict[str, PositiveFloat], AfterValidator(_custom)]
"""Resources that the nodes of a cluster were started with, e.g. ``{"a100": 1}``."""


def resource_bundle(
    num_cpus: float, num_gpus: float, resources: dict[str, float]
) -> dict[str, float]:
    """What one actor reserves, as `services.cluster.ray_session.check_resources` takes it."""
    bundle = {"CPU": num_cpus, "GPU": num_gpus, **resources}
    return {resource: amount for resource, amount in bundle.items() if amount}


class ReplicaConfig(Section):
    """The part of a config that all deployments have in common."""

    num_replicas: int = Field(1, ge=1, description="replicas; the fewest when autoscaling")
    max_replicas: int | None = Field(None, description="autoscale up to this many; None: never")
    num_cpus: float = Field(1.0, ge=0, description="CPUs reserved for a replica")
    num_gpus: float = Field(
        0.0, ge=0, le=1, description="share of a GPU reserved for a replica; 0 runs on CPU"
    )
    resources: CustomResources = Field({}, description="custom resources reserved for a replica")
    torch_threads: int = Field(1, ge=1, description="CPU threads of a replica's forward pass")

    @model_validator(mode="after")
    def _replica_range(self) -> Self:
        if self.max_replicas is not None and self.max_replicas < self.num_replicas:
            raise ValueError(
                f"max_replicas {self.max_replicas} is below num_replicas {self.num_replicas}"
            )
        return self

    @property
    def bundle(self) -> dict[str, float]:
        """What one replica reserves."""
        return resource_bundle(self.num_cpus, self.num_gpus, self.resources)

    def deployment_options(self, **autoscaling: Any) -> dict[str, Any]:
        """Options of ``serve.deployment``; ``autoscaling`` goes beside the range of replicas."""
        scaled = self.max_replicas is not None
        bounds = {"min_replicas": self.num_replicas, "max_replicas": self.max_replicas}
        return {
            "num_replicas": None if scaled else self.num_replicas,
            "autoscaling_config": bounds | autoscaling if scaled else None,
            "ray_actor_options": {
                "num_cpus": self.num_cpus,
                "num_gpus": self.num_gpus,
                "resources": self.resources,
            },
            "max_constructor_retry_count": 2,
            "graceful_shutdown_wait_loop_s": 0.5,
            "logging_config": {"enable_access_log": False},
        }
