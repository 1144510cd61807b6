"""The server's own checks: port, credentials, and the files of the model that concern text."""

import ipaddress
import socket
import time
from dataclasses import asdict, dataclass
from urllib.parse import urlsplit

from engine.protocol.checks import Check, Finding, MissingBasisError, ok, skipped, warning
from engine.protocol.config import EngineConfig
from engine.protocol.model_config import ModelConfig
from engine.protocol.units import format_count
from server.config import ServerConfig
from server.credentials import Credentials
from server.listener import listen
from server.model_files import ModelFiles
from server.text.chat_template import ChatTemplate, ChatTemplateError
from server.text.tokenizer import Tokenizer
from server.tracing.extra import require_extra

SECTION = "service"
SAMPLE = "def f(x):\n    return x + 1  # größer, 42\n"
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
CONNECT_SECONDS = 3.0
SPEED_TEXT = SAMPLE * 500
MESSAGES = ({"role": "user", "content": "Hello."},)


@dataclass
class TextSide:
    """What is examined, and what checks have found that later ones build on."""

    engine: EngineConfig
    server: ServerConfig
    files: ModelFiles | None = None
    tokenizer: Tokenizer | None = None

    def usable_files(self) -> ModelFiles:
        """Return the small files.

        Raises:
            MissingBasisError: if they cannot be used.
        """
        if self.files is None:
            raise MissingBasisError("usable model files")
        return self.files

    def usable_tokenizer(self) -> Tokenizer:
        """Return the tokenizer.

        Raises:
            MissingBasisError: if it cannot be used.
        """
        if self.tokenizer is None:
            raise MissingBasisError("a usable tokenizer")
        return self.tokenizer

    def model_config(self) -> ModelConfig:
        """Return what config.json says.

        Raises:
            MissingBasisError: if it cannot be used, which the engine's checks tell.
        """
        try:
            return ModelConfig.from_directory(self.engine.model)
        except ValueError as error:
            raise MissingBasisError("a usable config.json") from error


def checks(engine: EngineConfig, server: ServerConfig) -> list[Check]:
    """Return this section's checks."""
    text = TextSide(engine, server)
    return [
        *access_checks(server),
        Check(SECTION, "model files", lambda: _files(text)),
        Check(SECTION, "tokenizer", lambda: _tokenizer(text)),
        Check(SECTION, "vocabulary", lambda: _vocabulary(text)),
        Check(SECTION, "special tokens", lambda: _special_tokens(text)),
        Check(SECTION, "end of text", lambda: _end_of_text(text)),
        Check(SECTION, "chat template", lambda: _chat_template(text)),
        Check(SECTION, "sampling defaults", lambda: _sampling_defaults(text)),
    ]


def access_checks(server: ServerConfig) -> list[Check]:
    """Return those checks that need no model."""
    endpoint = server.otlp_traces_endpoint
    return [
        Check(SECTION, "API key and TLS", lambda: _credentials(server)),
        Check(SECTION, "port", lambda: _port(server)),
        *([] if endpoint is None else [Check(SECTION, "traces", lambda: _traces(endpoint))]),
    ]


def _credentials(server: ServerConfig) -> Finding:
    credentials = Credentials.load(server)
    tls = "plain HTTP" if credentials.tls is None else "HTTPS with a certificate and its key"
    if credentials.keys:
        num_keys = len(credentials.keys)
        return ok(f"{'an API key' if num_keys == 1 else f'{num_keys} API keys'}; {tls}")
    if is_loopback(server.host):
        return ok(f"no API key, and only this machine reaches {server.host}; {tls}")
    return warning(
        f"no API key: whoever reaches {server.host}:{server.port} may use the API; {tls}",
        "--api-key-file, unless something in front of it asks for one",
    )


def _traces(endpoint: str) -> Finding:
    require_extra()
    url = urlsplit(endpoint)
    address = url.hostname, url.port or {"http": 80, "https": 443}[url.scheme]
    try:
        socket.create_connection(address, timeout=CONNECT_SECONDS).close()
    except OSError as error:
        return warning(
            f"{endpoint} does not answer: {error.strerror or error}",
            "start the collector; until it answers spans are lost, and requests do not mind",
        )
    return ok(f"{endpoint} takes connections")


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _port(server: ServerConfig) -> Finding:
    """Listen where the service would, for a moment."""
    host, port = server.host, server.port
    with listen(host, port) as listener:
        bound = listener.getsockname()[:2]
    return ok(f"{port} on {host} is free" if port else f"any: {bound[1]} on {host} is free")


