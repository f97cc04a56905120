"""The embedded index at scale: build rate, size, memory and search times.

python -m benchmarks.index_scale [--points N --cubes M] [--json FILE] [--folder PATH] [--url URL]

Without --points: 10,000 and 100,000 memories in one cube, and 1,000,000 in 10,000 cubes. Vectors
are random, of 384 dimensions, around 1,000 centres as those of texts are; with --uniform around
none, where all are as good as equally far and a graph finds half. Words follow Zipf's law.
The index optimises itself while it is filled, as in service, and once more at the end when it
holds more than it would scan. A search asks for 100 by vector and 100 by words in one call, as
retrieval does. With --url, a Qdrant server is measured instead of the embedded index.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import platform
import secrets
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from memos_vllm.domain.filters import HasTag
from memos_vllm.domain.ids import CubeId
from memos_vllm.domain.scope import FilterFields, Scope
from memos_vllm.plaintext.index.base import IndexPoint, IndexQuery, SparseVector, VectorIndex
from memos_vllm.plaintext.index.qdrant_edge import EdgeStore
from memos_vllm.plaintext.index.qdrant_server import ServerStore
from memos_vllm.plaintext.index.queries import FULL_SCAN_POINTS

DIM = 384
BATCH = 512
SIZES = ((10_000, 1), (100_000, 1), (1_000_000, 10_000))
VOCABULARY = 50_000
MEMORY_TERMS, QUERY_TERMS = 20, 8
LIMIT = 100
NOW = 1_700_000_000.0
TAGS = 10
CENTRES = 1000


@dataclass
class Row:
    """One size, measured; times of searches in milliseconds."""

    points: int
    cubes: int
    build_per_second: float = 0.0
    optimize_seconds: float = 0.0
    disk_mib: float = 0.0
    memory_mib: float = 0.0
    recall_at_10: float = 0.0
    plain_ms: list[float] = field(default_factory=list)
    labelled_ms: list[float] = field(default_factory=list)
    tagged_ms: list[float] = field(default_factory=list)


class Sampler:
    """Memories and queries; the same for the same seed."""

    def __init__(self, cubes: int, *, uniform: bool = False, seed: int = 0) -> None:
        self._random = np.random.default_rng(seed)
        self._cubes = cubes
        centres = self._random.standard_normal((CENTRES, DIM), dtype=np.float32)
        self._centres = centres * np.float32(0.0 if uniform else 1.0)
        shares = 1 / np.arange(10, VOCABULARY + 10)
        self._cumulated = np.cumsum(shares / shares.sum())

    def dense(self, count: int) -> np.ndarray:
        vectors = self._random.standard_normal((count, DIM), dtype=np.float32)
        vectors += self._centres[self._random.integers(CENTRES, size=count)]
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors

    def sparse(self, terms: int) -> SparseVector:
        drawn = np.searchsorted(self._cumulated, self._random.random(terms))
        indices = np.unique(drawn.clip(0, VOCABULARY - 1)).astype(np.uint32)
        return SparseVector(indices, self._random.uniform(0.5, 1.5, len(indices)).astype("f4"))

    def batches(self, points: int) -> Iterator[list[IndexPoint]]:
        for start in range(0, points, BATCH):
            count = min(BATCH, points - start)
            dense = self.dense(count)
            yield [self._point(start + place + 1, dense[place]) for place in range(count)]

    def _point(self, seq: int, dense: np.ndarray) -> IndexPoint:
        fields = FilterFields(
            created_at=NOW - seq,
            updated_at=NOW - seq,
            tags=(f"tag-{seq % TAGS}",),
            labels=("secret",) if seq % 50 == 0 else (),
            source={"kind": "note"},
            metadata={"page": (seq % 100,)},
        )
        cube = CubeId(f"cube-{seq % self._cubes}")
        return IndexPoint(seq, 1, cube, dense, self.sparse(MEMORY_TERMS), fields)

    def query(self, labels: frozenset[str] | None, tag: str | None) -> IndexQuery:
        cube = CubeId(f"cube-{self._random.integers(self._cubes)}")
        where = None if tag is None else HasTag((tag, "tag-1"))
        return IndexQuery(
            Scope((cube,), labels, NOW), self.dense(1)[0], self.sparse(QUERY_TERMS), where
        )


def measure(index: VectorIndex, row: Row, sampler: Sampler, *, queries: int) -> None:
    """Fill the index and search it; what does not come from the index is not timed."""
    writing = 0.0
    for number, batch in enumerate(sampler.batches(row.points)):
        began = time.perf_counter()
        index.upsert(batch)
        if number % 8 == 7:
            index.flush()
        writing += time.perf_counter() - began
    began = time.perf_counter()
    index.flush()
    row.build_per_second = row.points / (writing + time.perf_counter() - began)
    if row.points >= FULL_SCAN_POINTS:
        began = time.perf_counter()
        index.optimize()
        row.optimize_seconds = time.perf_counter() - began

    for samples, labels, tag in (
        (row.plain_ms, None, None),
        (row.labelled_ms, frozenset({"team"}), None),
        (row.tagged_ms, None, "tag-0"),
    ):
        for number in range(queries + 10):
            query = sampler.query(labels, tag)
            began = time.perf_counter()
            index.search(query, dense_limit=LIMIT, sparse_limit=LIMIT)
            if number >= 10:
                samples.append((time.perf_counter() - began) * 1e3)
    row.recall_at_10 = _recall(index, sampler, 2_000_000 * row.cubes // row.points)


def _recall(index: VectorIndex, sampler: Sampler, queries: int) -> float:
    """Of the 10 nearest by exact scores, how many a search finds."""
    shares = []
    for _ in range(max(5, min(50, queries))):
        query = sampler.query(None, None)
        (cube,) = query.scope.cube_ids
        seqs: list[int] = []
        while page := index.versions(after=seqs[-1] if seqs else 0, limit=10_000, cube_id=cube):
            seqs += [entry.seq for entry in page]
        dense = IndexQuery(query.scope, query.dense)
        found = {hit.seq for hit in index.search(dense, dense_limit=10, sparse_limit=0)}
        exact = sorted(index.score(seqs, dense), key=lambda hit: -(hit.dense or 0.0))[:10]
        shares.append(sum(hit.seq in found for hit in exact) / len(exact))
    return statistics.mean(shares)


def run_embedded(row: Row, folder: Path, sampler: Sampler, *, queries: int) -> None:
    """Measure a fresh embedded index in `folder`."""
    store = EdgeStore(folder)
    try:
        index = store.open("scale", dim=DIM)
        measure(index, row, sampler, queries=queries)
        files = (path.stat() for path in folder.rglob("*") if path.is_file())
        row.disk_mib = sum(file.st_blocks * 512 for file in files) / 2**20
        status = Path(f"/proc/{store.pid}/status").read_text()
        row.memory_mib = int(status.split("VmRSS:")[1].split()[0]) / 1024
    finally:
        store.close()


def run_server(row: Row, url: str, sampler: Sampler, *, queries: int) -> None:
    """Measure a collection of a Qdrant server, dropped afterwards."""
    store = ServerStore(url, namespace=f"memos-scale-{secrets.token_hex(4)}")
    try:
        measure(store.open("scale", dim=DIM), row, sampler, queries=queries)
    finally:
        store.drop("scale")
        store.close()


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    lines = [
        "| memories | cubes | build /s | optimise s | disk MiB | memory MiB | recall@10 "
        "| search p50/p99 ms | with labels | with a tag filter |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        times = (_percentiles(ms) for ms in (row.plain_ms, row.labelled_ms, row.tagged_ms))
        lines.append(
            f"| {row.points:,} | {row.cubes:,} | {row.build_per_second:,.0f} "
            f"| {row.optimize_seconds:.1f} | {row.disk_mib:,.0f} | {row.memory_mib:,.0f} "
            f"| {row.recall_at_10:.3f} | {' | '.join(times)} |"
        )
    return "\n".join(lines)


def _percentiles(samples: list[float]) -> str:
    return f"{np.percentile(samples, 50):.1f} / {np.percentile(samples, 99):.1f}"


def machine() -> str:
    """The machine and the versions, in one line."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.split(":")[1].strip() for line in lines if "model name" in line)
    memory = int(Path("/proc/meminfo").read_text().split()[1]) / 2**20
    versions = (
        f"{name} {importlib.metadata.version(name)}"
        for name in ("qdrant-edge-py", "qdrant-client", "numpy")
    )
    return (
        f"linux {platform.release()}, {os.cpu_count()} cores, {next(names, 'unknown')}, "
        f"{memory:.0f} GiB, python {platform.python_version()}, {', '.join(versions)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--points", type=int, help="measure only this many memories")
    parser.add_argument("--cubes", type=int, default=1, help="over this many cubes")
    parser.add_argument("--queries", type=int, default=200, help="of each kind")
    parser.add_argument("--uniform", action="store_true", help="vectors around no centres")
    parser.add_argument("--folder", type=Path, help="where to write; a folder on a real disk")
    parser.add_argument("--url", help="of a Qdrant server to measure instead")
    parser.add_argument("--json", type=Path, help="a file for all samples")
    options = parser.parse_args()
    sizes = SIZES if options.points is None else ((options.points, options.cubes),)
    print(machine(), flush=True)
    rows: list[Row] = []
    for points, cubes in sizes:
        row = Row(points, cubes)
        sampler = Sampler(cubes, uniform=options.uniform)
        if options.url is not None:
            run_server(row, options.url, sampler, queries=options.queries)
        else:
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                run_embedded(row, Path(folder), sampler, queries=options.queries)
        rows.append(row)
        lines = table(rows).splitlines()
        print(
            "\n".join(itertools.chain(lines[:2] if len(rows) == 1 else (), lines[-1:])), flush=True
        )
    if options.json is not None:
        document = {"machine": machine(), "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
