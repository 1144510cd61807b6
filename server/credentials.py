"""The API keys and the TLS certificate, read before anything is started: a wrong file is found at once."""

import ssl
from dataclasses import dataclass
from pathlib import Path

from server.api_keys import ANONYMOUS, APIKey, parse_key, parse_keys
from server.config import ServerConfig


@dataclass(frozen=True)
class Credentials:
    """What callers must show the service, and what it shows them. Stays in this process."""

    keys: tuple[APIKey, ...] = ()  # none: nobody is asked for one
    tls: ssl.SSLContext | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Under which requests may come: those of the keys, or the one of everybody."""
        return tuple(key.name for key in self.keys) or (ANONYMOUS,)

    @classmethod
    def load(cls, config: ServerConfig) -> "Credentials":
        """Read the files that `config` names.

        Raises:
            ValueError: naming the option whose key or file cannot be used.
        """
        return cls(_api_keys(config), _tls_context(config))


def _api_keys(config: ServerConfig) -> tuple[APIKey, ...]:
    if config.api_key_file is not None:
        name = f"--api-key-file {config.api_key_file}"
        text = _read(name, config.api_key_file)
    elif config.api_key is not None:
        name, text = "--api-key", config.api_key
    else:
        return ()
    try:
        return parse_key(text) if config.api_key_file is None else parse_keys(text)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _tls_context(config: ServerConfig) -> ssl.SSLContext | None:
    if config.ssl_certfile is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _load_certificate(context, config.ssl_certfile, config)
    if config.ssl_ca_certs is not None:
        _load_authorities(context, "--ssl-ca-certs", config.ssl_ca_certs)
    context.verify_mode = ssl.VerifyMode(config.ssl_cert_reqs)
    return context


def _load_certificate(context: ssl.SSLContext, certfile: str, config: ServerConfig) -> None:
    _load_authorities(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), "--ssl-certfile", certfile)  # is it a certificate?
    name = f"--ssl-keyfile {config.ssl_keyfile}" if config.ssl_keyfile else f"--ssl-certfile {certfile}"
    _read(name, config.ssl_keyfile or certfile)

    def password() -> str:  # always given: OpenSSL would ask on the terminal
        if config.ssl_keyfile_password is None:
            raise ValueError(f"{name}: the key is encrypted: it needs --ssl-keyfile-password")
        return config.ssl_keyfile_password

    try:
        context.load_cert_chain(certfile, config.ssl_keyfile, password)
    except ssl.SSLError as error:
        secret = " with the password of --ssl-keyfile-password" if config.ssl_keyfile_password else ""
        reason = error.reason or "not a PEM file"
        raise ValueError(f"{name}: holds no key to the certificate that can be read{secret} ({reason})") from error


def _load_authorities(context: ssl.SSLContext, option: str, path: str) -> None:
    name = f"{option} {path}"
    _read(name, path)
    try:
        context.load_verify_locations(path)
    except ssl.SSLError as error:
        raise ValueError(f"{name}: holds no certificate in PEM form") from error


def _read(name: str, path: str) -> str:
    """Return a file's text; `name` is what errors call it."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8 text") from error
