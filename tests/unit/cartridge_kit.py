"""Archives of the catalog tests' cubes, and ways to forge them."""

from __future__ import annotations

import io
import json
import secrets
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from api_harness import FakeCartridges
from catalog_kit import ADMIN, Desk

from memos_vllm.api.archives import check, pack
from memos_vllm.cartridge.layout import MANIFEST, Part
from memos_vllm.cartridge.reader import ArchiveReader
from memos_vllm.cartridge.writer import ArchiveFile, write_archive
from memos_vllm.domain.access import Principal
from memos_vllm.domain.cartridge import LoadedCube

Lines = list[dict[str, Any]]


def packed(desk: Desk, cube_id: str = "c", *, actor: Principal = ADMIN) -> bytes:
    """What HTTP would send."""
    support = FakeCartridges(Path(tempfile.gettempdir()))
    _, chunks = pack(desk.mos, actor, cube_id, include=("plaintext",), support=support)
    return b"".join(chunks)


def load(
    desk: Desk,
    archive: bytes,
    *,
    cube_id: str | None = None,
    replace: bool = False,
    actor: Principal = ADMIN,
) -> LoadedCube:
    """What HTTP does with a body."""
    received = check(io.BytesIO(archive), "digest")
    import_id = secrets.token_hex(8)
    try:
        chunks = received.stage(desk.mos, import_id, vectors=True)
        return desk.mos.import_cube(
            actor,
            import_id,
            received.manifest.cube,
            chunks=chunks,
            archive_digest="digest",
            cube_id=cube_id,
            replace=replace,
        )
    except BaseException:
        desk.mos.discard_import(import_id)
        raise


def lines_of(archive: bytes) -> dict[Part, Lines]:
    found = {}
    for file in ArchiveReader(io.BytesIO(archive)).files():
        if file.name.endswith(".jsonl"):
            part = Part(file.name.removesuffix(".jsonl"))
            found[part] = [json.loads(line) for line in file.lines()]
    return found


def forged(
    archive: bytes,
    change: Callable[[dict[Part, Lines]], None] = lambda _: None,
    *,
    manifest: Mapping[str, Any] | None = None,
) -> bytes:
    """The archive with other lines, and with counts and checksums that fit them."""
    reader = ArchiveReader(io.BytesIO(archive))
    parts = lines_of(archive)
    change(parts)
    data = {
        part: b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        for part, lines in parts.items()
    }
    facts = json.loads(reader.manifest.model_dump_json())
    facts["counts"] = {part.value: len(lines) for part, lines in parts.items()}
    for path, value in (manifest or {}).items():
        *steps, last = path.split(".")
        place = facts
        for step in steps:
            place = place[step]
        place[last] = value
    head = json.dumps(facts).encode()
    return b"".join(
        write_archive(
            [
                ArchiveFile(MANIFEST, len(head), [head]),
                *(ArchiveFile(p.file_name, len(body), [body]) for p, body in data.items()),
            ]
        )
    )
