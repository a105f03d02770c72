from importlib import import_module
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from mara_rl.common.errors import ConfigError, MaraError
from services.endpoint.endpoint_assembly import make_endpoint, served_llm_name
from services.endpoint.endpoint_config import EndpointConfig

SERVE_YAML = Path(__file__).parents[3] / "deploy" / "serve.yaml"


def test_every_field_is_described():
    for config in (EndpointConfig, EndpointConfig.model_fields["limits"].annotation):
        for name, field in config.model_fields.items():
            assert field.description or name == "limits", name


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"slot": 3}, "endpoint: unknown key 'slot'"),
        ({"slots": 0}, "endpoint: slots: input should be greater than or equal to 1, not 0"),
        ({"limits": {"max_answers": "x"}}, r"endpoint: limits\.max_answers: .* not 'x'"),
        ({"num_replicas": 3, "max_replicas": 2}, "max_replicas 2 is below num_replicas 3"),
        ({"dtype": "int3"}, "endpoint: dtype"),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        EndpointConfig.parse(values)


def test_without_keys_it_must_be_told_to_answer_anybody(monkeypatch):
    monkeypatch.delenv("MARA_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="no API keys: set MARA_API_KEY or keys_file"):
        make_endpoint(EndpointConfig(), deployed=0)
    assert not make_endpoint(EndpointConfig(anonymous=True), deployed=0).keys
    monkeypatch.setenv("MARA_API_KEY", "long-enough")
    assert make_endpoint(EndpointConfig(), deployed=0).keys


@pytest.mark.parametrize(
    ("agents", "message"),
    [
        (("same=one", "same=other"), "two are served as 'same'"),
        (("llama=one",), "the LLM is served as 'llama'"),
        (("models:/mara-x/3",), "no MLflow to ask"),
        (("gone=./no/such",), "no such file or folder"),
    ],
)
def test_agents_that_cannot_be_served_are_named(tiny_llms, monkeypatch, agents, message):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = EndpointConfig(llm=str(tiny_llms["llama"]), agents=agents, anonymous=True)
    endpoint = make_endpoint(config, deployed=0)
    with pytest.raises(MaraError, match=message):
        endpoint.load()
    with pytest.raises(RuntimeError, match="loading failed"):
        endpoint.check()


def test_names_requests_call_an_llm_by(tmp_path):
    assert served_llm_name("mistralai/Mistral-7B") == "mistralai/Mistral-7B"
    assert served_llm_name("smollm2-135m-instruct") == "smollm2-135m-instruct"
    assert served_llm_name(str(tmp_path / "my-llm")) == "my-llm"
    (tmp_path / "x.gguf").touch()
    assert served_llm_name(str(tmp_path / "x.gguf")) == "x.gguf"


def test_the_serve_config_is_what_serve_and_we_take():
    text = yaml.safe_load(SERVE_YAML.read_text(encoding="utf-8"))
    schema = ServeDeploySchema.model_validate(text)
    assert {application.name for application in schema.applications} == {
        "reward",
        "cost",
        "aligned",
    }
    for application in schema.applications:
        module, _, name = application.import_path.partition(":")
        builder = getattr(import_module(module), name)
        config = builder.__annotations__["config"].model_validate(application.args)
        assert builder(config) is not None
        with pytest.raises(ValidationError):
            type(config).model_validate({**application.args, "unknown": 1})
    endpoint = EndpointConfig.model_validate(schema.applications[-1].args)
    assert set(endpoint.score_apps.values()) == {"reward", "cost"}
    assert not endpoint.anonymous
