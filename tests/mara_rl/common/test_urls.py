"""Credentials of URLs are never shown."""

import pytest

from mara_rl.common.urls import hide_credentials, hide_credentials_in


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://host:1/0", "redis://host:1/0"),
        ("redis://:p@ss/w:rd@host:1/0", "redis://***@host:1/0"),
        ("redis://:two words@host", "redis://***@host"),
        ("rediss://user:pw@host/2?ssl_cert_reqs=none", "rediss://***@host/2?ssl_cert_reqs=none"),
        (
            "unix:///run/r.sock?db=1&password=pw&username=me",
            "unix:///run/r.sock?db=1&password=***&username=***",
        ),
        ("sqlite:////home/a@b/mlflow.db", "sqlite:////home/a@b/mlflow.db"),
    ],
)
def test_credentials_of_a_url_are_hidden(url: str, shown: str) -> None:
    assert hide_credentials(url) == shown


def test_credentials_are_hidden_wherever_they_stand() -> None:
    text = "GET http://user:pass@host/a failed (postgresql://u:p%40x@db:1/x), mail a@b"
    assert hide_credentials_in(text) == (
        "GET http://***@host/a failed (postgresql://***@db:1/x), mail a@b"
    )
