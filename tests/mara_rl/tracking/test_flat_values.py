import numpy as np
import pytest
import torch
from mlflow.utils.validation import _validate_metric_name, _validate_param

from mara_rl.common.errors import DataError
from mara_rl.tracking.flat_values import flat_metrics, flat_params, plain_key


def test_params_are_flat_short_and_readable():
    config = {"ppo": {"lr": 3e-4, "clip": None}, "name": "run", "on": True, "empty": {}, "l": [1]}
    assert flat_params(config) == {
        "ppo.lr": "0.0003",
        "ppo.clip": "null",
        "name": "run",
        "on": "true",
        "empty": "{}",
        "l": "[1]",
    }
    assert flat_params({}) == {}


def test_a_long_value_says_how_long_it_was():
    (value,) = flat_params({"text": "x" * 10_000}).values()
    assert len(value) == 500
    assert value.endswith("x… (10000 characters)")


def test_metrics_are_flat_floats():
    metrics = {"a": {"b": np.float32(0.5), "c": {"d": torch.tensor(2)}}, "e": True}
    assert flat_metrics(metrics) == {"a/b": 0.5, "a/c/d": 2.0, "e": 1.0}


@pytest.mark.parametrize("value", ["text", [1, 2], None, {}])
def test_a_metric_that_is_no_number_is_named(value):
    with pytest.raises(DataError, match="metric 'a/b' is"):
        flat_metrics({"a": {"b": value}})


@pytest.mark.parametrize(
    "key",
    [
        "plain/key-1.x",
        "π*",
        "a//b",
        "/a",
        "a/",
        "../up",
        "",
        ".",
        "...",
        "k" * 300,
        "a:b",
        " a ",
        "*",
    ],
)
def test_mlflow_takes_every_plain_key(key):
    plain = plain_key(key)
    _validate_param(plain, "value")
    _validate_metric_name(plain)
    assert len(plain) <= 250


def test_plain_keys_stay_apart():
    assert plain_key("plain/key-1.x") == "plain/key-1.x"
    keys = ["a*", "a+", "a_", "k" * 300, "k" * 301, "k" * 250, "a//b", "a/b"]
    assert len({plain_key(key) for key in keys}) == len(keys)
