"""Reading an artifact: the layers and heads that one rank needs, from one or more shards."""

from __future__ import annotations

from types import TracebackType
from typing import Self

import numpy as np

from memos_vllm.activation.store.paths import StorePaths
from memos_vllm.activation.store.shard_file import ShardFile
from memos_vllm.activation.store.types import ArtifactManifest, RawArray, ShardLayout


class ArtifactReader:
    """The layers and heads of one artifact that this rank needs. A context manager.

    Nothing is handed out before it is verified. Different layers may be used from different
    threads.

    Attributes:
        layers, heads: the ranges it was opened for.
    """

    def __init__(
        self, paths: StorePaths, manifest: ArtifactManifest, *, layers: range, heads: range
    ) -> None:
        """Called by `ArtifactStore.open_shards`, which says what is raised."""
        if not _within(layers, manifest.total_layers) or not _within(
            heads, manifest.total_kv_heads
        ):
            raise ValueError(
                f"asked for {layers} and {heads} of an artifact with {manifest.total_layers} "
                f"layers and {manifest.total_kv_heads} KV heads"
            )
        self.manifest, self.layers, self.heads = manifest, layers, heads
        self._shards: list[ShardFile] = []
        try:
            for entry in manifest.shards:
                layout = entry.layout
                if _overlap(layout.layers, layers) and _overlap(layout.heads, heads):
                    path = paths.shard(entry.content_digest)
                    self._shards.append(ShardFile(path, manifest=manifest, entry=entry))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def layout(self, layer: int) -> ShardLayout:
        """Head dimension and dtype of a layer, as one shard of the heads asked for."""
        source = self._shards_of(layer)[0].entry.layout
        return ShardLayout(
            layer_start=layer,
            num_layers=1,
            head_start=self.heads.start,
            num_kv_heads=len(self.heads),
            head_dim=source.head_dim,
            dtype=source.dtype,
            encoding=source.encoding,
        )

    def layer(self, layer: int, *, num_tokens: int) -> RawArray:
        """The first `num_tokens` tokens of one layer, verified (once).

        Returns:
            [2, num_tokens, heads, head_dim] as unsigned integers of the dtype's width. A view
            of the mapping when one shard holds all the heads, else a copy; either is valid
            as long as it is referenced, also after `close`.
        Raises:
            ArtifactCorrupted: a checksum differs, or the file changed under us.
            ArtifactUnreadable: the system refused for now.
        """
        parts = []
        for shard in self._shards_of(layer):
            first = shard.entry.layout.head_start
            inside = slice(
                max(self.heads.start - first, 0),
                min(self.heads.stop - first, shard.entry.layout.num_kv_heads),
            )
            parts.append(shard.layer(layer, num_tokens=self._checked(num_tokens))[:, :, inside])
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=2)

    def verify_layer(self, layer: int, *, num_tokens: int) -> None:
        """Verify what `layer` would return. Releases the GIL while it hashes."""
        for shard in self._shards_of(layer):
            shard.verify_layer(layer, num_tokens=self._checked(num_tokens))

    def verify(self, num_tokens: int) -> None:
        """`verify_layer` for all layers."""
        for layer in self.layers:
            self.verify_layer(layer, num_tokens=num_tokens)

    def close(self) -> None:
        """Close the files; arrays that are still in use keep their memory."""
        for shard in self._shards:
            shard.close()
        self._shards = []

    def _shards_of(self, layer: int) -> list[ShardFile]:
        shards = [shard for shard in self._shards if layer in shard.entry.layout.layers]
        if layer not in self.layers or not shards:
            raise ValueError(f"layer {layer} is not open; {self.layers} are")
        return sorted(shards, key=lambda shard: shard.entry.layout.head_start)

    def _checked(self, num_tokens: int) -> int:
        if not 0 < num_tokens <= self.manifest.num_tokens:
            raise ValueError(
                f"asked for {num_tokens} tokens of an artifact of {self.manifest.num_tokens}"
            )
        return num_tokens


def _within(wanted: range, total: int) -> bool:
    return wanted.step == 1 and 0 <= wanted.start < wanted.stop <= total


def _overlap(left: range, right: range) -> bool:
    return max(left.start, right.start) < min(left.stop, right.stop)
