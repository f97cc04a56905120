"""Documents over HTTP: chunks with provenance, and a clear refusal of everything else."""

from __future__ import annotations

import asyncio
import io
import json
import threading
import zipfile
from collections.abc import AsyncIterator
from time import monotonic
from typing import Any

import pytest
import pytest_asyncio
from api_harness import Served, error_of, serve
from api_plaintext_kit import Part, form, grant, new_cube, post_form, unchanged, upload
from databases import Database
from ingest_samples import docx, pdf, pdf_with, word_paragraph

from memos_vllm.api import documents
from memos_vllm.api.threads import Threads
from memos_vllm.domain.access import Role
from memos_vllm.errors import Unavailable

pytestmark = pytest.mark.asyncio(loop_scope="module")

HANDBOOK = """# Returns

Refunds take five working days after the parcel has arrived.

## Desk

The returns desk is in Leeds and opens at nine.
"""
FIVE, DESK = "Refunds take five working days", "The returns desk is in Leeds"
GOOD_PDF = pdf([["Refunds take five working days."], ["The desk is in Leeds."]])
MIB = 1 << 20


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(
    tmp_path_factory: pytest.TempPathFactory, database: Database
) -> AsyncIterator[Served]:
    async with serve(tmp_path_factory.mktemp("documents"), database) as opened:
        yield opened


@pytest_asyncio.fixture(loop_scope="module")
async def cube(served: Served) -> str:
    return await new_cube(served)


async def put(served: Served, cube: str, *args: Any, **fields: Any) -> dict[str, Any]:
    reply = await upload(served, cube, *args, **fields)
    assert reply.status_code == 201, reply.text
    stored: dict[str, Any] = reply.json()
    return stored


async def version(served: Served, cube: str) -> int:
    return int((await served.client.get(f"/v1/memcubes/{cube}")).json()["version"])


async def test_a_document_becomes_linked_chunks_with_headings_and_source(
    served: Served, cube: str
) -> None:
    stored = await put(
        served,
        cube,
        HANDBOOK,
        "dir/handbook.md",
        title="The handbook",
        tags='["a", "b"]',
        labels="hr",
        metadata='{"year": 2025}',
        reason="first",
    )
    assert set(stored) == {"object", "data", "next_cursor", "document"}
    first, second = stored["data"]
    assert FIVE in first["text"]
    assert DESK in second["text"]
    document = stored["document"]
    assert [(edge["kind"], edge["target"]) for edge in first["edges"]] == [
        ("part-of", document["id"]),
        ("next", second["id"]),
    ]
    assert first["source"]["kind"] == "chunk"
    assert (first["source"]["uri"], first["source"]["title"]) == ("handbook.md", "The handbook")
    assert second["metadata"] == {"year": 2025, "heading_path": ["Returns", "Desk"]}
    assert (first["tags"], first["labels"]) == (["a", "b"], ["hr"])
    assert {name: document[name] for name in ("outcome", "chunks", "added", "media_type")} == {
        "outcome": "added",
        "chunks": 2,
        "added": 2,
        "media_type": "text/markdown",
    }


async def test_a_page_is_named(served: Served, cube: str) -> None:
    stored = await put(served, cube, GOOD_PDF, "a.pdf")
    assert stored["data"][0]["metadata"]["page"] == 1
    assert stored["data"][0]["source"]["locator"].startswith("page")


async def test_the_same_again_changes_nothing_whatever_is_said_of_it_again(
    served: Served, cube: str
) -> None:
    said = {"tags": "a", "metadata": '{"k": 1}'}
    first = await put(served, cube, HANDBOOK, **said)
    async with unchanged(served, cube):
        again = await put(served, cube, HANDBOOK, **said)
        plain = await put(served, cube, HANDBOOK)
    assert again["document"]["outcome"] == plain["document"]["outcome"] == "unchanged"
    assert again["data"] == plain["data"] == first["data"]


async def test_a_changed_document_changes_what_changed_and_keeps_what_was_said(
    served: Served, cube: str
) -> None:
    said = {"tags": "a", "labels": "hr", "metadata": '{"k": 1}'}
    first = await put(served, cube, HANDBOOK, **said)
    after = await put(served, cube, HANDBOOK.replace("five", "three") + "\n## New\n\nNew text.\n")
    numbers = {name: after["document"][name] for name in ("outcome", "added", "changed")}
    assert numbers == {"outcome": "updated", "added": 1, "changed": 1}
    assert [memory["id"] for memory in after["data"][:2]] == [
        memory["id"] for memory in first["data"]
    ]
    assert [memory["version"] for memory in after["data"]] == [2, 1, 1]
    for memory in after["data"]:
        # What was under a label must not be seen by all because a paragraph was added.
        assert (memory["labels"], memory["tags"], memory["metadata"]["k"]) == (["hr"], ["a"], 1)


