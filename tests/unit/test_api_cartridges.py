"""Whole cubes over HTTP: export, import, clone, move, diff."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_harness import Everyone, FakeCartridges, Served, build_app, error_of, serve

from memos_vllm.api.authentication import STATE
from memos_vllm.api.middleware import MemosGuard
from memos_vllm.cartridge.artifacts import CarriedArtifact
from memos_vllm.cartridge.layout import ArtifactFacts
from memos_vllm.cartridge.reader import verify

COMPARED = ("text", "tags", "labels", "metadata", "source", "state", "version", "created_at")


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serve(tmp_path) as opened:
        opened.gateway.cartridges = FakeCartridges(tmp_path)
        yield opened


async def listed(served: Served, cube_id: str) -> list[dict[str, Any]]:
    reply = await served.client.get(f"/v1/memcubes/{cube_id}/memories?limit=1000")
    assert reply.status_code == 200, reply.text
    data: list[dict[str, Any]] = reply.json()["data"]
    return data


async def exported(served: Served, cube_id: str = "acme", **query: str) -> bytes:
    reply = await served.client.get(f"/v1/memcubes/{cube_id}/export", params=query)
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"] == "application/zstd"
    return reply.content


async def imported(served: Served, archive: bytes, **query: str) -> dict[str, Any]:
    reply = await served.client.post("/v1/memcubes/import", content=archive, params=query)
    assert reply.status_code == 201, reply.text
    cube: dict[str, Any] = reply.json()
    return cube


async def filled(served: Served) -> list[dict[str, Any]]:
    """A cube with a bit of everything; its memories."""
    await served.cube()
    one, two = await served.memories("Refunds take five days.", "Returns are free.")
    add = {"text": "See refunds.", "edges": [{"kind": "cites", "target": one["id"]}]}
    path = "/v1/memcubes/acme"
    await served.client.post(f"{path}/memories", json={"memories": [{**add, "tags": ["x"]}]})
    merge = {"memory_ids": [one["id"], two["id"]], "text": "Refunds and returns."}
    assert (await served.client.post(f"{path}/merge", json=merge)).status_code == 201
    turns = {"messages": [{"role": "user", "content": "hello"}], "session_id": "s"}
    assert (await served.client.post(f"{path}/turns", json=turns)).status_code == 201
    form = {"file": ("handbook.md", b"# Title\n\nSome words about it.\n\n## More\n\nAnd more.")}
    assert (await served.client.post(f"{path}/documents", files=form)).status_code == 201
    return await listed(served, "acme")


async def test_a_cube_that_was_deleted_comes_back_as_it_was(served: Served) -> None:
    before = await filled(served)
    archive = await exported(served)
    history = await served.client.get(f"/v1/memcubes/acme/memories/{before[0]['id']}/history")
    assert (await served.client.delete("/v1/memcubes/acme")).status_code == 200
    cube = await imported(served, archive)
    assert (cube["id"], cube["origin"], cube["ids_mapped"]) == ("acme", "acme", 0)
    assert await listed(served, "acme") == before
    again = await served.client.get(f"/v1/memcubes/acme/memories/{before[0]['id']}/history")
    assert again.json()["data"] == history.json()["data"]
    turns = {"messages": [{"role": "assistant", "content": "hi"}], "session_id": "s"}
    added = (await served.client.post("/v1/memcubes/acme/turns", json=turns)).json()["data"]
    assert added[0]["source"]["locator"] == "turn 2"
    entry = (await served.client.get("/v1/memcubes/acme/audit?limit=1000")).json()["data"]
    assert "cube.import" in [row["action"] for row in entry]


async def test_under_another_id_everything_is_mapped_and_the_reply_says_so(served: Served) -> None:
    before = await filled(served)
    cube = await imported(served, await exported(served), id="acme-2")
    after = await listed(served, "acme-2")
    ids = cube["memory_ids"]
    assert (cube["id"], cube["origin"], cube["ids_mapped"]) == ("acme-2", "acme", len(before))
    assert set(ids) == {memory["id"] for memory in before}
    assert set(ids.values()) == {memory["id"] for memory in after}
    for old, new in zip(before, after, strict=True):
        assert new["id"] == ids[old["id"]]
        assert {name: new[name] for name in COMPARED} == {name: old[name] for name in COMPARED}
        assert [edge["target"] for edge in new["edges"]] == [
            ids[edge["target"]] for edge in old["edges"]
        ]
        assert new["lineage"]["derived_from"] == [ids[it] for it in old["lineage"]["derived_from"]]
    assert await listed(served, "acme") == before


async def test_an_id_that_is_taken_is_a_conflict_and_leaves_nothing(served: Served) -> None:
    await filled(served)
    archive = await exported(served)
    reply = await served.client.post("/v1/memcubes/import", content=archive)
    error_of(reply, 409)
    assert served.mos.sweep_imports() == 0
    reply = await served.client.post("/v1/memcubes/import?id=No!", content=archive)
    assert error_of(reply, 400)["param"] == "id"


async def test_what_is_no_archive_is_a_400_that_leaves_nothing(served: Served) -> None:
    await filled(served)
    archive = await exported(served)
    for body in (b"", b"hello", b"\x28\xb5\x2f\xfd", archive[:-1], archive + b"x", archive[:300]):
        reply = await served.client.post("/v1/memcubes/import?id=other", content=body)
        error_of(reply, 400)
    served.gateway.cartridges.max_import_bytes = 100
    reply = await served.client.post("/v1/memcubes/import?id=other", content=archive)
    error_of(reply, 413)
    cubes = (await served.client.get("/v1/memcubes")).json()["data"]
    assert [cube["id"] for cube in cubes] == ["acme"]


async def test_a_body_without_an_end_is_refused_at_the_limit(served: Served) -> None:
    served.gateway.cartridges.max_import_bytes = 4 << 20
    pulled = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal pulled
        while True:
            pulled += 1
            yield bytes(1 << 20)

    app = build_app(lambda: served.mos, lambda: served.gateway)
    setattr(app.state, STATE, Everyone())
    app.add_middleware(MemosGuard)
    guarded = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=guarded, base_url="http://t") as client:
        error_of(await client.post("/v1/memcubes/import", content=endless()), 413)
    assert pulled == 5


async def test_the_same_key_imports_once(served: Served) -> None:
    await filled(served)
    archive = await exported(served)
    headers = {"Idempotency-Key": "k1"}
    first, again = [
        await served.client.post("/v1/memcubes/import?id=b", content=archive, headers=headers)
        for _ in range(2)
    ]
    assert (first.status_code, again.status_code) == (201, 201)
    assert first.json() == again.json()
    other = await exported(served, "b")
    reply = await served.client.post("/v1/memcubes/import?id=b", content=other, headers=headers)
    error_of(reply, 409)


async def test_labels_that_the_caller_lacks_keep_memories_out_of_the_archive(
    served: Served,
) -> None:
    await served.cube()
    body = {"memories": [{"text": "open"}, {"text": "the secret", "labels": ["hr"]}]}
    await served.client.post("/v1/memcubes/acme/memories", json=body)
    as_other = {"x-test-principal": "eve"}
    reply = await served.client.get("/v1/memcubes/acme/export", headers=as_other)
    error_of(reply, 404)
    archive = await exported(served)
    await imported(served, archive, id="mine")
    assert [memory["text"] for memory in await listed(served, "mine")] == ["open", "the secret"]


async def test_artifacts_travel_and_a_caller_may_leave_them(served: Served) -> None:
    await filled(served)
    cartridges = served.gateway.cartridges
    facts = ArtifactFacts(fingerprint="f", numerics="n", renderer_version=1, tokens=3, size_bytes=7)

    def carried() -> list[CarriedArtifact]:
        shards = [(5, io.BytesIO(b"shard")), (3, io.BytesIO(b"two"))]
        return [
            CarriedArtifact(facts, b"{}", shards),
            CarriedArtifact(facts, b"[]", [(1, io.BytesIO(b"x"))]),
        ]

    cartridges.carried = carried()
    archive = await exported(served)
    assert verify(io.BytesIO(archive)).artifacts == (facts, facts)
    cube = await imported(served, archive, id="with")
    assert cube["warnings"] == ["2 artifacts were noted"]
    assert cartridges.adopted[-1][1] == [(b"{}", [b"shard", b"two"]), (b"[]", [b"x"])]
    cube = await imported(served, archive, id="without", trust_artifacts="false")
    assert cube["warnings"] == ["the archive's artifacts were left out, as asked"]
    assert cartridges.adopted[-1][1] == []
    cartridges.carried = carried()
    assert not verify(io.BytesIO(await exported(served, include="plaintext"))).artifacts
    reply = await served.client.get("/v1/memcubes/acme/export?include=everything")
    assert error_of(reply, 400)["param"] == "include"


async def test_a_clone_is_a_cube_of_its_own(served: Served) -> None:
    before = await filled(served)
    body = {"id": "copy", "name": "Copy"}
    reply = await served.client.post("/v1/memcubes/acme/clone", json=body)
    assert reply.status_code == 201, reply.text
    copy = reply.json()
    assert (copy["name"], copy["origin"], copy["ids_mapped"]) == ("Copy", "acme", len(before))
    await served.client.delete(f"/v1/memcubes/copy/memories/{copy['memory_ids'][before[2]['id']]}")
    assert await listed(served, "acme") == before
    error_of(await served.client.post("/v1/memcubes/acme/clone", json=body), 409)
    error_of(await served.client.post("/v1/memcubes/none/clone", json={"id": "x"}), 404)


async def test_a_diff_names_what_only_one_has_and_what_changed(served: Served) -> None:
    before = await filled(served)
    clone = await served.client.post("/v1/memcubes/acme/clone", json={"id": "copy"})
    ids = clone.json()["memory_ids"]
    assert (await served.client.get("/v1/memcubes/acme/diff?with=copy")).json()["data"] == []
    cited = next(memory for memory in before if memory["text"] == "See refunds.")
    patch = {"text": "See returns.", "tags": []}
    await served.client.patch(f"/v1/memcubes/copy/memories/{ids[cited['id']]}", json=patch)
    await served.memories("only in the copy", cube_id="copy")
    await served.memories("only in the first")
    found = []
    cursor: str | None = None
    while True:
        query = {"with": "copy", "limit": "1", **({"cursor": cursor} if cursor else {})}
        page = (await served.client.get("/v1/memcubes/acme/diff", params=query)).json()
        found += page["data"]
        if (cursor := page["next_cursor"]) is None:
            break
    assert [entry["kind"] for entry in found] == ["changed", "only_here", "only_there"]
    assert found[0]["fields"] == ["text", "tags"]
    assert found[0]["there"]["text"] == "See returns."
    assert found[1]["here"]["text"] == "only in the first"
    assert found[2]["there"]["text"] == "only in the copy"
    error_of(await served.client.get("/v1/memcubes/acme/diff?with=none"), 404)
    error_of(await served.client.get("/v1/memcubes/acme/diff?with=acme"), 400)
    error_of(await served.client.get("/v1/memcubes/acme/diff"), 400)
    error_of(await served.client.get("/v1/memcubes/acme/diff?with=copy&cursor=x"), 400)


async def test_a_cube_moves_to_an_owner_that_exists(served: Served) -> None:
    await served.cube()
    alice = {"x-test-principal": "alice"}
    made = await served.client.post("/v1/memcubes", json={"id": "hers"}, headers=alice)
    assert made.status_code == 201
    reply = await served.client.post("/v1/memcubes/acme/move", json={"owner": "alice"})
    assert (reply.status_code, reply.json()["owner"]) == (200, "alice")
    assert (await served.client.get("/v1/memcubes/acme", headers=alice)).status_code == 200
    error_of(await served.client.post("/v1/memcubes/acme/move", json={"owner": "bob"}), 404)
    reply = await served.client.post(
        "/v1/memcubes/acme/move", json={"owner": "alice"}, headers={"x-test-principal": "eve"}
    )
    error_of(reply, 404)
