"""Archives as bytes: what is written is read, and anything else is refused."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from memos_vllm.cartridge import reader as reader_module
from memos_vllm.cartridge import ustar
from memos_vllm.cartridge.layout import (
    CHECKSUMS,
    MANIFEST,
    ArtifactFacts,
    CubeFacts,
    Manifest,
    Part,
    artifact_name,
)
from memos_vllm.cartridge.reader import ArchiveReader, verify
from memos_vllm.cartridge.writer import ArchiveFile, write_archive
from memos_vllm.errors import InvalidRequest, TooLarge

NOW = datetime(2026, 1, 1, tzinfo=UTC)
FACTS = ArtifactFacts(fingerprint="f", numerics="n", renderer_version=1, tokens=1, size_bytes=1)
Files = list[tuple[str, bytes]]


def manifest(**changes: object) -> bytes:
    facts = CubeFacts(
        id="c",
        name="c",
        description="",
        preamble="",
        labels=(),
        owner="local",
        version=1,
        created_at=NOW,
    )
    counts = {part.value: 1 for part in Part}
    whole = Manifest(
        created_at=NOW,
        created_by="tests",
        include=("plaintext",),
        whole=True,
        cube=facts,
        counts=counts,
        artifacts=(FACTS,),
    )
    return json.dumps({**json.loads(whole.model_dump_json()), **changes}).encode()


def sample() -> Files:
    parts = [(part.file_name, b'{"a": "%s"}\n' % part.value.encode()) for part in Part]
    shards = [(artifact_name(0, None), b"{}"), (artifact_name(0, 0), bytes(range(256)) * 9)]
    return [(MANIFEST, manifest()), *parts, *shards]


def archive(files: Iterable[tuple[str, bytes]] | None = None) -> bytes:
    chosen = sample() if files is None else files
    return b"".join(write_archive(ArchiveFile(name, len(data), [data]) for name, data in chosen))


def read(data: bytes) -> Files:
    """Everything in an archive; what is handed out before the end counts for nothing."""
    reader = ArchiveReader(io.BytesIO(data))
    return [(file.name, file.read(file.size_bytes)) for file in reader.files()]


def tar_of(data: bytes) -> bytes:
    return zstandard.ZstdDecompressor().decompressobj().decompress(data)


def compressed(tar: bytes, **options: object) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(tar)


def refused(data: bytes, kind: type[Exception] = InvalidRequest, match: str | None = None) -> None:
    with pytest.raises(kind, match=match):
        verify(io.BytesIO(data))


def test_what_is_written_is_read_and_tar_reads_it_too() -> None:
    data = archive()
    assert read(data) == sample()[1:]
    assert verify(io.BytesIO(data)).cube.id == "c"
    with tarfile.open(fileobj=io.BytesIO(tar_of(data))) as tar:
        assert tar.getnames() == [*(name for name, _ in sample()), CHECKSUMS]
    assert archive() == data


def test_an_archive_that_tar_and_zstd_packed_anew_is_read() -> None:
    packed = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(tar_of(archive()))) as tar,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as again,
    ):
        for member in tar:
            member.mtime, member.uid, member.uname = 1_700_000_000, 1000, "someone"
            again.addfile(member, tar.extractfile(member))
    verify(io.BytesIO(compressed(packed.getvalue(), level=19)))


@settings(max_examples=300, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_turned_bit_is_refused_or_changes_nothing(place: float, bit: int) -> None:
    data = bytearray(archive())
    data[int(place * len(data))] ^= 1 << bit
    try:
        verify(io.BytesIO(bytes(data)))
    except (InvalidRequest, TooLarge):
        return
    assert read(bytes(data)) == sample()[1:]


@settings(max_examples=300, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_turned_bit_inside_the_tar_is_refused_or_says_nothing(place: float, bit: int) -> None:
    tar = bytearray(tar_of(archive()))
    tar[int(place * len(tar))] ^= 1 << bit
    data = compressed(bytes(tar))
    try:
        verify(io.BytesIO(data))
    except (InvalidRequest, TooLarge):
        return
    assert read(data) == sample()[1:]


@settings(max_examples=200, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True))
def test_a_truncated_archive_is_refused(place: float) -> None:
    data = archive()
    refused(data[: int(place * len(data))])
    tar = tar_of(data)
    refused(compressed(tar[: int(place * (len(tar) - 1))]))


@settings(max_examples=100, deadline=None)
@given(start=st.floats(0, 1), size=st.integers(1, 2000), to=st.floats(0, 1), inside=st.booleans())
def test_bytes_that_are_there_twice_are_refused_or_change_nothing(
    start: float, size: int, to: float, inside: bool
) -> None:
    data = archive()
    body = tar_of(data) if inside else data
    begin, target = int(start * len(body)), int(to * len(body))
    changed = body[:target] + body[begin : begin + size] + body[target:]
    try:
        verify(io.BytesIO(compressed(changed) if inside else changed))
    except (InvalidRequest, TooLarge):
        return
    assert read(compressed(changed) if inside else changed) == sample()[1:]


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=2000), opened=st.booleans())
def test_any_bytes_are_refused(data: bytes, opened: bool) -> None:
    refused(compressed(data) if opened else data)


def test_nothing_may_follow_the_end() -> None:
    data = archive()
    for more in (b"x", data, compressed(b""), bytes(4)):
        refused(data + more, match="behind")
    tar = tar_of(data)
    refused(compressed(tar + b"x" * 512), match="behind")
    refused(compressed(tar + bytes(1 << 20)), match="behind")
    verify(io.BytesIO(compressed(tar + bytes(512 * 4))))


def _with(place: int, name: str, data: bytes) -> Files:
    """The sample with another file at a place."""
    return [*sample()[:place], (name, data), *sample()[place + 1 :]]


_FIRST = Part.MEMORIES.file_name
_DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"\n"
CHANGES: dict[str, Files] = {
    "missing": sample()[:3] + sample()[4:],
    "extra": [*sample(), ("more.txt", b"")],
    "twice": [*sample()[:2], *sample()[1:]],
    "order": [sample()[0], sample()[2], sample()[1], *sample()[3:]],
    "no manifest": sample()[1:],
    "shard without manifest": [*sample()[:-2], sample()[-1]],
    "shard gap": [*sample()[:-1], (artifact_name(0, 1), b"")],
    "artifact gap": [*sample(), (artifact_name(2, None), b"{}")],
    "one artifact more than said": [*sample(), (artifact_name(1, None), b"{}")],
    "one artifact less than said": sample()[:-2],
    "traversal": _with(3, "../edges.jsonl", b"{}\n"),
    "absolute": _with(3, "/edges.jsonl", b"{}\n"),
    "line missing": _with(1, _FIRST, b""),
    "line too many": _with(1, _FIRST, b"{}\n{}\n"),
    "no line end": _with(1, _FIRST, b"{}"),
    "no json": _with(1, _FIRST, b"{]\n"),
    "no object": _with(1, _FIRST, b"[]\n"),
    "deep": _with(1, _FIRST, _DEEP),
}


@pytest.mark.parametrize("change", CHANGES)
def test_files_that_are_not_an_archives_are_refused(change: str) -> None:
    refused(archive(CHANGES[change]))


def test_a_newer_schema_is_refused_in_words() -> None:
    refused(archive(_with(0, MANIFEST, manifest(schema_version=2))), match="schema version 2 .* up")


def test_a_long_line_and_a_large_manifest_are_too_large() -> None:
    files = sample()
    files[1] = (files[1][0], b'{"a": "' + b"x" * (1 << 20) + b'"}\n')
    refused(archive(files), TooLarge, "line")
    refused(archive([(MANIFEST, bytes(2 << 20))]), TooLarge)
    refused(archive(_with(-2, artifact_name(0, None), bytes(17 << 20))), TooLarge)


def _member(kind: bytes, name: str = "edges.jsonl", **fields: object) -> bytes:
    info = tarfile.TarInfo(name)
    info.type = kind
    for field, value in fields.items():
        setattr(info, field, value)
    form = tarfile.PAX_FORMAT if "pax_headers" in fields else tarfile.GNU_FORMAT
    return info.tobuf(form if name != "ustar" else tarfile.USTAR_FORMAT)


@pytest.mark.parametrize(
    "header",
    [
        _member(tarfile.SYMTYPE, linkname="/etc/passwd"),
        _member(tarfile.LNKTYPE, linkname="memories.jsonl"),
        _member(tarfile.CHRTYPE, devmajor=1, devminor=3),
        _member(tarfile.FIFOTYPE),
        _member(tarfile.DIRTYPE),
        _member(tarfile.GNUTYPE_SPARSE),
        _member(tarfile.REGTYPE, name="x" * 200),
        _member(tarfile.REGTYPE, pax_headers={"path": "other"}),
        _member(tarfile.REGTYPE, size=8**12),
        ustar.header("edges.jsonl", 0)[:-1] + b"x",
        ustar.header("edges.jsonl", 0)[:124] + b"-0000000001\0" + ustar.header("x", 0)[136:],
        b"\xff" * 512,
    ],
)
def test_what_is_no_plain_file_is_refused(header: bytes) -> None:
    opening = ustar.header(MANIFEST, len(manifest())) + manifest()
    opening += bytes(ustar.padding(len(manifest())))
    refused(compressed(opening + header + bytes(4096)))


def test_a_bomb_is_refused_before_it_went_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "_FREE_BYTES", 1 << 20)
    size = 1 << 30
    opening = ustar.header(MANIFEST, len(manifest())) + manifest()
    opening += bytes(ustar.padding(len(manifest()))) + ustar.header("memories.jsonl", size)
    compressor = zstandard.ZstdCompressor().compressobj()
    pieces: list[bytes] = [compressor.compress(opening)]
    line = b" " * 1023 + b"\n"
    pieces += [compressor.compress(line * 1024) for _ in range(64)]
    refused(b"".join([*pieces, compressor.flush()]), TooLarge, "times its size")


def test_sizes_and_windows_beyond_reason_are_refused() -> None:
    opening = ustar.header(MANIFEST, len(manifest())) + manifest()
    opening += bytes(ustar.padding(len(manifest())))
    refused(compressed(opening + ustar.header("memories.jsonl", 8**11 - 1)), InvalidRequest)
    window = zstandard.ZstdCompressionParameters(window_log=27, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=window).compressobj()
    wide = compressor.compress(tar_of(archive())) + compressor.flush()
    refused(wide, match="decompressed")


@pytest.mark.parametrize(
    "counts", [{}, {"memories": -1}, {"memories": 10**9}, {"memories": "1"}, {"more": 1}]
)
def test_counts_that_make_no_sense_are_refused(counts: dict[str, object]) -> None:
    ours: dict[str, object] = {part.value: 1 for part in Part}
    given_counts = {**ours, **counts} if counts else {}
    files: Sequence[tuple[str, bytes]] = [(MANIFEST, manifest(counts=given_counts)), *sample()[1:]]
    refused(archive(files))


def test_a_writer_says_when_a_file_is_not_as_long_as_it_said() -> None:
    for size in (2, 4):
        with pytest.raises(ValueError, match="bytes"):
            list(write_archive([ArchiveFile("x", size, [b"abc"])]))