async def test_a_file_name_is_a_name_and_no_path(served: Served, cube: str) -> None:
    for sent, kept in (
        ("../../etc/passwd.txt", "passwd.txt"),
        ("/etc/shadow.txt", "shadow.txt"),
        ("C:\\\\boot\\\\b.md", "b.md"),
        ("..", ".."),
        ("naïve 文.txt", "naïve 文.txt"),
    ):
        stored = await put(served, cube, f"Something about {kept}.", sent)
        assert stored["document"]["uri"] == kept


async def test_scripts_and_links_of_a_page_are_left_out_and_nothing_is_fetched(
    served: Served, cube: str
) -> None:
    page = (
        "<html><head><title>Shop</title><script>alert('script')</script>"
        "<link rel=stylesheet href='file:///etc/passwd'></head><body><p>Open at nine.</p>"
        "<a href='file:///etc/shadow'>our rules</a><img src='http://127.0.0.1:1/x.png'>"
        "<iframe src='file:///etc/hosts'></iframe><p onclick='steal()'>Closed on Sunday.</p>"
    )
    stored = await put(served, cube, page, "page.html")
    text = json.dumps(stored)
    assert "Open at nine." in text
    assert "Closed on Sunday." in text
    for hidden in ("alert", "etc/", "root:", "127.0.0.1", "steal"):
        assert hidden not in text


async def test_65_kib_of_text_is_a_document_of_many_chunks(served: Served, cube: str) -> None:
    text = ("Refunds take five working days. " * 3000)[: 65 * 1024]
    stored = await put(served, cube, text, "a.txt")
    assert stored["document"]["chunks"] > 50


async def test_an_answer_holds_at_most_a_thousand_chunks(served: Served, cube: str) -> None:
    text = "".join(f"# Part {number}\n\nSentence {number}.\n\n" for number in range(1003))
    stored = await put(served, cube, text)
    assert (len(stored["data"]), stored["document"]["chunks"]) == (1000, 1003)


def bomb() -> bytes:
    """A docx of some kilobytes whose directory names one part often: over 256 MiB unpacked."""
    stream = io.BytesIO(docx(word_paragraph("x" * 300_000)))
    with zipfile.ZipFile(stream, "a") as packed:
        entry = packed.getinfo("word/document.xml")
        for number in range(1000):
            copied = zipfile.ZipInfo(f"word/{number}.xml")
            for name in ("header_offset", "compress_size", "file_size", "CRC", "compress_type"):
                setattr(copied, name, getattr(entry, name))
            packed.filelist.append(copied)
        packed._didModify = True
    return stream.getvalue()


BAD_FILES: list[tuple[str, bytes, str, int, str]] = [
    ("empty", b"", "a.txt", 400, "empty"),
    ("blank", b" \n\t ", "a.txt", 400, "no text"),
    ("binary", b"text\x00\x01\x02" * 99, "a.txt", 400, "NUL"),
    ("picture", b"\x89PNG\r\n\x1a\nxx", "a.txt", 400, "picture"),
    ("program", b"\x7fELF" + bytes(99), "a.md", 400, "program"),
    ("invalid-utf-8", b"caf\xe9 au lait", "a.txt", 400, "UTF-8"),
    ("half-a-surrogate", b"a \xed\xa0\x80 b", "a.txt", 400, "UTF-8"),
    ("encrypted-pdf", pdf_with(GOOD_PDF, user_password="x"), "a.pdf", 400, "password"),
    ("broken-pdf", GOOD_PDF[:300], "a.pdf", 400, "broken"),
    ("pdf-as-txt", GOOD_PDF, "a.txt", 400, "a PDF"),
    ("no-docx", b"PK\x03\x04 word/document", "a.docx", 400, "zip directory"),
    ("docx-bomb", bomb(), "a.docx", 413, "zip bombs"),
    ("only-scripts", b"<script>x</script>", "a.html", 400, "no text"),
    ("spreadsheet", b"a,b\n1,2\n", "a.csv", 400, "taken are"),
]


