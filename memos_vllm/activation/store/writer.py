"""Writing one shard: to a temporary name, checksummed on the way, renamed when whole."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from memos_vllm.activation.store.durable import (
    SEALED_FILE_MODE,
    TemporaryFile,
    make_folder,
    write_all,
)
from memos_vllm.activation.store.errors import ArtifactScopeErased, save_error
from memos_vllm.activation.store.paths import StorePaths
from memos_vllm.activation.store.shard_format import ShardFormat, content_digest, tail_of
from memos_vllm.activation.store.types import ShardEntry, ShardLayout, TokenIds


class ShardWriter:
    """One shard being saved. `finish` or `abort` ends it; a context manager aborts it
    unless finished. Different layers may be written from different threads.

    Written with pwrite, not through a mapping: a disk that fills up or fails is then an
    error code and not a SIGBUS.

    Attributes:
        layout: what it holds.
        num_tokens: tokens of the artifact.
    """

    def __init__(
        self,
        paths: StorePaths,
        *,
        key: str,
        shard_format: ShardFormat,
        token_ids: TokenIds,
        is_erased: Callable[[], bool],
    ) -> None:
        """Called by `ArtifactStore.begin_shard`. Raises OSError."""
        self.layout: ShardLayout = shard_format.layout
        self.num_tokens: int = shard_format.num_tokens
        self._paths, self._key, self._format = paths, key, shard_format
        self._token_ids, self._is_erased = token_ids, is_erased
        self._checksums = np.zeros(shard_format.checksums_shape, dtype=np.uint8)
        self._missing = set(self.layout.layers)
        self._lock = threading.Lock()
        self._file = TemporaryFile(paths.temporaries)
        try:
            self._file.preallocate(shard_format.size_bytes)
            write_all(self._file.fd, shard_format.header, offset=0)
        except BaseException:
            self._file.remove()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.abort()

    def write_layer(self, layer: int, kv: NDArray[Any]) -> None:
        """Checksum and write one layer.

        Args:
            layer: model layer index, within `layout.layers`; each exactly once, any order.
            kv: [2, tokens, kv_heads, head_dim], any dtype of the cache dtype's width
                (uint16 for bfloat16); copied first when not contiguous.
        Raises:
            ValueError: wrong shape, width or layer.
            ArtifactStoreFull, ArtifactSaveFailed: and the shard is aborted.
        """
        layout = self.layout
        expected = (2, self.num_tokens, layout.num_kv_heads, layout.head_dim)
        if kv.shape != expected or kv.dtype.itemsize != layout.kv_dtype.item_bytes:
            raise ValueError(f"layer {layer} is {kv.shape} {kv.dtype}, expected {expected}")
        with self._lock:
            if layer not in self._missing:
                raise ValueError(f"layer {layer} is not in this shard, or was written already")
            self._missing.remove(layer)
        data = np.ascontiguousarray(kv).reshape(-1).view(np.uint8).data
        index = layer - layout.layer_start
        for half in range(2):
            digests = self._format.checksums_of(data, half, first_chunks=self._format.num_chunks)
            self._checksums[index, half].reshape(-1)[:] = np.frombuffer(digests, dtype=np.uint8)
        self._write(data, offset=self._format.kv_offset + index * len(data))

    def write_keys_values(self, layer: int, keys: NDArray[Any], values: NDArray[Any]) -> None:
        """`write_layer` from two arrays of [tokens, kv_heads, head_dim]."""
        self.write_layer(layer, np.stack((keys, values)))

    def finish(self) -> ShardEntry:
        """Flush to the disk and rename to the content-addressed name.

        Raises:
            ValueError: a layer is missing.
            ArtifactScopeErased: discarded in the meantime; the shard is aborted.
            ArtifactStoreFull, ArtifactSaveFailed: and the shard is aborted.
        """
        if self._missing:
            raise ValueError(f"layers {sorted(self._missing)} were not written")
        checksums = self._checksums.tobytes()
        tail = tail_of(self._token_ids, checksums)
        self._write(memoryview(tail), offset=self._format.tail_offset)
        if self._is_erased():
            self.abort()
            raise ArtifactScopeErased(self._key, "its memory was erased while it was being saved")
        digest = content_digest(self._format.header, tail)
        destination: Path = self._paths.shard(digest)
        try:
            make_folder(destination.parent)
            self._file.publish(destination, mode=SEALED_FILE_MODE)
        except OSError as error:
            self.abort()
            raise save_error(self._key, error) from error
        return ShardEntry(
            content_digest=digest,
            layout=self.layout,
            file_name=self._paths.name_of(destination),
            size_bytes=self._format.size_bytes,
            checksum_digest=blake3(checksums).hexdigest(),
        )

    def abort(self) -> None:
        """Remove the temporary file; harmless when ended already."""
        self._file.remove()

    def _write(self, data: memoryview, *, offset: int) -> None:
        try:
            write_all(self._file.fd, data, offset=offset)
        except OSError as error:
            self.abort()
            raise save_error(self._key, error) from error
