"""Save, lookup and verify throughput of the artifact store, on one core, in page cache.

python benchmarks/store.py [--rounds 15] [--folder PATH]
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import blake3
import numpy as np

from memos_vllm.activation.store import ArtifactStore, PrefixIdentity, ShardLayout, shard_file

TOKENS = 3072
LAYOUT = ShardLayout(0, 30, 0, 3, 64, "bfloat16")
IDENTITY = PrefixIdentity("5c09e", "smollm2-135m", "cpu-amx-bf16-tp1", 1)
RAW_BYTES = LAYOUT.kv_bytes(TOKENS)


def measure(name: str, rounds: int, action: Callable[[], object], *, num_bytes: int = 0) -> None:
    """Print every sample, the median and the best, in ms and GB/s."""
    action()
    samples = []
    for _ in range(rounds):
        start = time.perf_counter()
        action()
        samples.append(time.perf_counter() - start)
    median, best = statistics.median(samples), min(samples)
    line = f"{name:34s} median {median * 1e3:8.3f} ms, best {best * 1e3:8.3f} ms"
    if num_bytes:
        line += f", {num_bytes / median / 1e9:5.2f} GB/s, best {num_bytes / best / 1e9:5.2f} GB/s"
    print(line)
    print("    ms: " + " ".join(f"{sample * 1e3:.3f}" for sample in samples))


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--folder", type=Path, default=None, help="where to write (a real disk)")
    options = parser.parse_args()
    versions = f"python {platform.python_version()}, numpy {np.__version__}"
    print(f"linux {platform.release()}, {os.cpu_count()} cores, {processor()}, {versions}")
    print(f"blake3 {blake3.__version__}, {RAW_BYTES} bytes of KV, {options.rounds} rounds")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        run(ArtifactStore(Path(folder) / "store", mac_key=bytes(32)), options.rounds)


def run(store: ArtifactStore, rounds: int) -> None:
    random = np.random.default_rng(0)
    shape = (2, TOKENS, LAYOUT.num_kv_heads, LAYOUT.head_dim)
    layers = [random.integers(0, 1 << 16, shape, dtype=np.uint16) for _ in LAYOUT.layers]
    ids = [int(token) for token in random.integers(0, 49152, TOKENS)]

    def save() -> None:
        with store.begin_shard(IDENTITY, ids, LAYOUT) as writer:
            for layer, kv in enumerate(layers):
                writer.write_layer(layer, kv)
            entry = writer.finish()
        store.commit(IDENTITY, ids, total_layers=30, total_kv_heads=3, shards=[entry])

    def verify() -> None:
        with store.open_shards(manifest) as reader:
            reader.verify(TOKENS)

    def verify_copied() -> None:
        with mock.patch.object(shard_file, "_take_read_lease", return_value=False):
            verify()

    measure("save (fsync and rename included)", max(rounds // 3, 3), save, num_bytes=RAW_BYTES)
    measure("lookup, 3,072 tokens, hit", rounds * 10, lambda: store.lookup(IDENTITY, ids))
    other = [*ids[:1500], *reversed(ids[1500:])]
    measure("lookup, half of it shared", rounds * 10, lambda: store.lookup(IDENTITY, other))
    match = store.lookup(IDENTITY, ids)
    assert match is not None
    manifest = match.manifest
    measure("open", rounds, lambda: store.open_shards(manifest).close())
    measure("open and verify, mapped", rounds, verify, num_bytes=RAW_BYTES)
    measure("open and verify, copied", rounds, verify_copied, num_bytes=RAW_BYTES)
    measure("refresh, nothing new", rounds, store.refresh)
    measure("scan", rounds, store.scan)
    print(f"store holds {store.bytes_used / RAW_BYTES:.5f} x the raw {RAW_BYTES} KV bytes")


if __name__ == "__main__":
    main()