@pytest.mark.parametrize(
    ("file", "status", "says"),
    [((content, filename), *rest) for _, content, filename, *rest in BAD_FILES],
    ids=[row[0] for row in BAD_FILES],
)
async def test_a_bad_file_is_refused_and_nothing_is_written(
    served: Served, cube: str, file: tuple[bytes, str], status: int, says: str
) -> None:
    async with unchanged(served, cube):
        error = error_of(await upload(served, cube, *file), status)
    assert says in error["message"]
    assert error["param"] == "file" or status == 413


BAD_FIELDS: list[tuple[str, str | bytes, str | None, int]] = [
    ("uri", "two\nlines", "uri", 400),
    ("uri", "x" * 2049, "uri", 400),
    ("uri", "nul\x00", "uri", 400),
    ("title", "x" * 513, "title", 400),
    ("title", "a\x1bb", "title", 400),
    ("title", b"caf\xe9", "title", 400),
    ("title", b"\xed\xa0\x80", "title", 400),
    ("reason", "x" * 1001, "reason", 400),
    ("metadata", "{", "metadata", 400),
    ("metadata", "[1]", "metadata", 400),
    ("metadata", "1", "metadata", 400),
    ("metadata", '{"n": NaN}', "metadata", 400),
    ("metadata", '{"k": 1, "k": 2}', "metadata", 400),
    ("metadata", '{"k": "\\ud800"}', "metadata", 400),
    ("metadata", '{"k": "\\u0000"}', "metadata", 400),
    ("metadata", '{"k": %s}' % ("[" * 40 + "]" * 40), "metadata", 400),
    ("metadata", "[" * 60_000, "metadata", 400),
    ("metadata", json.dumps({"k": "x" * 17_000}), None, 413),
    ("metadata", "x" * 70_000, None, 413),
    ("tags", "[1, 2]", "tags", 400),
    ("tags", '["a", null]', "tags", 400),
    ("tags", '["a"', "tags", 400),
    ("tags", json.dumps([f"t{n}" for n in range(65)]), "tags", 400),
    ("tags", "x" * 129, "tags[0]", 400),
    ("labels", '[["a"]]', "labels", 400),
    ("labels", "a\u2028b", "labels[0]", 400),
    ("colour", "red", "colour", 400),
    ("file", "text", "file", 400),
]


@pytest.mark.parametrize(
    ("field", "param", "status"),
    [({name: value}, *rest) for name, value, *rest in BAD_FIELDS],
    ids=range(len(BAD_FIELDS)),
)
async def test_a_bad_field_is_named_and_nothing_is_written(
    served: Served, cube: str, field: dict[str, str | bytes], param: str | None, status: int
) -> None:
    async with unchanged(served, cube):
        reply = await upload(served, cube, "Some text.", "a.txt", **field)
    assert error_of(reply, status)["param"] == param


async def test_a_field_that_is_sent_twice_is_refused_and_tags_may_repeat(
    served: Served, cube: str
) -> None:
    file: Part = ("file", b"Some text.", "a.txt")
    twice = form([file, ("title", b"a", None), ("title", b"b", None)])
    assert error_of(await post_form(served, cube, twice), 400)["param"] == "title"
    tags = form([("tags", b"a", None), file, ("tags", b"b", None), ("tags", b"", None)])
    reply = await post_form(served, cube, tags)
    assert reply.json()["data"][0]["tags"] == ["a", "b"]


FILE: Part = ("file", b"Some text.", "a.txt")
BAD_FORMS: list[tuple[str, bytes]] = [
    ("nothing", b""),
    ("no-part", form([])),
    ("no-file", form([("title", b"x", None)])),
    ("file-without-a-name", form([("file", b"Some text.", None)])),
    ("empty-name", form([("file", b"Some text.", "")])),
    ("only-a-folder", form([("file", b"Some text.", "folder/")])),
    ("two-files", form([FILE, FILE])),
    ("name-not-utf-8", form([FILE]).replace(b"a.txt", b"caf\xe9.txt")),
    ("no-field-name", form([FILE]).replace(b'name="file"; ', b"")),
    ("many-parts", form([FILE, *[("tags", b"", None)] * 300])),
    ("broken-off", form([FILE])[:-30]),
    ("no-last-boundary", form([FILE]).removesuffix(b"--\r\n") + b"\r\n"),
    ("another-boundary", form([FILE], boundary="another")),
    ("long-header", form([FILE]).replace(b"a.txt", b"a" * 60_000)),
    ("many-headers", form([FILE]).replace(b"\r\n\r\nSome", b"\r\n" + b"a: b\r\n" * 9999 + b"\r\n")),
    ("no-colon", form([FILE]).replace(b"Content-Disposition:", b"Content-Disposition")),
    ("json", b'{"file": "x"}'),
]


