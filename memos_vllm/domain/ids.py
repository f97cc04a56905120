"""Names of things, as types that do not mix, and where new ones come from."""

from __future__ import annotations

import secrets
import threading
import time
from typing import NewType

CubeId = NewType("CubeId", str)
MemoryId = NewType("MemoryId", str)
ArtifactId = NewType("ArtifactId", str)
JobId = NewType("JobId", str)
PrincipalId = NewType("PrincipalId", str)

# Crockford's base 32 in lower case: no look-alikes, and every id is a legal cube id.
_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
_TIME_DIGITS = 9
_RANDOM_DIGITS = 16


def _base32(value: int, digits: int) -> str:
    letters = []
    for _ in range(digits):
        value, index = divmod(value, 32)
        letters.append(_ALPHABET[index])
    return "".join(reversed(letters))


class IdSource:
    """Makes ids such as `mem_01k9…`: a kind, a millisecond clock, then 80 random bits.

    Ids of one source sort by the time they were made; the random half makes two sources disagree.
    Thread-safe.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last_ms = 0

    def __call__(self, kind: str) -> str:
        """A new id that starts with `kind` and an underscore."""
        with self._lock:
            self._last_ms = max(self._last_ms, time.time_ns() // 1_000_000)
            stamp = self._last_ms
        noise = secrets.randbits(5 * _RANDOM_DIGITS)
        return f"{kind}_{_base32(stamp, _TIME_DIGITS)}{_base32(noise, _RANDOM_DIGITS)}"
