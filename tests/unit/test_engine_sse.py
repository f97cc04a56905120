"""The `memos` object in a stream: on the right chunk, and every other byte untouched."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.entrypoints.generate.base.protocol import (
    DeltaFunctionCall,
    DeltaMessage,
    DeltaToolCall,
)
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionResponseStreamChoice,
    ChatCompletionStreamResponse,
)
from vllm.entrypoints.serve.engine.protocol import UsageInfo
from vllm.entrypoints.serve.utils.sse_keep_alive import SSE_KEEP_ALIVE_COMMENT, with_sse_keep_alive

from memos_vllm.engine.sse import with_memos

MEMOS = {"cubes": [{"id": "a", "version": 3}], "activation": {"tokens": 7, "source": "résident"}}
DONE = "data: [DONE]\n\n"


def event(
    *deltas: DeltaMessage, usage: int | None = None, finish: str | None = None, first_index: int = 0
) -> str:
    """A chunk as vLLM writes it."""
    chunk = ChatCompletionStreamResponse(
        id="chatcmpl-7",
        created=1_800_000_000,
        model="smol",
        choices=[
            ChatCompletionResponseStreamChoice(
                index=first_index + index, delta=delta, finish_reason=finish
            )
            for index, delta in enumerate(deltas)
        ],
    )
    if usage is not None:
        chunk.usage = UsageInfo(prompt_tokens=9, completion_tokens=usage, total_tokens=9 + usage)
    return f"data: {chunk.model_dump_json(exclude_unset=True)}\n\n"


def text(content: str, **options: Any) -> str:
    return event(DeltaMessage(content=content), **options)


async def stream(events: list[str]) -> AsyncIterator[str]:
    for item in events:
        yield item


async def say_memos() -> dict[str, Any]:
    return MEMOS


async def through(events: list[str]) -> list[str]:
    return [item async for item in with_memos(stream(events), say_memos)]


def chunk_of(item: str) -> dict[str, Any]:
    assert item.startswith("data: ")
    assert item.endswith("\n\n")
    parsed: dict[str, Any] = json.loads(item.removeprefix("data: "))
    return parsed


def memos_positions(items: list[str]) -> list[int]:
    return [
        index
        for index, item in enumerate(items)
        if item.startswith("data: {") and "memos" in chunk_of(item)
    ]


async def test_without_usage_a_chunk_of_its_own_comes_before_the_end() -> None:
    events = [
        event(DeltaMessage(role="assistant", content="")),
        text("Hi"),
        text("", finish="stop"),
    ]
    answer = await through([*events, DONE])
    assert answer[:3] == events
    assert answer[-1] == DONE
    assert memos_positions(answer) == [3]
    assert chunk_of(answer[3]) == {
        "id": "chatcmpl-7",
        "object": "chat.completion.chunk",
        "created": 1_800_000_000,
        "model": "smol",
        "choices": [],
        "memos": MEMOS,
    }


async def test_with_usage_it_rides_on_the_usage_chunk() -> None:
    usage = event(usage=4)
    answer = await through([text("Hi"), text("", finish="stop"), usage, DONE])
    assert memos_positions(answer) == [2]
    assert {**chunk_of(usage), "memos": MEMOS} == chunk_of(answer[2])
    assert answer[3] == DONE


async def test_with_continuous_usage_it_rides_on_the_last_chunk_with_usage() -> None:
    events = [text("a", usage=1), text("b", usage=2), text("", usage=2, finish="stop")]
    answer = await through([*events, event(usage=2), DONE])
    assert answer[:3] == events
    assert memos_positions(answer) == [3]
    with_usage = [i for i, item in enumerate(answer[:-1]) if "usage" in chunk_of(item)]
    assert memos_positions(answer) == with_usage[-1:]


async def test_events_pass_at_once_and_only_the_usage_chunk_waits() -> None:
    seen: list[str] = []

    async def noting() -> AsyncIterator[str]:
        for item in (text("a"), text("b"), event(usage=1), DONE):
            seen.append(item)
            yield item

    answer = with_memos(noting(), say_memos)
    for count in (1, 2):
        await anext(answer)
        assert len(seen) == count


async def test_the_reply_is_asked_for_only_when_the_stream_has_ended() -> None:
    asked: list[int] = []
    count = 0

    async def memos() -> dict[str, Any]:
        asked.append(count)
        return MEMOS

    async for _ in with_memos(stream([text("a"), event(usage=1), DONE]), memos):
        count += 1
    assert asked == [1]


async def test_tool_calls_reasoning_and_several_samples_pass_untouched() -> None:
    call = DeltaToolCall(
        index=0, id="call-1", function=DeltaFunctionCall(name="f", arguments='{"choices":[]}')
    )
    events = [
        event(DeltaMessage(role="assistant", content="")),
        event(DeltaMessage(role="assistant", content=""), first_index=1),
        event(DeltaMessage(reasoning="hm")),
        event(DeltaMessage(tool_calls=[call])),
        event(DeltaMessage(tool_calls=[]), first_index=1),
        event(DeltaMessage(), finish="tool_calls"),
        event(DeltaMessage(content="x"), DeltaMessage(content="y")),
    ]
    answer = await through([*events, event(usage=3), DONE])
    assert answer[: len(events)] == events
    assert memos_positions(answer) == [len(events)]


@pytest.mark.parametrize(
    "content",
    [
        '"choices":[]',
        '{"choices":[]}',
        "data: [DONE]",
        "\n\ndata: [DONE]\n\n",
        '\\"choices":[]',
        "é\u2028",
    ],
)
async def test_what_the_model_writes_is_never_mistaken_for_structure(content: str) -> None:
    events = [text(content), text(content), text("", finish="stop")]
    answer = await through([*events, DONE])
    assert answer[:3] == events
    assert memos_positions(answer) == [3]


@given(contents=st.lists(st.text(), max_size=6), usage=st.booleans())
@settings(max_examples=100, deadline=None)
async def test_any_text_passes_byte_for_byte(contents: list[str], usage: bool) -> None:
    events = [text(content.encode(errors="replace").decode()) for content in contents]
    answer = await through([*events, *([event(usage=1)] if usage else []), DONE])
    assert answer[: len(events)] == events
    assert memos_positions(answer) == [len(events)]
    assert answer[-1] == DONE


async def test_a_chunk_without_choices_in_the_middle_keeps_its_place_before_the_next() -> None:
    middle = event(usage=0)
    answer = await through([text("a"), middle, text("b"), event(usage=2), DONE])
    assert sorted(answer.index(item) for item in (text("a"), middle, text("b"))) == [0, 1, 2]
    assert memos_positions(answer) == [3]
    assert chunk_of(answer[3])["usage"]["completion_tokens"] == 2


async def test_an_error_in_the_middle_is_told_and_the_stream_still_ends_well() -> None:
    error = 'data: {"error": {"message": "boom", "type": "x", "param": null, "code": 500}}\n\n'
    answer = await through([text("a"), error, DONE])
    assert answer[:2] == [text("a"), error]
    assert answer[-1] == DONE
    only_error = await through([error, DONE])
    assert only_error[0] == error
    assert chunk_of(only_error[1])["object"] == "chat.completion.chunk"


async def test_a_stream_that_breaks_off_still_gives_what_was_held_back() -> None:
    assert await through([text("a"), event(usage=1)]) == [text("a"), event(usage=1)]


async def test_an_exception_reaches_the_server() -> None:
    async def failing() -> AsyncIterator[str]:
        yield text("a")
        raise RuntimeError("engine died")

    answer = with_memos(failing(), say_memos)
    assert await anext(answer) == text("a")
    with pytest.raises(RuntimeError, match="engine died"):
        await anext(answer)


async def test_lines_that_are_no_events_pass() -> None:
    answer = await through([": keep-alive\n\n", text("a"), ": keep-alive\n\n", DONE])
    assert answer[:3] == [": keep-alive\n\n", text("a"), ": keep-alive\n\n"]
    assert chunk_of(answer[3])["id"] == "chatcmpl-7"


async def test_keep_alive_comments_come_while_the_model_thinks() -> None:
    import asyncio

    async def slow() -> AsyncIterator[str]:
        yield text("a")
        await asyncio.sleep(0.2)
        yield event(usage=1)
        yield DONE

    wrapped = with_sse_keep_alive(with_memos(slow(), say_memos), 0.05)  # type: ignore[arg-type]
    answer = [item async for item in wrapped]
    assert SSE_KEEP_ALIVE_COMMENT in answer
    events = [item for item in answer if item != SSE_KEEP_ALIVE_COMMENT]
    assert memos_positions(events) == [1]
    assert events[-1] == DONE


async def test_a_client_that_goes_away_closes_the_stream_behind() -> None:
    closed: list[bool] = []

    async def endless() -> AsyncIterator[str]:
        try:
            while True:
                yield text("a")
        finally:
            closed.append(True)

    answer = with_memos(endless(), say_memos)
    await anext(answer)
    await answer.aclose()  # type: ignore[attr-defined]
    import asyncio
    import gc

    gc.collect()
    await asyncio.sleep(0.01)
    assert closed == [True]
