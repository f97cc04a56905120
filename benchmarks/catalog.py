"""How fast the catalog writes, and whether anything slows down when it holds many cubes.

    python -m benchmarks.catalog [--cubes 10 300] [--rounds 9] [--json FILE]
    python -m benchmarks.catalog --cubes 10 10000     # a million memories: minutes, 4 GB of disk
    python -m benchmarks.catalog --catalog-url postgresql://...   # an empty database: writes only

Writes go through `Mos`, one after another from one thread, each on the disk when it returns. For
the second table, catalogs with 100 memories in each cube are put together from ten cubes that the
service has written (`benchmarks/catalog_fill.py`), and the same calls are timed in turns on each,
on cubes chosen at random. They are asked by an administrator, or by a principal with a grant on
every cube. All cubes of a catalog are in one collection of Qdrant Edge, in vectors of 32 random
numbers, documents and queries alike, so that what is measured is the catalog and the index, and no
embedder. Ratios are those of single rounds, and the middle one is shown: what slows the machine
down slows both catalogs.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import random
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sqlalchemy import select

from benchmarks.catalog_fill import (
    EVERYWHERE,
    ORIGINALS,
    cube_id,
    original_points,
    repeat,
    repeat_points,
    write_cubes,
)
from benchmarks.search import Speech
from benchmarks.store import processor
from memos_vllm.control.mos import Mos
from memos_vllm.control.tables import CubeRow
from memos_vllm.domain.access import LOCAL_ADMIN, Principal
from memos_vllm.domain.audit import AuditFilter
from memos_vllm.domain.ids import PrincipalId
from memos_vllm.domain.memory import MemoryState, NewMemory
from memos_vllm.domain.search import SearchQuery
from memos_vllm.plaintext.index.base import IndexPoint
from memos_vllm.plaintext.index.qdrant_edge import EdgeStore
from memos_vllm.plaintext.indexer import collection_name
from memos_vllm.plaintext.store import PlaintextStore

BATCH = 100
DIMENSION = 32
CALLS_A_ROUND = 20
INDEX = "index"
ADMIN = LOCAL_ADMIN
GRANTED = Principal(PrincipalId(EVERYWHERE))
OF_NOBODY = AuditFilter(actor="nobody")

Samples = dict[str, list[float]]


class RandomVectors:
    """An embedder that costs nothing."""

    key = "random-32"
    dimension = DIMENSION
    max_tokens = 256

    def __init__(self) -> None:
        self._random = np.random.default_rng(0)

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        vectors = self._random.standard_normal((len(texts), DIMENSION), np.float32)
        normal: npt.NDArray[np.float32] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return normal

    def embed_query(self, text: str) -> npt.NDArray[np.float32]:
        vector: npt.NDArray[np.float32] = self.embed([text])[0]
        return vector

    def close(self) -> None:
        pass


def write_rates(url: str, *, rounds: int) -> Samples:
    """Memories a second, one to a call and a hundred to a call, in turns."""
    mos = Mos.open(url)
    mos.create_cube(LOCAL_ADMIN, cube_id="bench")
    speech = Speech(0)
    found: Samples = {"one memory a call": [], f"{BATCH} memories a call": []}
    for done in range(rounds + 1):
        for name, size, calls in zip(found, (1, BATCH), (100, 10), strict=True):
            batches = [[NewMemory(speech.sentence(15)) for _ in range(size)] for _ in range(calls)]
            started = time.perf_counter()
            for batch in batches:
                mos.add_memories(LOCAL_ADMIN, "bench", batch)
            if done:  # the first round warms up
                found[name].append(round(size * calls / (time.perf_counter() - started), 1))
    mos.close()
    return found


@dataclass
class Catalog:
    """A catalog of so many cubes, and what is timed on it."""

    cubes: int
    mos: Mos
    plaintext: PlaintextStore | None
    samples: Samples = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=dict)

    def calls(self, chosen: random.Random, speech: Speech) -> dict[str, Callable[[], object]]:
        mos = self.mos

        def cube() -> str:
            return cube_id(chosen.randrange(self.cubes))

        def known_version(actor: Principal) -> object:
            """What a chat asks of a cube that the server has in memory already."""
            one = cube()
            return mos.changed_snapshots(actor, [one], known={one: self.versions[one]})

        calls: dict[str, Callable[[], object]] = {
            "list 50 memories with a tag": lambda: mos.list_memories(ADMIN, cube(), tag="tag-3"),
            "list 50 active memories": lambda: mos.list_memories(
                ADMIN, cube(), state=MemoryState.ACTIVE
            ),
            "stats of a cube": lambda: mos.cube_stats(ADMIN, cube()),
            "list 10 jobs": lambda: mos.list_jobs(ADMIN, limit=10),
            "end of the audit log": lambda: mos.audit_entries(ADMIN),
            "audit log of somebody": lambda: mos.audit_entries(ADMIN, which=OF_NOBODY),
            "audit log of a cube": lambda: mos.audit_entries(ADMIN, cube()),
            "list grants of a cube": lambda: mos.list_grants(ADMIN, cube()),
            "add a memory": lambda: mos.add_memories(
                ADMIN, cube(), [NewMemory(speech.sentence(15))]
            ),
        }
        for asking, actor in (("", ADMIN), (", by grants", GRANTED)):
            calls |= {
                f"{name}{asking}": functools.partial(call, actor)
                for name, call in {
                    "list 10 cubes": lambda actor: mos.list_cubes(actor, limit=10),
                    "show a cube": lambda actor: mos.get_cube(actor, cube()),
                    "list 50 memories": lambda actor: mos.list_memories(actor, cube()),
                    "snapshot for a chat": lambda actor: mos.snapshots(actor, [cube()]),
                    "snapshot that is known": known_version,
                    "list jobs of a cube": lambda actor: mos.list_jobs(actor, cube_id=cube()),
                }.items()
            }
            if (plaintext := self.plaintext) is not None:
                calls[f"search{asking}"] = functools.partial(
                    lambda search, actor: search(actor, [cube()], SearchQuery(speech.sentence(5))),
                    plaintext.search,
                    actor,
                )
        return calls

    def get_ready(self) -> None:
        """Wait until the index has what was added, and learn what versions cubes have by now."""
        with self.mos._catalog.read() as session:
            self.versions = dict(session.execute(select(CubeRow.id, CubeRow.version)).all())
        while self.plaintext is not None and self.behind():
            time.sleep(0.05)

    def behind(self) -> bool:
        (index,) = self.mos.indexes()
        backlog = self.mos.index_backlog(index.name)
        return bool(backlog.changes or backlog.memories)


def open_catalog(cubes: int, folder: Path, stack: ExitStack, *, search: bool) -> Catalog:
    """A catalog of so many cubes, with an index that has taken all of it in."""
    path = folder / str(cubes) / "catalog.sqlite"
    url = f"sqlite:///{path}"
    began = time.perf_counter()
    with closing(Mos.open(url)) as mos:
        write_cubes(mos)
        points = _index_originals(mos, path.parent) if search else []
    repeat(path, cubes // ORIGINALS)
    print(f"{cubes:,} cubes: filled in {time.perf_counter() - began:.0f} s", end="", flush=True)
    began = time.perf_counter()
    if search:
        with closing(EdgeStore(path.parent / INDEX)) as store:
            collection = store.open(collection_name(RandomVectors()), dim=DIMENSION)
            repeat_points(collection, points, cubes // ORIGINALS)
    mos = Mos.open(url)
    stack.callback(mos.close)
    plaintext = None
    if search:
        plaintext = _search_over(mos, path.parent)
        stack.callback(plaintext.close)
        while not plaintext.wait_until_indexed(cube_id(0), seconds=60) or _optimizing(plaintext):
            time.sleep(0.5)
        print(f", indexed in {time.perf_counter() - began:.0f} s", end="")
    print(flush=True)
    return Catalog(cubes, mos, plaintext)


def _index_originals(mos: Mos, folder: Path) -> list[IndexPoint]:
    """Have the indexer take in what the service wrote; its points."""
    with closing(_search_over(mos, folder)) as plaintext:
        for number in range(ORIGINALS):
            while not plaintext.wait_until_indexed(cube_id(number), seconds=60):
                pass
    return original_points(mos, embedder=RandomVectors.key)


def _search_over(mos: Mos, folder: Path) -> PlaintextStore:
    plaintext = PlaintextStore(
        mos,
        store=lambda: EdgeStore(folder / INDEX),
        embedder=RandomVectors,
        former_embedder=lambda _key: RandomVectors(),
    )
    plaintext.start()
    return plaintext


def _optimizing(plaintext: PlaintextStore) -> bool:
    serving = plaintext.status().get("serving")
    return not isinstance(serving, dict) or bool(serving["optimizing"])


def time_calls(catalogs: Sequence[Catalog], *, rounds: int) -> None:
    """Time every call on every catalog, in turns; in milliseconds, the median of each round."""
    chosen, speech = random.Random(3), Speech(4)
    timed = [(catalog, catalog.calls(chosen, speech)) for catalog in catalogs]
    for done in range(rounds + 1):
        for name in timed[0][1]:
            chosen.shuffle(timed)
            for catalog, calls in timed:
                catalog.get_ready()
                took = statistics.median(_milliseconds(calls[name]))
                if done:  # the first round warms up
                    catalog.samples.setdefault(name, []).append(round(took, 3))


def _milliseconds(call: Callable[[], object]) -> Iterator[float]:
    for _ in range(CALLS_A_ROUND):
        before = time.perf_counter()
        call()
        yield (time.perf_counter() - before) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--cubes", type=int, nargs="+", default=[10, 300], help=f"multiples of {ORIGINALS}"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--no-search", action="store_true", help="leave the index out")
    parser.add_argument("--catalog-url", help="measure writes on this empty database instead")
    parser.add_argument("--folder", type=Path, help="where the catalogs are made: a real disk")
    parser.add_argument("--json", type=Path, help="write every sample there")
    asked = parser.parse_args()
    print(
        f"{platform.system()} {platform.release()}, {os.cpu_count()} cores, {processor()}, "
        f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}"
    )
    with tempfile.TemporaryDirectory(prefix="memos-bench-", dir=asked.folder) as made:
        folder = Path(made)
        url = asked.catalog_url or f"sqlite:///{folder / 'writes' / 'catalog.sqlite'}"
        report: dict[str, Any] = {"memories_per_second": write_rates(url, rounds=asked.rounds)}
        print("\n| writes | memories a second, median (least - most) |\n|---|---|")
        for name, rates in report["memories_per_second"].items():
            spread = f"{min(rates):,.0f} - {max(rates):,.0f}"
            print(f"| {name} | {statistics.median(rates):,.0f} ({spread}) |")
        if asked.catalog_url is None:
            print()
            report["milliseconds"] = _scale(asked, folder)
    print("\nevery sample: " + json.dumps(report))
    if asked.json:
        asked.json.write_text(json.dumps(report, indent=1))


def _scale(asked: argparse.Namespace, folder: Path) -> dict[int, Samples]:
    with ExitStack() as stack:
        catalogs = [
            open_catalog(cubes, folder, stack, search=not asked.no_search) for cubes in asked.cubes
        ]
        time_calls(catalogs, rounds=asked.rounds)
    first, *others = catalogs
    print(
        "\n| ms, median | " + " | ".join(f"{one.cubes:,} cubes" for one in catalogs) + " | ratio |"
    )
    print("|---" * (len(catalogs) + 2) + "|")
    for name, base in first.samples.items():
        medians = [statistics.median(one.samples[name]) for one in catalogs]
        # Of the same round: what slows the machine down slows both.
        last = others[-1].samples[name] if others else base
        ratio = statistics.median(a / b for a, b in zip(last, base, strict=True))
        print(f"| {name} | " + " | ".join(f"{ms:.2f}" for ms in medians) + f" | {ratio:.2f} |")
    return {one.cubes: one.samples for one in catalogs}


if __name__ == "__main__":
    main()
