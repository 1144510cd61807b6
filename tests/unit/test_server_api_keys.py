from pathlib import Path

import pytest

from server.api_keys import APIKey, parse_keys
from server.config import ServerConfig
from server.credentials import Credentials

SECRET = "sk-very-secret"


def test_a_file_may_hold_several_keys_with_names_and_limits() -> None:
    text = """
# who may use it
- name: team-a
  key: sk-1
  requests_per_minute: 60
- {name: team-b, key: "123", max_concurrent_requests: 4, requests_per_minute: null}
"""
    assert parse_keys(text) == (APIKey("team-a", "sk-1", 60), APIKey("team-b", "123", None, 4))


def test_json_is_a_list_of_keys_too() -> None:
    assert parse_keys('[{"name":"a","key":"sk-1"}]') == (APIKey("a", "sk-1"),)


@pytest.mark.parametrize("key", ["sk-1", "a:b", "-", "#1", "[x]", "*alias", "key:"])
def test_one_word_is_a_plain_key_whatever_yaml_would_make_of_it(key: str) -> None:
    assert parse_keys(f"{key}\n") == (APIKey("default", key),)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (f"- {SECRET}", "key 1 must have name and key"),
        (f"key: {SECRET}", "one word .* or a YAML list"),
        (f"{SECRET} {SECRET}", "one word .* or a YAML list"),
        ("[]", "one word .* or a YAML list"),
        ("{}\n", "one word .* or a YAML list"),
        ("[]\n# none", "one word .* or a YAML list"),
        (f"- {{name: a, key: {SECRET}", "neither one word nor YAML, as of line 1"),
        (f"- name: a\n  key: *{SECRET}", "neither one word nor YAML, as of line 2"),
        (f"- name: a\n  key: {SECRET}\n  key: {SECRET}2", "written twice"),
        (f"- name: a\n  {SECRET}: b\n  key: c", "key 1 must have name and key"),
        (f"- {{key: {SECRET}}}", "key 1 must have name and key"),
        (f"- {{name: a, key: b}}\n- {{name: 'b c', key: {SECRET}}}", "key 2: name must be"),
        (f"- {{name: {SECRET}{'x' * 64}, key: b}}", "key 1: name must be"),
        ("- {name: a, key: 123456789}", "key 1: key must be text"),
        ("- {name: a, key: ''}", "key 1: key is empty"),
        (f"- {{name: a, key: '{SECRET} x'}}", "key 1: key must be one word"),
        (f"- {{name: a, key: {SECRET}, requests_per_minute: 0}}", "requests_per_minute must be a whole number"),
        (f"- {{name: a, key: {SECRET}, requests_per_minute: true}}", "requests_per_minute must be a whole number"),
        (f"- {{name: a, key: {SECRET}, max_concurrent_requests: 1.5}}", "max_concurrent_requests must be"),
        (f"- {{name: a, key: b}}\n- {{name: a, key: {SECRET}}}", "keys 1 and 2 have the same name"),
        (f"- {{name: a, key: {SECRET}}}\n- {{name: b, key: {SECRET}}}", "keys 1 and 2 have the same key"),
        ("[" * 1000 + " ]", "neither one word nor YAML"),
    ],
)
def test_what_is_wrong_is_named_without_showing_a_key(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"(?s)^--api-key-file {path}: .*{problem}") as caught:
        Credentials.load(ServerConfig(api_key_file=str(path)))
    assert SECRET not in str(caught.value)
    assert "123456789" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_key_is_not_in_the_text_of_the_object_that_holds_it() -> None:
    assert SECRET not in repr(APIKey("a", SECRET))
