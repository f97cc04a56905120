"""One shard as a safetensors file: KV first, on a page boundary, then ids and checksums.

    u64     header length
    JSON    header, padded with spaces; its `__metadata__` names identity and layout
    kv         [layers, 2, tokens, kv_heads, head_dim] in the cache dtype, or rows of bytes
    token_ids  [tokens] uint32
    checksums  [layers, 2, chunks, 16] XXH3-128 of each chunk of tokens

A chunk is contiguous in this layout, so verifying the first n tokens reads little more than
what is loaded. The checksums find what disks, crashes and stray writes do to KV, at 15 GB/s on one
core, where BLAKE3 runs at 5; who may write the store's folder may also read its MAC key beside it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property

import xxhash
from blake3 import blake3

from memos_vllm.activation.store.types import (
    CHECKSUM_BYTES,
    KvDtype,
    PrefixIdentity,
    ShardLayout,
    TokenIds,
)

FORMAT_NAME = "memos_vllm.kv"
FORMAT_VERSION = 2
MAX_HEADER_BYTES = 1 << 20
PAGE_BYTES = 4096

_SAFETENSORS_DTYPES = {
    KvDtype.BFLOAT16: "BF16",
    KvDtype.FLOAT16: "F16",
    KvDtype.FLOAT32: "F32",
    KvDtype.FLOAT8_E4M3: "F8_E4M3",
    KvDtype.FLOAT8_E5M2: "F8_E5M2",
    KvDtype.UINT8: "U8",
    KvDtype.INT8: "I8",
}

# Beyond 192 KiB a partial load pays more for its last chunk than it gains.
_MIN_SEGMENT_BYTES = 192 << 10
_MIN_CHUNK_TOKENS = 128
_MAX_CHUNK_TOKENS = 1024


def chunk_tokens_for(layout: ShardLayout) -> int:
    """Tokens under one checksum: a power of two, so that engine blocks divide it."""
    tokens = _MIN_CHUNK_TOKENS
    while tokens < _MAX_CHUNK_TOKENS and tokens * layout.token_bytes < _MIN_SEGMENT_BYTES:
        tokens *= 2
    return tokens


@dataclass(frozen=True)
class ShardFormat:
    """Where everything is in one shard file."""

    identity: PrefixIdentity
    layout: ShardLayout
    num_tokens: int
    chunk_tokens: int

    @cached_property
    def num_chunks(self) -> int:
        return -(-self.num_tokens // self.chunk_tokens)

    @property
    def kv_bytes(self) -> int:
        return self.layout.kv_bytes(self.num_tokens)

    @property
    def checksums_shape(self) -> tuple[int, int, int, int]:
        return (self.layout.num_layers, 2, self.num_chunks, CHECKSUM_BYTES)

    @property
    def tail_bytes(self) -> int:
        """Bytes of token ids and checksum table."""
        layers, two, chunks, width = self.checksums_shape
        return 4 * self.num_tokens + layers * two * chunks * width

    @cached_property
    def kv_offset(self) -> int:
        return len(self.header)

    @property
    def tail_offset(self) -> int:
        return self.kv_offset + self.kv_bytes

    @property
    def size_bytes(self) -> int:
        return self.tail_offset + self.tail_bytes

    @cached_property
    def half_layer_bytes(self) -> int:
        """Bytes of all tokens' K (or V) in one layer."""
        return self.num_tokens * self.layout.token_bytes

    @cached_property
    def segments(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """Byte ranges within a layer: of each chunk of K, then of each chunk of V."""
        half_bytes, chunk_bytes = self.half_layer_bytes, self.chunk_tokens * self.layout.token_bytes
        starts = range(0, half_bytes, chunk_bytes)
        keys = tuple((start, min(start + chunk_bytes, half_bytes)) for start in starts)
        return keys, tuple((start + half_bytes, end + half_bytes) for start, end in keys)

    def checksums_of(self, layer: memoryview, half: int, *, first_chunks: int) -> bytes:
        """Checksums of the first chunks of K (`half` 0) or V (1) of a layer's bytes."""
        ranges = self.segments[half][:first_chunks]
        return b"".join([xxhash.xxh3_128_digest(layer[start:end]) for start, end in ranges])

    @cached_property
    def header(self) -> bytes:
        """Length field and padded JSON: everything before the KV."""
        layout, tail = self.layout, self.kv_bytes
        ids_end = tail + 4 * self.num_tokens
        fields = {
            "__metadata__": {
                "format": FORMAT_NAME,
                "version": str(FORMAT_VERSION),
                "identity": _canonical(asdict(self.identity)),
                "layout": _canonical(asdict(layout)),
                "chunk_tokens": str(self.chunk_tokens),
            },
            "kv": {
                "dtype": _SAFETENSORS_DTYPES[layout.kv_dtype],
                "shape": [
                    layout.num_layers,
                    2,
                    self.num_tokens,
                    layout.num_kv_heads,
                    layout.head_dim,
                ],
                "data_offsets": [0, tail],
            },
            "token_ids": {
                "dtype": "U32",
                "shape": [self.num_tokens],
                "data_offsets": [tail, ids_end],
            },
            "checksums": {
                "dtype": "U8",
                "shape": list(self.checksums_shape),
                "data_offsets": [ids_end, tail + self.tail_bytes],
            },
        }
        text = _canonical(fields).encode()
        text += b" " * (-(8 + len(text)) % PAGE_BYTES)
        return len(text).to_bytes(8, "little") + text


def parse_header(header: bytes) -> ShardFormat:
    """The inverse of `ShardFormat.header`.

    Raises:
        ValueError: not a header that this version writes.
    """
    try:
        metadata = json.loads(header[8:])["__metadata__"]
        if metadata["format"] != FORMAT_NAME or metadata["version"] != str(FORMAT_VERSION):
            raise ValueError("unknown format or version")
        shape = json.loads(header[8:])["kv"]["shape"]
        parsed = ShardFormat(
            identity=PrefixIdentity(**json.loads(metadata["identity"])),
            layout=ShardLayout(**json.loads(metadata["layout"])),
            num_tokens=int(shape[2]),
            chunk_tokens=int(metadata["chunk_tokens"]),
        )
        matches = parsed.chunk_tokens > 0 and parsed.header == header
    except (KeyError, IndexError, TypeError, RecursionError, ZeroDivisionError) as error:
        raise ValueError(f"unreadable header: {error}") from error
    if not matches:
        raise ValueError("the header is not in canonical form")
    return parsed


def content_digest(header: bytes, tail: bytes) -> str:
    """The name of a shard's content: covers all of the file, the KV through its checksums."""
    hasher = blake3(derive_key_context="memos_vllm 2025 shard content v1")
    hasher.update(header)
    hasher.update(tail)
    return hasher.hexdigest()


def tail_of(token_ids: TokenIds, checksums: bytes) -> bytes:
    """What follows the KV."""
    return token_ids.astype("<u4", copy=False).tobytes() + checksums


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
