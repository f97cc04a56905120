"""Input that means harm or nothing at all: a clear 4xx in our own shape, on every kind of route."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import pytest
from api_harness import error_of, open_app
from fastapi.testclient import TestClient

CUBE = "/v1/memcubes/acme"
MEMORIES = f"{CUBE}/memories"
SEARCH = f"{CUBE}/search"
DOCUMENTS = f"{CUBE}/documents"
JSON = {"Content-Type": "application/json"}
TEN_MB = "a" * 10_000_000


def one(text: str = '"hello"', more: str = "") -> str:
    """A body of one memory, as JSON."""
    return f'{{"memories": [{{"text": {text}{more}}}]}}'


def with_(path: str, name: str, value: str) -> str:
    """The path with one more parameter."""
    return str(httpx.URL(path).copy_add_param(name, value))


def asking(more: str) -> str:
    """A body of a search."""
    return f'{{"query": "hello", {more}}}'


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """Of an app with two cubes."""
    folder = tmp_path_factory.mktemp("hostile")
    with open_app(folder, search=True) as (app, *_), TestClient(app) as opened:
        for cube, texts in (("acme", ("hello", "there", "again")), ("other", ("elsewhere", "too"))):
            assert opened.post("/v1/memcubes", json={"id": cube}).status_code == 201
            memories = [{"text": text} for text in texts]
            added = opened.post(f"/v1/memcubes/{cube}/memories", json={"memories": memories})
            assert added.status_code == 201
        yield opened


BODIES = {
    "NUL in a text": (MEMORIES, one('"a\\u0000b"'), 400, "memories[0].text holds a NUL"),
    "NUL as it is": (MEMORIES, one('"a\x00b"'), 400, "control character"),
    "half a surrogate pair": (MEMORIES, one('"\\ud800"'), 400, "surrogate"),
    "half a pair as bytes": (MEMORIES, one().encode() + b"\xed\xa0\x80", 400, "not UTF-8"),
    "no UTF-8": (MEMORIES, b'{"memories": "\xff"}', 400, "not UTF-8: byte 14"),
    "UTF-16": (MEMORIES, one().encode("utf-16"), 400, "not UTF-8"),
    "a byte order mark": (MEMORIES, b"\xef\xbb\xbf" + one().encode(), 400, "BOM"),
    "a member named twice": (MEMORIES, one(more=', "text": "b"'), 400, "same member twice"),
    "NaN": (MEMORIES, one(more=', "metadata": {"x": NaN}'), 400, "NaN is not JSON"),
    "infinity": (MEMORIES, one(more=', "metadata": {"x": 1e999}'), 400, "JSON does not know"),
    "a number of 5,000 digits": (SEARCH, asking(f'"top_k": {"9" * 5000}'), 400, "4,300 digits"),
    "a number beyond 64 bits": (SEARCH, asking(f'"top_k": {2**70}'), 400, "must lie in 1..10000"),
    "such a number as metadata": (
        MEMORIES, one(more=f', "metadata": {{"x": {2**70}}}'), 400, "more than 64 bits",
    ),
    "half a hit": (SEARCH, asking('"top_k": 1.5'), 400, "top_k"),
    "hops back": (SEARCH, asking('"hops": -1'), 400, "hops is -1"),
    "100,000 levels": (MEMORIES, "[" * 100_000 + "]" * 100_000, 400, "nested too deeply"),
    "900 levels of metadata": (
        MEMORIES, one(more=', "metadata": ' + '{"a":' * 900 + "1" + "}" * 900), 400, "16 levels",
    ),
    "900 levels of a filter": (
        SEARCH, asking('"filter": ' + '{"not":' * 900 + "{}" + "}" * 900), 400, "8 levels",
    ),
    "infinity in a filter": (
        SEARCH, asking('"filter": {"metadata": {"x": {"gte": 1e999}}}'), 400, "filter.metadata",
    ),
    "NUL in a filter": (SEARCH, asking('"filter": {"metadata": {"a\\u0000": 1}}'), 400, "NUL"),
    "10 MB of text": (MEMORIES, one(f'"{TEN_MB}"'), 413, "10000000 bytes"),
    "10 MB of a query": (SEARCH, f'{{"query": "{TEN_MB}"}}', 413, "10000000 bytes"),
    "10 MB of nothing": (MEMORIES, TEN_MB, 400, "not valid JSON"),
    "100,000 memories to merge": (
        f"{CUBE}/merge", json.dumps({"memory_ids": ["m"] * 100_000}), 400, "2 to 256",
    ),
    "100,000 memories to promote": (
        f"{CUBE}/promote",
        json.dumps({"to": "activation", "memory_ids": [str(n) for n in range(100_000)]}),
        413,
        "limit is 1000",
    ),
    "a wait of NaN": (
        f"{CUBE}/promote", '{"to": "activation", "all": true, "wait": NaN}', 400, "NaN",
    ),
    "a wait before now": (
        f"{CUBE}/promote", '{"to": "activation", "all": true, "wait": -0.5}', 400, "wait",
    ),
    "a leap second": (
        MEMORIES, one(more=', "expires_at": "2026-01-01T23:59:60Z"'), 400, "expires_at",
    ),
    "a day beyond the calendar": (
        MEMORIES, one(more=', "expires_at": "9999-12-31T23:59:59-14:00"'), 400, "calendar",
    ),
    "null": (MEMORIES, "null", 400, "required"),
    "a list": (MEMORIES, "[]", 400, "body"),
    "no body": (MEMORIES, "", 400, "body"),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_a_hostile_body_is_refused_with_the_reason(client: TestClient, name: str) -> None:
    path, body, status, words = BODIES[name]
    content = body if isinstance(body, bytes) else body.encode()

    reply = client.post(path, content=content, headers=JSON)

    assert words in error_of(reply, status)["message"]
    assert len(reply.content) < 1000, "what was sent is not repeated"


QUERIES = {
    "a limit below one": (MEMORIES, "limit=-1", "limit"),
    "half a limit": (MEMORIES, "limit=1.5", "limit"),
    "a limit of NaN": (MEMORIES, "limit=nan", "limit"),
    "a limit of 5,000 digits": (MEMORIES, f"limit={'9' * 5000}", "limit"),
    "a limit sent twice": (MEMORIES, "limit=1&limit=2", "limit was sent twice"),
    "NUL in a tag": (MEMORIES, "tag=a%00", "tag: it holds a NUL"),
    "a tag that is not UTF-8": (MEMORIES, "tag=%FF", "not UTF-8"),
    "half a surrogate pair": (MEMORIES, "q=%ED%A0%80", "not UTF-8"),
    "NUL as a cursor": (MEMORIES, "cursor=%00", "cursor"),
    "a time before the calendar": ("/v1/audit", "until=0001-01-01T00:00:00%2B23:59", "until lies"),
    "a time after it": ("/v1/audit", "since=9999-12-31T23:59:59-23:59", "since lies"),
    "a time of a cube's log": (f"{CUBE}/audit", "since=9999-12-31T23:59:59-23:59", "since lies"),
    "a day": ("/v1/audit", "since=2026-01-01", "RFC 3339"),
    "an unknown parameter": (MEMORIES, "limits=1", "unknown field 'limits'"),
    "the same cube": (f"{CUBE}/diff", "with=acme", "same cube"),
}


@pytest.mark.parametrize("name", QUERIES)
def test_a_hostile_query_is_refused_with_the_reason(client: TestClient, name: str) -> None:
    path, query, words = QUERIES[name]
    assert words in error_of(client.get(f"{path}?{query}"), 400)["message"]


@pytest.mark.parametrize("wait", ["nan", "inf", "-1", "1e999", "601"])
def test_nobody_waits_for_ever(client: TestClient, wait: str) -> None:
    error_of(client.post(f"{CUBE}/reindex?wait={wait}"), 400)


# What lists of a cube have pages of; the diff's other cube is named in its query.
LISTS = {
    "memories": MEMORIES,
    "memories of the other cube": "/v1/memcubes/other/memories",
    "audit log": "/v1/audit",
    "audit log of the cube": f"{CUBE}/audit",
    "cubes": "/v1/memcubes",
    "differences": f"{CUBE}/diff?with=other",
}


def test_a_cursor_leads_on_in_its_own_list_only(client: TestClient) -> None:
    cursors = {}
    for name, path in LISTS.items():
        page = client.get(with_(path, "limit", "1")).json()
        cursors[name] = page["next_cursor"]
    assert all(cursors.values()), cursors

    for of, cursor in cursors.items():
        for name, path in LISTS.items():
            reply = client.get(with_(path, "cursor", cursor))
            if name == of:
                assert reply.status_code == 200, reply.text
            else:
                assert error_of(reply, 400)["param"] == "cursor", f"{of} in {name}"


@pytest.mark.parametrize("damage", [slice(1, None), slice(None, -1), slice(None, 8)])
def test_a_cursor_that_was_cut_leads_nowhere(client: TestClient, damage: slice) -> None:
    for path in (MEMORIES, f"{CUBE}/audit", f"{CUBE}/diff?with=other"):
        page = client.get(with_(path, "limit", "1")).json()
        reply = client.get(with_(path, "cursor", page["next_cursor"][damage]))
        error_of(reply, 400)


@pytest.mark.parametrize(
    "version", ["abc", "-1", "1.5", "99999999999999999999", '"1","2"', "", "1;2", "NaN"]
)
def test_a_version_that_is_none_is_refused(client: TestClient, version: str) -> None:
    for method, path in (("PATCH", CUBE), ("DELETE", CUBE)):
        body = {"json": {"name": "n"}} if method == "PATCH" else {}
        reply = client.request(method, path, headers={"If-Match": version}, **body)
        assert error_of(reply, 400)["param"] == "If-Match"


@pytest.mark.parametrize(
    "content_type",
    ["text/plain", "application/xml", "multipart/form-data; boundary=x", "", "text/json"],
)
def test_json_that_says_it_is_something_else_is_refused(
    client: TestClient, content_type: str
) -> None:
    headers = {"Content-Type": content_type}
    reply = client.post(MEMORIES, content=one().encode(), headers=headers)
    assert "application/json" in error_of(reply, 400)["message"]


def test_forms_and_json_are_not_taken_for_each_other(client: TestClient) -> None:
    error_of(client.post(MEMORIES, files={"file": ("a.txt", b"abc")}), 400)
    error_of(client.post(DOCUMENTS, json={"file": "abc"}), 400)
    error_of(client.post("/v1/memcubes/import", json={"id": "x"}), 400)
    bare = {"Content-Type": "multipart/form-data"}
    error_of(client.post(DOCUMENTS, content=b"abc", headers=bare), 400)


FIELDS = {
    "NUL": ("uri", "\x00"),
    "NaN": ("metadata", '{"a": NaN}'),
    "10,000 levels": ("metadata", '{"a":' * 10_000 + "1" + "}" * 10_000),
    "a list": ("metadata", "[]"),
    "a word": ("labels", "[1]"),
}


@pytest.mark.parametrize("name", FIELDS)
def test_a_hostile_field_of_a_form_is_refused_by_name(client: TestClient, name: str) -> None:
    field, value = FIELDS[name]
    files = {"file": ("a.txt", b"hello")}
    reply = client.post(DOCUMENTS, files=files, data={field: value})
    assert error_of(reply, 400)["param"] == field


IDS = ["%00", "a%00b", "%ED%A0%80", "%FF", "a" * 5000, "%F0%9F%98%80", "%0a", "a%20b", "..%2e"]


@pytest.mark.parametrize("hostile", IDS, ids=lambda value: value[:12])
def test_a_hostile_id_names_nothing(client: TestClient, hostile: str) -> None:
    for method, path in (
        ("GET", f"/v1/memcubes/{hostile}"),
        ("DELETE", f"/v1/memcubes/{hostile}"),
        ("GET", f"/v1/memcubes/{hostile}/audit"),
        ("GET", f"/v1/memcubes/{hostile}/export"),
        ("GET", f"{MEMORIES}/{hostile}"),
        ("GET", f"{MEMORIES}/{hostile}/history"),
        ("GET", f"/v1/jobs/{hostile}"),
        ("GET", f"/v1/jobs/{hostile}/events"),
        ("DELETE", f"{CUBE}/grants/{hostile}"),
        ("DELETE", f"/v1/keys/{hostile}"),
    ):
        reply = client.request(method, path)
        assert reply.status_code in {400, 404}, f"{method} {path}: {reply.text}"
        error_of(reply, reply.status_code)


def test_nothing_of_it_all_has_changed_anything(client: TestClient) -> None:
    assert client.get(CUBE).json()["version"] == 2
    assert client.get("/v1/audit/verify").json()["ok"]
