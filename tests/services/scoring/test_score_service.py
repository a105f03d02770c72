import asyncio
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import ray
import torch
from pydantic import ValidationError
from ray import cloudpickle, serve
from tiny_checkpoints import BeaverFolder

from mara_rl.common.errors import ConfigError, RetryableError
from mara_rl.score_models.loading import load_score_model
from services.cluster.ray_session import ray_session
from services.scoring import score_service
from services.scoring.score_service import (
    ScoreService,
    ScoreServiceConfig,
    check_hosts,
    delete_scores,
    deploy_scores,
)


def test_applications_that_serve_does_not_delete_are_told_after_all_were_tried(monkeypatch):
    tried = []

    def delete(name: str) -> None:
        tried.append(name)
        if name == "stuck":
            raise TimeoutError("Deletion of 'stuck' took too long\nmore")

    monkeypatch.setattr(score_service, "_status", lambda name: "RUNNING")
    monkeypatch.setattr(score_service.serve, "delete", delete)
    with pytest.raises(
        RetryableError, match=r"deleted: 'stuck': Deletion of 'stuck' took too long$"
    ):
        delete_scores(["stuck", "other"])
    assert tried == ["stuck", "other"]


class LengthModel:
    """Scores an answer by its length, after waiting for ``gate``, and notes its batch sizes."""

    def __init__(self) -> None:
        self.batch_sizes: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None

    def score(self, pairs: list[tuple[str, str]]) -> list[float]:
        self.batch_sizes.append(len(pairs))
        self.gate.wait(timeout=30)
        if self.error is not None:
            raise self.error
        return [float(len(response)) for _, response in pairs]


class LengthService(ScoreService):
    _model: LengthModel

    def _load_model(self) -> LengthModel:
        return LengthModel()

    async def batch_sizes(self) -> list[int]:
        return self._model.batch_sizes


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # replicas cannot import tests
    with ray_session(num_cpus=2) as session:
        assert session.owns_cluster
        yield


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ScoreServiceConfig]:
    """Two tiny beaver checkpoints that score differently."""
    root = tmp_path_factory.mktemp("beaver")
    reward, cost = BeaverFolder(root / "reward"), BeaverFolder(root / "cost")
    cost.state["score_head.weight"] = -2 * cost.state["score_head.weight"]
    return {
        name: ScoreServiceConfig(model=str(folder.write()), num_cpus=0.1, max_batch_size=10)
        for name, folder in (("reward", reward), ("cost", cost))
    }


def _replicas(app: str) -> set[str]:
    actors = ray.util.list_named_actors(all_namespaces=True)
    return {actor["name"] for actor in actors if actor["name"].startswith(f"SERVE_REPLICA::{app}#")}


def test_config_names_what_is_wrong():
    with pytest.raises(ValidationError, match="max_replicas 1 is below num_replicas 2"):
        ScoreServiceConfig(model="m", num_replicas=2, max_replicas=1)
    with pytest.raises(ValidationError, match="max_batch_size"):
        ScoreServiceConfig(model="m", max_batch_size=0)
    assert ScoreServiceConfig(model="m", num_cpus=0.1).bundle == {"CPU": 0.1}
    assert ScoreServiceConfig(model="m", num_gpus=0.5).bundle == {"CPU": 1, "GPU": 0.5}


def test_custom_resources_are_reserved_and_checked():
    config = ScoreServiceConfig(model="m", num_cpus=0, resources={"a100": 0.5})
    assert config.bundle == {"a100": 0.5}
    assert config.deployment_options()["ray_actor_options"]["resources"] == {"a100": 0.5}
    for wrong in ({"GPU": 1}, {"a100": 0}, {"a100": "some"}):
        with pytest.raises(ValidationError, match="resources"):
            ScoreServiceConfig(model="m", resources=wrong)


def test_a_forward_pass_that_hangs_is_unhealthy_and_one_that_ends_is_not():
    service = LengthService(ScoreServiceConfig(model="m", forward_timeout_s=0.2))
    asyncio.run(service.check_health())
    service._model.gate.clear()
    forward = threading.Thread(target=service._forward, args=([("p", "r")],))
    forward.start()
    asyncio.run(service.check_health())
    time.sleep(0.4)
    with pytest.raises(RuntimeError, match=r"over 0\.2 s"):
        asyncio.run(service.check_health())
    service._model.gate.set()
    forward.join()
    asyncio.run(service.check_health())


def test_a_broken_device_is_retryable_and_unhealthy_but_full_memory_is_not():
    service = LengthService(ScoreServiceConfig(model="m"))
    service._model.error = torch.OutOfMemoryError("no room")
    with pytest.raises(RetryableError, match="no room"):
        service._forward([("p", "r")])
    asyncio.run(service.check_health())
    service._model.error = torch.AcceleratorError("illegal memory access")
    with pytest.raises(RetryableError, match="illegal memory access"):
        service._forward([("p", "r")])
    with pytest.raises(RuntimeError, match="illegal memory access"):
        asyncio.run(service.check_health())


