"""Private parts of Ray and RLlib are touched in one module, and behave as it expects."""

import re
from pathlib import Path

import pytest

import services.cluster.ray_internals as ray_internals

ROOT = Path(__file__).parents[3]
OWN = "services/cluster/ray_internals.py"
IMPORTED = re.compile(r"\bray(\.\w+)*\._\w+|from ray(\.\w+)* import _\w+")
TOUCHED = re.compile(
    r"\._(worker_manager|actor_id|needs_initial_reset|learner_connector|set_global_client|private"
    r"|raylet)\b"
    r"|\b(runner|group|learner|algorithm|actor|pipeline|metrics)\._[a-z]\w*"
)


def private(line: str) -> bool:
    return bool(IMPORTED.search(line) or TOUCHED.search(line))


def test_no_other_module_touches_a_private_part() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for folder in ("mara_rl", "envs", "services", "benchmarks")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path != ROOT / OWN
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if private(line)
    ]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "from ray._private import ray_constants",
        "from ray._raylet import Config",
        'logging.getLogger("ray._common.deprecation")',
        "manager = self._group._worker_manager",
        "runner._seed = 1",
        "self._learner_connector.append(connector)",
        "actor._actor_id.hex()",
        'sys.modules["ray.serve.context"]._set_global_client(None)',
    ],
)
def test_a_private_part_is_recognised(line: str) -> None:
    assert private(line)


def test_the_module_is_where_the_private_parts_are() -> None:
    text = Path(ray_internals.__file__).read_text(encoding="utf-8")
    assert sum(private(line) for line in text.splitlines()) > 10
