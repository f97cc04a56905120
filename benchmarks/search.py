"""How fast memories are taken in and found, on one core, embedding included.

    python -m benchmarks.search [--memories 10000 100000] [--queries 300] [--json FILE]

Builds a catalog of made-up conversations in a temporary folder and searches it as the server does:
SQLite, Qdrant Edge in its own process, MiniLM. Above `--embedded` memories their vectors are random
and only queries are embedded: a search costs the same, and building takes minutes less.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from memos_vllm.config import ServerSettings
from memos_vllm.control.mos import Mos
from memos_vllm.domain.access import LOCAL_ADMIN
from memos_vllm.domain.search import SearchQuery
from memos_vllm.domain.turn import NewTurn
from memos_vllm.plaintext.assembly import open_plaintext
from memos_vllm.plaintext.embedders.base import Embedder
from memos_vllm.plaintext.embedders.create import create_embedder
from memos_vllm.plaintext.index.qdrant_edge import EdgeStore
from memos_vllm.plaintext.store import PlaintextStore

SPEAKERS = ("Ada", "Ben", "Chloe", "Dev", "Elif", "Femi")
TURNS_A_CALL = 500
VOCABULARY = 4000
WORDS = (
    "time year people way day man thing woman life child world school family student group "
    "country problem hand part place case week company system program question work number "
    "night point home water room mother area money story fact month lot right study book eye "
    "job word business issue side kind head house service friend father power hour game line "
    "end member law car city name team minute idea kid body information back parent face others "
    "level office door health person art war history party result change morning reason "
    "research girl guy moment air teacher force education foot boy age policy music market "
    "sense nation plan college interest death experience effect use class control field "
    "development role effort rate heart drug show leader light voice wife police mind price "
    "decision son view relationship town road arm difference value building action season "
    "society tax player record paper space ground form event matter center couple site project "
    "star table need court oil situation cost industry figure street image phone data picture "
    "practice piece land product doctor wall worker news test movie north love support "
    "technology garden kitchen bicycle train ticket letter window summer winter dinner river "
    "bridge mountain holiday painting guitar puppy wedding birthday museum library hospital "
    "concert marathon recipe"
).split()


@dataclass(frozen=True)
class Row:
    """One line of the report; times in milliseconds, rates a second."""

    memories: int
    words_each: str
    vectors: str
    taken_in_per_second: float
    p50_ms: float
    p99_ms: float
    first_ms: float
    p50_at_once_ms: float


class RandomVectors:
    """An embedder whose documents cost nothing, beside real queries."""

    def __init__(self, queries: Embedder) -> None:
        self._queries = queries
        self._random = np.random.default_rng(0)
        self.key = "random-documents"
        self.dimension = queries.dimension
        self.max_tokens = queries.max_tokens

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        vectors = self._random.standard_normal((len(texts), self.dimension), np.float32)
        normal: npt.NDArray[np.float32] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return normal

    def embed_query(self, text: str) -> npt.NDArray[np.float32]:
        return self._queries.embed_query(text)

    def close(self) -> None:
        self._queries.close()


class Speech:
    """Made-up sentences: plain words, and now and then a name that few others hold."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        starts = [a + b for a in "bdfgklmnprstv" for b in ("a", "e", "i", "o", "u")]
        ends = ("ner", "ton", "lek", "vin", "mar", "dal", "rik", "sey")
        self._names = [
            (self._random.choice(starts) + self._random.choice(starts) + end).capitalize()
            for end in ends
            for _ in range(VOCABULARY // len(ends))
        ]
        self._weights = [1.0 / (rank + 10) for rank in range(len(WORDS))]

    def sentence(self, words: int) -> str:
        said = self._random.choices(WORDS, self._weights, k=words)
        for place in range(3, words, 8):
            said[place] = self._random.choice(self._names)
        return " ".join(said)

    def turns(self, count: int) -> Iterator[NewTurn]:
        for _ in range(count):
            text = self.sentence(self._random.randint(10, 20)) + "."
            yield NewTurn("user", text, name=self._random.choice(SPEAKERS))


def measure(memories: int, *, queries: int, embedded: bool, folder: Path) -> Row:
    """Build a cube of `memories` turns and search it `queries` times."""
    settings = ServerSettings(data_dir=folder)
    mos = Mos.open(settings.resolved_catalog_url)
    plaintext = open_plaintext(settings, mos) if embedded else _with_random_vectors(settings, mos)
    plaintext.start()
    try:
        mos.create_cube(LOCAL_ADMIN, cube_id="bench")
        plaintext.wait_until_indexed("bench", seconds=120)
        started = time.perf_counter()
        _fill(mos, plaintext, memories)
        rate = memories / (time.perf_counter() - started)
        at_once = _search(plaintext, min(queries, 100))
        _wait_until_optimized(plaintext)
        took = _search(plaintext, queries)
    finally:
        plaintext.close()
        mos.close()
    steady = sorted(took[10:])
    return Row(
        memories=memories,
        words_each="10-20",
        vectors="MiniLM" if embedded else "random",
        taken_in_per_second=round(rate, 1),
        p50_ms=round(statistics.median(steady), 1),
        p99_ms=round(steady[int(len(steady) * 0.99)], 1),
        first_ms=round(at_once[0], 1),
        p50_at_once_ms=round(statistics.median(at_once[10:]), 1),
    )


def _search(plaintext: PlaintextStore, queries: int) -> list[float]:
    """How long each of so many searches took, in milliseconds."""
    speech = Speech(1)
    took = []
    for _ in range(queries):
        question = f"What did {random.choice(SPEAKERS)} say about {speech.sentence(5)}?"
        before = time.perf_counter()
        plaintext.search(LOCAL_ADMIN, ["bench"], SearchQuery(question))
        took.append((time.perf_counter() - before) * 1e3)
    return took


def _wait_until_optimized(plaintext: PlaintextStore) -> None:
    """Large cubes get a graph in the background, in the time that nobody else wants."""
    while (serving := plaintext.status().get("serving")) is not None:
        if not (isinstance(serving, dict) and serving["optimizing"]):
            return
        time.sleep(1)


def _with_random_vectors(settings: ServerSettings, mos: Mos) -> PlaintextStore:
    def embedder(_: str = "") -> Embedder:
        opened = create_embedder(settings.embedder)
        assert opened is not None
        return RandomVectors(opened)

    return PlaintextStore(
        mos,
        store=lambda: EdgeStore(settings.index_dir),
        embedder=embedder,
        former_embedder=embedder,
    )


def _fill(mos: Mos, plaintext: PlaintextStore, memories: int) -> None:
    speech = Speech(0)
    for start in range(0, memories, TURNS_A_CALL):
        turns = list(speech.turns(min(TURNS_A_CALL, memories - start)))
        mos.add_turns(LOCAL_ADMIN, "bench", turns, session_id=f"s{start}")
        plaintext.wake()
    while not plaintext.wait_until_indexed("bench", seconds=600):
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--memories", type=int, nargs="+", default=[2_000, 10_000])
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--embedded", type=int, default=10_000)
    parser.add_argument("--all-cores", action="store_true", help="do not stay on one core")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    if not asked.all_cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    print(
        f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, ",
        end="",
    )
    print("all cores" if asked.all_cores else "one core")
    rows = []
    print("| memories | vectors | taken in /s | p50 ms | p99 ms | first ms | p50 ms at once |")
    print("|---|---|---|---|---|---|---|")
    for memories in asked.memories:
        with tempfile.TemporaryDirectory(prefix="memos-bench-") as folder:
            row = measure(
                memories,
                queries=asked.queries,
                embedded=memories <= asked.embedded,
                folder=Path(folder),
            )
        rows.append(row)
        print(
            f"| {row.memories:,} | {row.vectors} | {row.taken_in_per_second} | {row.p50_ms} | "
            f"{row.p99_ms} | {row.first_ms} | {row.p50_at_once_ms} |",
            flush=True,
        )
    if asked.json:
        asked.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