def _files(text: TextSide) -> Finding:
    text.files = files = ModelFiles.read(text.engine.model)
    there = [name for name in SMALL_FILES if (files.directory / name).is_file()]
    return ok(f"{text.server.model_name(text.engine.model)}: {', '.join(there)}")


def _tokenizer(text: TextSide) -> Finding:
    """Take a text apart and put it together again."""
    directory = text.usable_files().directory
    began = time.perf_counter()
    text.tokenizer = tokenizer = Tokenizer(directory)
    loaded = time.perf_counter() - began
    began = time.perf_counter()
    num_tokens = len(tokenizer.encode(SPEED_TEXT, add_special_tokens=False))
    speed = num_tokens / (time.perf_counter() - began)
    found = f"loaded in {loaded:.2f} s; {format_count(speed)} tokens/s"
    again = tokenizer.decode(tokenizer.encode(SAMPLE, add_special_tokens=False))
    if again != SAMPLE:
        return warning(f"{found}; it does not keep every text: {SAMPLE!r} comes back as {again!r}")
    return ok(f"{found}; a sample of code and umlauts comes back as it was")


def _vocabulary(text: TextSide) -> Finding:
    """Compare the tokenizer's ids with the rows of the model's embedding."""
    size, largest = text.model_config().vocab_size, text.usable_tokenizer().largest_id
    if largest >= size:
        return warning(
            f"the tokenizer has ids up to {largest}, the model knows {size}",
            "texts with such tokens will be refused; is it this model's tokenizer?",
        )
    unused = size - 1 - largest
    padding = f"; {unused} rows of padding" if unused else ""
    return ok(f"{size} tokens in the model, ids up to {largest} in the tokenizer{padding}")


def _special_tokens(text: TextSide) -> Finding:
    tokenizer, named = text.usable_tokenizer(), text.usable_files().special_tokens()
    if not named:
        return skipped("tokenizer_config.json names none")
    unknown = [f"{name} {token!r}" for name, token in named.items() if tokenizer.id_of(token) is None]
    if unknown:
        return warning(f"not in the vocabulary: {', '.join(unknown)}", "is it this model's tokenizer_config.json?")
    return ok(", ".join(f"{name} {token} ({tokenizer.id_of(token)})" for name, token in named.items()))


def _end_of_text(text: TextSide) -> Finding:
    files, tokenizer, size = text.usable_files(), text.usable_tokenizer(), text.model_config().vocab_size
    ids = files.end_of_text_ids(size)
    if ids:
        return ok(f"{', '.join(map(str, ids))} ({', '.join(tokenizer.token_strs(ids))})")
    token = files.special_tokens().get("eos_token")
    if token is not None and tokenizer.id_of(token) is not None:
        return ok(f"{tokenizer.id_of(token)} ({token}), by tokenizer_config.json")
    return warning("the model's files name none", "only max_tokens and stop will end an answer")


def _chat_template(text: TextSide) -> Finding:
    """Compile it, and render a conversation."""
    files = text.usable_files()
    source = files.chat_template(text.server.chat_template)
    if source is None:
        return skipped("the model has none: /v1/chat/completions will refuse, /v1/completions works")
    template = ChatTemplate(source, files.special_tokens())
    try:
        prompt = template.render(MESSAGES)
    except ChatTemplateError as error:
        return warning(f"it refuses a single message of a user: {error}", "is it this model's template?")
    if MESSAGES[0]["content"] not in prompt:
        return warning(f"it leaves out what the user says: {prompt!r}", "is it this model's template?")
    return ok(f"{len(source)} characters; renders a user's message in {len(prompt)}")


def _sampling_defaults(text: TextSide) -> Finding:
    files = text.usable_files()
    defaults = files.sampling_defaults()
    values = ", ".join(f"{name} {value:g}" for name, value in asdict(defaults).items())
    if files.ignored_defaults():
        ignored = ", ".join(files.ignored_defaults())
        return warning(f"{values}; generation_config.json has what is without effect here: {ignored}")
    return ok(values)
