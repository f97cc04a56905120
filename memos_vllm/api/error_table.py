"""Which HTTP status, type and code each error has. The one table; nothing else maps errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fastapi.responses import JSONResponse

from memos_vllm import errors


@dataclass(frozen=True, slots=True)
class ErrorRow:
    """How one class of error is answered."""

    status: int
    kind: str
    code: str


ERROR_TABLE: Mapping[type[errors.MemosError], ErrorRow] = {
    errors.ContextTooLong: ErrorRow(400, "invalid_request_error", "context_length_exceeded"),
    errors.TemplateError: ErrorRow(400, "invalid_request_error", "template_error"),
    errors.InvalidRequest: ErrorRow(400, "invalid_request_error", "invalid_request"),
    errors.Unauthenticated: ErrorRow(401, "authentication_error", "invalid_api_key"),
    errors.Forbidden: ErrorRow(403, "permission_error", "forbidden"),
    errors.NotFound: ErrorRow(404, "not_found_error", "not_found"),
    errors.Conflict: ErrorRow(409, "conflict_error", "conflict"),
    errors.StaleVersion: ErrorRow(412, "conflict_error", "stale_version"),
    errors.TooLarge: ErrorRow(413, "invalid_request_error", "too_large"),
    errors.Unavailable: ErrorRow(503, "server_error", "unavailable"),
    errors.MemosError: ErrorRow(500, "server_error", "internal_error"),
}

_INTERNAL_MESSAGE = "the server failed to answer this request; its log holds the reason"


def error_row(error: BaseException) -> ErrorRow:
    """Find the row of the nearest class; anything foreign is an internal error."""
    for kind in type(error).__mro__:
        row = ERROR_TABLE.get(kind)
        if row is not None:
            return row
    return ERROR_TABLE[errors.MemosError]


def error_body(
    message: str, *, kind: str, code: str, param: str | None = None
) -> dict[str, dict[str, str | None]]:
    """The body of every error, in OpenAI's shape."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def describe_error(error: BaseException) -> dict[str, dict[str, str | None]]:
    """The body for an error. What is not the caller's doing is told without its details."""
    row = error_row(error)
    message = str(error) if row.status != 500 else _INTERNAL_MESSAGE
    param = error.param if isinstance(error, errors.InvalidRequest) else None
    return error_body(
        _printable(message),
        kind=row.kind,
        code=row.code,
        param=None if param is None else _printable(param),
    )


def error_response(
    error: BaseException, *, extra: Mapping[str, object] | None = None
) -> JSONResponse:
    """Answer an error.

    Args:
        extra: further top-level members of the body, for routes that have more to tell.
    """
    headers = {}
    if isinstance(error, errors.Unavailable):
        headers["Retry-After"] = str(max(1, error.retry_after_seconds))
    if isinstance(error, errors.Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(
        {**describe_error(error), **(extra or {})},
        status_code=error_row(error).status,
        headers=headers,
    )


def _printable(text: str) -> str:
    """Messages quote input; a lone surrogate in it must not fail the reply."""
    return text.encode("utf-8", "replace").decode("utf-8")
