"""Search, documents, turns and reindex through both clients: what goes out and what comes back."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import client_fakes as fakes
import httpx
import pytest
from client_fakes import Script, reply
from starlette.datastructures import UploadFile
from starlette.requests import Request

from memos_vllm.client import ApiUnavailable, JobFailed, UnexpectedReply
from memos_vllm.client.documents import MAX_DOCUMENT_BYTES
from memos_vllm.errors import InvalidRequest, TooLarge

Connect = Callable[..., Any]


@pytest.fixture(params=["blocking", "awaited"])
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    if request.param == "blocking":
        yield fakes.client
        return
    loop = asyncio.new_event_loop()
    yield lambda script, **options: fakes.waited_client(script, loop, **options)
    loop.close()


def form_of(request: httpx.Request) -> tuple[dict[str, str], str, bytes]:
    """The fields, the file's name and its bytes, as the server's own parser reads them."""

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": request.content, "more_body": False}

    async def parse() -> tuple[dict[str, str], str, bytes]:
        headers = [(name.lower(), value) for name, value in request.headers.raw]
        scope = {"type": "http", "method": "POST", "headers": headers}
        async with Request(scope, receive).form() as form:
            file = form["file"]
            assert isinstance(file, UploadFile)
            assert file.filename is not None
            texts = {name: value for name, value in form.items() if isinstance(value, str)}
            return texts, file.filename, await file.read()

    return asyncio.run(parse())


def test_a_search_is_iterated_over_hit_by_hit_best_first(connect: Connect) -> None:
    body = fakes.list_json(fakes.hit_json("mem_2"), fakes.hit_json("mem_1", score=0.4))
    script = Script(reply(200, body))
    found = connect(script).cube("acme").search("how long do refunds take?", top_k=3)
    assert [hit.memory.id for hit in found] == ["mem_2", "mem_1"]
    assert (len(found), found[0].score, found[1].score) == (2, 0.81, 0.4)
    assert found.hits[0].scores == {"dense": 0.74, "sparse": 0.9, "graph": 0.0}
    assert found[0].via == ()
    assert found.pending is None
    assert script.paths == ["POST /v1/memcubes/acme/search"]
    assert script.body() == {"query": "how long do refunds take?", "top_k": 3, "hops": 1}


def test_a_search_sends_its_filter_and_reads_paths_and_what_is_not_indexed(
    connect: Connect,
) -> None:
    body = {
        **fakes.list_json(fakes.hit_json(via=[fakes.HOP_JSON])),
        "pending": {"changes": 4, "memories": 1},
    }
    script = Script(reply(200, body))
    only = {"tags": ["refunds"], "not": {"tier": "activation"}}
    found = connect(script).cube("acme").search("refunds", filter=only, hops=2, explain=True)
    assert script.body() == {
        "query": "refunds",
        "top_k": 10,
        "hops": 2,
        "filter": only,
        "explain": True,
    }
    (hop,) = found[0].via
    assert (hop.origin, hop.kind, hop.forward, hop.detail) == ("mem_1", "mentions", False, "acme")
    assert (found.pending.changes, found.pending.memories) == (4, 1)


def test_a_search_that_finds_nothing_is_empty_and_false(connect: Connect) -> None:
    found = connect(Script(reply(200, fakes.list_json()))).cube("acme").search("nothing")
    assert not found
    assert list(found) == []


@pytest.mark.parametrize(
    "body",
    [
        {"object": "list"},
        fakes.list_json({"memory": None, "score": 1}),
        fakes.list_json(fakes.hit_json(scores={"dense": "high"})),
        fakes.list_json(fakes.hit_json(via=[{"origin": "mem_1"}])),
    ],
)
def test_a_search_answer_of_another_shape_is_refused(connect: Connect, body: object) -> None:
    with pytest.raises(UnexpectedReply):
        connect(Script(reply(200, body))).cube("acme").search("x")


def test_a_search_whose_index_stays_down_raises_after_its_attempts(connect: Connect) -> None:
    down = reply(503, fakes.error_json("the search index is down"), Retry_After="0")
    script = Script(down, down, down)
    with pytest.raises(ApiUnavailable, match="the search index is down"):
        connect(script).cube("acme").search("x")
    assert len(script.requests) == 3


def test_a_document_is_sent_by_its_path_and_read_into_a_typed_object(
    connect: Connect, tmp_path: Path
) -> None:
    path = tmp_path / "händbook.md"
    path.write_bytes(b"# Refunds\n\nFive days.\xff")
    body = fakes.document_json(chunks=2, outcome="updated", changed=1, notes=["no page 3"])
    script = Script(reply(201, body))
    document = connect(script).cube("acme").add_document(path)
    assert (document.id, document.outcome, document.title) == ("mem_doc", "updated", "Handbook")
    assert (document.chunks, document.changed, document.archived) == (2, 1, 0)
    assert document.notes == ("no page 3",)
    assert [memory.id for memory in document.memories] == ["mem_1", "mem_2"]
    assert document.raw["media_type"] == document.media_type
    assert script.paths == ["POST /v1/memcubes/acme/documents"]
    assert form_of(script.requests[0]) == ({}, "händbook.md", path.read_bytes())


def test_what_is_said_of_a_document_travels_beside_it(connect: Connect) -> None:
    script = Script(reply(201, fakes.document_json()))
    connect(script).cube("acme").add_document(
        b"text",
        filename="a.txt",
        uri="docs/a.txt",
        title="Über",
        tags=["[draft]", "b,c"],
        labels=("private",),
        metadata={"year": 2026},
        reason="first",
    )
    fields, filename, content = form_of(script.requests[0])
    assert (filename, content) == ("a.txt", b"text")
    assert json.loads(fields.pop("tags")) == ["[draft]", "b,c"]
    assert json.loads(fields.pop("labels")) == ["private"]
    assert json.loads(fields.pop("metadata")) == {"year": 2026}
    assert fields == {"uri": "docs/a.txt", "title": "Über", "reason": "first"}


def test_an_open_file_gives_its_own_name_unless_another_is_given(
    connect: Connect, tmp_path: Path
) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"text")
    script = Script(*[reply(201, fakes.document_json()) for _ in range(3)])
    cube = connect(script).cube("acme")
    with path.open("rb") as file:
        cube.add_document(file)
        file.seek(0)
        cube.add_document(file, filename="b.md")
    cube.add_document(io.BytesIO(b"bytes"), filename="c.txt")
    sent = [form_of(request)[1:] for request in script.requests]
    assert sent == [("a.txt", b"text"), ("b.md", b"text"), ("c.txt", b"bytes")]


def test_a_document_that_cannot_be_sent_is_refused_before_it_is(
    connect: Connect, tmp_path: Path
) -> None:
    cube = connect(Script()).cube("acme")
    with pytest.raises(InvalidRequest, match="needs a filename"):
        cube.add_document(b"text")
    with pytest.raises(InvalidRequest, match="'rb'"):
        cube.add_document(io.StringIO("text"), filename="a.txt")
    with pytest.raises(InvalidRequest, match="not int"):
        cube.add_document(7, filename="a.txt")
    with pytest.raises(InvalidRequest, match="uri holds half of a surrogate"):
        cube.add_document(b"text", filename="a.txt", uri="caf\udce9")
    with pytest.raises(InvalidRequest, match="metadata cannot be written"):
        cube.add_document(b"text", filename="a.txt", metadata={"n": float("nan")})
    with pytest.raises(FileNotFoundError):
        cube.add_document(tmp_path / "missing.pdf")


def test_only_more_than_32_mib_are_too_large(connect: Connect, tmp_path: Path) -> None:
    script = Script(reply(201, fakes.document_json()))
    cube = connect(script).cube("acme")
    path = tmp_path / "large.txt"
    path.write_bytes(b"x" * MAX_DOCUMENT_BYTES)
    cube.add_document(path)
    with path.open("ab") as file:
        file.write(b"x")
    with pytest.raises(TooLarge, match=r"large\.txt has more than 33,554,432 bytes"):
        cube.add_document(path)
    assert len(script.requests) == 1


def test_a_document_is_sent_again_whole_and_under_the_same_key(connect: Connect) -> None:
    script = Script(httpx.ReadError("reset"), reply(201, fakes.document_json()))
    connect(script).cube("acme").add_document(b"text", filename="a.txt", tags=["t"])
    first, second = script.requests
    assert first.headers["Idempotency-Key"] == second.headers["Idempotency-Key"]
    # The server compares the bytes, the form's boundary included.
    assert first.content == second.content
    assert form_of(second) == ({"tags": '["t"]'}, "a.txt", b"text")


def test_a_document_may_take_as_long_as_a_chat(connect: Connect) -> None:
    script = Script(reply(201, fakes.document_json()))
    connect(script, timeout=3, chat_timeout=300).cube("acme").add_document(b"x", filename="a.md")
    assert script.requests[0].extensions["timeout"]["read"] == 300


def test_turns_are_sent_with_their_times_and_without_what_is_none(connect: Connect) -> None:
    body = fakes.list_json(fakes.memory_json("mem_1"), fakes.memory_json("mem_2"))
    script = Script(reply(201, body))
    added = (
        connect(script)
        .cube("acme")
        .add_turns(
            [
                {
                    "role": "user",
                    "name": "Ada",
                    "content": "My parcel is late.",
                    "created_at": datetime(2026, 1, 2, 3, tzinfo=UTC),
                    "metadata": {"channel": "phone"},
                },
                {
                    "role": "assistant",
                    "content": "Sorry.",
                    "refusal": None,
                    "created_at": "2026-01-02T03:00:05Z",
                },
            ],
            session_id="call-17",
            reason="import",
        )
    )
    assert [memory.id for memory in added] == ["mem_1", "mem_2"]
    assert script.paths == ["POST /v1/memcubes/acme/turns"]
    assert script.body() == {
        "messages": [
            {
                "role": "user",
                "name": "Ada",
                "content": "My parcel is late.",
                "created_at": "2026-01-02T03:00:00Z",
                "metadata": {"channel": "phone"},
            },
            {"role": "assistant", "content": "Sorry.", "created_at": "2026-01-02T03:00:05Z"},
        ],
        "session_id": "call-17",
        "reason": "import",
    }


def test_turns_that_are_no_messages_are_refused_by_their_place(connect: Connect) -> None:
    cube = connect(Script()).cube("acme")
    with pytest.raises(InvalidRequest, match="list of messages"):
        cube.add_turns({"role": "user", "content": "Hi"})
    with pytest.raises(InvalidRequest, match=r"messages\[1\] is an object"):
        cube.add_turns([{"role": "user", "content": "Hi"}, "Hello"])
    with pytest.raises(InvalidRequest, match=r"messages\[0\]\.created_at has no time zone"):
        cube.add_turns([{"role": "user", "content": "Hi", "created_at": datetime(2026, 1, 1)}])


def test_reindex_is_queued_or_waited_for(connect: Connect) -> None:
    queued = fakes.job_json("queued", kind="reindex")
    script = Script(reply(202, queued), reply(202, queued), reply(200, fakes.job_json("succeeded")))
    cube = connect(script).cube("acme")
    assert cube.reindex().state == "queued"
    assert cube.reindex(wait=True).state == "succeeded"
    assert script.paths == [*["POST /v1/memcubes/acme/reindex"] * 2, "GET /v1/jobs/job_1"]
    failed = fakes.job_json("failed", kind="reindex", error="the index is down")
    with pytest.raises(JobFailed, match="the index is down"):
        connect(Script(reply(202, failed))).cube("acme").reindex(wait=True)
