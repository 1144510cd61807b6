"""Which pages of other origins browsers let in."""

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from server.errors import APIError


class CORS(CORSMiddleware):
    """Starlette's, with refusals in OpenAI's shape."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """Answer a browser that asks what a page may do."""
        answer = super().preflight_response(request_headers)
        if answer.status_code < 400:
            return answer
        headers = {name: value for name, value in answer.headers.items() if not name.startswith("content-")}
        return APIError(f"{bytes(answer.body).decode()}.", code="cors_refused").response(headers)
