from pathlib import Path
from typing import Any

import pytest

from server.config import ServerConfig
from tests.unit.test_server_options import parse, write


def test_lists_are_words_between_commas_or_lists_of_the_file(tmp_path: Path) -> None:
    origins = ("https://a.example", "http://b.example:3000")
    assert parse("--allowed-origins", "https://a.example, http://b.example:3000")[1].allowed_origins == origins
    environment = {"RYZANSTEIN_ALLOWED_ORIGINS": ",".join(origins)}
    assert parse(environment=environment)[1].allowed_origins == origins
    for text in ("[https://a.example, 'http://b.example:3000']", "https://a.example,http://b.example:3000"):
        assert parse("--config", write(tmp_path, f"allowed-origins: {text}"))[1].allowed_origins == origins
    assert parse("--allowed-origins", "")[1].allowed_origins == ()


def test_a_list_of_other_things_is_refused(tmp_path: Path) -> None:
    for text in ("[7]", "7", "{a: b}"):
        with pytest.raises(ValueError, match=r"--allowed-origins must be .*options\.yaml"):
            parse("--config", write(tmp_path, f"allowed-origins: {text}"))


def test_a_secret_of_the_wrong_type_is_not_shown(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--api-key must be text") as caught:
        parse("--config", write(tmp_path, "api-key: 1234"))
    assert "1234" not in str(caught.value)


@pytest.mark.parametrize("variable", ["RYZANSTEIN_API_KEY", "RYZANSTEIN_API_KEY_FILE"])
def test_key_and_file_of_the_key_exclude_each_other_wherever_they_come_from(variable: str) -> None:
    other = "--api-key" if variable.endswith("FILE") else "--api-key-file"
    with pytest.raises(ValueError, match=rf"--api-key and --api-key-file.*{variable}") as caught:
        parse(other, "other-1", environment={variable: "value-1"})
    assert "-1" not in str(caught.value)


@pytest.mark.parametrize("root_path", ["", "/llm", "/a/b-c/d_1.0~"])
def test_root_paths_are_like_folders(root_path: str) -> None:
    assert ServerConfig(root_path=root_path).root_path == root_path


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"log_level": "loud"}, "--log-level"),
        ({"log_format": "xml"}, "--log-format"),
        ({"root_path": "llm"}, "--root-path"),
        ({"root_path": "/llm/"}, "--root-path"),
        ({"root_path": "/"}, "--root-path"),
        ({"root_path": "/a?b"}, "--root-path"),
        ({"root_path": "/é"}, "--root-path"),
        ({"max_body_size": 0}, "--max-body-size"),
        ({"drain_timeout": -1.0}, "--drain-timeout"),
        ({"slow_client_timeout": 0.0}, "--slow-client-timeout"),
        ({"stream_resume_timeout": float("nan")}, "--stream-resume-timeout"),
        ({"stream_resume_memory": 0}, "--stream-resume-memory"),
        ({"stream_resume_memory": 9, "stream_resume_timeout": 0.0}, "--stream-resume-memory has no effect"),
        ({"max_body_size": 2**50}, "--max-body-size"),
        ({"allowed_origins": ("example.org",)}, "--allowed-origins"),
        ({"allowed_origins": ("https://example.org/",)}, "--allowed-origins"),
        ({"allowed_origins": ("*",), "allow_credentials": True}, "--allow-credentials .* --allowed-origins"),
        ({"allow_credentials": True}, "--allow-credentials .* --allowed-origins"),
        ({"allowed_methods": ("GET",)}, "--allowed-methods .* --allowed-origins"),
        ({"allowed_headers": ("x-a",)}, "--allowed-headers .* --allowed-origins"),
        ({"ssl_keyfile": "k"}, "--ssl-keyfile .* --ssl-certfile"),
        ({"ssl_keyfile_password": "secret"}, "--ssl-keyfile-password .* --ssl-certfile"),
        ({"ssl_ca_certs": "c", "ssl_cert_reqs": 2}, "--ssl-ca-certs .* --ssl-certfile"),
        ({"ssl_certfile": "c", "ssl_cert_reqs": 3}, "--ssl-cert-reqs"),
        ({"ssl_certfile": "c", "ssl_cert_reqs": 2}, "--ssl-ca-certs"),
        ({"ssl_certfile": "c", "ssl_ca_certs": "c"}, "--ssl-cert-reqs"),
    ],
)
def test_options_that_make_no_sense_are_refused_by_name(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named) as caught:
        ServerConfig(**options)
    assert "secret" not in str(caught.value)
