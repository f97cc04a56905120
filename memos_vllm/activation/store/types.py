"""What the store holds: identities, shard layouts, manifests. Plain data, picklable."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

TokenIds: TypeAlias = NDArray[np.uint32]
RawArray: TypeAlias = NDArray[np.unsignedinteger[Any]]

CHECKSUM_BYTES = 16
EXACT = "exact"


class KvDtype(StrEnum):
    """Cache dtypes by torch's name, which is what `str(dtype)[6:]` gives."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"
    FLOAT8_E4M3 = "float8_e4m3fn"
    FLOAT8_E5M2 = "float8_e5m2"
    UINT8 = "uint8"
    INT8 = "int8"

    @property
    def item_bytes(self) -> int:
        return {"float32": 4, "bfloat16": 2, "float16": 2}.get(self.value, 1)

    @property
    def raw(self) -> np.dtype[np.unsignedinteger[Any]]:
        """The unsigned integer of the same width, in which the bytes are handed around."""
        return np.dtype(f"<u{self.item_bytes}")


@dataclass(frozen=True, slots=True)
class PrefixIdentity:
    """Everything that decides whether KV may be used, besides the token ids.

    Attributes:
        scope: who may use it, an opaque hex string; the index never crosses scopes.
        fingerprint: the model.
        numerics: the numerics class: device, ISA, TP, attention backend, KV dtype, scales.
        renderer_version: the prefix renderer that made the head.
    """

    scope: str
    fingerprint: str
    numerics: str
    renderer_version: int


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """Which part of the model one file holds: a range of layers and a range of KV heads.

    Attributes:
        head_dim: numbers of one token and head; of encoded KV the bytes of its row.
        dtype: of the cache; of encoded KV "uint8".
        encoding: how the rows are written, by the kernels' name; "exact" holds the cache's numbers.
    """

    layer_start: int
    num_layers: int
    head_start: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    encoding: str = EXACT

    @property
    def kv_dtype(self) -> KvDtype:
        return KvDtype(self.dtype)

    @property
    def layers(self) -> range:
        return range(self.layer_start, self.layer_start + self.num_layers)

    @property
    def heads(self) -> range:
        return range(self.head_start, self.head_start + self.num_kv_heads)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's K (or V) in one layer."""
        return self.num_kv_heads * self.head_dim * self.kv_dtype.item_bytes

    def kv_bytes(self, num_tokens: int) -> int:
        """Raw KV bytes of `num_tokens` tokens in this shard."""
        return self.num_layers * 2 * num_tokens * self.token_bytes


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One file of an artifact, as its manifest names it.

    Attributes:
        content_digest: hex BLAKE3 over header, token ids and checksum table, and through the
            table over every byte of KV.
        file_name: path below the store's root.
        size_bytes: of the whole file.
        checksum_digest: hex BLAKE3 of the checksum table alone.
    """

    content_digest: str
    layout: ShardLayout
    file_name: str
    size_bytes: int
    checksum_digest: str


@dataclass(frozen=True, slots=True)
class ArtifactManifest:
    """A whole artifact: its existence is what makes its shards usable.

    Attributes:
        key: hex BLAKE3 over identity and token ids; also its file name.
        created_at: seconds since the epoch.
        size_bytes: of all shard files and the manifest together.
    """

    key: str
    identity: PrefixIdentity
    token_ids: TokenIds = field(compare=False, repr=False)
    num_tokens: int
    total_layers: int
    total_kv_heads: int
    shards: tuple[ShardEntry, ...]
    created_at: float
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Match:
    """The answer of a lookup: the first `num_tokens` tokens of `manifest` are the query's."""

    manifest: ArtifactManifest
    num_tokens: int


@dataclass(frozen=True, slots=True)
class ScanReport:
    """What `ArtifactStore.scan` found and did; names are file names below the root."""

    num_artifacts: int
    quarantined: tuple[str, ...] = ()
    removed_temporaries: tuple[str, ...] = ()
    removed_orphans: tuple[str, ...] = ()
    evicted: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Sizes now and counts since this process opened the store."""

    num_artifacts: int
    bytes_used: int
    budget_bytes: int | None
    num_quarantined: int
    quarantine_bytes: int
    committed: int
    evicted: int
    discarded: int
    quarantined: int
    refused: int


def as_token_ids(token_ids: Sequence[int] | TokenIds) -> TokenIds:
    """Token ids as a contiguous, read-only vector of little-endian uint32 (a copy).

    Raises:
        TypeError, ValueError, OverflowError: anything that is not a vector of such ids.
    """
    if isinstance(token_ids, np.ndarray):
        if token_ids.ndim != 1 or token_ids.dtype.kind not in "iu":
            raise TypeError("token ids must be a vector of integers")
        if token_ids.size and not 0 <= int(token_ids.min()) <= int(token_ids.max()) < 1 << 32:
            raise OverflowError("a token id does not fit 32 bits")
        ids = np.array(token_ids, dtype="<u4")
    else:
        if isinstance(token_ids, bytes | bytearray | str):
            raise TypeError("token ids must be a sequence of integers")
        # array("I") takes 25 us for 3,072 ids where numpy takes 86, and refuses floats.
        ids = np.frombuffer(array("I", token_ids), dtype="<u4")
    ids.flags.writeable = False
    return ids
