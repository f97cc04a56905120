"""One call as bytes: the request that goes out, and how its reply is read. No IO here."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Generic, TypeVar
from urllib.parse import quote

import httpx

from memos_vllm.client.errors import UnexpectedReply, api_error
from memos_vllm.errors import ApiError, ConfigurationError, InvalidRequest

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Upload:
    """A file as a multipart form, and the form's other fields."""

    filename: str
    content: bytes
    fields: Mapping[str, str]


class FileStream(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body that either client can send; each attempt begins anew."""

    size_bytes: int


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One request to the API and the type of its answer.

    Args:
        parse: turns the decoded JSON body (None for an empty one) into the result.
        repeatable: sending it twice does no harm, so it may be retried.
        slow: it generates text or reads a document, so the longer timeout applies.
        upload: sent in place of a JSON body.
        file: the same, as it is and as it is read.
        accept: error statuses whose body is an answer all the same.
    """

    method: str
    path: str
    parse: Callable[[Any], T]
    query: Mapping[str, str | int | None] = field(default_factory=dict)
    body: Mapping[str, object] | None = None
    upload: Upload | None = None
    file: FileStream | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    repeatable: bool = True
    slow: bool = False
    accept: frozenset[int] = frozenset()


def path_part(identifier: str, kind: str) -> str:
    """An identifier as one segment of a path.

    Raises:
        InvalidRequest: empty, or "." or "..", which would name another route.
    """
    if not isinstance(identifier, str) or identifier in {"", ".", ".."}:
        raise InvalidRequest(f"{identifier!r} is not a {kind} id", param=f"{kind}_id")
    try:
        return quote(identifier, safe="")
    except UnicodeEncodeError:
        raise InvalidRequest(f"{identifier!r} is not a {kind} id", param=f"{kind}_id") from None


def server_url(text: str) -> httpx.URL:
    """The server's root; a trailing `/v1`, as OpenAI clients want it, is taken off.

    Raises:
        ConfigurationError: not an http(s) URL with a host, or one that holds a password.
    """
    try:
        url = httpx.URL(text.strip())
    except httpx.InvalidURL as error:
        raise ConfigurationError(f"'{text}' is not a URL: {error}") from None
    if url.scheme not in {"http", "https"} or not url.host:
        raise ConfigurationError(f"'{text}' is not the URL of a server, like http://127.0.0.1:8000")
    if url.port is not None and not 0 < url.port < 1 << 16:
        raise ConfigurationError(f"'{text}' has a port outside of 1 to 65535")
    if url.userinfo:
        raise ConfigurationError("the server's URL holds a user name; give the key as api_key")
    return url.copy_with(path=url.path.rstrip("/").removesuffix("/v1"), query=None, fragment=None)


def authorization(api_key: str | None) -> dict[str, str]:
    """The header that carries the key.

    Raises:
        ConfigurationError: the key cannot travel in a header.
    """
    if not api_key:
        return {}
    if not api_key.isascii() or not api_key.isprintable() or " " in api_key:
        raise ConfigurationError(
            "the API key holds a space, a line end or a character that is not ASCII; "
            "was it copied whole?"
        )
    return {"Authorization": f"Bearer {api_key}"}


def encode_body(body: Mapping[str, object]) -> bytes:
    """A request body as UTF-8 JSON.

    Raises:
        InvalidRequest: something in it has no JSON form, or a text is not valid Unicode.
    """
    try:
        return json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise InvalidRequest(
            "a text is not valid Unicode (it holds a lone surrogate); was it read with the "
            "right encoding?"
        ) from None
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"the request cannot be written as JSON: {error}") from None


def encode_time(moment: datetime, *, param: str) -> str:
    """A time in RFC 3339; one without a zone would mean another moment on the server."""
    if moment.tzinfo is None:
        raise InvalidRequest(f"{param} has no time zone", param=param)
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")


def read_reply(call: Call[T], response: httpx.Response) -> T:
    """The result of a call whose reply has been read whole.

    Raises:
        ApiError: the server answered an error.
        UnexpectedReply: it answered something that this API does not.
    """
    status = response.status_code
    if status >= 400 and status not in call.accept:
        raise read_error(response)
    if not 200 <= status < 300 and status not in call.accept:
        raise UnexpectedReply(f"{_origin(response)} answered {status} to {_call_line(response)}")
    return call.parse(decode_json(response))


def decode_json(response: httpx.Response) -> Any:
    if not response.content.strip():
        return None
    try:
        return json.loads(response.content)
    except ValueError:
        raise UnexpectedReply(
            f"{_origin(response)} answered {_call_line(response)} with something that is not "
            "JSON; is it a memos-vllm server?"
        ) from None


def read_error(response: httpx.Response) -> ApiError:
    """The error that a reply of status 400 or above stands for."""
    status = response.status_code
    message, code, param = "", None, None
    try:
        body = json.loads(response.content)
    except ValueError:
        body = None
    if isinstance(body, dict) and isinstance(body.get("error"), dict):
        message, code, param = error_fields(body["error"])
    elif status == 404:
        message = (
            f"{_origin(response)} does not know {_call_line(response)}; is it a memos-vllm server?"
        )
    if not message:
        plain = " ".join(response.text.split())[:200] or response.reason_phrase
        message = f"{_origin(response)} answered {status} to {_call_line(response)}: {plain}"
    return api_error(
        message,
        status_code=status,
        code=code,
        param=param,
        retry_after_seconds=retry_after_seconds(response, now=datetime.now(UTC)),
    )


def error_fields(error: Mapping[str, Any]) -> tuple[str, str | None, str | None]:
    """Message, code and param of an OpenAI-shaped error object."""
    code, param = error.get("code"), error.get("param")
    return (
        str(error.get("message") or ""),
        None if code is None else str(code),
        None if param is None else str(param),
    )


def retry_after_seconds(response: httpx.Response, *, now: datetime) -> float | None:
    """The Retry-After header, which is seconds or a date; None if absent or unreadable."""
    value = response.headers.get("Retry-After", "").strip()
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - now).total_seconds())


def _origin(response: httpx.Response) -> str:
    url = response.request.url
    return f"{url.scheme}://{url.netloc.decode('ascii')}"


def _call_line(response: httpx.Response) -> str:
    return f"{response.request.method} {response.request.url.path}"
