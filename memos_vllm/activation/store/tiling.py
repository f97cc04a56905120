"""Do the shards of an artifact cover layers x KV heads, each cell once?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from memos_vllm.activation.store.errors import ArtifactIncomplete
from memos_vllm.activation.store.types import ShardEntry


def check_tiling(
    key: str, shards: Sequence[ShardEntry], *, total_layers: int, total_kv_heads: int
) -> None:
    """Raises ArtifactIncomplete, naming the first hole, overlap or shard that sticks out."""
    covered = np.zeros((max(total_layers, 0), max(total_kv_heads, 0)), dtype=np.int32)
    for shard in shards:
        layers, heads = shard.layout.layers, shard.layout.heads
        inside = (
            0 <= layers.start < layers.stop <= total_layers
            and 0 <= heads.start < heads.stop <= total_kv_heads
        )
        if not inside:
            raise ArtifactIncomplete(key, f"a shard of {layers} and {heads} sticks out")
        covered[layers.start : layers.stop, heads.start : heads.stop] += 1
    wrong = np.argwhere(covered != 1)
    if not covered.size or wrong.size:
        layer, head = wrong[0] if wrong.size else (0, 0)
        times = covered[layer, head] if wrong.size else 0
        raise ArtifactIncomplete(key, f"layer {layer}, KV head {head} was saved {times} times")
