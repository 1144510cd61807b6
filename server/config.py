"""The HTTP side's options: one definition of each name, default and help text, as in `engine.protocol.config`."""

import os
import re
from dataclasses import dataclass, fields
from pathlib import Path

from engine.protocol.config import EMBEDDED_MODEL, check_utf8, option
from engine.protocol.logs import LOG_FORMATS, LOG_LEVELS, LogConfig
from server.limits import MAX_TIMEOUT, QueueLimits, RequestLimits
from server.model_source.config import ModelSourceConfig, is_hub_name

EMBEDDED_MODEL_NAME = "ryzanstein-embedded"
ANY = ("*",)
_ROOT_PATH = re.compile(r"(/[A-Za-z0-9._~-]+)*")
_HTTP_URL = re.compile(r"https?://(\[[0-9a-fA-F:.]+\]|[^/\s:@\[\]]+)(:[0-9]{1,5})?(/\S*)?")
_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s]+")


@dataclass(frozen=True, kw_only=True)
class ServerConfig(RequestLimits, QueueLimits, ModelSourceConfig):
    """Where and how the API is served, and what a request may ask for.

    Raises:
        ValueError: naming the option, when a value is out of range.
    """

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 takes requests from other machines")
    port: int = option(8000, "TCP port to listen on; 0 picks a free one")
    root_path: str = option("", "path under which a proxy that strips it shows the service, such as /llm")
    served_model_name: str | None = option(
        None, "the model's name in the API; its directory's or the hub's when left out"
    )
    chat_template: str | None = option(None, "file with a Jinja chat template to use instead of the model's own")
    seed: int | None = option(
        None, "makes requests without a seed repeatable: theirs are drawn from this one, in order of arrival"
    )
    api_key: str | None = option(
        None,
        "key that requests must send as `Authorization: Bearer KEY`; other users of the machine can read it on the "
        "command line: prefer the variable or --api-key-file",
        secret=True,
    )
    api_key_file: str | None = option(
        None, "file that holds the API key, or a YAML list of several with names and limits: see the guide"
    )
    ssl_certfile: str | None = option(None, "PEM file of the certificate (with its chain) to serve HTTPS with")
    ssl_keyfile: str | None = option(None, "PEM file of the certificate's key; in --ssl-certfile when left out")
    ssl_keyfile_password: str | None = option(None, "password of an encrypted key", secret=True)
    ssl_ca_certs: str | None = option(None, "PEM file of the authorities whose client certificates are taken")
    ssl_cert_reqs: int = option(0, "client certificates: 0 not asked for, 1 checked when sent, 2 required")
    allowed_origins: tuple[str, ...] = option((), "web origins whose pages may call the API (CORS); * is any")
    allowed_methods: tuple[str, ...] = option(ANY, "methods that those pages may use")
    allowed_headers: tuple[str, ...] = option(ANY, "request headers that those pages may send")
    allow_credentials: bool = option(False, "let those pages send cookies and other credentials of the browser")
    max_body_size: int = option(16 * 2**20, "largest request body", unit="bytes")
    stream_resume_timeout: float = option(
        30.0, "seconds that a stream can be gone on with after its connection broke or it ended; 0: not at all"
    )
    stream_resume_memory: int = option(
        64 * 2**20, "most memory of such streams; those that nobody has read for longest go first", unit="bytes"
    )
    slow_client_timeout: float = option(60.0, "seconds after which a client that takes nothing is disconnected")
    drain_timeout: float = option(
        30.0, "seconds that requests have to finish after SIGTERM or Ctrl-C; 0: they end at once"
    )
    otlp_traces_endpoint: str | None = option(
        None, "URL to which OpenTelemetry traces go over OTLP/HTTP, such as http://localhost:4318/v1/traces"
    )
    access_log: bool = option(True, "write one line for each request, without its body")
    vllm_metric_names: bool = option(
        False, "serve metrics under vLLM's names, too: for the endpoint picker of Kubernetes' inference gateways"
    )
    log_level: str = option("info", "least important messages to write, by server and ranks", choices=LOG_LEVELS)
    log_format: str = option(
        "text",
        "how the log is written to standard error; json: every process writes an object a line",
        choices=LOG_FORMATS,
    )

    def __post_init__(self) -> None:
        RequestLimits.__post_init__(self)
        QueueLimits.__post_init__(self)
        ModelSourceConfig.__post_init__(self)
        self._check_choices()
        if not 0 <= self.port <= 65535:
            raise ValueError(f"--port must be between 0 and 65535, not {self.port}")
        if self.served_model_name == "":
            raise ValueError("--served-model-name must not be empty")
        check_utf8("--served-model-name", self.served_model_name or "")
        if not _ROOT_PATH.fullmatch(self.root_path):
            raise ValueError(f"--root-path must be like /llm or /a/b, not {self.root_path!r}")
        if not 1 <= self.max_body_size < 2**40:
            raise ValueError(f"--max-body-size must be between 1 and 2**40 bytes, not {self.max_body_size}")
        if self.api_key is not None and self.api_key_file is not None:
            raise ValueError("--api-key and --api-key-file both hold the key: give one of them")
        if self.otlp_traces_endpoint is not None and not _HTTP_URL.fullmatch(self.otlp_traces_endpoint):
            raise ValueError(
                "--otlp-traces-endpoint must be like http://localhost:4318/v1/traces (OTLP over HTTP), "
                f"not {self.otlp_traces_endpoint!r}"
            )
        self._check_times()
        self._check_tls()
        self._check_cors()

    def _check_choices(self) -> None:
        for item in fields(self):
            value, choices = getattr(self, item.name), item.metadata["choices"]
            if choices and value not in choices:
                raise ValueError(f"--{item.name.replace('_', '-')} must be one of {', '.join(choices)}, not {value!r}")

    def _check_times(self) -> None:
        for name, least in (("stream_resume_timeout", 0), ("slow_client_timeout", 0.1), ("drain_timeout", 0)):
            value = getattr(self, name)
            if not least <= value <= MAX_TIMEOUT:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} must be between {least} and {MAX_TIMEOUT} seconds, not {value:g}")
        if not 1 <= self.stream_resume_memory < 2**48:
            raise ValueError(
                f"--stream-resume-memory must be between 1 and 2**48 bytes, not {self.stream_resume_memory}"
            )
        if not self.stream_resume_timeout and self.stream_resume_memory != ServerConfig.stream_resume_memory:
            raise ValueError("--stream-resume-memory has no effect with --stream-resume-timeout 0")

    def _check_tls(self) -> None:
        if self.ssl_cert_reqs not in (0, 1, 2):
            raise ValueError(f"--ssl-cert-reqs must be 0, 1 or 2, not {self.ssl_cert_reqs}")
        if self.ssl_certfile is None:
            for name in ("ssl_keyfile", "ssl_keyfile_password", "ssl_ca_certs", "ssl_cert_reqs"):
                if getattr(self, name):
                    raise ValueError(f"--{name.replace('_', '-')} has no effect without --ssl-certfile")
        if bool(self.ssl_cert_reqs) != (self.ssl_ca_certs is not None):
            raise ValueError("--ssl-ca-certs and --ssl-cert-reqs 1 or 2 go together: neither has an effect alone")

    def _check_cors(self) -> None:
        for origin in self.allowed_origins:
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(f"--allowed-origins must be * or like https://example.org, not {origin!r}")
        if "*" in self.allowed_origins and self.allow_credentials:
            raise ValueError("--allow-credentials needs --allowed-origins by name: with * any page could use them")
        if not self.allowed_origins:
            for name, default in (("allowed_methods", ANY), ("allowed_headers", ANY), ("allow_credentials", False)):
                if getattr(self, name) != default:
                    raise ValueError(f"--{name.replace('_', '-')} has no effect without --allowed-origins")

    @property
    def log(self) -> LogConfig:
        """What all processes write to standard error."""
        return LogConfig(self.log_level, self.log_format)

    def model_name(self, model: str) -> str:
        """Return the name under which the API offers `model`, which is a directory or a name on the hub.

        Raises:
            ValueError: if the directory has a name that the API cannot write.
        """
        if self.served_model_name is not None:
            return self.served_model_name
        if is_hub_name(model) and not Path(model).is_dir():
            return model
        if Path(model).resolve() == EMBEDDED_MODEL.resolve():
            return EMBEDDED_MODEL_NAME
        # As it is written: a link is often the name, and what it leads to a hash.
        name = Path(os.path.normpath(Path(model).absolute())).name
        check_utf8("the name of the directory --model", name)
        return name
