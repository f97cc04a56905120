"""Cubes over HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from api_harness import Served, error_of, serve

from memos_vllm.domain.access import LOCAL_ADMIN
from memos_vllm.domain.artifact import ActivationState, ArtifactRecord
from memos_vllm.domain.ids import ArtifactId
from memos_vllm.domain.memory import Tier
from memos_vllm.errors import Unavailable


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serve(tmp_path) as opened:
        yield opened


async def test_a_cube_has_exactly_the_fields_of_the_contract_and_two_of_ours(
    served: Served,
) -> None:
    cube = await served.cube("acme-support")
    assert set(cube) == {
        "id", "object", "name", "description", "owner", "version", "created_at", "updated_at",
        "memories", "tiers", "activation", "adapter",
        # added to the contract: what create and patch take can be read back
        "preamble", "labels",
    }  # fmt: skip
    assert cube["object"] == "memcube"
    assert cube["memories"] == {"active": 0, "merged": 0, "archived": 0}
    assert cube["tiers"] == {"plaintext": 0, "activation": 0, "parametric": 0}
    assert cube["activation"] == {"state": "none", "tokens": 0, "bytes": 0, "resident_tokens": 0}
    assert cube["adapter"] is None
    assert cube["created_at"].endswith("Z")


async def test_an_empty_body_creates_a_cube_with_an_id_of_its_own(served: Served) -> None:
    for content in (b"", b"{}"):
        reply = await served.client.post(
            "/v1/memcubes", content=content, headers={"content-type": "application/json"}
        )
        assert reply.status_code == 201, reply.text
    bare = await served.client.post("/v1/memcubes")
    assert bare.status_code == 201
    assert (await served.client.get(f"/v1/memcubes/{bare.json()['id']}")).json() == bare.json()


async def test_a_taken_id_is_a_conflict(served: Served) -> None:
    await served.cube("acme")
    error = error_of(await served.client.post("/v1/memcubes", json={"id": "acme"}), 409)
    assert error["code"] == "conflict"


@pytest.mark.parametrize(
    "cube_id", ["", "A", "-a", "a" * 65, "a/b", "a b", "é", "a\n", ".a", "a%00", "a\x00"]
)
async def test_a_bad_id_is_refused_with_the_rule(served: Served, cube_id: str) -> None:
    error = error_of(await served.client.post("/v1/memcubes", json={"id": cube_id}), 400)
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"id": 1}, "id"),
        ({"name": True}, "name"),
        ({"naem": "x"}, "naem"),
        ({"labels": "x"}, "labels"),
        ({"labels": [1]}, "labels[0]"),
        ({"description": "x" * 70_000}, None),
        ({"name": "x\ny"}, "name"),
    ],
)
async def test_a_wrong_field_is_named(
    served: Served, body: dict[str, object], param: str | None
) -> None:
    reply = await served.client.post("/v1/memcubes", json=body)
    assert reply.status_code in (400, 413)
    assert error_of(reply, reply.status_code)["param"] == param


async def test_an_unknown_field_is_called_unknown(served: Served) -> None:
    reply = await served.client.post("/v1/memcubes", json={"naem": "x"})
    assert error_of(reply, 400)["message"] == "unknown field 'naem'"


async def test_a_patch_changes_only_what_it_names(served: Served) -> None:
    await served.client.post("/v1/memcubes", json={"id": "acme", "name": "A", "preamble": "P"})
    reply = await served.client.patch(
        "/v1/memcubes/acme", json={"description": "D", "labels": ["x"]}
    )
    cube = reply.json()
    assert (cube["name"], cube["preamble"], cube["description"]) == ("A", "P", "D")
    assert cube["labels"] == ["x"]
    assert reply.headers["etag"] == f'"{cube["version"]}"'


@pytest.mark.parametrize("body", [{"name": None}, {"id": "b"}, {"version": 3}, [], "x", None])
async def test_a_patch_of_what_cannot_change_is_refused(served: Served, body: object) -> None:
    before = await served.cube()
    error_of(await served.client.patch("/v1/memcubes/acme", json=body), 400)
    assert (await served.client.get("/v1/memcubes/acme")).json() == before


async def test_if_match_lets_a_current_version_through_and_stops_a_stale_one(
    served: Served,
) -> None:
    version = (await served.cube())["version"]
    url = "/v1/memcubes/acme"
    first = await served.client.patch(url, json={"name": "A"}, headers={"if-match": f'"{version}"'})
    assert first.status_code == 200
    stale = await served.client.patch(url, json={"name": "B"}, headers={"if-match": str(version)})
    assert error_of(stale, 412)["code"] == "stale_version"
    assert error_of(await served.client.delete(url, headers={"if-match": str(version)}), 412)
    assert (await served.client.get(url)).json()["name"] == "A"
    anything = await served.client.delete(url, headers={"if-match": "*"})
    assert anything.status_code == 200


@pytest.mark.parametrize("value", ["x", "1.5", "-1", "", "1, 2", "9" * 40, '"1'])
async def test_an_if_match_that_is_no_version_is_refused(served: Served, value: str) -> None:
    await served.cube()
    reply = await served.client.delete("/v1/memcubes/acme", headers={"if-match": value})
    if value == '"1':
        return
    assert error_of(reply, 400)["param"] == "If-Match"


async def test_pages_cover_every_cube_once(served: Served) -> None:
    names = [f"cube-{number:02}" for number in range(7)]
    for name in names:
        await served.cube(name)
    seen: list[str] = []
    query: dict[str, str | int] = {"limit": 3}
    for _ in range(10):
        page = (await served.client.get("/v1/memcubes", params=query)).json()
        assert page["object"] == "list"
        seen.extend(cube["id"] for cube in page["data"])
        if page["next_cursor"] is None:
            break
        query["cursor"] = page["next_cursor"]
    assert seen == names


@pytest.mark.parametrize(
    "query",
    [
        "limit=0", "limit=1001", "limit=-1", "limit=x", "limit=1.5", "limit=", "limt=5",
        "cursor=", "cursor=nonsense", "cursor=%00", "cursor=" + "x" * 2000, "cursor=%F0%28",
        "limit=" + "9" * 5000,
    ],
)  # fmt: skip
async def test_a_bad_page_is_refused(served: Served, query: str) -> None:
    error_of(await served.client.get(f"/v1/memcubes?{query}"), 400)


async def test_a_limit_of_1000_is_allowed(served: Served) -> None:
    assert (await served.client.get("/v1/memcubes?limit=1000")).status_code == 200


async def test_a_cube_of_somebody_else_does_not_exist(served: Served) -> None:
    await served.cube("acme")
    other = {"x-test-principal": "bob"}
    for method, path in [
        ("GET", ""), ("PATCH", ""), ("DELETE", ""), ("GET", "/stats"), ("GET", "/jobs"),
        ("GET", "/audit"), ("GET", "/memories"), ("POST", "/promote"), ("POST", "/memories"),
    ]:  # fmt: skip
        body: dict[str, object] | None = None
        if method == "PATCH":
            body = {"name": "x"}
        if path == "/promote":
            body = {"to": "activation", "memory_ids": "all"}
        if path == "/memories" and method == "POST":
            body = {"memories": [{"text": "x"}]}
        replies = []
        for cube_id in ("acme", "acmf"):
            reply = await served.client.request(
                method, f"/v1/memcubes/{cube_id}{path}", json=body, headers=other
            )
            replies.append(error_of(reply, 404)["message"].replace(cube_id, "ID"))
        assert replies[0] == replies[1]
    assert served.gateway.checked == []


async def test_deleting_a_cube_removes_its_files_and_it(served: Served) -> None:
    await served.cube()
    await served.memories("one", "two")
    reply = await served.client.delete("/v1/memcubes/acme")
    assert reply.json() == {
        "id": "acme", "object": "memcube", "deleted": True, "artifacts_removed": 0,
    }  # fmt: skip
    error_of(await served.client.get("/v1/memcubes/acme"), 404)
    error_of(await served.client.delete("/v1/memcubes/acme"), 404)


async def test_files_that_cannot_be_removed_are_not_called_removed(served: Served) -> None:
    await served.cube()
    served.gateway.discard_failure = Unavailable("store down", retry_after_seconds=7)
    reply = await served.client.delete("/v1/memcubes/acme")
    assert error_of(reply, 503)["message"] == "store down"
    assert reply.headers["retry-after"] == "7"


async def test_resident_tokens_are_the_engines_report_and_never_more_than_the_cube_has(
    served: Served,
) -> None:
    await served.cube()
    await served.memories("one")
    served.gateway.resident["acme"] = 384
    assert (await resident_tokens(served)) == 0
    served.mos.promote(LOCAL_ADMIN, "acme", to=Tier.ACTIVATION, memory_ids=None)
    (snapshot,) = served.mos.snapshots(LOCAL_ADMIN, ["acme"])
    served.mos.record_artifact(
        ArtifactRecord(
            id=ArtifactId("key"),
            cube_id=snapshot.id,
            kind="kv-prefix",
            head_key="head",
            scope="5c",
            tokens=400,
            bytes=1,
            memory_versions=tuple((memory.id, memory.version) for memory in snapshot.memories),
            state=ActivationState.READY,
            created_at=datetime.now(UTC),
            cube_version=snapshot.version,
        )
    )
    assert (await resident_tokens(served)) == 384
    stats = (await served.client.get("/v1/memcubes/acme/stats")).json()
    assert stats["resident_tokens"] == 384


async def resident_tokens(served: Served) -> int:
    cube = (await served.client.get("/v1/memcubes/acme")).json()
    return int(cube["activation"]["resident_tokens"])


async def test_stats_count_the_tiers(served: Served) -> None:
    await served.cube()
    await served.memories("one", "two")
    stats = (await served.client.get("/v1/memcubes/acme/stats")).json()
    assert stats["memories"]["active"] == 2
    assert stats["tiers"]["plaintext"]["memories"] == 2
    assert stats["tiers"]["plaintext"]["text_bytes"] == 6
    assert stats["hits"] == 0
