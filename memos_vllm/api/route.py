"""The route class of every memos_vllm route.

The app is vLLM's own, with its own handlers, so errors are turned into replies right here and
never reach them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any
from urllib.parse import parse_qsl

from fastapi import Request, Response
from fastapi.exceptions import HTTPException, RequestValidationError
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect

from memos_vllm.api.error_table import error_response
from memos_vllm.api.json_body import MAX_BODY_BYTES, JsonRequest
from memos_vllm.errors import InvalidRequest, MemosError

logger = logging.getLogger(__name__)

# What proxies log for a client that went away; nobody receives it.
_CLIENT_CLOSED_REQUEST = 499
_MAX_REPORTED_ERRORS = 3


# A document of 32 MiB and the fields of its form.
_MAX_FORM_BYTES = 33 * 1024 * 1024


class MemosRoute(APIRoute):
    """Reads JSON strictly, and answers every error in OpenAI's shape."""

    # None: the route reads the body itself, as it comes.
    max_body_bytes: int | None = MAX_BODY_BYTES

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        inner = super().get_route_handler()
        takes_body = self.body_field is not None
        limit = self.max_body_bytes

        async def handle(request: Request) -> Response:
            try:
                _check_query(request)
                if limit is not None and (takes_body or request.method == "POST"):
                    request = await JsonRequest.read(request, parse=takes_body, max_bytes=limit)
                return await inner(request)
            except MemosError as error:
                if error_response(error).status_code == 500:
                    logger.exception("%s failed", self.name)
                return error_response(error)
            except RequestValidationError as error:
                return error_response(invalid_request(error.errors()))
            except ClientDisconnect:
                return Response(status_code=_CLIENT_CLOSED_REQUEST)
            except HTTPException:
                raise
            except Exception as error:
                logger.exception("%s failed", self.name)
                return error_response(error)

        return handle


def _check_query(request: Request) -> None:
    """Raises InvalidRequest where Starlette would guess what was meant."""
    try:
        sent = parse_qsl(
            request.scope["query_string"].decode("ascii"), keep_blank_values=True, errors="strict"
        )
    except UnicodeDecodeError as error:
        raise InvalidRequest("the query string is not UTF-8, percent-encoded") from error
    names = [name for name, _ in sent]
    for name in names:
        if names.count(name) > 1:
            raise InvalidRequest(f"{name[:64]} was sent twice; send it once", param=name[:64])


class FormRoute(MemosRoute):
    """Of routes that take a form instead of JSON; they read it themselves."""

    max_body_bytes = _MAX_FORM_BYTES


class StreamRoute(MemosRoute):
    """Of a route that takes a body of any size, and reads it itself."""

    max_body_bytes = None


def invalid_request(problems: Sequence[Mapping[str, Any]]) -> InvalidRequest:
    """Put pydantic's findings into one message; what was sent is not repeated in it."""
    described = [_describe(problem) for problem in problems[:_MAX_REPORTED_ERRORS]]
    more = len(problems) - len(described)
    if more > 0:
        described.append(f"and {more} more")
    return InvalidRequest("; ".join(described), param=_param(problems[0]) if problems else None)


def _describe(problem: Mapping[str, Any]) -> str:
    param = _param(problem)
    kind = problem.get("type")
    if kind == "extra_forbidden":
        return f"unknown field '{param}'"
    if param is None:
        return "a JSON body is required" if kind == "missing" else f"the body: {_message(problem)}"
    return f"{param}: {_message(problem)}"


def _message(problem: Mapping[str, Any]) -> str:
    return str(problem["msg"]).removeprefix("Value error, ")


def _param(problem: Mapping[str, Any]) -> str | None:
    """The field as `memories[0].text`, without where FastAPI found it (body, query, path)."""
    place = ""
    for part in problem.get("loc", ())[1:]:
        place += f"[{part}]" if isinstance(part, int) else f".{str(part)[:64]}"
    return place.lstrip(".") or None