@pytest.mark.parametrize(
    "body", [body for _, body in BAD_FORMS], ids=[name for name, _ in BAD_FORMS]
)
async def test_a_broken_form_is_a_400_and_nothing_is_written(
    served: Served, cube: str, body: bytes
) -> None:
    async with unchanged(served, cube):
        error_of(await post_form(served, cube, body), 400)


@pytest.mark.parametrize(
    "kind",
    [
        None,
        "text/plain",
        "application/json",
        "application/x-www-form-urlencoded",
        "multipart/mixed; boundary=boundary-of-the-tests",
        "multipart/form-data",
        "multipart/form-data; boundary=",
        'multipart/form-data; boundary=""',
        "multipart/form-data; boundary=\xff",
        "multipart/form-data; boundary=" + "b" * 5000,
        "multipart/form-data; boundary*0=boundary-of-; boundary*1=the-tests",
        "é",
    ],
)
async def test_another_content_type_is_refused(served: Served, cube: str, kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind.encode("latin-1")}
    async with unchanged(served, cube):
        reply = await served.client.post(
            f"/v1/memcubes/{cube}/documents", content=form([FILE]), headers=headers
        )
        error_of(reply, 400)


@pytest.mark.parametrize("charset", ["undefined", "idna", "punycode", "utf-7", "zlib_codec", "x"])
async def test_a_declared_charset_does_not_choose_a_codec_of_python(
    served: Served, cube: str, charset: str
) -> None:
    body = form([FILE, ("title", b"+2AA- caf\xc3\xa9", None)])
    reply = await post_form(
        served, cube, body, boundary=f"boundary-of-the-tests; charset={charset}"
    )
    assert reply.json()["document"]["title"] == "+2AA- café"


@pytest.mark.parametrize(
    "content",
    [b"\r\n--boundary-of-the-test" * 200_000, b"\r" * 4 * MIB, b"\r\n-" * MIB, b"-" * 4 * MIB],
    ids=range(4),
)
async def test_almost_boundaries_are_read_in_linear_time_off_the_event_loop(
    served: Served, cube: str, content: bytes
) -> None:
    uploading = asyncio.create_task(upload(served, cube, content, "a.zip"))
    longest = 0.0
    while not uploading.done():
        started = monotonic()
        await asyncio.sleep(0.001)
        longest = max(longest, monotonic() - started)
    error_of(await uploading, 400)
    assert longest < 1.0


async def test_a_file_over_32_mib_and_a_body_over_33_are_too_large(
    served: Served, cube: str
) -> None:
    async with unchanged(served, cube):
        file = await upload(served, cube, b"x" * (32 * MIB + 1), "a.txt")
        assert "33554432" in error_of(file, 413)["message"]
        body = await upload(served, cube, b"x" * (33 * MIB), "a.txt")
        assert "34603008" in error_of(body, 413)["message"]


