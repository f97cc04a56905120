"""Idempotency-Key: one key and body, one effect, one answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_harness import Served, build_app, error_of, serve
from databases import Database

from memos_vllm.errors import Unavailable

URL = "/v1/memcubes/acme/memories"
KEY = {"idempotency-key": "once"}


@pytest.fixture
async def served(tmp_path: Path, database: Database) -> AsyncIterator[Served]:
    async with serve(tmp_path, database) as opened:
        await opened.cube()
        yield opened


async def count(served: Served) -> int:
    return len((await served.client.get(URL, params={"limit": 1000})).json()["data"])


BODY = {"memories": [{"text": "a"}, {"text": "b"}]}


async def test_the_same_key_and_body_act_once_and_answer_alike(served: Served) -> None:
    first = await served.client.post(URL, json=BODY, headers=KEY)
    again = await served.client.post(URL, json=BODY, headers=KEY)
    assert first.status_code == again.status_code == 201
    assert first.content == again.content
    assert again.headers["idempotent-replayed"] == "true"
    assert "idempotent-replayed" not in first.headers
    assert await count(served) == 2


async def test_spaces_and_member_order_do_not_make_another_body(served: Served) -> None:
    headers = {**KEY, "content-type": "application/json"}
    first = await served.client.post(
        URL, content=b'{"memories":[{"text":"a","tags":[]}]}', headers=headers
    )
    again = await served.client.post(
        URL, content=b'{ "memories": [{"tags":[], "text":"\\u0061"}] }', headers=headers
    )
    assert first.content == again.content
    assert await count(served) == 1


async def test_another_body_path_or_query_under_the_same_key_is_a_conflict(
    served: Served,
) -> None:
    await served.client.post(URL, json=BODY, headers=KEY)
    other = {"memories": [{"text": "c"}]}
    error_of(await served.client.post(URL, json=other, headers=KEY), 409)
    error_of(await served.client.post("/v1/memcubes", json=BODY | {}, headers=KEY), 400)
    error_of(await served.client.post("/v1/memcubes", json={"id": "b"}, headers=KEY), 409)
    assert await count(served) == 2


async def test_one_caller_does_not_meet_the_key_of_another(served: Served) -> None:
    mine = await served.client.post("/v1/memcubes", json={}, headers=KEY)
    theirs = await served.client.post(
        "/v1/memcubes", json={}, headers={**KEY, "x-test-principal": "bob"}
    )
    assert (mine.status_code, theirs.status_code) == (201, 201)
    assert mine.json()["id"] != theirs.json()["id"]


async def test_twenty_requests_at_once_add_the_memories_once(served: Served) -> None:
    replies = await asyncio.gather(
        *(served.client.post(URL, json=BODY, headers=KEY) for _ in range(20))
    )
    assert {reply.status_code for reply in replies} == {201}
    assert len({reply.content for reply in replies}) == 1
    assert await count(served) == 2


async def test_a_race_of_two_bodies_under_one_key_adds_one_of_them(served: Served) -> None:
    other = {"memories": [{"text": "c"}]}
    replies = await asyncio.gather(
        *(
            served.client.post(URL, json=body, headers=KEY)
            for _ in range(6)
            for body in (BODY, other)
        )
    )
    assert sorted({reply.status_code for reply in replies}) == [201, 409]
    assert len({reply.content for reply in replies if reply.status_code == 201}) == 1
    assert await count(served) in (1, 2)


async def test_two_servers_of_one_catalog_do_not_act_twice(served: Served) -> None:
    second = build_app(lambda: served.mos, lambda: served.gateway)
    transport = httpx.ASGITransport(app=second)
    async with httpx.AsyncClient(transport=transport, base_url="http://t") as other:
        replies = await asyncio.gather(
            *(client.post(URL, json=BODY, headers=KEY) for client in (served.client, other) * 8)
        )
        assert {reply.status_code for reply in replies} <= {201, 409}
        assert len({reply.content for reply in replies if reply.status_code == 201}) == 1
        assert await count(served) == 2
        late = await other.post(URL, json=BODY, headers=KEY)
    assert late.status_code == 201
    assert await count(served) == 2


async def test_a_refused_request_leaves_its_key_free(served: Served) -> None:
    bad: dict[str, Any] = {"memories": [{"text": ""}]}
    error_of(await served.client.post(URL, json=bad, headers=KEY), 400)
    assert (await served.client.post(URL, json=BODY, headers=KEY)).status_code == 201


async def test_an_answer_after_a_failure_of_the_engine_is_not_kept(served: Served) -> None:
    await served.memories("a")
    url = "/v1/memcubes/acme/promote"
    body = {"to": "activation", "memory_ids": "all"}
    served.gateway.refusal = Unavailable("engine is loading")
    reply = await served.client.post(url, json=body, headers=KEY)
    error_of(reply, 503)
    assert reply.headers["retry-after"] == "1"
    served.gateway.refusal = None
    assert (await served.client.post(url, json=body, headers=KEY)).status_code == 202


async def test_every_post_takes_a_key(served: Served) -> None:
    memory = (await served.memories("a"))[0]
    one = f"{URL}/{memory['id']}"
    steps: list[tuple[str, dict[str, Any] | None]] = [
        ("/v1/memcubes", {"id": "b"}),
        (URL, BODY),
        (f"{one}/archive", None),
        (f"{one}/restore", None),
        ("/v1/memcubes/acme/promote", {"to": "activation", "memory_ids": "all"}),
        ("/v1/memcubes/acme/demote", {"from": "activation", "memory_ids": "all"}),
    ]
    for number, (path, body) in enumerate(steps):
        headers = {"idempotency-key": f"key-{number}"}
        first = await served.client.post(path, json=body, headers=headers)
        assert first.status_code in (200, 201, 202), first.text
        again = await served.client.post(path, json=body, headers=headers)
        assert again.content == first.content, path
        assert again.headers["idempotent-replayed"] == "true"


@pytest.mark.parametrize("key", ["", " ", "a b", "x" * 256, "é", "a\tb"])
async def test_a_key_that_is_no_key_is_refused(served: Served, key: str) -> None:
    reply = await served.client.post(
        URL, json=BODY, headers={"idempotency-key": key.encode("utf-8")}
    )
    assert error_of(reply, 400)["param"] == "Idempotency-Key"
    assert await count(served) == 0


async def test_a_kept_answer_survives_a_restart(
    served: Served, tmp_path: Path, database: Database
) -> None:
    first = await served.client.post(URL, json=BODY, headers=KEY)
    served.mos.close()
    async with serve(tmp_path, database) as reopened:
        again = await reopened.client.post(URL, json=BODY, headers=KEY)
        assert json.loads(again.content) == first.json()
        assert await count(reopened) == 2
