"""The OpenAI-compatible application: which paths there are, and what each does."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from pydantic import ValidationError
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException

from inferlab import __version__
from inferlab.server.calls import ClientGone
from inferlab.server.engine_thread import Unavailable
from inferlab.server.failures import ApiError, of_validation
from inferlab.server.gate import Gate
from inferlab.server.protocol import ChatRequest, CompletionRequest, RequestFields
from inferlab.server.responses import ResponsesRequest
from inferlab.server.service import Service
from inferlab.server.settings import ServerSettings
from inferlab.specdec.pipeline import SpeculativePipeline

Body = TypeVar("Body", bound=RequestFields)


def create_app(pipeline: SpeculativePipeline, settings: ServerSettings | None = None) -> FastAPI:
    """The application that serves a pipeline; ``app.state.service`` is what stands behind it."""
    settings = settings or ServerSettings()
    service = Service(pipeline, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        service.start()
        try:
            yield
        finally:
            await asyncio.to_thread(service.engine.stop)

    app = FastAPI(
        title="LLM Inference Lab",
        version=__version__,
        lifespan=lifespan,
        responses={401: _ERROR} if settings.api_keys else None,
    )
    app.state.service = service
    app.add_middleware(Gate, keys=settings.api_keys, max_body_bytes=settings.max_body_bytes)

    @app.exception_handler(ApiError)
    async def _api_error(_: HttpRequest, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), error.status, headers=error.headers)

    @app.exception_handler(ClientGone)
    async def _client_gone(_: HttpRequest, error: ClientGone) -> Response:
        return Response(status_code=499)  # nobody reads it

    @app.exception_handler(Exception)
    async def _fault(_: HttpRequest, error: Exception) -> JSONResponse:
        return JSONResponse(ApiError(500, "a fault of the server; its log says more").body(), 500)

    @app.exception_handler(HTTPException)
    async def _http_error(_: HttpRequest, error: HTTPException) -> JSONResponse:
        made = ApiError(error.status_code, str(error.detail))
        return JSONResponse(made.body(), error.status_code, headers=error.headers)

    @app.post("/v1/completions", **_described(CompletionRequest))
    async def completions(http: HttpRequest) -> Response:
        return await service.complete(await _read(http, CompletionRequest), http)

    @app.post("/v1/chat/completions", **_described(ChatRequest))
    async def chat_completions(http: HttpRequest) -> Response:
        return await service.chat(await _read(http, ChatRequest), http)

    @app.post("/v1/responses", **_described(ResponsesRequest))
    async def responses(http: HttpRequest) -> Response:
        return await service.respond(await _read(http, ResponsesRequest), http)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": service.models()}

    @app.get("/v1/models/{model:path}", responses={404: _ERROR})
    async def model(model: str) -> dict[str, Any]:
        for known in service.models():
            if known["id"] == model:
                return known
        raise ApiError(404, f"the model {model!r} is not served here", code="model_not_found")

    page = (resources.files("inferlab.server") / "page.html").read_text()

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page)

    @app.get("/health", response_class=Response, responses={503: _ERROR})
    async def health() -> Response:
        if service.engine.failure is not None:
            raise ApiError(503, service.engine.failure)
        return Response()

    @app.get("/ready", response_class=Response, responses={503: _ERROR})
    async def ready() -> Response:
        try:
            service.engine.check_taking()
        except Unavailable as error:
            raise ApiError(503, str(error)) from error
        return Response()

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return PlainTextResponse(
            service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    app.openapi = functools.cache(functools.partial(_document, app))  # type: ignore[method-assign]
    return app


async def _read(http: HttpRequest, kind: type[Body]) -> Body:
    """The body of a request. Raises ApiError where it is not one.

    It must be said to be JSON: what may be said to be something else, any page that a user looks at
    can have their browser send to a server on their machine.
    """
    said = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if said != "application/json":
        raise ApiError(415, f"Content-Type is {said!r}; it must be application/json")
    if http.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise ApiError(415, "the body has a Content-Encoding; it must be sent as it is")
    body = await http.body()
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise of_validation(error) from error


_ERROR = {
    "description": "an error",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["error"],
                "properties": {
                    "error": {
                        "type": "object",
                        "required": ["message", "type", "param", "code"],
                        "properties": {
                            "message": {"type": "string"},
                            "type": {"type": "string"},
                            "param": {"type": ["string", "null"]},
                            "code": {"type": ["string", "null"]},
                        },
                    }
                },
            }
        }
    },
}


_STREAM = {"content": {"text/event-stream": {"schema": {"type": "string"}}}}


def _described(kind: type[RequestFields]) -> dict[str, Any]:
    """What the OpenAPI document says of a path that reads its body itself."""
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    return {
        "openapi_extra": {
            "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}
        },
        "responses": {200: _STREAM}
        | {status: _ERROR for status in (400, 401, 404, 408, 413, 415, 429, 500, 503)},
    }


def _document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, bodies included."""
    made = get_openapi(title=app.title, version=app.version, routes=app.routes)
    _, schemas = models_json_schema(
        [(kind, "validation") for kind in (CompletionRequest, ChatRequest, ResponsesRequest)],
        ref_template="#/components/schemas/{model}",
    )
    made.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])
    return made
