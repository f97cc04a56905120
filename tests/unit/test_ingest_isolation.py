"""The process that parses: its limits, what it may not do, and that nothing of it stays."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import random
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ingest_samples import docx, pdf, pdf_with, word_paragraph, word_table

from memos_vllm.errors import InvalidRequest, MemosError, TooLarge
from memos_vllm.plaintext.ingest import isolation, wire, worker
from memos_vllm.plaintext.ingest.document import (
    Block,
    BlockKind,
    Document,
    FileKind,
    IngestLimits,
    ParsedDocument,
)
from memos_vllm.plaintext.ingest.pipeline import ingest_document

# Each such tag takes the parser a tenth of a second or more.
SLOW_PAGE = (b"<p " + b" ".join(b"a%d=1" % number for number in range(4_500)) + b">x") * 200


def children() -> set[int]:
    """Processes whose parent is this one."""
    found: set[int] = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
            except OSError:
                continue
            if int(parent) == os.getpid():
                found.add(int(entry.name))
    return found


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_document_says_where_it_came_from() -> None:
    document = ingest_document(b"# Returns\n\nFive days.", filename="C:\\docs\\rules.md")
    assert isinstance(document, Document)
    assert (document.title, document.kind, document.media_type) == (
        "rules",
        FileKind.MARKDOWN,
        "text/markdown",
    )
    assert document.size_bytes == 21
    assert [(chunk.heading_path, chunk.text) for chunk in document.chunks] == [
        (("Returns",), "Five days.")
    ]
    again = ingest_document(b"# Returns\n\nFive days.", filename="other.md")
    assert again.digest == document.digest
    assert again.chunks == document.chunks


def test_the_character_set_that_the_sender_declares_reaches_the_reader() -> None:
    document = ingest_document(
        b"caf\xe9", filename="a.txt", media_type="text/plain; charset=iso-8859-1"
    )
    assert document.chunks[0].text == "café"


def test_parsing_over_the_time_is_ended_and_leaves_nothing_behind() -> None:
    before, files = children(), open_files()
    started = time.monotonic()
    with pytest.raises(InvalidRequest, match=r"took longer than 0\.5 s to parse; split it"):
        ingest_document(SLOW_PAGE, filename="a.html", limits=IngestLimits(timeout_seconds=0.5))
    assert time.monotonic() - started < 3
    assert children() == before
    assert open_files() == files


def test_the_kernel_ends_a_parser_whose_clock_nobody_watches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As if the server had been killed: by its own clock there is always more time.
    clock = itertools.count(0, -100)
    monkeypatch.setattr(isolation.time, "monotonic", lambda: float(next(clock)))
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    with pytest.raises(InvalidRequest, match="took longer than 1 s"):
        ingest_document(SLOW_PAGE, filename="a.html", limits=IngestLimits(timeout_seconds=1))
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 1.8


def test_parsing_over_the_memory_is_refused() -> None:
    page = b"<p>word</p>" * 400_000
    with pytest.raises(TooLarge, match="needs more than 100 MiB to parse"):
        ingest_document(page, filename="a.html", limits=IngestLimits(memory_bytes=100 << 20))


def test_an_answer_over_the_limit_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        isolation, "_COMMAND", (sys.executable, "-c", "while True: print('x' * 100000)")
    )
    before = children()
    with pytest.raises(TooLarge, match="more than 1000 bytes of text"):
        ingest_document(b"x", filename="a.txt", limits=IngestLimits(max_text_bytes=1000))
    assert children() == before


@pytest.mark.parametrize(
    "program",
    [
        "import os; os.kill(os.getpid(), 11)",
        "print('no json')",
        'print(\'{"title": null, "notes": [], "blocks": [["code", "x", 0, null, [9], []]]}\')',
        'print(\'{"title": 5, "notes": [], "blocks": []}\')',
        'print(\'{"title": ["x"], "notes": [], "blocks": []}\')',
        "import sys; sys.exit(3)",
    ],
)
def test_a_parser_that_dies_or_lies_is_a_refusal(
    program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolation, "_COMMAND", (sys.executable, "-c", program))
    with pytest.raises(InvalidRequest, match="its parser was ended"):
        ingest_document(b"x", filename="a.txt")


def test_a_grandchild_does_not_outlive_the_parser(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    marker = tmp_path / "pid"
    program = (
        "import subprocess, sys; p = subprocess.Popen(['sleep', '60'], stdout=subprocess.DEVNULL);"
        f"open({str(marker)!r}, 'w').write(str(p.pid)); print('bad')"
    )
    monkeypatch.setattr(isolation, "_COMMAND", (sys.executable, "-c", program))
    with pytest.raises(InvalidRequest):
        ingest_document(b"x", filename="a.txt")
    deadline = time.monotonic() + 5
    while _runs(int(marker.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _runs(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


ATTEMPTS = {
    "connect": "import socket; socket.create_connection(('127.0.0.1', 9))",
    "socket": "import socket; socket.socket()",
    "raw socket": "import _socket; _socket.socket(2, 1)",
    "resolve": "import socket; socket.getaddrinfo('localhost', 80)",
    "fetch": "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9/')",
    "read a file": "open('/etc/hostname').read()",
    "read by number": "import os; os.open('/etc/hostname', os.O_RDONLY)",
    "write a file": "open('/tmp/memos-ingest-test', 'w')",
    "start a program": "import subprocess; subprocess.run(['true'])",
    "shell": "import os; os.system('true')",
    "fork": "import os; os.fork()",
    "remove": "import os; os.remove('/tmp/memos-ingest-test')",
}


@pytest.mark.parametrize("name", ATTEMPTS)
def test_behind_closed_doors_nothing_is_opened_sent_or_started(name: str) -> None:
    program = (
        "import socket, urllib.request, subprocess, sys\n"
        "from memos_vllm.plaintext.ingest import sandbox\n"
        "sandbox.limit_resources(timeout_seconds=5, memory_bytes=1 << 30)\n"
        "sandbox.close_doors()\n"
        "import colorsys\n"  # modules of Python itself may still be loaded
        f"try:\n    {ATTEMPTS[name]}\nexcept PermissionError:\n    print('refused')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=30
    )
    assert result.stdout == "refused\n", result.stderr


def test_the_parser_gets_none_of_the_servers_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMOS_SECRET", "x")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert set(isolation._environment()) == {"PYTHONPATH", "LC_ALL"}


@pytest.fixture
def listener() -> Iterator[tuple[str, list[str]]]:
    """A server on the loopback address, and who connected to it."""
    seen: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        stop = threading.Event()

        def accept() -> None:
            while not stop.is_set():
                try:
                    connection, address = server.accept()
                except TimeoutError:
                    continue
                seen.append(str(address))
                connection.close()

        thread = threading.Thread(target=accept)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", seen
        stop.set()
        thread.join()


def test_nothing_that_a_document_points_to_is_fetched(listener: tuple[str, list[str]]) -> None:
    url, seen = listener
    page = (
        f'<html><head><link rel=stylesheet href="{url}/a.css"><base href="{url}/">'
        f'<script src="{url}/b.js"></script><meta http-equiv=refresh content="0;url={url}"></head>'
        f'<body background="{url}/c"><img src="{url}/d"><iframe src="{url}/e"></iframe>'
        f'<object data="{url}/f"></object><p>Text.</p></body></html>'
    )
    office = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    relations = "".join(
        f'<Relationship Id="x{number}" Type="{office}/{kind}" Target="{url}/{kind}" '
        'TargetMode="External"/>'
        for number, kind in enumerate(("attachedTemplate", "styles", "image", "footnotes"))
    )
    for data, name in (
        (page.encode(), "a.html"),
        (f"![x]({url}/y) Text. <img src='{url}/z'>".encode(), "a.md"),
        (
            docx(word_paragraph("A", style="H1") + word_paragraph("Text."), relations=relations),
            "a.docx",
        ),
    ):
        chunk = ingest_document(data, filename=name).chunks[0]
        assert "Text." in chunk.text
        # The document's own styles, and not those that an earlier relation points out of it.
        assert chunk.heading_path == (("A",) if name == "a.docx" else ())
    time.sleep(0.2)
    assert seen == []


def test_the_worker_starts_light_and_fast() -> None:
    heavy = "torch vllm numpy pydantic ray sqlalchemy PIL"
    program = (
        "import sys, time\n"
        "import memos_vllm.plaintext.ingest.worker, memos_vllm.plaintext.ingest.read_html\n"
        f"print(time.process_time(), *(set({heavy!r}.split()) & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    seconds, *loaded = result.stdout.split()
    assert loaded == []
    # Seen: 0.05 s with the start of Python; 0.12 s for the reader of PDF.
    assert float(seconds) < 0.3


def test_decoders_of_pictures_are_not_even_loaded() -> None:
    program = (
        "import sys\nfrom memos_vllm.plaintext.ingest import worker\nworker.main()\n"
        "print('PIL.Image' in sys.modules or sys.modules['PIL'] is not None, file=sys.stderr)"
    )
    task = wire.encode_task(wire.Task(FileKind.PDF, None, IngestLimits()))
    result = subprocess.run(
        [sys.executable, "-c", program],
        input=task + SAMPLES["a.pdf"],
        capture_output=True,
        check=True,
    )
    assert result.stderr == b"False\n"
    assert wire.decode_answer(result.stdout).title == "T"


def test_answers_pass_the_wire_unchanged() -> None:
    parsed = ParsedDocument(
        title='A "title"\\ 漢',
        blocks=(
            Block(BlockKind.HEADING, "H", level=2, page=1),
            Block(BlockKind.PARAGRAPH, "One. Two.\nx", page=1, cuts=(5,), turns=((5, 2), (7, 4))),
        ),
        notes=("a note",),
    )
    assert wire.decode_answer(wire.encode_answer(parsed)) == parsed
    task = wire.Task(FileKind.HTML, "cp1252", IngestLimits(max_pages=3))
    assert wire.decode_task(wire.encode_task(task)) == task


PAGE = b"""<html><head><title>T</title></head><body><h1>A</h1><p>One. Two.</p><ul><li>x</ul>
<table><tr><th>a<td colspan=2>b</table><pre>code</pre></body></html>"""
SAMPLES = {
    "a.txt": "Title\n=====\n\nText é 漢。 More.\n\n- a\n- b\n".encode(),
    "a.md": b"---\ntitle: x\n---\n# A\n\nText [l](u) `c`.\n\n| a | b |\n|---|---|\n| 1 | 2 |\n",
    "a.html": PAGE,
    "a.pdf": pdf_with(
        pdf([[("Big", 20.0), "One line."], ["Two."]]), title="T", outline=[("Big", 0)]
    ),
    "a.docx": docx(
        word_paragraph("A", style="H1")
        + word_paragraph("Text.")
        + word_table([["a", "b"], ["1", "2"]]),
        title="T",
    ),
}


def mutated(data: bytes, source: random.Random) -> bytes:
    """`data` with some bytes changed, taken out, doubled or cut off."""
    content = bytearray(data)
    for _ in range(source.randint(1, 12)):
        place = source.randrange(len(content) + 1)
        match source.randrange(5):
            case 0:
                content[place : place + 1] = source.randbytes(1)
            case 1:
                del content[place : place + source.randint(1, 20)]
            case 2:
                content[place:place] = content[place : place + 30]
            case 3:
                content[place:place] = source.choice(
                    [b"<", b">>", b"[", b"0", b"\xff", b"(", b"65535"]
                )
            case _:
                if source.random() < 0.2:
                    del content[place:]
    return bytes(content)


@settings(max_examples=8, deadline=None)
@given(st.sampled_from(sorted(SAMPLES)), st.integers(0, 2**32), st.booleans())
def test_damaged_files_give_a_document_or_a_refusal(name: str, seed: int, anonymous: bool) -> None:
    started = time.monotonic()
    try:
        document = ingest_document(
            mutated(SAMPLES[name], random.Random(seed)), filename="x" if anonymous else name
        )
    except MemosError:
        document = None
    assert time.monotonic() - started < 10
    if document is not None:
        assert all(chunk.text.strip() for chunk in document.chunks)
        assert "\x00" not in document.title


@pytest.mark.parametrize("name", SAMPLES)
def test_readers_meet_damaged_files_with_nothing_but_refusals(name: str) -> None:
    """As above, many more and without a process each."""
    kind = ingest_document(SAMPLES[name], filename=name).kind
    reader = importlib.import_module(f"memos_vllm.plaintext.ingest.read_{kind}")
    source = random.Random(name)
    task = wire.Task(kind, None, IngestLimits())
    num_read = 0
    for _ in range(150):
        answer = worker._answer(reader, mutated(SAMPLES[name], source), task)
        try:
            wire.decode_answer(answer)
            num_read += 1
        except MemosError:
            pass
    assert num_read > 0


@settings(max_examples=5, deadline=None)
@given(st.binary(max_size=400), st.sampled_from([*SAMPLES, "x"]))
def test_random_bytes_give_a_document_or_a_refusal(data: bytes, name: str) -> None:
    with contextlib.suppress(MemosError):
        ingest_document(data, filename=name)
