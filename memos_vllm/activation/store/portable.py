"""Artifacts on their way between stores: shards as they lie here, manifests without scope and MAC.

A scope and a MAC are one server's; whoever takes an artifact in puts its own in their place. The
shard's header names the scope, so it is written anew, and the KV behind it is copied and must give
the checksums that came with it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, BinaryIO, Protocol

import numpy as np
from blake3 import blake3
from pydantic import TypeAdapter, ValidationError

from memos_vllm.activation.store.artifact_store import ArtifactStore
from memos_vllm.activation.store.manifest import manifest_fields, manifest_of
from memos_vllm.activation.store.shard_format import (
    MAX_HEADER_BYTES,
    ShardFormat,
    chunk_tokens_for,
    content_digest,
    parse_header,
    tail_of,
)
from memos_vllm.activation.store.types import (
    ArtifactManifest,
    KvDtype,
    PrefixIdentity,
    ShardEntry,
    ShardLayout,
)
from memos_vllm.errors import ArtifactCorrupted

_KEY = "(imported)"
_ENCODING = re.compile(r"[a-z0-9_-]{1,32}")
_TYPES: dict[str, Any] = {
    "identity": PrefixIdentity,
    "shards": list[ShardEntry],
    "total_layers": int,
    "total_kv_heads": int,
}
# Layers or heads, and numbers of a head: far beyond any model.
_MOST = 4096
_MOST_NUMBERS = 1 << 20


class Source(Protocol):
    """Bytes in order; fewer than asked for only at the end."""

    def read(self, size: int, /) -> bytes: ...


def describe(manifest: ArtifactManifest) -> bytes:
    """The manifest as it travels."""
    return json.dumps(manifest_fields(manifest), sort_keys=True).encode()


def read_description(data: bytes) -> ArtifactManifest:
    """The inverse of `describe`; nothing in it has been compared with any shard yet.

    Raises:
        ArtifactCorrupted: it is not one, or says what no artifact can.
    """
    try:
        fields = json.loads(data)
        for name, kind in _TYPES.items():
            TypeAdapter(kind).validate_json(json.dumps(fields[name]), strict=True)
        manifest = manifest_of(fields, size_bytes=len(data))
        for entry in manifest.shards:
            _check_layout(entry.layout)
    except (KeyError, TypeError, ValueError, RecursionError, ValidationError) as error:
        raise ArtifactCorrupted(_KEY, "its manifest cannot be read") from error
    if not 0 < manifest.total_layers < _MOST or not 0 < manifest.total_kv_heads < _MOST:
        raise ArtifactCorrupted(_KEY, "its manifest tells of no model")
    if not manifest.num_tokens or not manifest.shards:
        raise ArtifactCorrupted(_KEY, "it is empty")
    return manifest


def open_shard(store: ArtifactStore, entry: ShardEntry) -> BinaryIO:
    """A shard's file, which stays readable when the artifact is removed meanwhile.

    Raises:
        OSError: it is gone already.
    """
    return store.shard_path(entry).open("rb")


def adopt(
    store: ArtifactStore,
    described: ArtifactManifest,
    *,
    scope: str,
    shards: Iterable[tuple[int, Source]],
) -> ArtifactManifest:
    """Take an artifact into this store, under a scope of this server.

    Args:
        shards: size and content of each shard, in the order of the description.
    Returns:
        The manifest as it is signed here.
    Raises:
        ArtifactError: it is not what it says, or cannot be kept; nothing of it is left.
    """
    identity = replace(described.identity, scope=scope)
    taken: list[ShardEntry] = []
    try:
        for entry, (size_bytes, source) in zip(described.shards, shards, strict=True):
            taken.append(
                _adopt_shard(
                    store, described, entry, identity, size_bytes=size_bytes, source=source
                )
            )
    except ValueError as error:
        store.drop_shards(taken)
        raise ArtifactCorrupted(described.key, "a shard is missing, or one too many") from error
    except BaseException:
        store.drop_shards(taken)
        raise
    return store.commit(
        identity,
        described.token_ids,
        total_layers=described.total_layers,
        total_kv_heads=described.total_kv_heads,
        shards=taken,
    )


def _adopt_shard(
    store: ArtifactStore,
    described: ArtifactManifest,
    entry: ShardEntry,
    identity: PrefixIdentity,
    *,
    size_bytes: int,
    source: Source,
) -> ShardEntry:
    header, form = _read_header(described, entry, source)
    if size_bytes != form.size_bytes:
        raise ArtifactCorrupted(described.key, f"a shard has {size_bytes} bytes and names others")
    shape = (2, form.num_tokens, form.layout.num_kv_heads, form.layout.head_dim)
    with store.begin_shard(identity, described.token_ids, entry.layout) as writer:
        for layer in entry.layout.layers:
            data = _exactly(described, source, 2 * form.half_layer_bytes)
            kv = np.frombuffer(data, dtype=form.layout.kv_dtype.raw).reshape(shape)
            writer.write_layer(layer, kv)
        tail = _exactly(described, source, form.tail_bytes)
        written = writer.finish()
    checksums = tail[4 * form.num_tokens :]
    whole = (
        tail == tail_of(described.token_ids, checksums)
        and content_digest(header, tail) == entry.content_digest
        and blake3(checksums).hexdigest() == entry.checksum_digest == written.checksum_digest
    )
    if not whole:
        store.drop_shards([written])
        raise ArtifactCorrupted(described.key, "a shard differs from its checksums")
    return written


def _read_header(
    described: ArtifactManifest, entry: ShardEntry, source: Source
) -> tuple[bytes, ShardFormat]:
    opening = _exactly(described, source, 8)
    length = int.from_bytes(opening, "little")
    if length > MAX_HEADER_BYTES:
        raise ArtifactCorrupted(described.key, "a shard's header has an absurd length")
    header = opening + _exactly(described, source, length)
    try:
        form = parse_header(header)
    except ValueError as error:
        raise ArtifactCorrupted(described.key, "a shard's header cannot be read") from error
    expected = ShardFormat(
        described.identity, entry.layout, described.num_tokens, chunk_tokens_for(entry.layout)
    )
    if form != expected:
        raise ArtifactCorrupted(described.key, "a shard's header is not what the manifest says")
    return header, form


def _exactly(described: ArtifactManifest, source: Source, size: int) -> bytes:
    data = source.read(size)
    if len(data) != size:
        raise ArtifactCorrupted(described.key, "a shard is truncated")
    return data


def _check_layout(layout: ShardLayout) -> None:
    KvDtype(layout.dtype)
    numbers = (layout.num_layers, layout.num_kv_heads)
    starts = (layout.layer_start, layout.head_start)
    sized = all(0 < number < _MOST for number in numbers) and 0 < layout.head_dim < _MOST_NUMBERS
    if not sized or not all(0 <= start < _MOST for start in starts):
        raise ValueError("a layout of no model")
    if _ENCODING.fullmatch(layout.encoding) is None:
        raise ValueError("an encoding with an odd name")
