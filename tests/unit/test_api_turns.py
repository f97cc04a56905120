"""Chat turns over HTTP."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from api_harness import Served, error_of, serve
from api_plaintext_kit import grant, new_cube, unchanged
from databases import Database

from memos_vllm.domain.access import Role

pytestmark = pytest.mark.asyncio(loop_scope="module")

ASKED = {"role": "user", "name": "Ada", "content": "My parcel is late."}
ANSWERED = {"role": "assistant", "content": "Which order is it?"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(
    tmp_path_factory: pytest.TempPathFactory, database: Database
) -> AsyncIterator[Served]:
    async with serve(tmp_path_factory.mktemp("turns"), database) as opened:
        yield opened


@pytest_asyncio.fixture(loop_scope="module")
async def cube(served: Served) -> str:
    return await new_cube(served)


async def say(served: Served, cube: str, *messages: Any, **more: Any) -> list[dict[str, Any]]:
    reply = await served.client.post(
        f"/v1/memcubes/{cube}/turns", json={"messages": list(messages), **more}
    )
    assert reply.status_code == 201, reply.text
    assert set(reply.json()) == {"object", "data", "next_cursor"}
    added: list[dict[str, Any]] = reply.json()["data"]
    return added


async def test_turns_become_memories_with_speaker_time_and_next_edges(
    served: Served, cube: str
) -> None:
    said_at = "2025-01-31T12:00:00+02:00"
    first, second = await say(
        served, cube, {**ASKED, "created_at": said_at, "metadata": {"n": 1}}, ANSWERED
    )
    assert first["text"] == ASKED["content"]
    assert (first["source"]["kind"], first["source"]["author"]) == ("turn", "Ada")
    assert first["source"]["created_at"] == "2025-01-31T10:00:00Z"
    assert first["metadata"] == {"role": "user", "n": 1}
    assert second["source"]["author"] == "assistant"
    assert [(edge["kind"], edge["target"]) for edge in first["edges"]] == [("next", second["id"])]


async def test_a_session_goes_on_in_the_next_call(served: Served, cube: str) -> None:
    (first,) = await say(served, cube, ASKED, session_id="call-17")
    (second,) = await say(served, cube, ANSWERED, session_id="call-17", reason="the answer")
    url = f"/v1/memcubes/{cube}/memories/{first['id']}"
    edges = (await served.client.get(url)).json()["edges"]
    assert [edge["target"] for edge in edges] == [second["id"]]
    assert second["metadata"]["session_id"] == "call-17"
    history = await served.client.get(f"/v1/memcubes/{cube}/memories/{second['id']}/history")
    assert history.json()["data"][0]["reason"] == "the answer"


async def test_content_may_come_in_parts_of_text(served: Served, cube: str) -> None:
    parts = [{"type": "text", "text": "One."}, {"type": "input_text", "text": "Two."}]
    (memory,) = await say(served, cube, {"role": "user", "content": parts})
    assert memory["text"] == "One.\nTwo."


BAD_TURNS: list[tuple[Any, str]] = [
    ({"role": "robot", "content": "x"}, "messages[1].role"),
    ({"role": 1, "content": "x"}, "messages[1].role"),
    ({"content": "x"}, "messages[1].role"),
    ({"role": "user"}, "messages[1].content"),
    ({"role": "user", "content": ""}, "messages[1].content"),
    ({"role": "user", "content": " \n"}, "messages[1].content"),
    ({"role": "user", "content": []}, "messages[1].content"),
    ({"role": "user", "content": [{"type": "text"}]}, "messages[1].content[0]"),
    (
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///x"}}]},
        "messages[1].content[0]",
    ),
    ({"role": "user", "content": [{"type": ["text"], "text": "x"}]}, "messages[1].content[0]"),
    ({"role": "user", "content": "x", "name": "two\nlines"}, "messages[1].name"),
    ({"role": "user", "content": "x", "name": "n" * 257}, "messages[1].name"),
    ({"role": "user", "content": "x", "name": ""}, "messages[1].name"),
    ({"role": "user", "content": "x", "created_at": "yesterday"}, "messages[1].created_at"),
    ({"role": "user", "content": "x", "created_at": 5}, "messages[1].created_at"),
    ({"role": "user", "content": "x", "metadata": []}, "messages[1].metadata"),
    ({"role": "user", "content": "x", "metadata": {"n": 10**30}}, "messages[1].metadata"),
    ({"role": "user", "content": "x", "tool_calls": []}, "messages[1].tool_calls"),
    ("x", "messages[1]"),
]


@pytest.mark.parametrize(("bad", "param"), BAD_TURNS, ids=range(len(BAD_TURNS)))
async def test_one_bad_turn_is_named_and_none_is_added(
    served: Served, cube: str, bad: Any, param: str
) -> None:
    async with unchanged(served, cube):
        reply = await served.client.post(
            f"/v1/memcubes/{cube}/turns", json={"messages": [ASKED, bad], "session_id": "s"}
        )
    found = error_of(reply, 400)["param"]
    assert found is not None
    assert found.startswith(param)


BAD_BODIES: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({}, "messages"),
    ({"messages": [ASKED], "session": "s"}, "session"),
    ({"messages": [ASKED], "session_id": ""}, "session_id"),
    ({"messages": [ASKED], "session_id": "s" * 257}, "session_id"),
    ({"messages": [ASKED], "session_id": "a\x00b"}, "session_id"),
    ({"messages": [ASKED], "session_id": "\ud800"}, "session_id"),
    ({"messages": [ASKED], "session_id": 7}, "session_id"),
    ({"messages": [ASKED], "reason": "\ud800"}, "reason"),
    ({"messages": [ASKED], "reason": "a\x00b"}, "reason"),
    ({"messages": [ASKED], "reason": "r" * 1001}, "reason"),
    ({"messages": [{**ASKED, "content": "a\x00b"}]}, "messages[0].text"),
    ({"messages": [{**ASKED, "content": "\udc00"}]}, "messages[0].text"),
    ({"messages": [{**ASKED, "name": "\udc00"}]}, "messages[0].name"),
    ({"messages": [{**ASKED, "metadata": {"\udc00": 1}}]}, "messages[0].metadata"),
    ({"messages": [{**ASKED, "metadata": {"k": "\x00"}}]}, "messages[0].metadata"),
]


@pytest.mark.parametrize(("body", "param"), BAD_BODIES, ids=range(len(BAD_BODIES)))
async def test_a_bad_body_is_named_and_nothing_is_added(
    served: Served, cube: str, body: dict[str, Any], param: str
) -> None:
    async with unchanged(served, cube):
        reply = await served.client.post(
            f"/v1/memcubes/{cube}/turns",
            content=json.dumps(body),
            headers={"content-type": "application/json"},
        )
    assert error_of(reply, 400)["param"] == param


async def test_what_is_too_large_is_a_413(served: Served, cube: str) -> None:
    url = f"/v1/memcubes/{cube}/turns"
    async with unchanged(served, cube):
        for messages in (
            [{**ASKED, "content": "x" * 65_537}],
            [ASKED] * 1001,
            [{**ASKED, "metadata": {"k": "x" * 17_000}}],
        ):
            error_of(await served.client.post(url, json={"messages": messages}), 413)
    full = await served.client.post(url, json={"messages": [{**ASKED, "content": "é" * 32_768}]})
    assert full.status_code == 201


async def test_who_may_not_write_gets_a_404(served: Served, cube: str) -> None:
    reader = grant(served, cube, Role.READER)
    async with unchanged(served, cube):
        for cube_id, headers in (
            ("nowhere", {}),
            (cube, {"x-test-principal": "x"}),
            (cube, reader),
        ):
            reply = await served.client.post(
                f"/v1/memcubes/{cube_id}/turns", json={"messages": [ASKED]}, headers=headers
            )
            error = error_of(reply, 404)
            assert error["message"] == f"memcube '{cube_id}' does not exist"


async def test_a_key_adds_a_conversation_once(served: Served, cube: str) -> None:
    url, key = f"/v1/memcubes/{cube}/turns", {"idempotency-key": f"key-{cube}"}
    body = {"messages": [ASKED, ANSWERED], "session_id": "s"}
    first = await served.client.post(url, json=body, headers=key)
    async with unchanged(served, cube):
        again = await served.client.post(url, json=body, headers=key)
        assert first.content == again.content
        other = {**body, "session_id": "t"}
        error_of(await served.client.post(url, json=other, headers=key), 409)
