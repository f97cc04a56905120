"""Sharing a cube over HTTP, and reading the audit log."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_harness import Served, error_of, serve


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serve(tmp_path) as opened:
        await opened.client.post("/v1/memcubes", json={"id": "acme"}, headers=by("ann"))
        yield opened


def by(name: str) -> dict[str, str]:
    return {"x-test-principal": name}


async def put(served: Served, who: str, body: Any, *, as_: str = "ann") -> httpx.Response:
    return await served.client.put(f"/v1/memcubes/acme/grants/{who}", json=body, headers=by(as_))


async def test_a_cube_is_shared_shown_and_taken_back(served: Served) -> None:
    reply = await put(served, "bob", {"role": "reader", "labels": ["hr"]})
    assert reply.status_code == 200, reply.text
    grant = reply.json()
    assert {key: grant[key] for key in ("object", "cube_id", "principal", "role", "labels")} == {
        "object": "grant",
        "cube_id": "acme",
        "principal": "bob",
        "role": "reader",
        "labels": ["hr"],
    }
    assert grant["granted_by"] == "ann"
    listed = await served.client.get("/v1/memcubes/acme/grants", headers=by("bob"))
    assert listed.json()["data"] == [grant]
    shown = await served.client.get("/v1/memcubes/acme", headers=by("bob"))
    assert shown.status_code == 200
    taken = await served.client.delete("/v1/memcubes/acme/grants/bob", headers=by("ann"))
    assert taken.status_code == 200
    error_of(await served.client.get("/v1/memcubes/acme", headers=by("bob")), 404)
    error_of(await served.client.delete("/v1/memcubes/acme/grants/bob", headers=by("ann")), 404)
    error_of(await served.client.delete("/v1/memcubes/acme/grants/ann", headers=by("ann")), 409)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"role": "boss"},
        {"role": None},
        {"role": "reader", "labels": "hr"},
        {"role": "reader", "labels": ["a\nb"]},
        {"role": "reader", "admin": True},
        [],
    ],
)
async def test_what_is_no_grant_is_a_400(served: Served, body: Any) -> None:
    error_of(await put(served, "bob", body), 400)


@pytest.mark.parametrize("name", ["local", "system", "a%20b", "%00", "a" * 300, "%F0%9F%98%80"])
async def test_a_name_that_is_none_is_refused(served: Served, name: str) -> None:
    error_of(await put(served, name, {"role": "reader"}), 400)


async def test_a_revoked_editor_gets_no_stored_answer_either(served: Served) -> None:
    await put(served, "bob", {"role": "editor"})
    headers = {**by("bob"), "Idempotency-Key": "k1"}
    body = {"memories": [{"text": "secret words"}]}
    path = "/v1/memcubes/acme/memories"
    assert (await served.client.post(path, json=body, headers=headers)).status_code == 201
    await served.client.delete("/v1/memcubes/acme/grants/bob", headers=by("ann"))
    error_of(await served.client.post(path, json=body, headers=headers), 404)


async def test_the_log_is_filtered_by_who_what_and_when(served: Served) -> None:
    await put(served, "bob", {"role": "auditor"})
    path = "/v1/memcubes/acme/audit"

    async def actions(**query: str) -> list[str]:
        reply = await served.client.get(path, params=query, headers=by("bob"))
        assert reply.status_code == 200, reply.text
        return [entry["action"] for entry in reply.json()["data"]]

    assert await actions() == ["grant.put", "cube.create"]
    assert await actions(action="cube.create") == ["cube.create"]
    assert await actions(actor="bob") == []
    assert await actions(actor="ann", since="2020-01-01T00:00:00Z") == ["grant.put", "cube.create"]
    assert await actions(until="2020-01-01T00:00:00Z") == []
    error_of(await served.client.get(path, params={"since": "today"}, headers=by("bob")), 400)


async def test_only_an_administrator_reads_the_whole_log(served: Served) -> None:
    for path in ("/v1/audit", "/v1/audit/export", "/v1/audit/verify"):
        error_of(await served.client.get(path, headers=by("ann")), 404)
    await served.cube("other")
    entries = (await served.client.get("/v1/audit")).json()["data"]
    assert [entry["cube_id"] for entry in entries] == ["other", "acme"]


async def test_the_log_is_exported_as_lines_the_whole_one_with_its_end(served: Served) -> None:
    await served.cube("other")
    reply = await served.client.get("/v1/audit/export")
    assert reply.headers["content-type"].startswith("application/x-ndjson")
    *rows, head = [json.loads(line) for line in reply.text.splitlines()]
    assert [row["cube_id"] for row in rows] == ["acme", "other"]
    assert head == {"object": "audit.head", "seq": 2, "hash": rows[-1]["hash"]}
    of_cube = await served.client.get("/v1/memcubes/acme/audit/export", headers=by("ann"))
    assert [json.loads(line)["seq"] for line in of_cube.text.splitlines()] == [1]
    for path in ("/v1/memcubes/other/audit/export", "/v1/memcubes/none/audit/export"):
        error_of(await served.client.get(path, headers=by("ann")), 404)
