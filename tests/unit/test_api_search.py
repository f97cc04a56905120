"""Search over HTTP, with a real catalog and a real index that finds by words and edges."""

from __future__ import annotations

import asyncio
import functools
import json
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from api_harness import FakeGateway, Served, build_app, error_of, serve
from api_plaintext_kit import grant, new_cube, unchanged
from databases import Database
from model_server import running_server

from memos_vllm.config import ServerSettings
from memos_vllm.domain.access import Role
from memos_vllm.plaintext.assembly import open_plaintext

pytestmark = pytest.mark.asyncio(loop_scope="module")

REFUNDS = "Refunds take five working days."
DESK = "The returns desk is in Leeds."
CARDS = "Gift cards never expire."


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(
    tmp_path_factory: pytest.TempPathFactory, database: Database
) -> AsyncIterator[Served]:
    async with serve(tmp_path_factory.mktemp("search"), database, search=True) as opened:
        await asyncio.to_thread(opened.plaintext.wait_until_indexed, "none", seconds=20)
        yield opened


@pytest_asyncio.fixture(loop_scope="module")
async def cube(served: Served) -> str:
    return await new_cube(served)


async def add(served: Served, cube: str, *memories: str | dict[str, Any]) -> list[dict[str, Any]]:
    body = [{"text": item} if isinstance(item, str) else item for item in memories]
    reply = await served.client.post(f"/v1/memcubes/{cube}/memories", json={"memories": body})
    assert reply.status_code == 201, reply.text
    added: list[dict[str, Any]] = reply.json()["data"]
    return added


async def post(
    served: Served, cube: str, body: Any, headers: dict[str, str] | None = None
) -> httpx.Response:
    return await served.client.post(
        f"/v1/memcubes/{cube}/search",
        content=json.dumps(body),
        headers={"content-type": "application/json", **(headers or {})},
    )


async def find(
    served: Served, cube: str, query: str, *, headers: dict[str, str] | None = None, **options: Any
) -> list[dict[str, Any]]:
    reply = await post(served, cube, {"query": query, **options}, headers)
    assert reply.status_code == 200, reply.text
    hits: list[dict[str, Any]] = reply.json()["data"]
    return hits


def texts(hits: list[dict[str, Any]]) -> list[str]:
    return [hit["memory"]["text"] for hit in hits]


async def test_what_was_just_added_is_found_best_first(served: Served, cube: str) -> None:
    added = await add(served, cube, REFUNDS, DESK, CARDS)
    reply = (await post(served, cube, {"query": "how long do refunds take?"})).json()
    assert set(reply) == {"object", "data", "next_cursor", "pending"}
    assert (reply["object"], reply["next_cursor"], reply["pending"]) == ("list", None, None)
    best = reply["data"][0]
    assert set(best) == {"memory", "score", "scores", "via"}
    assert best["memory"] == added[0]
    assert set(best["scores"]) == {"dense", "sparse", "graph"}
    assert best["scores"]["sparse"] > 0
    assert 0 < best["score"] <= 1
    assert best["via"] is None


async def test_explain_shows_every_part_of_the_score_and_the_way_to_a_memory(
    served: Served, cube: str
) -> None:
    first, second = await add(served, cube, REFUNDS, "Ask in Leeds.")
    edge = {"kind": "see-also", "target": second["id"], "weight": 0.5}
    url = f"/v1/memcubes/{cube}/memories/{first['id']}"
    assert (await served.client.patch(url, json={"edges": [edge]})).status_code == 200
    best, led = await find(served, cube, "refunds working days", explain=True)
    parts = {name: value for name, value in best["scores"].items() if name != "bm25"}
    assert {"dense", "sparse", "graph", "recency", "usage"} <= set(parts)
    assert sum(parts.values()) == pytest.approx(best["score"], abs=1e-5)
    assert best["scores"]["bm25"] > 0
    assert led["memory"]["id"] == second["id"]
    assert led["via"] == [
        {
            "origin": first["id"],
            "kind": "see-also",
            "forward": True,
            "weight": 0.5,
            "detail": None,
        }
    ]
    assert texts(await find(served, cube, "refunds working days", hops=0)) == [REFUNDS]


