"""`GET /v1/models` and one of them."""

from fastapi import APIRouter

from server.api.responses import ModelCard, ModelList
from server.routes.documentation import NOT_FOUND
from server.service import Service, ServiceOf

router = APIRouter(tags=["models"])


def _card(service: Service) -> ModelCard:
    length = service.max_model_len or None  # not known before the engine is ready
    return ModelCard(id=service.model.name, created=service.model.created, max_model_len=length)


@router.get("/v1/models", summary="List the models")
async def list_models(service: ServiceOf) -> ModelList:
    """List the served model."""
    return ModelList(data=[_card(service)])


@router.get("/v1/models/{name:path}", responses=NOT_FOUND, summary="Describe a model")
async def retrieve_model(name: str, service: ServiceOf) -> ModelCard:
    """Describe one model."""
    service.check_model(name)
    return _card(service)
