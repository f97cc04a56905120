"""Looks for pieces of erased texts in the logs that a server keeps, and blanks what it finds."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from memos_vllm.domain.needles import MAX_PIECES, MIN_PIECE_BYTES, PIECE_BYTES, Needle, find_needles

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 4 << 20
_BLANK = b"*"


@dataclass(frozen=True, slots=True)
class Searched:
    """What a search of logs came to; `blanked` counts the lines that were overwritten."""

    files: int
    blanked: int

    def told(self) -> str:
        """For a person."""
        return (
            f"{self.files} files of Ray's folder and of the data folder's run/ were searched for "
            f"up to {MAX_PIECES} pieces of {MIN_PIECE_BYTES} to {PIECE_BYTES} bytes of each text, "
            "known by keyed hashes; a line that holds one is overwritten. Where the operator sends "
            "the server's own output is not known here"
        )


class LogSearch:
    """The folders in which this server's logs lie.

    Args:
        folders: asked at each search; one that is not there holds nothing.
    """

    def __init__(self, folders: Callable[[], Sequence[Path]]) -> None:
        self._folders = folders

    def blank(self, needles: Sequence[Needle], *, key: bytes) -> Searched:
        """Overwrite every line that holds one of these pieces."""
        files = blanked = 0
        for path in self._files():
            # A log that was removed meanwhile holds nothing.
            with contextlib.suppress(FileNotFoundError):
                files += 1
                blanked += _blank(path, needles, key=key)
        if blanked:
            logger.warning("memos: %d lines of logs quoted what was erased", blanked)
        return Searched(files, blanked)

    def _files(self) -> Iterator[Path]:
        for folder in self._folders():
            for root, _, names in os.walk(folder):
                for path in (Path(root) / name for name in names):
                    # Sockets and links to elsewhere are none of ours.
                    if path.is_file() and not path.is_symlink():
                        yield path


def _blank(path: Path, needles: Sequence[Needle], *, key: bytes) -> int:
    lines = list(_lines(path, needles, key=key))
    if lines:
        with path.open("r+b") as file:
            for start, end in lines:
                os.pwrite(file.fileno(), _BLANK * (end - start), start)
    return len(lines)


def _lines(path: Path, needles: Sequence[Needle], *, key: bytes) -> Iterator[tuple[int, int]]:
    """Start and end of every line with a piece in it, as far as it was read together with that."""
    with path.open("rb") as file:
        before, offset = b"", 0
        while part := file.read(_CHUNK_BYTES):
            data = before + part
            ended = -1
            for start, end in find_needles(data, needles, key=key):
                if start < ended:
                    continue
                first = data.rfind(b"\n", 0, start) + 1
                after = data.find(b"\n", end)
                ended = len(data) if after < 0 else after
                yield offset - len(before) + first, offset - len(before) + ended
            offset += len(part)
            # A piece may lie across two parts.
            before = data[-(PIECE_BYTES - 1) :]