async def test_top_k_bounds_the_answer_up_to_ten_thousand(served: Served, cube: str) -> None:
    await add(served, cube, *(f"Refund number {number}." for number in range(30)))
    assert len(await find(served, cube, "refund")) == 10
    assert len(await find(served, cube, "refund", top_k=1)) == 1
    assert len(await find(served, cube, "refund", top_k=10_000, hops=3)) == 30


@pytest.mark.parametrize(
    ("where", "found"),
    [
        ({"tags": "a"}, {REFUNDS}),
        ({"not": {"tags": "a"}}, {DESK, CARDS}),
        ({"or": [{"tags": "a"}, {"source": {"kind": "chunk"}}]}, {REFUNDS, DESK}),
        ({"metadata": {"n": {"gte": 2}}}, {CARDS}),
        ({"created_at": {"lt": "2020-01-01T00:00:00Z"}}, {DESK}),
        ({"tier": "activation"}, set()),
    ],
)
async def test_filters_hold_within_the_search(
    served: Served, cube: str, where: Any, found: set[str]
) -> None:
    await add(
        served,
        cube,
        {"text": REFUNDS, "tags": ["a"], "metadata": {"n": 1}},
        {"text": DESK, "source": {"kind": "chunk", "created_at": "2019-05-01T00:00:00Z"}},
        {"text": CARDS, "metadata": {"n": 2}},
    )
    hits = await find(served, cube, "refunds desk cards", filter=where, top_k=1000)
    assert set(texts(hits)) == found


BAD_QUERIES: list[tuple[dict[str, Any], str]] = [
    ({}, "query"),
    ({"query": ""}, "query"),
    ({"query": " \n\t"}, "query"),
    ({"query": None}, "query"),
    ({"query": 1}, "query"),
    ({"query": ["x"]}, "query"),
    ({"query": "a\x00b"}, "query"),
    ({"query": "\ud800"}, "query"),
    ({"query": "x", "top_k": 0}, "top_k"),
    ({"query": "x", "top_k": -1}, "top_k"),
    ({"query": "x", "top_k": 10_001}, "top_k"),
    ({"query": "x", "top_k": 10**30}, "top_k"),
    ({"query": "x", "top_k": "5"}, "top_k"),
    ({"query": "x", "top_k": True}, "top_k"),
    ({"query": "x", "top_k": 1.5}, "top_k"),
    ({"query": "x", "top_k": None}, "top_k"),
    ({"query": "x", "hops": -1}, "hops"),
    ({"query": "x", "hops": 4}, "hops"),
    ({"query": "x", "hops": "1"}, "hops"),
    ({"query": "x", "hops": True}, "hops"),
    ({"query": "x", "explain": "yes"}, "explain"),
    ({"query": "x", "explain": 1}, "explain"),
    ({"query": "x", "limit": 5}, "limit"),
    ({"query": "x", "filters": {}}, "filters"),
    ({"query": "x", "labels": ["hr"]}, "labels"),
]
BAD_FILTERS: list[tuple[Any, str]] = [
    ([], "filter"),
    ("tags", "filter"),
    ({}, "filter"),
    ({"colour": "red"}, "filter.colour"),
    ({"labels": "hr"}, "filter.labels"),
    ({"cube_id": "x"}, "filter.cube_id"),
    ({"\ud800": 1}, "filter.?"),
    ({"tags": 1}, "filter.tags"),
    ({"tags": []}, "filter.tags"),
    ({"tags": ["a", 1]}, "filter.tags[1]"),
    ({"tags": ["a"] * 65}, "filter.tags"),
    ({"tags": "a\x00b"}, "filter.tags"),
    ({"tags": "x" * 2049}, "filter.tags"),
    ({"tier": "hot"}, "filter.tier"),
    ({"source": {"name": "x"}}, "filter.source.name"),
    ({"source": {}}, "filter.source"),
    ({"created_at": "2025-01-01T00:00:00Z"}, "filter.created_at"),
    ({"created_at": {"gte": "yesterday"}}, "filter.created_at.gte"),
    ({"created_at": {"after": "2025-01-01T00:00:00Z"}}, "filter.created_at.after"),
    ({"metadata": {"n": {"gte": "1"}}}, "filter.metadata.n.gte"),
    ({"metadata": {"n": None}}, "filter.metadata.n"),
    ({"metadata": {"n": 10**30}}, "filter.metadata.n"),
    ({"and": {}}, "filter.and"),
    ({"or": []}, "filter.or"),
    ({"not": []}, "filter.not"),
    ({"not": {"not": {"not": {"not": {"not": {"not": {"not": {"not": {}}}}}}}}}, "filter.not"),
    ({"or": [{"tags": "x"}] * 65}, "filter.or[64].tags"),
]


