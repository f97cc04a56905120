"""Chat through the client: the request, the typed reply, and streams as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import client_fakes as fakes
import httpx
import pytest
from client_fakes import Script, reply

from memos_vllm.client import (
    ApiBadRequest,
    ApiError,
    AsyncMOS,
    ReplyTimeout,
    ServerUnreachable,
    UnexpectedReply,
)
from memos_vllm.client.stream import EventDecoder
from memos_vllm.errors import InvalidRequest

Connect = Callable[..., Any]
MODELS = {"object": "list", "data": [{"id": "small"}, {"id": "an-adapter"}]}
FINAL = {"choices": [], "usage": {"total_tokens": 9}, "memos": fakes.MEMOS_JSON}


@pytest.fixture(params=["blocking", "awaited"])
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    if request.param == "blocking":
        yield fakes.client
        return
    loop = asyncio.new_event_loop()
    yield lambda script, **options: fakes.waited_client(script, loop, **options)
    loop.close()


def stop(**changes: object) -> dict[str, object]:
    return {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], **changes}


def test_chat_names_the_cube_and_returns_the_text_and_what_it_was_built_on(
    connect: Connect,
) -> None:
    script = Script(reply(200, fakes.chat_json()))
    answer = connect(script).cube("acme").chat("How long?", model="small")
    assert answer.text == "Five days."
    assert answer.memos.activation.source == "resident"
    assert answer.memos.cubes == (("acme", 3),)
    assert answer.finish_reason == "stop"
    assert script.body() == {
        "model": "small",
        "messages": [{"role": "user", "content": "How long?"}],
        "memcube_id": "acme",
    }
    assert "Idempotency-Key" not in script.requests[0].headers


def test_the_model_is_asked_for_once(connect: Connect) -> None:
    script = Script(reply(200, MODELS), *[reply(200, fakes.chat_json()) for _ in range(2)])
    mos = connect(script)
    mos.cube("acme").chat("One?")
    mos.cube("other").chat("Two?")
    assert script.paths == ["GET /v1/models", *["POST /v1/chat/completions"] * 2]
    assert [script.body(1)["model"], script.body(2)["model"]] == ["small", "small"]


def test_chat_of_the_server_names_any_cubes_or_none(connect: Connect) -> None:
    script = Script(*[reply(200, fakes.chat_json()) for _ in range(3)])
    mos = connect(script)
    mos.chat("Hello", model="m")
    assert "memcube_id" not in script.body()
    mos.chat("Hello", model="m", cubes=["a", "b"])
    assert script.body()["memcube_id"] == ["a", "b"]
    mos.cube("a").chat("Hello", model="m", cubes=["b"])
    assert script.body()["memcube_id"] == ["a", "b"]


def test_memory_switches_travel_in_the_memos_object_and_options_beside_it(
    connect: Connect,
) -> None:
    script = Script(reply(200, fakes.chat_json()))
    connect(script).cube("acme").chat(
        [{"role": "user", "content": "Hi"}],
        model="m",
        retrieve={"top_k": 2},
        activation=False,
        adapter=False,
        options={"temperature": 0, "max_tokens": 5},
    )
    body = script.body()
    assert body["memos"] == {"retrieve": {"top_k": 2}, "activation": False, "adapter": False}
    assert (body["temperature"], body["max_tokens"]) == (0, 5)


@pytest.mark.parametrize(
    ("remember", "sent"),
    [(True, True), ("fast", {"mode": "fast"}), ("fine", {"mode": "fine"}), (False, None)],
)
def test_remember_and_the_session_travel_in_the_memos_object(
    connect: Connect, remember: object, sent: object
) -> None:
    script = Script(reply(200, fakes.chat_json()), reply(200, fakes.sse(stop(), FINAL)))
    cube = connect(script).cube("acme")
    cube.chat("Hi", model="m", remember=remember, session_id="s1")
    expected = {"session_id": "s1"} | ({} if sent is None else {"remember": sent})
    assert script.body()["memos"] == expected
    list(cube.chat_stream("Hi", model="m", remember=remember, session_id="s1"))
    assert script.body()["memos"] == expected


def test_retrieve_is_left_to_the_server_unless_it_is_refused_or_described(
    connect: Connect,
) -> None:
    script = Script(*[reply(200, fakes.chat_json()) for _ in range(3)])
    cube = connect(script).cube("acme")
    for retrieve in (None, True, False):
        cube.chat("Hi", model="m", retrieve=retrieve)
    sent = [script.body(index).get("memos") for index in range(3)]
    assert sent == [None, None, {"retrieve": False}]


def test_a_reply_says_what_was_retrieved_and_remembered_and_what_went_wrong(
    connect: Connect,
) -> None:
    final = {**FINAL, "memos": fakes.RECALLED_JSON}
    script = Script(
        reply(200, fakes.chat_json(memos=fakes.RECALLED_JSON)), reply(200, fakes.sse(final))
    )
    mos = connect(script)
    whole = mos.chat("Hi", model="m").memos
    stream = mos.chat_stream("Hi", model="m")
    assert list(stream) == []
    for memos in (whole, stream.memos):
        first, second = memos.retrieved
        assert (first.id, first.score, first.number) == ("mem_1", 0.8, 3)
        assert (first.tokens, first.source, second.source) == (40, "Handbook, page 7", None)
        assert memos.remembered.memory_ids == ("mem_8", "mem_9")
        assert memos.remembered.job == "job_1"
        assert memos.warnings == ("the index is behind",)


def test_a_server_that_says_less_of_memory_is_understood(connect: Connect) -> None:
    older = {"cubes": [], "activation": {}, "retrieved": [{"id": "mem_1", "score": 0.5}]}
    script = Script(
        reply(200, fakes.chat_json(memos=older)), reply(200, fakes.chat_json(memos=None))
    )
    mos = connect(script)
    memos = mos.chat("Hi", model="m").memos
    assert (memos.retrieved[0].number, memos.retrieved[0].source) == (None, None)
    assert (memos.remembered, memos.warnings) == (None, ())
    assert mos.chat("Hi", model="m").memos is None


@pytest.mark.parametrize("field", ["stream", "messages", "memcube_id", "memos"])
def test_options_may_not_replace_an_argument(connect: Connect, field: str) -> None:
    with pytest.raises(InvalidRequest, match=field):
        connect(Script()).cube("acme").chat("Hi", model="m", options={field: 1})


def test_a_reply_without_content_has_an_empty_text(connect: Connect) -> None:
    body = fakes.chat_json()
    body["choices"] = [{"index": 0, "message": {"content": None, "tool_calls": [{"id": "c"}]}}]
    answer = connect(Script(reply(200, body))).chat("Hi", model="m")
    assert answer.text == ""
    assert answer.message["tool_calls"] == [{"id": "c"}]


def test_a_stream_yields_text_as_it_comes_and_the_memos_object_at_the_end(
    connect: Connect,
) -> None:
    body = fakes.sse(
        fakes.delta_json(""), fakes.delta_json("Five "), fakes.delta_json("days."), stop(), FINAL
    )
    script = Script(reply(200, body))
    stream = connect(script).cube("acme").chat_stream("How long?", model="small")
    assert stream.memos is None
    assert list(stream) == ["Five ", "days."]
    assert stream.text == "Five days."
    assert stream.memos.activation.cached_tokens == 512
    assert (stream.finish_reason, stream.usage) == ("stop", {"total_tokens": 9})
    assert script.body()["stream"] is True
    assert script.body()["stream_options"] == {"include_usage": True}


def test_chat_with_stream_is_the_same_stream(connect: Connect) -> None:
    script = Script(reply(200, fakes.sse(fakes.delta_json("Hi"), FINAL)))
    assert list(connect(script).chat("Hello", model="m", stream=True)) == ["Hi"]


def test_only_the_first_choice_is_streamed(connect: Connect) -> None:
    second = {"choices": [{"index": 1, "delta": {"content": "B"}, "finish_reason": "length"}]}
    script = Script(reply(200, fakes.sse(fakes.delta_json("A"), second, stop())))
    stream = connect(script).chat_stream("Hello", model="m", options={"n": 2})
    assert list(stream) == ["A"]
    assert stream.finish_reason == "stop"


def test_a_refused_stream_raises_the_servers_error(connect: Connect) -> None:
    body = fakes.error_json("the memory takes 9000 tokens", param="memcube_id")
    with pytest.raises(ApiBadRequest, match="9000 tokens"):
        list(connect(Script(reply(400, body))).cube("acme").chat_stream("Hi", model="m"))


def test_an_error_in_the_middle_of_a_stream_is_raised(connect: Connect) -> None:
    body = fakes.sse(fakes.delta_json("Fi"), fakes.error_json("the engine died", code=500))
    stream = connect(Script(reply(200, body))).chat_stream("Hi", model="m")
    with pytest.raises(ApiError, match="the engine died") as caught:
        list(stream)
    assert caught.value.status_code == 500
    assert stream.text == ""


def test_a_stream_that_ends_early_is_not_taken_for_a_whole_answer(connect: Connect) -> None:
    body = fakes.sse(fakes.delta_json("Five "), end=False)
    stream = connect(Script(reply(200, body))).chat_stream("Hi", model="m")
    with pytest.raises(ServerUnreachable, match="broke off"):
        list(stream)
    assert stream.text == "Five "


@pytest.mark.parametrize(
    ("failure", "kind"),
    [(httpx.ReadError("reset"), ServerUnreachable), (httpx.ReadTimeout("slow"), ReplyTimeout)],
)
def test_a_connection_that_breaks_in_a_stream_is_told_from_a_slow_one(
    connect: Connect, failure: Exception, kind: type[Exception]
) -> None:
    class Breaking(httpx.SyncByteStream, httpx.AsyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            yield fakes.sse(fakes.delta_json("Five "), end=False)
            raise failure

        async def __aiter__(self) -> AsyncIterator[bytes]:
            yield fakes.sse(fakes.delta_json("Five "), end=False)
            raise failure

    script = Script(httpx.Response(200, stream=Breaking()))
    with pytest.raises(kind):
        list(connect(script).chat_stream("Hi", model="m"))


def test_a_stream_that_is_no_json_is_refused(connect: Connect) -> None:
    with pytest.raises(UnexpectedReply):
        list(connect(Script(reply(200, b"data: hello\n\n"))).chat_stream("Hi", model="m"))


def test_closing_a_stream_early_closes_its_connection(connect: Connect) -> None:
    closed = []

    class Watched(httpx.SyncByteStream, httpx.AsyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            yield fakes.sse(fakes.delta_json("a"), fakes.delta_json("b"), end=False)

        async def __aiter__(self) -> AsyncIterator[bytes]:
            yield fakes.sse(fakes.delta_json("a"), fakes.delta_json("b"), end=False)

        def close(self) -> None:
            closed.append(True)

        async def aclose(self) -> None:
            closed.append(True)

    stream = connect(Script(httpx.Response(200, stream=Watched()))).chat_stream("Hi", model="m")
    assert next(iter(stream)) == "a"
    stream.close()
    assert closed


async def test_an_async_stream_may_be_awaited_first_or_iterated_over_at_once() -> None:
    body = fakes.sse(fakes.delta_json("Hi"), FINAL)
    script = Script(*[reply(200, body) for _ in range(3)])
    async with AsyncMOS(fakes.URL, transport=httpx.MockTransport(script)) as mos:
        cube = mos.cube("acme")
        assert [delta async for delta in cube.chat_stream("a", model="m")] == ["Hi"]
        opened = await cube.chat_stream("b", model="m")
        assert len(script.requests) == 2
        assert [delta async for delta in opened] == ["Hi"]
        async with cube.chat_stream("c", model="m") as within:
            assert await anext(aiter(within)) == "Hi"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_are_the_same_however_the_bytes_are_cut(size: int) -> None:
    # U+2028 and U+0085 are line ends to Python's splitlines and to httpx's iter_lines.
    body = 'data: {"a": "x\u2028y\u0085z é"}\r\n\r\n: comment\n\nevent: x\ndata: 1\ndata: 2\n\n'
    content = body.encode()
    decoder = EventDecoder()
    events = [
        event
        for start in range(0, len(content), size)
        for event in decoder.feed(content[start : start + size])
    ]
    assert events == ['{"a": "x\u2028y\u0085z é"}', "1\n2"]
