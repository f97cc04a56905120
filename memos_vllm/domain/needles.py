"""Finding a text again without keeping it: pieces of it, known by keyed hashes only.

A piece is found by two sums over its bytes, which slide along a file at little cost, and is then
compared by a keyed hash. Who has no key learns the sums of 24 bytes from it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

PIECE_BYTES = 24
# Shorter texts stand in any file by accident.
MIN_PIECE_BYTES = 12
# Of one text, evenly spread: all of one of 6 KiB.
MAX_PIECES = 256
# Fewer different bytes are a ruler, an indent or the like.
_MIN_DIFFERENT = 6
_DIGEST_BYTES = 16


class Needle(NamedTuple):
    """A piece of a text: its length, the two sums, and its keyed hash in hex."""

    size: int
    total: int
    weighted: int
    digest: str


def needles_of(text: str, *, key: bytes) -> Iterator[Needle]:
    """Pieces of a text by which it is found again; none of a text that is too short.

    Args:
        key: secret, at most 64 bytes.
    """
    data = text.encode()
    size = min(PIECE_BYTES, len(data))
    if size < MIN_PIECE_BYTES:
        return
    starts = range(0, len(data) - size + 1, size)
    step = -(-len(starts) // MAX_PIECES)
    for start in starts[::step]:
        piece = data[start : start + size]
        if len(set(piece)) >= _MIN_DIFFERENT:
            total = sum(piece)
            weighted = sum(place * byte for place, byte in enumerate(piece))
            yield Needle(size, total, weighted, _digest(piece, key))


def find_needles(data: bytes, needles: Iterable[Needle], *, key: bytes) -> list[tuple[int, int]]:
    """Where any of the pieces stands in `data`: start and end of each place, by rising start."""
    by_size: dict[int, list[Needle]] = {}
    for needle in needles:
        by_size.setdefault(needle.size, []).append(needle)
    found = [
        (start, start + size)
        for size, group in by_size.items()
        for start in _starts(data, group, size, key)
    ]
    return sorted(found)


def _starts(data: bytes, needles: Sequence[Needle], size: int, key: bytes) -> Iterator[int]:
    # Imported here: the control plane makes needles, and looks for none.
    import numpy as np

    if len(data) < size:
        return
    values = np.frombuffer(data, np.uint8).astype(np.int64)
    sums = np.concatenate(([0], np.cumsum(values)))
    places = np.concatenate(([0], np.cumsum(values * np.arange(len(values), dtype=np.int64))))
    totals = sums[size:] - sums[:-size]
    weighted = places[size:] - places[:-size] - np.arange(len(totals)) * totals
    # Both sums in one number: the weighted one is below 2^20 for pieces of this size.
    wanted = np.array([needle.total << 20 | needle.weighted for needle in needles], np.int64)
    digests = {needle.digest for needle in needles}
    for start in np.flatnonzero(np.isin((totals << 20) | weighted, wanted)).tolist():
        if _digest(data[start : start + size], key) in digests:
            yield start


def _digest(piece: bytes, key: bytes) -> str:
    return hashlib.blake2b(piece, key=key[:64], digest_size=_DIGEST_BYTES).hexdigest()
