import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from server.api_keys import APIKey
from server.config import ServerConfig
from server.credentials import Credentials
from tests.unit.server_support import RunningServer, running_server

PASSWORD = "pass-secret"


class Files:
    """Certificate, key and authority, as files."""

    def __init__(self, folder: Path) -> None:
        self.authority = trustme.CA()
        issued = self.authority.issue_cert("127.0.0.1")
        self.ca = self._write(folder / "ca.pem", self.authority.cert_pem.bytes())
        self.cert = self._write(folder / "cert.pem", issued.cert_chain_pems[0].bytes())
        self.key = self._write(folder / "key.pem", issued.private_key_pem.bytes())
        self.both = self._write(folder / "both.pem", issued.private_key_and_cert_chain_pem.bytes())
        other = trustme.CA().issue_cert("127.0.0.1")
        self.other_key = self._write(folder / "other.pem", other.private_key_pem.bytes())
        key = load_pem_private_key(issued.private_key_pem.bytes(), None)
        encryption = BestAvailableEncryption(PASSWORD.encode())
        encrypted = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)
        self.encrypted_key = self._write(folder / "encrypted.pem", encrypted)
        self.nonsense = self._write(folder / "nonsense.pem", b"not a certificate")

    def _write(self, path: Path, content: bytes) -> str:
        path.write_bytes(content)
        return str(path)

    def trust(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.ca)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def secure(model: Path, files: Files) -> Iterator[RunningServer]:
    with running_server(model, ssl_certfile=files.cert, ssl_keyfile=files.key) as server:
        yield server


def key_file(folder: Path, content: bytes) -> ServerConfig:
    path = folder / "key"
    path.write_bytes(content)
    return ServerConfig(api_key_file=str(path))


@pytest.mark.parametrize("content", [b"sk-1", b"sk-1\n", b"sk-1\r\n"])
def test_a_key_file_may_end_its_line(tmp_path: Path, content: bytes) -> None:
    assert Credentials.load(key_file(tmp_path, content)).keys == (APIKey("default", "sk-1"),)


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"", "empty"), (b"\n", "empty"), (b"a\nb\n", "one word"), (b"a b", "one word"), (b"\xff", "not UTF-8")],
)
def test_a_key_file_that_holds_no_key_is_named(tmp_path: Path, content: bytes, problem: str) -> None:
    with pytest.raises(ValueError, match=rf"^--api-key-file {tmp_path}/key: .*{problem}"):
        Credentials.load(key_file(tmp_path, content))


def test_a_key_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    for path, problem in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ValueError, match=rf"^--api-key-file {path}: {problem}"):
            Credentials.load(ServerConfig(api_key_file=str(path)))


@pytest.mark.parametrize("key", ["", "two words", "line\nbreak", "clé-ключ", "half\ud800", "\x7f"])
def test_a_key_that_no_header_can_hold_is_refused_without_showing_it(key: str) -> None:
    with pytest.raises(ValueError, match=r"^--api-key: (is empty|must be one word)") as caught:
        Credentials.load(ServerConfig(api_key=key))
    assert not key or key not in str(caught.value)


def test_secrets_are_not_in_the_text_of_the_objects_that_hold_them() -> None:
    config = ServerConfig(api_key="sk-1", ssl_certfile="x", ssl_keyfile_password=PASSWORD)
    assert "sk-1" not in repr(config)
    assert PASSWORD not in repr(config)
    assert "sk-1" not in repr(Credentials((APIKey("default", "sk-1"),)))


def test_there_is_neither_key_nor_certificate_by_default() -> None:
    assert Credentials.load(ServerConfig()) == Credentials((), None)


def test_requests_are_served_over_tls(secure: RunningServer, files: Files) -> None:
    assert secure.url.startswith("https://")
    assert httpx.get(f"{secure.url}/v1/models", verify=files.trust()).status_code == 200
    with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
        httpx.get(f"{secure.url}/v1/models")


def test_plain_http_is_not_answered_on_a_tls_port(secure: RunningServer) -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.get(secure.url.replace("https", "http"))


def test_certificate_and_key_may_share_a_file(model: Path, files: Files) -> None:
    with running_server(model, ssl_certfile=files.both) as server:
        assert httpx.get(f"{server.url}/health", verify=files.trust()).status_code == 200


def test_an_encrypted_key_is_opened_with_its_password(model: Path, files: Files) -> None:
    with running_server(
        model, ssl_certfile=files.cert, ssl_keyfile=files.encrypted_key, ssl_keyfile_password=PASSWORD
    ) as server:
        assert httpx.get(f"{server.url}/health", verify=files.trust()).status_code == 200


@pytest.mark.parametrize(("cert_reqs", "strangers_get_in"), [(1, True), (2, False)])
def test_clients_show_certificates_of_the_named_authorities(
    model: Path, files: Files, cert_reqs: int, strangers_get_in: bool
) -> None:
    known, unknown = files.trust(), files.trust()
    files.authority.issue_cert("client").configure_cert(known)
    trustme.CA().issue_cert("client").configure_cert(unknown)
    with running_server(
        model,
        ssl_certfile=files.cert,
        ssl_keyfile=files.key,
        ssl_ca_certs=files.ca,
        ssl_cert_reqs=cert_reqs,
    ) as server:
        url = f"{server.url}/health"
        assert httpx.get(url, verify=known).status_code == 200
        with pytest.raises((httpx.ReadError, httpx.RemoteProtocolError, httpx.ConnectError)):
            httpx.get(url, verify=unknown)
        if strangers_get_in:
            assert httpx.get(url, verify=files.trust()).status_code == 200
        else:
            with pytest.raises((httpx.ReadError, httpx.RemoteProtocolError, httpx.ConnectError)):
                httpx.get(url, verify=files.trust())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ssl_certfile": "nowhere"}, "--ssl-certfile nowhere: No such file"),
        ({"ssl_certfile": "nonsense"}, "--ssl-certfile {nonsense}: holds no certificate"),
        ({"ssl_certfile": "key", "ssl_keyfile": "key"}, "--ssl-certfile {key}: holds no certificate"),
        ({"ssl_certfile": "cert"}, "--ssl-certfile {cert}: holds no key to the certificate"),
        ({"ssl_certfile": "cert", "ssl_keyfile": "nowhere"}, "--ssl-keyfile nowhere: No such file"),
        ({"ssl_certfile": "cert", "ssl_keyfile": "nonsense"}, "--ssl-keyfile {nonsense}: holds no key"),
        ({"ssl_certfile": "cert", "ssl_keyfile": "other_key"}, "--ssl-keyfile {other_key}: holds no key to the cert"),
        ({"ssl_certfile": "cert", "ssl_keyfile": "encrypted_key"}, "{encrypted_key}: .*needs --ssl-keyfile-password"),
        (
            {"ssl_certfile": "cert", "ssl_keyfile": "encrypted_key", "ssl_keyfile_password": "wrong"},
            "--ssl-keyfile {encrypted_key}: .*--ssl-keyfile-password",
        ),
        (
            {"ssl_certfile": "both", "ssl_cert_reqs": 2, "ssl_ca_certs": "nonsense"},
            "--ssl-ca-certs {nonsense}: holds no certificate",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_its_option(
    files: Files, options: dict[str, Any], message: str
) -> None:
    paths = {name: path for name, path in vars(files).items() if isinstance(path, str)}
    config = {name: paths.get(str(value), value) for name, value in options.items()}
    with pytest.raises(ValueError, match=message.format(**paths)) as caught:
        Credentials.load(ServerConfig(**config))
    assert "\n" not in str(caught.value)
    assert "wrong" not in str(caught.value)
