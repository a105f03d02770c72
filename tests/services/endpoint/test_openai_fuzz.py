"""Requests generated from the API's own OpenAPI schema: whatever comes, no status 500."""

import json
import random
from collections import Counter

import pytest
import schemathesis
from endpoints import AGENT, LLM, LengthScorer, make_backend
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

from mara_rl.llm.policy_llm import load_policy_llm
from services.endpoint.decode_plan import ApiLimits
from services.endpoint.endpoint import Endpoint
from services.endpoint.openai_api import create_api
from services.http.api_keys import ApiKeys

ROUTES = {
    "GET": ["/health", "/v1/models", "/v1/models/{model}"],
    "POST": ["/v1/chat/completions", "/v1/completions"],
}
REQUIRED = ("model", "messages", "prompt", "mara")


@pytest.fixture(scope="module")
def endpoint(tiny_llms):
    llm = load_policy_llm(str(tiny_llms["llama"]), device="cpu", dtype="float32")
    backend = make_backend(llm, scorer=LengthScorer())
    limits = ApiLimits(max_answer_tokens=6)
    endpoint = Endpoint(lambda: backend, ApiKeys([], max_concurrent=1), limits)
    endpoint.load()
    yield endpoint
    endpoint.close()


def test_the_schema_tells_of_keys_and_streams(endpoint):
    schema = create_api(endpoint).openapi()
    [(name, scheme)] = schema["components"]["securitySchemes"].items()
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
    for path, routes in schema["paths"].items():
        for route in routes.values():
            assert route.get("security", []) == ([{name: []}] if path.startswith("/v1/") else [])
    for path in ROUTES["POST"]:
        content = schema["paths"][path]["post"]["responses"]["200"]["content"]
        assert set(content) == {"application/json", "text/event-stream"}


@pytest.mark.parametrize(
    ("method", "path"), [(method, path) for method, paths in ROUTES.items() for path in paths]
)
def test_no_request_makes_it_fail(endpoint, method, path):
    schema = schemathesis.openapi.from_asgi("/openapi.json", create_api(endpoint))
    assert {route for routes in ROUTES.values() for route in routes} == set(schema)
    statuses: Counter[int] = Counter()
    choose = random.Random(0)

    @given(case=schema[path][method].as_strategy())
    @settings(
        max_examples=150 if method == "POST" else 20,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def check(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict):
            # Hardly any request is whole by chance: some get what is required alone, some a part
            # of the rest.
            kept = choose.choice([0.0, 0.3])
            case.body["model"] = choose.choice([LLM, AGENT, case.body.get("model")])
            for part in (case.body, case.body.get("mara")):
                for name in list(part) if isinstance(part, dict) else []:
                    if name not in REQUIRED and choose.random() >= kept:
                        del part[name]
        response = case.call()
        statuses[response.status_code] += 1
        if response.headers.get("content-type", [""])[0].startswith("text/event-stream"):
            *events, done, rest = response.text.split("\n\n")
            assert (done, rest) == ("data: [DONE]", "")
            assert all("error" not in json.loads(event[5:]) for event in events)
            return
        checks = [not_a_server_error, response_schema_conformance, status_code_conformance]
        case.validate_response(response, checks=checks)

    check()
    if method == "POST":  # neither was all refused nor all taken
        assert statuses[200] >= 5, statuses
        assert statuses[400] >= 5, statuses
    loop = endpoint.backend().loop
    assert (loop.in_use, loop.waiting) == (0, 0)
