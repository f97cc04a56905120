"""Small artifacts for the tests of the artifact store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from memos_vllm.activation.store import (
    ArtifactManifest,
    ArtifactStore,
    PrefixIdentity,
    ShardEntry,
    ShardLayout,
)

MAC_KEY = bytes(range(32))
IDENTITY = PrefixIdentity("5c0be", "model-a", "cpu-amx-bf16", 1)
LAYOUT = ShardLayout(0, 2, 0, 2, 8, "bfloat16")


class Clock:
    """Seconds since the epoch, moved by hand; starts at the real time, which files have."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def open_store(root: Path, **options: object) -> ArtifactStore:
    return ArtifactStore(root / "store", **{"mac_key": MAC_KEY, **options})  # type: ignore[arg-type]


def token_ids(count: int, *, seed: int = 0) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(0, 50_000, count)]


def kv_of(layers: int, tokens: int, heads: int, dim: int, *, seed: int = 0) -> NDArray[np.uint16]:
    """[layers, 2, tokens, heads, dim] of random bits."""
    shape = (layers, 2, tokens, heads, dim)
    return np.random.default_rng(seed).integers(0, 1 << 16, shape, dtype=np.uint16)


def write_shard(
    store: ArtifactStore,
    identity: PrefixIdentity,
    ids: Sequence[int],
    layout: ShardLayout,
    kv: NDArray[np.uint16],
) -> ShardEntry:
    with store.begin_shard(identity, ids, layout) as writer:
        for index, layer in enumerate(layout.layers):
            writer.write_layer(layer, kv[index])
        return writer.finish()


def save(
    store: ArtifactStore,
    ids: Sequence[int],
    *,
    identity: PrefixIdentity = IDENTITY,
    seed: int = 0,
) -> ArtifactManifest:
    """Save one artifact of one shard of `LAYOUT`, of random KV."""
    kv = kv_of(2, len(ids), 2, 8, seed=seed)
    entry = write_shard(store, identity, ids, LAYOUT, kv)
    return store.commit(identity, ids, total_layers=2, total_kv_heads=2, shards=[entry])


def shard_path(store_root: Path, manifest: ArtifactManifest) -> Path:
    return store_root / "store" / manifest.shards[0].file_name


def overwrite(path: Path, offset: int, data: bytes | None = None) -> None:
    """Put `data` at `offset` of a sealed file, or flip the byte there."""
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(offset)
        if data is None:
            old = file.read(1)
            data = bytes([old[0] ^ 0x40])
            file.seek(offset)
        file.write(data)


def files_of(root: Path) -> set[str]:
    """Every file below the store's root but the lock, relative."""
    store = root / "store"
    found = {path.relative_to(store).as_posix() for path in store.rglob("*") if path.is_file()}
    return found - {"lock"}
