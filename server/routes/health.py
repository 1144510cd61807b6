"""`GET /health`, `/ready`, `/version` and `/metrics`: for those who run the service."""

from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Request, Response

from engine.protocol.messages import GroupState
from server.api.responses import Health, LastRecovery, RankPlace, Readiness, Version
from server.service import ServiceOf

router = APIRouter(tags=["operation"])
VERSION = version("ryzanstein")
NOT_READY: dict[int | str, dict[str, Any]] = {503: {"model": Readiness, "description": "Requests are not taken."}}


@router.head("/health", include_in_schema=False)
@router.get("/health", summary="Is the process alive?")
async def health() -> Health:
    """Say that the process is alive."""
    return Health()


@router.head("/ready", include_in_schema=False)
@router.get("/ready", responses=NOT_READY, summary="Are requests taken?")
async def ready(service: ServiceOf, response: Response) -> Readiness:
    """Say whether requests are taken, and which ranks serve them."""
    status = service.engine.status
    is_draining = service.drain.is_draining
    response.status_code = 200 if status.state is GroupState.READY and not is_draining else 503
    ranks = [RankPlace(rank=rank.rank, pid=rank.pid, host=rank.host, device=rank.device) for rank in status.ranks]
    readiness = Readiness(
        state="DRAINING" if is_draining else status.state.value,
        epoch=status.epoch,
        ranks=ranks,
        error=status.error or None,
    )
    if status.state is not GroupState.READY and status.total_bytes:
        readiness.loaded_bytes, readiness.total_bytes = status.loaded_bytes, status.total_bytes
    if (recovery := service.engine.last_recovery) is not None:
        readiness.last_recovery = LastRecovery.model_validate(
            {name: getattr(recovery, name) for name in LastRecovery.model_fields}
        )
    return readiness


@router.get("/version", summary="Version of the service")
async def get_version() -> Version:
    """Return the version of this program."""
    return Version(version=VERSION)


@router.get("/metrics", response_class=Response, summary="Metrics for Prometheus")
async def metrics(request: Request, service: ServiceOf) -> Response:
    """Return the metrics for Prometheus."""
    body, content_type = service.metrics.render(request.headers.get("accept", ""))
    return Response(body, headers={"content-type": content_type})
