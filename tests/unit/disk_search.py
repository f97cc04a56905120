"""Looks for what must not be on a disk, in every form that the stores write it in."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt


def files_holding(folder: Path, *forms: bytes) -> list[str]:
    """The files below `folder` that hold one of these byte strings.

    Whoever owns the folder may be at work: what goes while it is searched holds nothing any more.
    """
    return sorted(
        str(path.relative_to(folder))
        for path in _files(folder)
        # Logs are allocated ahead: what follows the last byte that was written is zeros.
        if (data := _content(path).rstrip(b"\0"))
        if any(form in data for form in forms)
    )


def _files(folder: Path) -> Iterator[Path]:
    for root, _, names in os.walk(folder):
        yield from (Path(root) / name for name in names)


def _content(path: Path) -> bytes:
    # Neither the sockets nor the pipes of a running server.
    try:
        return path.read_bytes() if path.is_file() else b""
    except FileNotFoundError:
        return b""


def text_forms(*texts: str) -> list[bytes]:
    """UTF-8, and UTF-16 of both byte orders."""
    return [text.encode(form) for text in texts for form in ("utf-8", "utf-16-le", "utf-16-be")]


def token_forms(token_ids: Sequence[int], *, run: int = 8) -> list[bytes]:
    """Run after run of token ids as int32 and int64 arrays, and as JSON and decimal lists."""
    forms: list[bytes] = []
    for start in range(0, max(1, len(token_ids) - run + 1), run):
        ids = list(token_ids[start : start + run])
        forms += [np.array(ids, dtype=kind).tobytes() for kind in ("<i4", "<i8", ">i4", ">i8")]
        forms += [between.join(map(str, ids)).encode() for between in (",", ", ", " ", "\n")]
    return forms


def vector_forms(vector: npt.NDArray[np.float32]) -> list[bytes]:
    """A dense vector as float32 and float16 arrays, and as Edge's log has it: CBOR, piece by piece.

    A quarter of a vector is enough to be found.
    """
    forms: list[bytes] = []
    size = max(4, len(vector) // 4)
    for start in range(0, len(vector) - size + 1, size):
        part = vector[start : start + size]
        forms += [part.astype(kind).tobytes() for kind in ("<f4", "<f2", ">f4")]
        forms.append(b"".join(b"\xfa" + struct.pack(">f", value) for value in part))
    return forms


def left_in(folder: Path, wanted: Mapping[str, Iterable[bytes]]) -> dict[str, list[str]]:
    """Which files hold what of `wanted`; empty when nothing is left."""
    found = {name: files_holding(folder, *forms) for name, forms in wanted.items()}
    return {name: files for name, files in found.items() if files}
