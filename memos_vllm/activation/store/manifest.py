"""Manifests: canonical JSON under a MAC. A file is `{"mac":"<64 hex>","manifest":{...}}`."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from dataclasses import asdict
from typing import Any

import numpy as np
from blake3 import blake3

from memos_vllm.activation.store.types import (
    ArtifactManifest,
    PrefixIdentity,
    ShardEntry,
    ShardLayout,
    TokenIds,
    as_token_ids,
)
from memos_vllm.errors import ArtifactCorrupted

MANIFEST_VERSION = 2
MAX_MANIFEST_BYTES = 64 << 20

_OPENING = b'{"mac":"'
_MIDDLE = b'","manifest":'
_BODY_START = len(_OPENING) + 64 + len(_MIDDLE)
_MAC_CONTEXT = "memos_vllm 2025 artifact manifest MAC v1"


def artifact_key(identity: PrefixIdentity, token_ids: TokenIds) -> str:
    """The name of an artifact: hex BLAKE3 over identity and token ids."""
    named = json.dumps(asdict(identity), sort_keys=True, separators=(",", ":")).encode()
    hasher = blake3(derive_key_context="memos_vllm 2025 artifact key v1")
    hasher.update(len(named).to_bytes(8, "little") + named)
    hasher.update(token_ids.astype("<u4", copy=False).tobytes())
    return hasher.hexdigest()


def manifest_fields(manifest: ArtifactManifest) -> dict[str, Any]:
    """A manifest as JSON values."""
    return {
        "version": MANIFEST_VERSION,
        "key": manifest.key,
        "identity": asdict(manifest.identity),
        "token_ids": base64.b64encode(manifest.token_ids.tobytes()).decode(),
        "total_layers": manifest.total_layers,
        "total_kv_heads": manifest.total_kv_heads,
        "shards": [asdict(shard) for shard in manifest.shards],
        "created_at": manifest.created_at,
    }


def encode_manifest(manifest: ArtifactManifest, *, mac_key: bytes) -> bytes:
    """The file of a manifest; `manifest.size_bytes` is not written, reading computes it."""
    fields = manifest_fields(manifest)
    body = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    return _OPENING + _mac(body, mac_key) + _MIDDLE + body + b"}"


def decode_manifest(data: bytes, *, key: str, mac_key: bytes) -> ArtifactManifest:
    """Check and parse the file of the artifact `key`.

    Raises:
        ArtifactCorrupted: torn, altered, signed with another key, or another artifact's.
    """
    body = data[_BODY_START:-1]
    found = data[len(_OPENING) : len(_OPENING) + 64]
    framed = data == _OPENING + found + _MIDDLE + body + b"}"
    if not framed or not hmac.compare_digest(found, _mac(body, mac_key)):
        raise ArtifactCorrupted(key, "the manifest is torn, altered or signed with another key")
    try:
        manifest = manifest_of(json.loads(body), size_bytes=len(data))
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactCorrupted(key, f"the manifest is of another version: {error}") from error
    if manifest.key != key:
        raise ArtifactCorrupted(key, f"the manifest is that of artifact {manifest.key}")
    return manifest


def manifest_of(fields: dict[str, Any], *, size_bytes: int) -> ArtifactManifest:
    """The inverse of `manifest_fields`; raises KeyError, TypeError, ValueError."""
    if fields["version"] != MANIFEST_VERSION:
        raise ValueError(f"version {fields['version']}")
    shards = tuple(
        ShardEntry(**{**shard, "layout": ShardLayout(**shard["layout"])})
        for shard in fields["shards"]
    )
    token_ids = as_token_ids(np.frombuffer(base64.b64decode(fields["token_ids"]), dtype="<u4"))
    return ArtifactManifest(
        key=fields["key"],
        identity=PrefixIdentity(**fields["identity"]),
        token_ids=token_ids,
        num_tokens=len(token_ids),
        total_layers=fields["total_layers"],
        total_kv_heads=fields["total_kv_heads"],
        shards=shards,
        created_at=fields["created_at"],
        size_bytes=size_bytes + sum(shard.size_bytes for shard in shards),
    )


def _mac(body: bytes, mac_key: bytes) -> bytes:
    # The key may serve other purposes too; the derivation keeps them apart.
    derived = blake3(mac_key, derive_key_context=_MAC_CONTEXT).digest()
    return hmac.digest(derived, body, hashlib.sha256).hex().encode()
