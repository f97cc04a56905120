"""The request guard against honest and hostile bodies."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from api_harness import Everyone
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.types import Message

from memos_vllm.api import middleware
from memos_vllm.api.authentication import STATE
from memos_vllm.api.body_guard import (
    MEMORY_FIELDS,
    TRANSFER_FIELD,
    UnreadableBodyError,
    guard_body,
    is_suspect,
)
from memos_vllm.api.middleware import MemosGuard, guard_counters

CHAT = "/v1/chat/completions"
JSON_HEADERS = {"content-type": "application/json"}


@pytest.fixture(autouse=True)
def _fresh_counters() -> Iterator[None]:
    for name in guard_counters:
        guard_counters[name] = 0
    yield
    for name in guard_counters:
        guard_counters[name] = 0


def echo_app() -> FastAPI:
    """Answers every path with the bytes and headers that reached it."""
    app = FastAPI()

    @app.api_route("/{path:path}", methods=["GET", "POST"])
    async def echo(path: str, request: Request) -> Response:
        body = await request.body()
        declared = request.headers.get("content-length", "")
        return Response(
            body, headers={"x-seen-length": declared}, media_type="application/octet-stream"
        )

    setattr(app.state, STATE, Everyone())
    app.add_middleware(MemosGuard)
    return app


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=echo_app())
    async with httpx.AsyncClient(transport=transport, base_url="http://t") as opened:
        yield opened


async def post(client: httpx.AsyncClient, path: str, body: bytes, **headers: str) -> httpx.Response:
    return await client.post(path, content=body, headers=headers or JSON_HEADERS)


OTHER_ROUTES = [
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/chat/completions/batch",
    "/v1/chat/completions/render",
    "/invocations",
    "/inference/v1/generate",
    "/v1/embeddings",
    "/generative_scoring",
    "/tokenize",
    "/v1/memcubesx",
]


@pytest.mark.parametrize("path", OTHER_ROUTES)
@pytest.mark.parametrize("field", sorted(MEMORY_FIELDS))
async def test_memory_fields_on_another_route_are_refused_and_the_right_route_named(
    client: httpx.AsyncClient, path: str, field: str
) -> None:
    reply = await client.post(path, json={"model": "m", field: "acme"})
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["param"] == field
    assert "POST /v1/chat/completions" in error["message"]
    assert error["type"] == "invalid_request_error"
    assert guard_counters["memory_fields_refused"] == 1


@pytest.mark.parametrize("path", [CHAT, CHAT + "/", "/v1/memcubes", "/v1/memcubes/a/memories"])
async def test_routes_that_take_memory_fields_see_the_body_as_sent(
    client: httpx.AsyncClient, path: str
) -> None:
    body = b'{ "memcube_id":"acme", "memos" : {"a": 1.50}}'
    reply = await post(client, path, body)
    assert reply.content == body


async def test_a_root_path_does_not_hide_the_chat_route() -> None:
    app = echo_app()
    app.root_path = "/llm"
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
        chat = await client.post("/llm/v1/chat/completions", json={"memcube_id": "a"})
        other = await client.post("/llm/v1/completions", json={"memcube_id": "a"})
    assert (chat.status_code, other.status_code) == (200, 400)


async def test_memory_words_inside_values_are_no_memory_fields(client: httpx.AsyncClient) -> None:
    body = json.dumps(
        {
            "prompt": 'say "memos" and "memcube_id"',
            "metadata": {"memos": "x", "memcube_id": 1},
            "messages": [{"content": {"mem_cube_id": 2}}],
        }
    ).encode()
    reply = await post(client, "/v1/completions", body)
    assert reply.status_code == 200
    assert reply.content == body


HIDDEN = '{"model":"m","\\u006demcube_id":"acme"}'


@pytest.mark.parametrize(
    "body",
    [
        HIDDEN.encode(),
        b'{"memcube\\u005Fid":"acme"}',
        b'{"m\\u0065mos":{}}',
        '{"memcube_id":"acme"}'.encode("utf-8-sig"),
        '{"memcube_id":"acme"}'.encode("utf-16"),
        '{"memcube_id":"acme"}'.encode("utf-16-le"),
        '{"memcube_id":"acme"}'.encode("utf-16-be"),
        '{"memcube_id":"acme"}'.encode("utf-32"),
        b' \r\n\t{ "a" : 1 , "memcube_id" : null }',
        b'[{"model":"m"},{"memcube_id":"acme"}]',
        b'{"memcube_id":"a","memcube_id":"b"}',
    ],
)
async def test_a_disguised_memory_field_is_refused(client: httpx.AsyncClient, body: bytes) -> None:
    reply = await post(client, "/v1/completions", body)
    assert reply.status_code == 400, reply.text


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json; charset=utf-8",
        "APPLICATION/JSON",
        "application/vnd.api+json",
        "text/plain",
        "application/octet-stream",
    ],
)
async def test_the_content_type_does_not_let_a_json_body_by(
    client: httpx.AsyncClient, content_type: str
) -> None:
    body = b'{"memcube_id":"acme"}'
    reply = await post(client, "/v1/completions", body, **{"content-type": content_type})
    assert reply.status_code == 400
    bare = await client.post("/v1/completions", content=body)
    assert bare.status_code == 400


async def test_a_second_content_type_header_does_not_make_a_form(
    client: httpx.AsyncClient,
) -> None:
    headers = [("content-type", "application/json"), ("content-type", "multipart/form-data")]
    reply = await client.post("/v1/completions", content=b'{"memcube_id":"a"}', headers=headers)
    assert reply.status_code == 400


async def test_a_chunked_body_is_put_together_before_it_is_judged(
    client: httpx.AsyncClient,
) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for byte in b'{"x":1,"memcube_id":"acme"}':
            yield bytes([byte])

    reply = await client.post("/v1/completions", content=pieces(), headers=JSON_HEADERS)
    assert reply.status_code == 400


TRANSFER_BODIES: list[tuple[str, str]] = [
    ('{"a":1,"kv_transfer_params":{"x":[1,{"y":2}]},"b":2}', '{"a":1,"b":2}'),
    ('{"kv_transfer_params":"text"}', "{}"),
    ('{"kv_transfer_params":1,"a":2}', '{"a":2}'),
    ('{"a":2 , "kv_transfer_params":null }', '{"a":2 }'),
    ('{"kv_transfer_params":1,"kv_transfer_params":2,"a":3,"kv_transfer_params":4}', '{"a":3}'),
    ('{"a":1,"kv_transfer_params":2,"kv_transfer_params":3}', '{"a":1}'),
    ('{"vllm_xargs":{"kv_transfer_params":"x","k":1}}', '{"vllm_xargs":{"k":1}}'),
    (
        '{"vllm_xargs":{"kv_transfer_params":1},"vllm_xargs":{"kv_transfer_params":2,"b":1}}',
        '{"vllm_xargs":{},"vllm_xargs":{"b":1}}',
    ),
    (
        '{"sampling_params":{"temperature":0.10,"extra_args":{"kv_transfer_params":{}}}}',
        '{"sampling_params":{"temperature":0.10,"extra_args":{}}}',
    ),
    ('{"extra_args":{"vllm_xargs":{"kv_transfer_params":1}}}', '{"extra_args":{"vllm_xargs":{}}}'),
    ('[{"kv_transfer_params":1},{"b":2,"kv_transfer_params":1}]', '[{},{"b":2}]'),
    (
        '{"requests":[{"kv_transfer_params":1},{"extra_args":{"kv_transfer_params":1}},7]}',
        '{"requests":[{},{"extra_args":{}},7]}',
    ),
    ('{"kv_transfer\\u005fparams":1,"a":"\\u00e9\\ud83d\\ude00"}', '{"a":"\\u00e9\\ud83d\\ude00"}'),
    (
        '{"big":123456789012345678901234567890,"kv_transfer_params":1}',
        '{"big":123456789012345678901234567890}',
    ),
    (
        '{"f":[1e400,1.10,-0.0,1E5,0.1000000000000000055511151231257827],"kv_transfer_params":1}',
        '{"f":[1e400,1.10,-0.0,1E5,0.1000000000000000055511151231257827]}',
    ),
    ('{"lone":"\\ud800","kv_transfer_params":1,"x":NaN}', '{"lone":"\\ud800","x":NaN}'),
]


@pytest.mark.parametrize(("sent", "seen"), TRANSFER_BODIES)
@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/inference/v1/generate"])
async def test_transfer_params_are_cut_out_and_the_rest_arrives_as_sent(
    client: httpx.AsyncClient, path: str, sent: str, seen: str
) -> None:
    reply = await post(client, path, sent.encode())
    assert reply.status_code == 200
    assert reply.content.decode() == seen
    assert reply.headers["x-seen-length"] == str(len(seen.encode()))
    assert guard_counters["transfer_params_dropped"] >= 1


async def test_an_utf_16_body_loses_its_transfer_params_too(client: httpx.AsyncClient) -> None:
    body = '{"a":"é\ud83d","kv_transfer_params":1}'.encode("utf-16", "surrogatepass")
    reply = await post(client, "/v1/completions", body)
    assert json.loads(reply.content) == {"a": "é\ud83d"}


async def test_transfer_params_that_vllm_never_reads_stay(client: httpx.AsyncClient) -> None:
    body = json.dumps(
        {
            "messages": [{"content": "x", "kv_transfer_params": 1}],
            "tools": [{"parameters": {"properties": {"kv_transfer_params": {"type": "string"}}}}],
            "metadata": {"extra_args": {"kv_transfer_params": 1}},
        }
    ).encode()
    reply = await post(client, CHAT, body)
    assert reply.content == body
    assert guard_counters["transfer_params_dropped"] == 0


async def test_our_own_routes_keep_texts_about_transfer_params(client: httpx.AsyncClient) -> None:
    body = b'{"memories":[{"text":"x","metadata":{"kv_transfer_params":1}}],"vllm_xargs":{}}'
    reply = await post(client, "/v1/memcubes/acme/memories", body)
    assert reply.content == body


async def test_dropping_is_logged_once_without_the_value(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, logger="memos_vllm.api.middleware"):
        for _ in range(3):
            await post(client, CHAT, b'{"kv_transfer_params":{"ticket":"s3cret"}}')
    records = [record for record in caplog.records if record.name == middleware.__name__]
    assert len(records) == 1
    assert "s3cret" not in caplog.text
    assert guard_counters["transfer_params_dropped"] == 3


@pytest.mark.parametrize(
    "body",
    [
        b'{"kv_transfer_params":1',
        b'{"kv_transfer_params":1}garbage',
        b'{"kv_transfer_params":1,}',
        b'{"kv_transfer_params":"\xff"}',
        b'{"kv_transfer_params":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"extra_args":' * 50_000 + b'{"kv_transfer_params":1}' + b"}" * 50_000,
        b'{"extra_args":' * 400 + b'{"kv_transfer_params":1}',
    ],
)
async def test_unreadable_json_that_names_our_fields_is_a_400(
    client: httpx.AsyncClient, body: bytes
) -> None:
    reply = await post(client, CHAT, body)
    assert reply.status_code == 400
    assert guard_counters["unreadable_refused"] == 1


async def test_unreadable_json_without_our_fields_is_left_to_vllm(
    client: httpx.AsyncClient,
) -> None:
    reply = await post(client, CHAT, b'{"model":')
    assert reply.status_code == 200
    assert reply.content == b'{"model":'


async def test_binary_bodies_pass(client: httpx.AsyncClient) -> None:
    body = bytes(range(256)) * 4 + b'"kv_transfer_params"'
    for kind in ("application/octet-stream", "audio/wav"):
        reply = await post(client, "/v1/audio", body, **{"content-type": kind})
        assert reply.content == body


async def test_a_body_over_the_limit_is_refused_only_when_it_must_be_parsed(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(middleware, "MAX_INSPECTED_BYTES", 1000)
    filler = "x" * 1000
    refused = await client.post(CHAT, json={"kv_transfer_params": 1, "x": filler})
    assert refused.status_code == 413
    assert refused.json()["error"]["code"] == "too_large"
    assert guard_counters["oversized_refused"] == 1
    passed = await client.post(CHAT, json={"memcube_id": "a", "x": filler})
    assert passed.status_code == 200


async def test_a_form_is_streamed_through_without_waiting_for_its_end() -> None:
    events: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        events.append("first chunk reached the app")
        await receive()
        await JSONResponse({})(scope, receive, send)

    messages: list[Message] = [
        {"type": "http.request", "body": b"--b", "more_body": True},
        {"type": "http.request", "body": b'"kv_transfer_params"', "more_body": False},
    ]

    async def receive() -> Message:
        if len(messages) == 1:
            events.append("second chunk asked for")
        return messages.pop(0)

    async def send(message: Message) -> None:
        pass

    scope = {
        "type": "http",
        "app": echo_app(),
        "method": "POST",
        "path": "/v1/audio/transcriptions",
        "headers": [(b"content-type", b"multipart/form-data; boundary=b")],
    }
    await MemosGuard(app)(scope, receive, send)
    assert events == ["first chunk reached the app", "second chunk asked for"]


async def test_a_disconnect_after_the_body_reaches_the_app() -> None:
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.extend([(await receive())["type"], (await receive())["type"]])

    messages: list[Message] = [
        {"type": "http.request", "body": b"{}", "more_body": False},
        {"type": "http.disconnect"},
    ]

    async def receive() -> Message:
        return messages.pop(0)

    async def send(message: Message) -> None:
        pass

    scope = {"type": "http", "app": echo_app(), "method": "POST", "path": CHAT, "headers": []}
    await MemosGuard(app)(scope, receive, send)
    assert seen == ["http.request", "http.disconnect"]


async def test_a_client_that_leaves_while_sending_starts_nothing() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("the app was called")

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        raise AssertionError("something was sent")

    scope = {"type": "http", "app": echo_app(), "method": "POST", "path": CHAT, "headers": []}
    await MemosGuard(app)(scope, receive, send)


async def test_the_life_of_the_app_passes() -> None:
    scope = {"type": "lifespan"}
    called: list[Any] = []

    async def app(*arguments: Any) -> None:
        called.append(arguments[0])

    async def nothing(*_: Any) -> Any:
        raise AssertionError("touched")

    await MemosGuard(app)(scope, nothing, nothing)
    assert called == [scope]


def test_ordinary_multilingual_chat_is_never_parsed() -> None:
    body = json.dumps(
        {"messages": [{"role": "user", "content": 'Ünïcode 中文 <b>&</b> \x1b \U0001f600 "memos"'}]}
    ).encode()
    assert b"\\u" in body
    assert not is_suspect(body, memory_fields=True)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec=None), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                [
                    "a",
                    TRANSFER_FIELD,
                    "vllm_xargs",
                    "extra_args",
                    "sampling_params",
                    "requests",
                    "memos",
                ]
            )
            | st.text(max_size=4),
            inner,
            max_size=6,
        )
    ),
    max_leaves=30,
)
CONTAINERS = {"vllm_xargs", "extra_args", "sampling_params", "requests", "batch"}


def stripped(value: Any) -> Any:
    """The naive truth: the same removal on parsed values."""
    if isinstance(value, list):
        return [stripped(item) for item in value]
    if isinstance(value, dict):
        return {
            name: stripped(member) if name in CONTAINERS else member
            for name, member in value.items()
            if name != TRANSFER_FIELD
        }
    return value


@settings(max_examples=300, deadline=None)
@given(
    value=JSON,
    indent=st.sampled_from([None, 0, 3]),
    ascii_only=st.booleans(),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]),
)
def test_the_edited_text_means_what_the_naive_removal_means(
    value: Any, indent: int | None, ascii_only: bool, encoding: str
) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    guarded = guard_body(text.encode(encoding, "surrogatepass"))
    result = text if guarded.text is None else guarded.text
    assert json.loads(result) == stripped(value)
    if isinstance(value, dict):
        assert set(guarded.memory_fields) == MEMORY_FIELDS & set(value)


@settings(max_examples=300, deadline=None)
@given(
    members=st.lists(
        st.tuples(
            st.sampled_from(["a", "b", TRANSFER_FIELD, "kv_transfer\\u005fparams"]),
            st.sampled_from(["1", "1.50", "[ ]", '{"a" :1}', '"x"', "null", "9" * 5000]),
            st.sampled_from(["", " ", "\n\t"]),
        ),
        max_size=8,
    )
)
def test_duplicate_names_and_spellings_survive_in_order(
    members: list[tuple[str, str, str]],
) -> None:
    def pairs(text: str) -> list[tuple[str, str]]:
        collected = json.loads(text, object_pairs_hook=list, parse_int=str, parse_float=str)
        return [(name, json.dumps(member)) for name, member in collected]

    text = "{" + ",".join(f'{pad}"{n}"{pad}:{pad}{v}{pad}' for n, v, pad in members) + "}"
    guarded = guard_body(text.encode())
    result = text if guarded.text is None else guarded.text
    kept = [pair for pair in pairs(text) if pair[0] != TRANSFER_FIELD]
    assert pairs(result) == kept
    assert guarded.dropped == len(members) - len(kept)


@settings(max_examples=200, deadline=None)
@given(body=st.binary(max_size=60))
def test_any_bytes_are_edited_or_called_unreadable(body: bytes) -> None:
    try:
        guard_body(body)
    except UnreadableBodyError:
        with pytest.raises((ValueError, RecursionError)):
            json.loads(body)


def test_deep_nesting_of_containers_is_walked_in_linear_time() -> None:
    filler = "x" * 2_000_000
    body = (
        '{"extra_args":' * 200 + '{"kv_transfer_params":1,"f":"' + filler + '"}' + "}" * 200
    ).encode()
    guarded = guard_body(body)
    assert guarded.dropped == 1
    assert guarded.text is not None
    assert TRANSFER_FIELD not in guarded.text
