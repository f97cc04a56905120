"""Which stored artifact shares the longest prefix with these tokens? From memory alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from blake3 import blake3

from memos_vllm.activation.store.types import (
    ArtifactManifest,
    Match,
    PrefixIdentity,
    TokenIds,
    as_token_ids,
)

# Matches shorter than this are not found: no engine block is smaller.
STRIDE_TOKENS = 16
_STRIDE_BYTES = 4 * STRIDE_TOKENS


@dataclass
class _Group:
    """The artifacts of one identity.

    `starts` maps the digest of the first 16, 32, 48, ... tokens of each artifact to the keys
    that start so. If a prefix is in there all its own prefixes are: the longest one of a
    query is found by bisection, with 8 digests for 3,072 tokens instead of 192.
    """

    manifests: dict[str, ArtifactManifest] = field(default_factory=dict)
    starts: dict[bytes, list[str]] = field(default_factory=dict)
    longest: int = 0

    def longest_start(self, ids: TokenIds) -> tuple[int, list[str]]:
        """How many strides of `ids` are stored, and by which artifacts."""
        data = memoryview(ids.tobytes())
        known, keys = 0, []
        unknown = len(ids) // STRIDE_TOKENS + 1
        while unknown - known > 1:
            middle = (known + unknown) // 2
            found = self.starts.get(blake3(data[: middle * _STRIDE_BYTES]).digest(16))
            if found:
                known, keys = middle, found
            else:
                unknown = middle
        return known, keys


class PrefixIndex:
    """Thread-safe; `lookup` holds the lock for some 50 microseconds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._manifests: dict[str, ArtifactManifest] = {}
        self._groups: dict[PrefixIdentity, _Group] = {}
        self._bytes_used = 0

    def __len__(self) -> int:
        return len(self._manifests)

    @property
    def bytes_used(self) -> int:
        return self._bytes_used

    def get(self, key: str) -> ArtifactManifest | None:
        return self._manifests.get(key)

    def manifests(self) -> list[ArtifactManifest]:
        with self._lock:
            return list(self._manifests.values())

    def keys_of(self, identity: PrefixIdentity) -> list[str]:
        with self._lock:
            group = self._groups.get(identity)
            return list(group.manifests) if group else []

    def add(self, manifest: ArtifactManifest) -> None:
        """Offer an artifact, in place of one of the same key."""
        digests = list(_start_digests(manifest.token_ids))
        with self._lock:
            self._remove(manifest.key, digests)
            group = self._groups.setdefault(manifest.identity, _Group())
            self._manifests[manifest.key] = group.manifests[manifest.key] = manifest
            self._bytes_used += manifest.size_bytes
            group.longest = max(group.longest, manifest.num_tokens)
            for digest in digests:
                group.starts.setdefault(digest, []).append(manifest.key)

    def remove(self, key: str) -> bool:
        """Stop offering an artifact; answers whether it was offered."""
        manifest = self._manifests.get(key)
        if manifest is None:
            return False
        digests = list(_start_digests(manifest.token_ids))
        with self._lock:
            return self._remove(key, digests)

    def lookup(
        self,
        identity: PrefixIdentity,
        token_ids: Sequence[int] | TokenIds,
        *,
        any_numerics: bool = False,
    ) -> Match | None:
        """The artifact with the longest common prefix; of equals the own numerics, the newest.

        Never raises: ids that are no ids match nothing.
        """
        with self._lock:
            groups = [self._groups[identity]] if identity in self._groups else []
            if any_numerics:
                groups += [g for other, g in self._groups.items() if _portable(identity, other)]
            if not groups:
                return None
            longest = max(group.longest for group in groups)
            try:
                ids = as_token_ids(token_ids[:longest])
            except (TypeError, ValueError, OverflowError):
                return None
            best: Match | None = None
            for group in groups:
                match = _longest_match(group, ids)
                if match and (best is None or match.num_tokens > best.num_tokens):
                    best = match
            return best

    def _remove(self, key: str, digests: list[bytes]) -> bool:
        """With the lock held; `digests` belong to the key, which names the token ids."""
        manifest = self._manifests.pop(key, None)
        if manifest is None:
            return False
        self._bytes_used -= manifest.size_bytes
        group = self._groups[manifest.identity]
        del group.manifests[key]
        for digest in digests:
            keys = group.starts[digest]
            keys.remove(key)
            if not keys:
                del group.starts[digest]
        if not group.manifests:
            del self._groups[manifest.identity]
        return True


def _longest_match(group: _Group, ids: TokenIds) -> Match | None:
    strides, keys = group.longest_start(ids)
    if not strides:
        return None
    start = strides * STRIDE_TOKENS
    # All of `keys` agree with the query up to `start` and differ within the next stride.
    tail = ids[start : start + STRIDE_TOKENS]

    def rank(manifest: ArtifactManifest) -> tuple[int, float, str]:
        return _common_length(manifest.token_ids[start:], tail), manifest.created_at, manifest.key

    best = max((group.manifests[key] for key in keys), key=rank)
    num_tokens = start + rank(best)[0]
    # Digests only nominate: the real ids decide.
    if not np.array_equal(best.token_ids[:num_tokens], ids[:num_tokens]):
        return None
    return Match(best, num_tokens)


def _common_length(left: TokenIds, right: TokenIds) -> int:
    length = min(len(left), len(right))
    differing = np.flatnonzero(left[:length] != right[:length])
    return int(differing[0]) if differing.size else length


def _start_digests(token_ids: TokenIds) -> Iterator[bytes]:
    data = memoryview(token_ids.tobytes())
    hasher = blake3()
    for end in range(_STRIDE_BYTES, len(data) + 1, _STRIDE_BYTES):
        hasher.update(data[end - _STRIDE_BYTES : end])
        yield hasher.digest(16)


def _portable(wanted: PrefixIdentity, other: PrefixIdentity) -> bool:
    return other.numerics != wanted.numerics and (
        (other.scope, other.fingerprint, other.renderer_version)
        == (wanted.scope, wanted.fingerprint, wanted.renderer_version)
    )
