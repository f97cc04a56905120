"""Evidence recall through the service's own path: SQLite, Qdrant Edge, MiniLM and the graph.

    PYTHONPATH=. python PATH/TO/locomo_recall.py --retriever benchmarks.recall:Service

`Service` is what that harness asks for: `build(turns)`, then `search(question, k)`.
Turns go in as chat turns with speaker and time, and captions of pictures as metadata.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from memos_vllm.config import ServerSettings
from memos_vllm.control.mos import Mos
from memos_vllm.domain.access import LOCAL_ADMIN
from memos_vllm.domain.search import SearchQuery
from memos_vllm.domain.turn import NewTurn
from memos_vllm.plaintext.assembly import open_plaintext
from memos_vllm.plaintext.store import PlaintextStore

_SESSION_TIME = "%I:%M %p on %d %B, %Y"


class Service:
    """One cube of a catalog that all instances share."""

    def __init__(self) -> None:
        self._mos, self._plaintext = _opened()
        self._cube = ""
        self._names: dict[str, str] = {}

    def build(self, turns: Sequence[Mapping[str, Any]]) -> None:
        """Add a conversation's turns and wait until they are indexed."""
        self._cube = self._mos.create_cube(LOCAL_ADMIN).id
        for start in range(0, len(turns), 500):
            part = turns[start : start + 500]
            added = self._mos.add_turns(
                LOCAL_ADMIN, self._cube, [_turn(turn) for turn in part], session_id="conversation"
            )
            for turn, memory in zip(part, added, strict=True):
                self._names[memory.id] = turn["dia_id"]
        self._plaintext.wait_until_indexed(self._cube, seconds=600)

    def search(self, question: str, k: int) -> list[str]:
        """The names of the best `k` turns."""
        query = SearchQuery(question, top_k=k)
        found = self._plaintext.search(LOCAL_ADMIN, [self._cube], query)
        return [self._names[hit.memory.id] for hit in found.hits]


def _turn(turn: Mapping[str, Any]) -> NewTurn:
    metadata = {"caption": turn["caption"]} if turn["caption"] else {}
    said_at = datetime.strptime(turn["date"], _SESSION_TIME).replace(tzinfo=UTC)
    text = turn["text"] or turn["caption"] or "."
    return NewTurn("user", text, name=turn["speaker"], created_at=said_at, metadata=metadata)


@cache
def _opened() -> tuple[Mos, PlaintextStore]:
    folder = Path(tempfile.mkdtemp(prefix="memos-recall-"))
    settings = ServerSettings(data_dir=folder)
    mos = Mos.open(settings.resolved_catalog_url)
    plaintext = open_plaintext(settings, mos)
    plaintext.start()

    def close() -> None:
        plaintext.close()
        mos.close()
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(close)
    return mos, plaintext
