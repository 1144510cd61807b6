"""What traces are to the rest of the server. Nothing of OpenTelemetry is imported before they are asked for."""

from starlette.types import ASGIApp

from server.admission import AdmissionQueue
from server.generation import Generation, GenerationPlan
from server.text.token_bytes import TokenBytes


class Traces:
    """No traces: requests are what they are without."""

    def wrap(self, app: ASGIApp) -> ASGIApp:
        """Return `app` with spans for its requests."""
        return app

    def new_generation(self, queue: AdmissionQueue, token_bytes: TokenBytes, plan: GenerationPlan) -> Generation:
        """Return the generation of a request, which tells the request's span how it goes."""
        return Generation(queue, token_bytes, plan)

    async def close(self) -> None:
        """Export what is left, within a bounded time, and no more."""


def start_traces(endpoint: str | None, *, model: str, version: str) -> Traces:
    """Return what traces the requests to `model`, and exports to the URL `endpoint`, if there is one."""
    if endpoint is None:
        return Traces()
    from server.tracing.export import ExportedTraces  # noqa: PLC0415  (an extra, and takes long)

    return ExportedTraces(endpoint, model=model, version=version)
