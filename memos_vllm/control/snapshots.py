"""Cube snapshots as one API server keeps them."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from memos_vllm.control.mos import Mos
from memos_vllm.domain.access import Principal
from memos_vllm.domain.cube import CubeSnapshot, HeldSnapshot
from memos_vllm.errors import NotFound, Unavailable

logger = logging.getLogger(__name__)

MAX_CUBES = 256
# How long chats go on with what a principal could read when Mos was last there.
GRACE_SECONDS = 60.0
SWEEP_SECONDS = 5.0


class Snapshots:
    """What chats need of cubes, at the version and with the rights of this moment.

    Every chat asks `Mos` which cubes its caller may read and which versions they have, one call;
    only what changed travels. While Mos is down, what it last allowed goes on for
    `GRACE_SECONDS`: nobody can take a right back meanwhile (but through a Mos that others reach
    and this server does not). Thread-safe.

    Args:
        is_down: whether Mos is away, and not only slow.
        monotonic: seconds that only grow.
    """

    def __init__(
        self,
        mos: Mos,
        *,
        is_down: Callable[[], bool],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._mos = mos
        self._is_down = is_down
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._held: OrderedDict[str, HeldSnapshot] = OrderedDict()
        # Cube -> when Mos last said that what is held is so.
        self._confirmed: dict[str, float] = {}
        # (principal, cube) -> when Mos last said that it may be read.
        self._allowed: OrderedDict[tuple[str, str], float] = OrderedDict()

    def get(self, actor: Principal, cube_ids: Sequence[str]) -> list[CubeSnapshot]:
        """The cubes' activation memory, in the order asked for.

        Raises:
            NotFound: the first cube that the actor may not read.
            Unavailable: Mos is down, and was for longer than the grace, or was never asked.
        """
        with self._lock:
            known = {cube_id: self._held[cube_id] for cube_id in cube_ids if cube_id in self._held}
        try:
            changed = self._changed(actor, cube_ids, known)
        except NotFound:
            self._forbid(actor, cube_ids)
            raise
        found = [
            known[cube_id] if held is None else held
            for cube_id, held in zip(cube_ids, changed, strict=True)
        ]
        self._keep(found)
        now = datetime.now(UTC)
        return [held.at(now) for held in found]

    def _changed(
        self, actor: Principal, cube_ids: Sequence[str], known: dict[str, HeldSnapshot]
    ) -> Sequence[HeldSnapshot | None]:
        """What is not as it is known, None for the rest."""
        versions = {cube_id: held.snapshot.version for cube_id, held in known.items()}
        asked = self._monotonic()
        try:
            changed = self._mos.changed_snapshots(actor, cube_ids, known=versions)
        except Unavailable as error:
            if not self._in_grace(actor, cube_ids, known):
                raise
            if self._is_down():
                logger.warning("memos: a chat goes on with the rights of a moment ago: %s", error)
                return [None] * len(cube_ids)
            # It has come back meanwhile, or is slow and decides all the same.
            asked = self._monotonic()
            changed = self._mos.changed_snapshots(actor, cube_ids, known=versions)
        self._allow(actor, cube_ids, at=asked)
        return changed

    def drop(self, cube_id: str) -> None:
        """Forget a cube: something of it was erased."""
        with self._lock:
            self._forget(cube_id)

    def sweep(self) -> None:
        """Forget the cubes that no chat has named for the grace: what another server erased of them
        must not stay here. To be called every `SWEEP_SECONDS`."""
        oldest = self._monotonic() - GRACE_SECONDS
        with self._lock:
            for cube_id in [one for one, at in self._confirmed.items() if at < oldest]:
                self._forget(cube_id)

    def _forget(self, cube_id: str) -> None:
        self._held.pop(cube_id, None)
        self._confirmed.pop(cube_id, None)

    def _keep(self, found: Sequence[HeldSnapshot]) -> None:
        with self._lock:
            for held in found:
                self._held[held.snapshot.id] = held
                self._held.move_to_end(held.snapshot.id)
            while len(self._held) > MAX_CUBES:
                self._forget(next(iter(self._held)))

    def _allow(self, actor: Principal, cube_ids: Sequence[str], *, at: float) -> None:
        with self._lock:
            for cube_id in cube_ids:
                self._confirmed[cube_id] = at
                self._allowed[actor.id, cube_id] = at
                self._allowed.move_to_end((actor.id, cube_id))
            while self._allowed and next(iter(self._allowed.values())) < at - GRACE_SECONDS:
                self._allowed.popitem(last=False)

    def _forbid(self, actor: Principal, cube_ids: Sequence[str]) -> None:
        with self._lock:
            for cube_id in cube_ids:
                self._allowed.pop((actor.id, cube_id), None)

    def _in_grace(
        self, actor: Principal, cube_ids: Sequence[str], known: dict[str, HeldSnapshot]
    ) -> bool:
        since = self._monotonic() - GRACE_SECONDS
        with self._lock:
            return all(
                cube_id in known and self._allowed.get((actor.id, cube_id), since) > since
                for cube_id in cube_ids
            )