@pytest.mark.parametrize(
    ("body", "param"),
    [*BAD_QUERIES, *(({"query": "x", "filter": bad}, param) for bad, param in BAD_FILTERS)],
    ids=range(len(BAD_QUERIES) + len(BAD_FILTERS)),
)
async def test_a_search_that_makes_no_sense_names_what_is_wrong(
    served: Served, cube: str, body: dict[str, Any], param: str
) -> None:
    async with unchanged(served, cube):
        error = error_of(await post(served, cube, body), 400)
    assert error["param"] is not None
    assert error["param"].startswith(param)


async def test_a_query_over_64_kib_is_too_large_and_one_of_64_kib_is_answered(
    served: Served, cube: str
) -> None:
    await add(served, cube, REFUNDS)
    error_of(await post(served, cube, {"query": "x" * 65_537}), 413)
    names = " ".join(f"Name{number} refunds" for number in range(10_000))[:65_536]
    assert texts(await find(served, cube, names)) == [REFUNDS]


async def test_a_cube_that_may_not_be_read_is_one_that_does_not_exist(
    served: Served, cube: str
) -> None:
    for cube_id, headers in (("nowhere", None), (cube, {"x-test-principal": "stranger"})):
        reply = await post(served, cube_id, {"query": "x"}, headers)
        assert error_of(reply, 404)["message"] == f"memcube '{cube_id}' does not exist"


async def test_what_is_archived_erased_or_expired_is_not_found(served: Served, cube: str) -> None:
    first, second, _ = await add(
        served,
        cube,
        "Refunds one.",
        "Refunds two.",
        {"text": "Refunds three.", "expires_at": "2020-01-01T00:00:00Z"},
    )
    url = f"/v1/memcubes/{cube}/memories"
    await served.client.post(f"{url}/{first['id']}/archive")
    await served.client.delete(f"{url}/{second['id']}", params={"erase": True})
    assert await find(served, cube, "refunds") == []
    await served.client.post(f"{url}/{first['id']}/restore")
    assert texts(await find(served, cube, "refunds")) == ["Refunds one."]


async def test_labelled_memories_leave_no_trace_in_the_answers_of_who_lacks_the_label(
    served: Served, cube: str
) -> None:
    (open_one,) = await add(served, cube, "Refunds of Ada Lovelace are paid in Leeds.")
    reader = grant(served, cube, Role.READER, "other")
    before = await find(
        served, cube, "Refunds Leeds Lovelace", headers=reader, explain=True, hops=3
    )
    secret, _ = await add(
        served,
        cube,
        {
            "text": "Ada Lovelace gets refunds in Leeds at once.",
            "labels": ["hr"],
            "edges": [{"kind": "next", "target": open_one["id"]}],
            "source": {"kind": "note", "author": "Lovelace"},
        },
        {"text": "Refunds in Leeds.", "labels": ["hr", "other"]},
    )
    edges = [{"kind": "see-also", "target": secret["id"]}]
    url = f"/v1/memcubes/{cube}/memories/{open_one['id']}"
    assert (await served.client.patch(url, json={"edges": edges})).status_code == 200
    assert len(await find(served, cube, "Refunds Leeds Lovelace")) == 3
    after = await find(served, cube, "Refunds Leeds Lovelace", headers=reader, explain=True, hops=3)
    (was,), (now,) = before, after
    assert now["scores"] == pytest.approx(was["scores"], abs=1e-4)
    assert now["via"] is None
    assert now["memory"]["edges"] == []
    allowed = grant(served, cube, Role.READER, "hr", "other")
    assert len(await find(served, cube, "Refunds Leeds Lovelace", headers=allowed)) == 3


