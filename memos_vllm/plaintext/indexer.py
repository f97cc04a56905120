"""The thread that opens the index, follows the catalog, and changes the embedder."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from memos_vllm.domain.indexing import IndexProgress
from memos_vllm.errors import ConfigurationError, MemosError
from memos_vllm.plaintext.embedders.base import Embedder
from memos_vllm.plaintext.follower import Follower, IndexedCatalog
from memos_vllm.plaintext.index.base import IndexStore

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.2
_FIRST_RETRY_SECONDS = 0.5
_LONGEST_RETRY_SECONDS = 10.0
# Of a former embedder, beside which the new collection is built.
_LONGEST_PAUSE_SECONDS = 300.0
# Searches under way end before what they ask is closed.
_PATIENCE_SECONDS = 5.0
# Of a thread, on Linux: the engine and searches come first.
_NICENESS = 10


class Pause:
    """How long to leave alone what has failed: twice as long each time.

    Args:
        clock: seconds that only grow.
    """

    def __init__(self, *, longest_seconds: float, clock: Callable[[], float]) -> None:
        self.problem: str | None = None
        self._longest_seconds = longest_seconds
        self._clock = clock
        self._seconds = _FIRST_RETRY_SECONDS
        self._until = 0.0

    @property
    def seconds(self) -> float:
        """What is left of it."""
        return max(0.0, self._until - self._clock()) if self.problem is not None else 0.0

    def failed(self, problem: str) -> None:
        """Begin, or begin again and take longer."""
        self.problem = problem
        self._until = self._clock() + self._seconds
        self._seconds = min(2 * self._seconds, self._longest_seconds)

    def succeeded(self) -> None:
        """Over."""
        self.problem = None
        self._seconds = _FIRST_RETRY_SECONDS


class Collections:
    """The collection that answers searches and, beside a former one, the one being built.

    For one thread; others may read `serving` and `building`.

    Args:
        embedder: opens what new vectors are made with.
        former_embedder: opens the embedder of a collection that was built before, by its key; it
            answers searches until the new collection is complete. May raise anything.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        catalog: IndexedCatalog,
        store: Callable[[], IndexStore],
        embedder: Callable[[], Embedder],
        *,
        former_embedder: Callable[[str], Embedder],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.serving: Follower | None = None
        self.building: Follower | None = None
        self._catalog = catalog
        self._open_store = store
        self._open_embedder = embedder
        self._open_former = former_embedder
        self._clock = clock
        self._store: IndexStore | None = None
        self._embedder: Embedder | None = None
        self._pauses: dict[str, Pause] = {}
        # Collections that nothing uses may be left from before.
        self._tidy = False
        self._tidying = self._new_pause()

    def open(self) -> bool:
        """Open what is not open; whether that was anything. Raises as `step` does."""
        if self._store is not None:
            return False
        self._open()
        return True

    def step(self) -> bool:
        """Open what is not open, and follow one batch of changes with each collection.

        Returns:
            Whether there was anything to do.
        Raises:
            MemosError: what is down, missing or misconfigured; the next step tries again.
        """
        self.open()
        if self.serving is not None and self.building is not None:
            busy = self._step_both(self.serving, self.building)
        else:
            only = self.serving or self.building
            assert only is not None
            busy = only.step()
        if self.building is not None and self.building.complete:
            self._switch()
        if self.building is None and not self._tidy:
            self._remove_unused()
        return busy

    def problem_of(self, follower: Follower) -> str | None:
        """Why one of two collections does not follow while the other does."""
        pause = self._pauses.get(follower.name)
        return None if pause is None else pause.problem

    def check(self) -> None:
        """After a failure: let go of a store that does not answer, so that it is opened anew.

        Whatever it has lost by then is found out when it is opened.
        """
        try:
            for follower in (self.serving, self.building):
                if follower is not None:
                    follower.index.versions(limit=1)
        except MemosError as error:
            logger.info("memos: the index is opened again: %s", error)
            self._close_store()

    def close(self) -> None:
        """Save what was done, and let go of everything."""
        for follower in (self.serving, self.building):
            if follower is not None:
                with contextlib.suppress(MemosError):
                    follower.save()
        self._close_store()
        if self._embedder is not None:
            self._embedder.close()
            self._embedder = None

    def _new_pause(self) -> Pause:
        return Pause(longest_seconds=_LONGEST_PAUSE_SECONDS, clock=self._clock)

    def _open(self) -> None:
        if self._embedder is None:
            self._embedder = self._open_embedder()
        store = self._open_store()
        former = None
        try:
            wanted = self._open_wanted(store, self._embedder)
            if not wanted.complete:
                former = self._open_complete(store, apart_from=wanted.name)
        except BaseException:
            with contextlib.suppress(MemosError):
                store.close()
            raise
        self.serving, self.building = (wanted, None) if wanted.complete else (former, wanted)
        self._tidy = False
        self._pauses.clear()
        self._store = store

    def _open_wanted(self, store: IndexStore, embedder: Embedder) -> Follower:
        name = collection_name(embedder)
        index = store.open(name, dim=embedder.dimension)
        return Follower(self._catalog, embedder, index, name=name, clock=self._clock)

    def _open_complete(self, store: IndexStore, *, apart_from: str) -> Follower | None:
        """A collection of an earlier embedder that can answer while the new one is built."""
        there = set(store.collections())
        for progress in reversed(self._catalog.indexes()):
            if progress.name == apart_from or progress.name not in there or not progress.complete:
                continue
            try:
                former = self._open_one_former(store, progress)
            except MemosError as error:
                logger.warning("memos: '%s' cannot answer meanwhile: %s", progress.name, error)
                continue
            # Nothing that a model of former days raises may keep the new one from its work.
            except Exception:
                logger.exception("memos: '%s' cannot answer meanwhile", progress.name)
                continue
            if former is not None:
                logger.info("memos: '%s' answers until '%s' is complete", former.name, apart_from)
                return former
        return None

    def _open_one_former(self, store: IndexStore, progress: IndexProgress) -> Follower | None:
        name = progress.name
        with contextlib.ExitStack() as opened:
            embedder = self._open_former(progress.embedder)
            opened.callback(embedder.close)
            if (embedder.key, embedder.dimension) != (progress.embedder, progress.dimension):
                raise ConfigurationError(f"the embedder '{progress.embedder}' is another one now")
            index = store.open(name, dim=embedder.dimension)
            opened.callback(index.close)
            former = Follower(self._catalog, embedder, index, name=name, clock=self._clock)
            if not former.complete:
                return None
            opened.pop_all()
            return former

    def _step_both(self, serving: Follower, building: Follower) -> bool:
        """Neither holds up the other: not an embedder that is no more, nor one that is not yet."""
        busy, failures = False, []
        for follower in (serving, building):
            pause = self._pauses.setdefault(follower.name, self._new_pause())
            if pause.seconds:
                continue
            try:
                busy = follower.step() or busy
            except MemosError as error:
                logger.warning("memos: the index '%s' does not follow: %s", follower.name, error)
                pause.failed(str(error))
                failures.append(error)
            else:
                pause.succeeded()
        if failures and all(pause.problem is not None for pause in self._pauses.values()):
            self._pauses.clear()
            raise failures[-1]
        return busy

    def _switch(self) -> None:
        """The new collection answers from now on."""
        former, self.serving, self.building = self.serving, self.building, None
        self._tidy = False
        if former is not None:
            former.retire(patience_seconds=_PATIENCE_SECONDS)
            former.embedder.close()
            former.index.close()

    def _remove_unused(self) -> None:
        """Remove other collections. A failure is tried again later, and holds up nothing."""
        if self._tidying.seconds:
            return
        assert self._store is not None
        assert self.serving is not None
        try:
            for progress in self._catalog.indexes():
                if progress.name != self.serving.name:
                    self._catalog.forget_index(progress.name)
            for name in self._store.collections():
                if name != self.serving.name:
                    self._store.drop(name)
        except MemosError as error:
            logger.warning("memos: a former index could not be removed yet: %s", error)
            self._tidying.failed(str(error))
        else:
            self._tidying.succeeded()
            self._tidy = True

    def _close_store(self) -> None:
        followers = [one for one in (self.serving, self.building) if one is not None]
        store, self._store = self._store, None
        self.serving = self.building = None
        for follower in followers:
            follower.retire(patience_seconds=_PATIENCE_SECONDS)
            if follower.embedder is not self._embedder:
                follower.embedder.close()
        if store is not None:
            try:
                store.close()
            except MemosError as error:
                logger.warning("memos: the index was not closed in order: %s", error)


