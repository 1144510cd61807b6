"""Whether traces can be exported here: told before anything takes time."""

from importlib.util import find_spec

MODULES = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")


def require_extra() -> None:
    """Raise ValueError unless what exports traces is installed. Imports none of it but empty packages."""
    if not all(map(_is_there, MODULES)):
        raise ValueError("--otlp-traces-endpoint needs OpenTelemetry: pip install 'ryzanstein[traces]'")


def _is_there(module: str) -> bool:
    """Return whether a module is there; `find_spec` alone raises where a package above it is not."""
    above = module.rpartition(".")[0]
    return (not above or _is_there(above)) and find_spec(module) is not None
