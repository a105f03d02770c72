import pytest

from mara_rl.common.errors import ConfigError
from services.http.api_keys import ApiKeys, BusyKeyError, UnknownKeyError, configured_keys

ONE, OTHER = "key-number-one", "key-number-two"


def test_only_known_keys_are_let_in():
    keys = ApiKeys([ONE, OTHER], max_concurrent=1)
    assert keys
    assert keys.identify(f"Bearer {ONE}") != keys.identify(f"bearer {OTHER}")
    assert ONE not in keys.identify(f"Bearer {ONE}")
    for header in (None, "", ONE, "Basic abc", "Bearer", "Bearer  ", f"Bearer {ONE}x"):
        with pytest.raises(UnknownKeyError) as caught:
            keys.identify(header)
        assert ONE not in str(caught.value)


def test_without_keys_everybody_is_let_in_any_number_of_times():
    keys = ApiKeys([], max_concurrent=1)
    assert not keys
    assert keys.identify(None) == keys.identify("Bearer whatever") == ""
    with keys.running(""), keys.running(""):
        pass


def test_a_key_may_run_so_many_requests_at_once():
    keys = ApiKeys([ONE, OTHER], max_concurrent=2)
    one, other = keys.identify(f"Bearer {ONE}"), keys.identify(f"Bearer {OTHER}")
    with keys.running(one):
        with (
            keys.running(one),
            keys.running(other),
            pytest.raises(BusyKeyError, match="2 requests"),
            keys.running(one),
        ):
            pass
        with keys.running(one):
            pass


def test_keys_come_from_the_environment_and_a_file(monkeypatch, tmp_path):
    monkeypatch.delenv("MARA_API_KEY", raising=False)
    assert configured_keys() == []
    monkeypatch.setenv("MARA_API_KEY", f"{ONE}, {OTHER},")
    assert configured_keys() == [ONE, OTHER]
    file = tmp_path / "keys"
    with pytest.raises(ConfigError, match="keys_file"):
        configured_keys(file)
    file.write_text("# only a comment\n\n")
    with pytest.raises(ConfigError, match="holds no key"):
        configured_keys(file)
    file.write_text("# team\nthird-key-of-all\n")
    assert configured_keys(file) == [ONE, OTHER, "third-key-of-all"]


@pytest.mark.parametrize("key", ["short", "with a space in it", "schlüssel-schlüssel"])
def test_weak_or_odd_keys_are_refused_without_showing_them(key):
    with pytest.raises(ConfigError, match="API key 2 of 2") as caught:
        ApiKeys([ONE, key], max_concurrent=1)
    assert key not in str(caught.value)