@dataclass(slots=True)
class IndexerState:
    """What an indexer last met; read by searches and by the server's status.

    `tried` is set once the index was opened, or could not be.
    """

    problem: str | None = "the index is being opened"
    tried: bool = False


class Indexer:
    """A thread that takes steps until it is stopped, and tries again whatever fails.

    Args:
        on_progress: called after every step.
    """

    def __init__(self, collections: Collections, *, on_progress: Callable[[], None]) -> None:
        self.state = IndexerState()
        self._collections = collections
        self._on_progress = on_progress
        self._wake = threading.Event()
        self._doubted = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memos-indexer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """There is something new in the catalog."""
        self._wake.set()

    def doubt(self) -> None:
        """A search met trouble: look whether the index answers, and open it anew if not."""
        self._doubted.set()
        self._wake.set()

    def stop(self) -> None:
        """Finish the batch under way and let go of the index."""
        self._stopping.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        _lower_priority()
        pause = Pause(longest_seconds=_LONGEST_RETRY_SECONDS, clock=time.monotonic)
        busy = False

        def step() -> None:
            nonlocal busy
            if self._collections.open():
                # Whoever waits for the index knows it is there before the first batch is followed.
                self._met(None)
            busy = self._collections.step()

        while not self._stopping.is_set():
            if self._doubted.is_set():
                self._doubted.clear()
                self._tried(self._collections.check)
            problem = self._tried(step)
            self._met(problem)
            if problem is not None:
                pause.failed(problem)
                if not self._stopping.wait(pause.seconds):
                    self._tried(self._collections.check)
                continue
            pause.succeeded()
            if not busy:
                self._wake.wait(_POLL_SECONDS)
                self._wake.clear()
        self._tried(self._collections.close)
        self._met("the index is closed")

    def _tried(self, action: Callable[[], None]) -> str | None:
        """What went wrong, if anything."""
        try:
            action()
        except MemosError as error:
            return str(error)
        except Exception as error:
            # A bug of ours must not end the indexing of everything else in silence.
            logger.exception("memos: the indexer failed and tries again")
            return f"the indexer failed: {type(error).__name__}; see the log"
        return None

    def _met(self, problem: str | None) -> None:
        if problem is not None and problem != self.state.problem and not self._stopping.is_set():
            logger.warning("memos: indexing waits: %s", problem)
        self.state.problem = problem
        self.state.tried = True
        self._on_progress()


# Moves whenever terms, indexed texts or points are made in another way.
_FORMAT = 1


def collection_name(embedder: Embedder) -> str:
    """The collection of an embedder's vectors, as a name that folders and servers take."""
    key = embedder.key
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "-" for c in key)
    short = plain[:64]
    if short != key:
        short += "-" + hashlib.blake2b(key.encode(), digest_size=6).hexdigest()
    return f"memos-{short}-{embedder.dimension}-v{_FORMAT}"


def _lower_priority() -> None:
    """Only this thread's, where the system can: searches and the engine come first."""
    try:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
    except (AttributeError, OSError) as error:
        logger.debug("memos: the indexer keeps its priority: %s", error)