async def test_a_label_given_or_taken_counts_at_once(served: Served, cube: str) -> None:
    (memory,) = await add(served, cube, REFUNDS)
    reader = grant(served, cube, Role.READER)
    url = f"/v1/memcubes/{cube}/memories/{memory['id']}"
    for labels, found in ([["hr"], []], [[], [REFUNDS]]):
        await served.client.patch(url, json={"labels": labels})
        assert texts(await find(served, cube, "refunds", headers=reader)) == found


async def test_an_edge_to_a_memory_of_another_cube_is_refused(served: Served, cube: str) -> None:
    other = await new_cube(served)
    (foreign,) = await add(served, other, DESK)
    (own,) = await add(served, cube, REFUNDS)
    edge = {"kind": "next", "target": foreign["id"]}
    async with unchanged(served, cube), unchanged(served, other):
        reply = await served.client.post(
            f"/v1/memcubes/{cube}/memories",
            json={"memories": [{"text": "x"}, {"text": "y", "edges": [edge]}]},
        )
        error_of(reply, 404)
        url = f"/v1/memcubes/{cube}/memories/{own['id']}"
        error_of(await served.client.patch(url, json={"edges": [edge]}), 404)
    assert texts(await find(served, cube, "refunds desk", hops=3)) == [REFUNDS]


async def test_searches_that_wait_leave_the_catalog_free(
    served: Served, cube: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, search = threading.Event(), served.plaintext.search

    def wait(*args: Any, **kwargs: Any) -> Any:
        assert go_on.wait(20)
        return search(*args, **kwargs)

    monkeypatch.setattr(served.plaintext, "search", wait)
    searches = [asyncio.create_task(find(served, cube, "x")) for _ in range(12)]
    try:
        await asyncio.sleep(0.05)
        reply = await asyncio.wait_for(served.client.get(f"/v1/memcubes/{cube}"), 10)
        assert reply.status_code == 200
        assert not any(task.done() for task in searches)
    finally:
        go_on.set()
    await asyncio.gather(*searches)


async def test_without_an_index_searches_are_503_and_memories_are_added_all_the_same(
    served: Served, cube: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Never started: it says what one says whose index is down.
    down = open_plaintext(ServerSettings(data_dir=tmp_path, embedder="none"), served.mos)
    monkeypatch.setattr(down, "search", functools.partial(down.search, catch_up_seconds=0.1))
    app = build_app(lambda: served.mos, FakeGateway, lambda: down)
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
        url = f"/v1/memcubes/{cube}"
        reply = await client.post(f"{url}/search", json={"query": "refunds"})
        assert "search is not available" in error_of(reply, 503)["message"]
        assert int(reply.headers["retry-after"]) >= 1
        # Who may not read learns nothing of the index either.
        error_of(await client.post("/v1/memcubes/nowhere/search", json={"query": "x"}), 404)
        added = await client.post(f"{url}/memories", json={"memories": [{"text": REFUNDS}]})
        assert added.status_code == 201
    assert texts(await find(served, cube, "refunds")) == [REFUNDS]


async def test_an_embedder_that_answers_another_dimension_is_a_409_that_says_what_to_do(
    served: Served, cube: str, tmp_path: Path
) -> None:
    with running_server() as server:
        settings = ServerSettings(data_dir=tmp_path, embedder=f"openai:tiny@{server.url}/v1")
        plaintext = open_plaintext(settings, served.mos)
        plaintext.start()
        try:
            app = build_app(lambda: served.mos, FakeGateway, lambda: plaintext)
            transport = httpx.ASGITransport(app=app)
            async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
                url = f"/v1/memcubes/{cube}"
                await client.post(f"{url}/memories", json={"memories": [{"text": REFUNDS}]})
                assert await asyncio.to_thread(plaintext.wait_until_indexed, cube, seconds=20)
                server.dimension += 1
                reply = await client.post(f"{url}/search", json={"query": "refunds"})
                assert "embed all memories" in error_of(reply, 409)["message"]
                # What is written meanwhile waits, and is found once the model is back.
                added = await client.post(f"{url}/memories", json={"memories": [{"text": "Hi."}]})
                assert added.status_code == 201
                server.dimension -= 1
                assert await asyncio.to_thread(plaintext.wait_until_indexed, cube, seconds=30)
                reply = await client.post(f"{url}/search", json={"query": "hi"})
                assert len(reply.json()["data"]) == 2
        finally:
            plaintext.close()
