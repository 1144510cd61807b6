"""Requests made from /openapi.json, sensible and not, against a whole service."""

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import CheckContext, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.service_process import ServiceProcess

Operation: TypeAlias = "schemathesis.APIOperation[Any, Any, Any, Any]"


def not_a_server_error_but_a_deadline(
    context: CheckContext, response: "schemathesis.Response", case: "schemathesis.Case[Any]"
) -> bool | None:
    """Fail for a status of 5xx; 504 is what a request with a deadline of its own has asked for."""
    if response.status_code == 504 and isinstance(case.body, dict) and case.body.get("timeout"):
        return None
    return not_a_server_error(context, response, case)


CHECKS = [
    not_a_server_error_but_a_deadline,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
POSTS = ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]
GETS = ["/v1/models", "/v1/models/{name}", "/v1/streams/{stream_id}", "/health", "/ready", "/version", "/metrics"]
MODES = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]
SECONDS = 120.0  # generous: only a hang should exceed it


@pytest.fixture(scope="module")
def service() -> Iterator[ServiceProcess]:
    """What may be asked for is little, so that much can be asked."""
    with ServiceProcess("--max-model-len", "32", "--max-choices", "4", "--max-prompts", "8") as service:
        yield service


@pytest.fixture(scope="module")
def schema(service: ServiceProcess) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_url(f"{service.url}/openapi.json")


def call_often(
    operation: "schemathesis.APIOperation[Any, Any, Any, Any]",
    mode: GenerationMode,
    count: int,
    tell: Callable[[str], None],
) -> None:
    """Make so many requests, the same in each run, and check each answer."""
    statuses: dict[int, int] = {}

    @given(case=operation.as_strategy(mode))
    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def call(case: "schemathesis.Case[Any]") -> None:
        answer = case.call(timeout=SECONDS)
        statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
        case.validate_response(answer, checks=CHECKS)

    call()
    tell(f"{mode.value} requests to {operation.label}: statuses {dict(sorted(statuses.items()))}")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("path", POSTS)
def test_answers_to_bodies_are_those_that_the_schema_announces(
    schema: schemathesis.BaseSchema, path: str, mode: GenerationMode, tell: Callable[[str], None]
) -> None:
    call_often(schema[path]["POST"], mode, 80, tell)


@pytest.mark.parametrize("path", GETS)
def test_answers_without_bodies_are_those_that_the_schema_announces(
    schema: schemathesis.BaseSchema, path: str, tell: Callable[[str], None]
) -> None:
    call_often(schema[path]["GET"], GenerationMode.POSITIVE, 5, tell)


def test_no_operation_is_forgotten(schema: schemathesis.BaseSchema) -> None:
    assert set(schema) == {*POSTS, *GETS}


def test_the_service_is_ready_and_idle_afterwards(service: ServiceProcess) -> None:
    assert httpx.get(f"{service.url}/ready").status_code == 200
    assert service.complete(prompt="import ", max_tokens=4)["text"]
    service.wait_until_idle()