async def test_what_is_said_is_bounded_by_how_often_it_is_kept(
    served: Served, cube: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memos_vllm.control.document_upload.MAX_SAID_BYTES", 400)
    async with unchanged(served, cube):
        reply = await upload(served, cube, HANDBOOK, metadata=json.dumps({"k": "x" * 200}))
        assert "2 chunks" in error_of(reply, 413)["message"]


async def test_who_may_not_write_gets_a_404_before_anything_is_parsed(
    served: Served, cube: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parse(*_: object, **__: object) -> None:
        raise AssertionError("parsed")

    monkeypatch.setattr(documents, "ingest_document", parse)
    monkeypatch.setattr(documents, "read_form", parse)
    reader = grant(served, cube, Role.READER)
    async with unchanged(served, cube):
        for cube_id, headers in (
            ("nowhere", {}),
            (cube, {"x-test-principal": "stranger"}),
            (cube, reader),
        ):
            reply = await upload(served, cube_id, HANDBOOK, headers=headers)
            assert error_of(reply, 404)["code"] == "not_found"


async def test_a_chunk_under_a_label_is_kept_and_not_shown_to_who_lacks_it(
    served: Served, cube: str
) -> None:
    before = await put(served, cube, HANDBOOK)
    secret = before["data"][1]
    url = f"/v1/memcubes/{cube}/memories/{secret['id']}"
    body = {"text": "The safe's code is 4711.", "labels": ["hr"]}
    assert (await served.client.patch(url, json=body)).status_code == 200
    editor = grant(served, cube, Role.EDITOR, "mine")
    same = await put(served, cube, HANDBOOK, headers=editor)
    edited = await put(served, cube, HANDBOOK.replace("five", "six"), headers=editor, labels="mine")
    for reply in (same, edited):
        assert "4711" not in json.dumps(reply)
        assert secret["id"] not in json.dumps(reply)
        assert reply["document"]["chunks"] == 1
    after = (await served.client.get(url)).json()
    assert (after["text"], after["labels"], after["version"]) == (body["text"], ["hr"], 2)
    # A guess at the hidden text is not paired with it, and what is gone is archived unseen.
    guess = HANDBOOK.replace("The returns desk is in Leeds and opens at nine.", body["text"])
    other = grant(served, cube, Role.EDITOR, "mine")
    guessed = await put(served, cube, guess, headers=other)
    assert {name: guessed["document"][name] for name in ("changed", "archived", "added")} == {
        "changed": 1,
        "archived": 0,
        "added": 1,
    }
    assert (await served.client.get(url)).json()["state"] == "archived"


async def test_an_idempotency_key_compares_what_a_form_says_and_not_its_boundary(
    served: Served, cube: str
) -> None:
    key = {"idempotency-key": f"key-{cube}"}
    parts: list[Part] = [("file", HANDBOOK.encode(), "a.md"), ("tags", b"a", None)]
    first = await post_form(served, cube, form(parts), headers=key)
    again = await post_form(
        served, cube, form(parts, boundary="other"), boundary="other", headers=key
    )
    assert first.status_code == again.status_code == 201
    assert first.content == again.content
    assert again.headers["idempotent-replayed"] == "true"
    for changed in (
        [("file", HANDBOOK.encode() + b"!", "a.md"), parts[1]],
        [("file", HANDBOOK.encode(), "b.md"), parts[1]],
        [parts[0], ("tags", b"b", None)],
        [parts[0], parts[1], ("metadata", b'{"k": 1}', None)],
    ):
        async with unchanged(served, cube):
            error_of(await post_form(served, cube, form(changed), headers=key), 409)


async def test_a_refused_upload_leaves_its_key_free(served: Served, cube: str) -> None:
    key = {"idempotency-key": f"key-{cube}"}
    error_of(await upload(served, cube, b"", "a.txt", headers=key), 400)
    assert (await upload(served, cube, HANDBOOK, headers=key)).status_code == 201


async def test_no_digest_of_a_document_outlives_it_in_the_audit_log(
    served: Served, cube: str
) -> None:
    stored = await put(served, cube, HANDBOOK)
    audit = await served.client.get(f"/v1/memcubes/{cube}/audit")
    assert stored["document"]["digest"] not in audit.text
    assert "handbook" not in audit.text


async def test_a_parser_that_cannot_start_is_a_503_and_nothing_is_written(
    served: Served, cube: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise Unavailable("no process could be started")

    monkeypatch.setattr(documents, "ingest_document", fail)
    async with unchanged(served, cube):
        reply = await upload(served, cube, HANDBOOK)
        error_of(reply, 503)
    assert reply.headers["retry-after"]


async def test_uploads_wait_for_each_other_up_to_a_number(
    served: Served, cube: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, parse = threading.Event(), documents.ingest_document
    running = []

    def slowly(*args: Any, **kwargs: Any) -> Any:
        running.append(1)
        assert go_on.wait(10)
        running.pop()
        assert not running
        return parse(*args, **kwargs)

    monkeypatch.setattr(documents, "ingest_document", slowly)
    monkeypatch.setattr(documents, "_PARSERS", Threads(1, waiting=1, refusal="try again"))
    waiting = [
        asyncio.create_task(upload(served, cube, f"Text {n}.", f"{n}.txt")) for n in range(3)
    ]
    done, _ = await asyncio.wait(waiting, timeout=10, return_when=asyncio.FIRST_COMPLETED)
    go_on.set()
    error_of(done.pop().result(), 503)
    replies = await asyncio.gather(*waiting)
    assert sorted(reply.status_code for reply in replies) == [201, 201, 503]
