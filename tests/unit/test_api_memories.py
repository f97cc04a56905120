"""Memories over HTTP."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from api_harness import Served, error_of, serve
from databases import Database

URL = "/v1/memcubes/acme/memories"


@pytest.fixture
async def served(tmp_path: Path, database: Database) -> AsyncIterator[Served]:
    async with serve(tmp_path, database) as opened:
        await opened.cube()
        yield opened


async def count(served: Served) -> int:
    page = (await served.client.get(URL, params={"limit": 1000})).json()
    return len(page["data"])


async def test_a_memory_has_exactly_the_fields_of_the_contract(served: Served) -> None:
    first = (await served.memories("anchor"))[0]
    sent: dict[str, Any] = {
        "text": "Refunds take five working days. 返金 \U0001f600",
        "tags": ["refunds"],
        "labels": [],
        "source": {
            "kind": "handbook",
            "uri": "https://x/y",
            "created_at": "2030-01-02T03:04:05+02:00",
        },
        "edges": [{"kind": "next", "target": first["id"], "weight": 0.5}],
        "metadata": {"n": 1, "deep": {"list": [1.5, None, True, "x"]}},
        "expires_at": "2090-01-01T00:00:00Z",
    }
    reply = await served.client.post(URL, json={"memories": [sent]})
    assert reply.status_code == 201
    assert set(reply.json()) == {"object", "data", "next_cursor"}
    memory = reply.json()["data"][0]
    assert set(memory) == {
        "id", "object", "cube_id", "text", "tags", "labels", "metadata", "source", "state",
        "tier", "version", "lineage", "edges", "created_by", "created_at", "updated_at",
        "expires_at", "usage",
    }  # fmt: skip
    assert memory["text"] == sent["text"]
    assert memory["metadata"] == sent["metadata"]
    assert memory["edges"] == sent["edges"]
    assert memory["source"]["created_at"] == "2030-01-02T01:04:05Z"
    assert memory["expires_at"] == "2090-01-01T00:00:00Z"
    assert memory["lineage"] == {"derived_from": [], "merged_into": None, "supersedes": []}
    assert memory["usage"] == {"hits": 0, "last_used_at": None}
    assert (memory["state"], memory["tier"], memory["version"]) == ("active", "plaintext", 1)
    assert (await served.client.get(f"{URL}/{memory['id']}")).json() == memory


BAD_MEMORIES: list[tuple[Any, str | None]] = [
    ({"text": ""}, "memories[1].text"),
    ({"text": " \n"}, "memories[1].text"),
    ({"text": 1}, "memories[1].text"),
    ({"text": None}, "memories[1].text"),
    ({}, "memories[1].text"),
    ({"txet": "x", "text": "x"}, "memories[1].txet"),
    ({"text": "x", "tags": "a"}, "memories[1].tags"),
    ({"text": "x", "tags": [1]}, "memories[1].tags[0]"),
    ({"text": "x", "metadata": []}, "memories[1].metadata"),
    ({"text": "x", "metadata": {"n": 10**30}}, "memories[1].metadata"),
    ({"text": "x", "expires_at": 5}, "memories[1].expires_at"),
    ({"text": "x", "expires_at": "tomorrow"}, "memories[1].expires_at"),
    ({"text": "x", "expires_at": "2030-01-01T00:00:00"}, "memories[1].expires_at"),
    ({"text": "x", "expires_at": "2030-02-31T00:00:00Z"}, "memories[1].expires_at"),
    ({"text": "x", "expires_at": "9999-12-31T23:59:59-12:00"}, "memories[1].expires_at"),
    ({"text": "x", "source": {"kind": "Bad Kind"}}, "memories[1].source.kind"),
    ({"text": "x", "source": {"knid": "x"}}, "memories[1].source.knid"),
    ({"text": "x", "edges": [{"kind": "next"}]}, "memories[1].edges[0].target"),
    (
        {"text": "x", "edges": [{"kind": "a", "target": "b", "weight": 2}]},
        "memories[1].edges[0].weight",
    ),
    ({"text": "x", "id": "mem_mine"}, "memories[1].id"),
    ("x", "memories[1]"),
    (None, "memories[1]"),
]


@pytest.mark.parametrize(("bad", "param"), BAD_MEMORIES)
async def test_one_bad_memory_is_named_and_none_is_added(
    served: Served, bad: Any, param: str | None
) -> None:
    reply = await served.client.post(URL, json={"memories": [{"text": "good"}, bad]})
    assert error_of(reply, 400)["param"] == param
    assert await count(served) == 0


@pytest.mark.parametrize(
    "body",
    [{}, {"memories": []}, {"memories": None}, {"memories": {}}, {"memories": "x"}, [], 1, "x"],
)
async def test_a_body_without_memories_is_refused(served: Served, body: Any) -> None:
    error_of(await served.client.post(URL, json=body), 400)


RAW_BODIES: list[bytes] = [
    b"",
    b"{",
    b"null",
    b'{"memories":[{"text":"a\\u0000b"}]}',
    b'{"memories":[{"text":"\\ud800"}]}',
    b'{"memories":[{"text":"x","metadata":{"\\udc00":1}}]}',
    b'{"memories":[{"text":"x","metadata":{"k":"\\u0000"}}]}',
    b'{"memories":[{"text":"x","tags":["\\udfff"]}]}',
    b'{"\\ud800":1}',
    b'{"memories":[{"text":"\xff"}]}',
    b'{"memories":[{"text":"\xed\xa0\x80"}]}',
    b'{"memories":[{"text":"raw\x00nul"}]}',
    b'{"memories":[{"text":"x","metadata":{"n":NaN}}]}',
    b'{"memories":[{"text":"x","metadata":{"n":-Infinity}}]}',
    b'{"memories":[{"text":"x","metadata":{"n":1e999}}]}',
    b'{"memories":[{"text":"x","metadata":{"n":' + b"9" * 5000 + b"}}]}",
    b'{"memories":[{"text":"x","metadata":{"n":' + b"9" * 100 + b"}}]}",
    b'{"memories":[{"text":"x","text":"y"}]}',
    b'{"memories":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"memories":[{"text":"x","metadata":{"a":' + b"[" * 40 + b"]" * 40 + b"}}]}",
    b'{"memories":[{"text":"x","metadata":{"a":' + b"[" * 20 + b"]" * 20 + b"}}]}",
    '{"memories":[{"text":"x"}]}'.encode("utf-16"),
    '{"memories":[{"text":"x"}]}'.encode("utf-8-sig"),
    b'{"memories":[{"text":"x"}]} trailing',
]


@pytest.mark.parametrize("body", RAW_BODIES, ids=range(len(RAW_BODIES)))
async def test_bytes_that_are_no_storable_json_are_a_400(served: Served, body: bytes) -> None:
    reply = await served.client.post(
        URL, content=body, headers={"content-type": "application/json"}
    )
    error_of(reply, 400)
    assert await count(served) == 0


@pytest.mark.parametrize(
    "content_type", [None, "text/plain", "multipart/form-data; boundary=x", "application/xml", "é"]
)
async def test_another_content_type_is_refused_with_what_to_send(
    served: Served, content_type: str | None
) -> None:
    headers = {} if content_type is None else {"content-type": content_type.encode()}
    reply = await served.client.post(URL, content=b'{"memories":[{"text":"x"}]}', headers=headers)
    assert "application/json" in error_of(reply, 400)["message"]


async def test_a_charset_is_no_other_content_type(served: Served) -> None:
    reply = await served.client.post(
        URL,
        content=b'{"memories":[{"text":"x"}]}',
        headers={"content-type": "Application/JSON ; charset=UTF-8"},
    )
    assert reply.status_code == 201


async def test_a_thousand_memories_fit_and_one_more_does_not(served: Served) -> None:
    over = await served.client.post(URL, json={"memories": [{"text": "x"}] * 1001})
    error_of(over, 413)
    assert await count(served) == 0
    full = await served.client.post(
        URL, json={"memories": [{"text": f"fact {n}"} for n in range(1000)]}
    )
    assert full.status_code == 201
    assert await count(served) == 1000


async def test_64_kib_of_utf_8_fit_and_one_byte_more_does_not(served: Served) -> None:
    text = "é" * 32768
    assert (await served.client.post(URL, json={"memories": [{"text": text}]})).status_code == 201
    over = await served.client.post(URL, json={"memories": [{"text": text + "x"}]})
    assert error_of(over, 413)["code"] == "too_large"


async def test_a_body_over_the_limit_is_refused_before_it_is_read(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            yield b"x" * 1024 * 1024

    reply = await served.client.post(
        URL, content=endless(), headers={"content-type": "application/json"}
    )
    assert "134217728" in error_of(reply, 413)["message"]
    assert taken <= 130
    declared = await served.client.post(
        URL,
        content=b"{}",
        headers={"content-type": "application/json", "content-length": "99999999999"},
    )
    error_of(declared, 413)


async def test_a_body_for_a_route_without_one_is_bounded_too(served: Served) -> None:
    memory = (await served.memories("x"))[0]

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 1024 * 1024

    reply = await served.client.post(f"{URL}/{memory['id']}/archive", content=endless())
    error_of(reply, 413)


async def test_filters_pick_by_state_tier_tag_and_words(served: Served) -> None:
    await served.client.post(
        URL,
        json={
            "memories": [
                {"text": "Refunds take 5% longer", "tags": ["refunds"]},
                {"text": "The desk is in Leeds"},
            ]
        },
    )
    ids = [memory["id"] for memory in (await served.client.get(URL)).json()["data"]]
    await served.client.delete(f"{URL}/{ids[1]}")

    async def found(**query: str) -> list[str]:
        reply = await served.client.get(URL, params=query)
        assert reply.status_code == 200, reply.text
        return [memory["id"] for memory in reply.json()["data"]]

    assert await found(state="archived") == [ids[1]]
    assert await found(state="active") == [ids[0]]
    assert await found(tag="refunds") == [ids[0]]
    assert await found(q="5%") == [ids[0]]
    assert await found(q="REFUNDS") == [ids[0]]
    assert await found(tier="activation") == []
    assert await found(tier="plaintext", state="active", tag="refunds", q="longer") == [ids[0]]


@pytest.mark.parametrize(
    "query",
    ["state=gone", "tier=hot", "stat=active", "tag=", "tag=%00", "q=%00", "limit=0", "limit=1001"],
)
async def test_a_bad_filter_is_refused(served: Served, query: str) -> None:
    error_of(await served.client.get(f"{URL}?{query}"), 400)


async def test_pages_cover_every_memory_once(served: Served) -> None:
    await served.memories(*(f"fact {number}" for number in range(25)))
    seen: list[str] = []
    query: dict[str, str | int] = {"limit": 10}
    while True:
        page = (await served.client.get(URL, params=query)).json()
        seen.extend(memory["text"] for memory in page["data"])
        if page["next_cursor"] is None:
            break
        query["cursor"] = page["next_cursor"]
    assert seen == [f"fact {number}" for number in range(25)]


async def test_a_cursor_of_another_list_is_refused(served: Served) -> None:
    await served.memories("a", "b")
    cursor = (await served.client.get(URL, params={"limit": 1})).json()["next_cursor"]
    error_of(await served.client.get("/v1/memcubes", params={"cursor": cursor}), 400)


async def test_a_patch_makes_a_version_and_history_tells_who_and_why(served: Served) -> None:
    memory = (await served.memories("Refunds take five days."))[0]
    url = f"{URL}/{memory['id']}"
    patched = await served.client.patch(
        url, json={"text": "Refunds take three days.", "reason": "new policy"}
    )
    assert patched.json()["version"] == 2
    assert patched.headers["etag"] == '"2"'
    history = (await served.client.get(f"{url}/history")).json()
    assert history["object"] == "list"
    assert history["next_cursor"] is None
    assert [version["text"] for version in history["data"]] == [
        "Refunds take five days.",
        "Refunds take three days.",
    ]
    last = history["data"][1]
    assert (last["change"], last["reason"], last["changed_by"]) == ("edited", "new policy", "local")


@pytest.mark.parametrize(
    "body",
    [
        {"text": None}, {"text": ""}, {"text": 5}, {"tags": None}, {"state": "archived"},
        {"tier": "activation"}, {"metadata": None}, {"source": None}, {"edges": [{}]}, [], None,
    ],
)  # fmt: skip
async def test_a_bad_patch_changes_nothing(served: Served, body: Any) -> None:
    memory = (await served.memories("fact"))[0]
    url = f"{URL}/{memory['id']}"
    error_of(await served.client.patch(url, json=body), 400)
    assert (await served.client.get(url)).json() == memory


async def test_an_expiry_can_be_set_and_removed(served: Served) -> None:
    memory = (await served.memories("fact"))[0]
    url = f"{URL}/{memory['id']}"
    set_to = await served.client.patch(url, json={"expires_at": "2090-01-01T00:00:00.5Z"})
    assert set_to.json()["expires_at"] == "2090-01-01T00:00:00.500000Z"
    assert (await served.client.patch(url, json={"tags": ["x"]})).json()["expires_at"] is not None
    assert (await served.client.patch(url, json={"expires_at": None})).json()["expires_at"] is None


async def test_a_stale_if_match_stops_every_change_of_a_memory(served: Served) -> None:
    memory = (await served.memories("fact"))[0]
    url = f"{URL}/{memory['id']}"
    await served.client.patch(url, json={"text": "newer"})
    stale = {"if-match": "1"}
    for reply in [
        await served.client.patch(url, json={"text": "x"}, headers=stale),
        await served.client.delete(url, headers=stale),
        await served.client.delete(url + "?erase=true", headers=stale),
        await served.client.post(url + "/archive", headers=stale),
    ]:
        error_of(reply, 412)
    current = (await served.client.get(url)).json()
    assert (current["text"], current["version"], current["state"]) == ("newer", 2, "active")


async def test_archive_and_restore_are_each_legal_once(served: Served) -> None:
    memory = (await served.memories("fact"))[0]
    url = f"{URL}/{memory['id']}"
    assert (await served.client.delete(url)).json()["state"] == "archived"
    error_of(await served.client.post(f"{url}/archive"), 409)
    error_of(await served.client.patch(url, json={"text": "x"}), 409)
    assert (await served.client.post(f"{url}/restore")).json()["state"] == "active"
    error_of(await served.client.post(f"{url}/restore"), 409)
    assert (await served.client.post(f"{url}/archive")).json()["state"] == "archived"


async def test_erasing_leaves_no_word_of_the_text_anywhere(
    served: Served, tmp_path: Path, database: Database
) -> None:
    secret = "zanzibarquartz"
    memory = (await served.memories(f"the code is {secret}"))[0]
    url = f"{URL}/{memory['id']}"
    await served.client.patch(url, json={"text": f"now it is {secret}2"})
    reply = await served.client.delete(f"{url}?erase=true")
    assert reply.status_code == 200
    erased = reply.json()
    assert (erased["id"], erased["deleted"], erased["erased"]) == (memory["id"], True, True)
    assert erased["versions_removed"] == 2
    job = (await served.client.get(f"/v1/jobs/{erased['job_id']}")).json()
    assert (job["kind"], job["state"], job["proofs"]) == ("erase", "queued", [])
    assert secret not in str(job)
    error_of(await served.client.delete(f"/v1/jobs/{job['id']}"), 409)
    error_of(await served.client.get(url), 404)
    error_of(await served.client.get(f"{url}/history"), 404)
    audit = (await served.client.get("/v1/memcubes/acme/audit")).text
    assert secret not in audit
    assert secret.encode() not in database.contents(database.create(tmp_path))


@pytest.mark.parametrize("query", ["erased=true", "erase=maybe", "erase=", "erase=true&x=1"])
async def test_a_misspelt_erase_does_not_archive(served: Served, query: str) -> None:
    memory = (await served.memories("fact"))[0]
    error_of(await served.client.delete(f"{URL}/{memory['id']}?{query}"), 400)
    assert (await served.client.get(f"{URL}/{memory['id']}")).json()["state"] == "active"


@pytest.mark.parametrize(
    "path",
    [
        "/v1/memcubes/acme/memories/mem_none",
        "/v1/memcubes/acme/memories/a%2Fb",
        "/v1/memcubes/acme/memories/%00",
        "/v1/memcubes/acme/memories/%ED%A0%80",
        "/v1/memcubes/acme/memories/" + "x" * 3000,
        "/v1/memcubes/a%2Fb/memories",
        "/v1/memcubes/a%00b/memories",
        "/v1/memcubes/%F0%9F%98%80",
        "/v1/memcubes/..%2f..%2fetc%2fpasswd",
        "/v1/memcubes/" + "x" * 3000,
        "/v1/memcubes/ACME",
        "/v1/jobs/none",
        "/v1/jobs/a%00",
        "/v1/jobs/none/events",
    ],
)
async def test_a_strange_path_is_a_400_or_404(served: Served, path: str) -> None:
    reply = await served.client.get(path)
    assert reply.status_code in (400, 404), reply.text


async def test_json_survives_the_round_trip_exactly(served: Served) -> None:
    metadata = {"float": 0.1, "big": 2**63, "neg": -1, "text": '\u2028\U0001f600\\u0041"\n'}
    added = await served.client.post(
        URL, json={"memories": [{"text": "  spaces\tand\nlines  ", "metadata": metadata}]}
    )
    memory = json.loads(added.content)["data"][0]
    read = (await served.client.get(f"{URL}/{memory['id']}")).json()
    assert read["metadata"] == metadata
    assert read["text"] == "  spaces\tand\nlines  "