@pytest.mark.slow
class TestOnCluster:
    def test_list_calls_equal_direct_scoring(self, cluster, configs):
        deploy_scores(configs)
        pairs = [(f"prompt {i}", f"an answer {'at length ' * (i % 7)}") for i in range(64)]
        for name, config in configs.items():
            served = serve.get_app_handle(name).score.remote(pairs).result(timeout_s=60)
            direct = load_score_model(config.model, device="cpu").score(pairs)
            assert served == pytest.approx(direct, abs=1e-5)
            assert len(set(served)) > 32

    def test_an_application_shared_by_runs_has_to_host_the_model_that_is_meant(
        self, cluster, configs
    ):
        deploy_scores(configs)
        check_hosts("cost", configs["cost"].model)
        with pytest.raises(ConfigError, match=r"'cost' hosts '.*/cost', not 'another'"):
            check_hosts("cost", "another")
        with pytest.raises(ConfigError, match="'absent' is not there; expected one that runs"):
            check_hosts("absent", "another")

    def test_deploying_again_keeps_what_is_equal_and_replaces_what_is_not(self, cluster, configs):
        deploy_scores(configs)
        before = {name: _replicas(name) for name in configs}
        assert [len(replicas) for replicas in before.values()] == [1, 1]
        deploy_scores(configs)
        assert {name: _replicas(name) for name in configs} == before

        same_model = configs["cost"].model_copy(update={"model": configs["reward"].model})
        deploy_scores(configs | {"cost": same_model})
        assert _replicas("reward") == before["reward"]
        assert _replicas("cost").isdisjoint(before["cost"])
        pairs = [("p", "r"), ("prompt", "response")]
        reward, cost = (
            serve.get_app_handle(name).score.remote(pairs).result(timeout_s=60) for name in configs
        )
        assert cost == pytest.approx(reward)

    def test_concurrent_callers_share_batches(self, cluster):
        config = ScoreServiceConfig(
            model="lengths", num_cpus=0.1, max_batch_size=16, batch_wait_timeout_s=2
        )
        deployment = serve.deployment(
            LengthService, ray_actor_options={"num_cpus": 0.1}, max_ongoing_requests=32
        )
        handle = serve.run(deployment.bind(config), name="lengths", route_prefix=None)
        calls = [
            handle.score.remote([("p", "r" * (4 * c + i)) for i in range(4)]) for c in range(4)
        ]
        answers = [call.result(timeout_s=30) for call in calls]
        assert answers == [[4.0 * c + i for i in range(4)] for c in range(4)]
        assert handle.batch_sizes.remote().result(timeout_s=10) == [16]

        long_call = handle.score.remote([("p", "r" * i) for i in range(48)]).result(timeout_s=30)
        assert long_call == [float(i) for i in range(48)]
        assert handle.batch_sizes.remote().result(timeout_s=10) == [16] * 4
        delete_scores(["lengths", "never-deployed"])
        assert "lengths" not in serve.status().applications

    def test_more_than_the_cluster_has_is_refused_at_once(self, cluster):
        config = ScoreServiceConfig(model="never-loaded", num_cpus=1.5, num_replicas=2)
        began = time.monotonic()
        with pytest.raises(ConfigError, match=r"3 CPU \(big 2 x 1\.5\) but the cluster has 2"):
            deploy_scores({"big": config})
        assert time.monotonic() - began < 5
        assert "big" not in serve.status().applications

    def test_a_placement_that_does_not_come_is_refused_in_time(self, cluster):
        @ray.remote(num_cpus=1)
        class Occupant:
            def ready(self) -> bool:
                return True

        occupant = Occupant.remote()
        assert ray.get(occupant.ready.remote())
        config = ScoreServiceConfig(model="never-loaded", num_cpus=1.8)
        began = time.monotonic()
        with pytest.raises(ConfigError, match=r"within 3 s: waiting for late 1 x \(1\.8 CPU\)"):
            deploy_scores({"late": config}, ready_timeout_s=3)
        assert time.monotonic() - began < 20
        assert "late" not in serve.status().applications
        ray.kill(occupant)

    def test_a_model_that_cannot_be_loaded_is_named(self, cluster, tmp_path):
        config = ScoreServiceConfig(model=str(tmp_path / "absent"), num_cpus=0.1)
        with pytest.raises(ConfigError, match=r"'broken' did not start.*absent"):
            deploy_scores({"broken": config}, ready_timeout_s=60)
        assert "broken" not in serve.status().applications
