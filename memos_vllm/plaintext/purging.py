"""Rewrites the index's files without what was erased, once for all erasures that wait for it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from memos_vllm.errors import MemosError
from memos_vllm.plaintext.follower import Follower

logger = logging.getLogger(__name__)


class Purger:
    """Purges collections in a thread of its own. Thread-safe.

    Args:
        collections: those that are open now.
    """

    def __init__(self, collections: Callable[[], Sequence[Follower]]) -> None:
        self._collections = collections
        self._turn = threading.Lock()
        # The outbox entry up to which a collection's files were rewritten, by its name.
        self._purged: dict[str, int] = {}
        # Those whose store rewrites its files at a time of its own.
        self._not_ours: set[str] = set()
        self._problem: MemosError | None = None
        self._thread: threading.Thread | None = None

    def purged(self, entry: int) -> bool | None:
        """Whether files hold nothing of what was deleted up to this entry; if not, see to it.

        Returns:
            None where that is up to the store.
        Raises:
            MemosError: what the last try ended with; the next call tries again.
        """
        with self._turn:
            problem, self._problem = self._problem, None
            if problem is not None:
                raise problem
            waiting = [one for one in self._collections() if self._behind(one, entry)]
            if not waiting:
                return None if self._not_ours else True
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, args=(waiting,), name="memos-purge", daemon=True
                )
                self._thread.start()
            return False

    def _behind(self, collection: Follower, entry: int) -> bool:
        name = collection.name
        return name not in self._not_ours and self._purged.get(name, -1) < entry

    def _run(self, collections: Sequence[Follower]) -> None:
        problem: MemosError | None = None
        try:
            for collection in collections:
                saved = collection.saved
                if collection.index.purge():
                    self._purged[collection.name] = saved
                else:
                    self._not_ours.add(collection.name)
        except MemosError as error:
            problem = error
        except Exception as error:
            # A bug of ours must not leave whoever waits for it waiting for ever.
            logger.exception("memos: the index was not purged")
            problem = MemosError(f"purging the index failed: {type(error).__name__}; see the log")
        with self._turn:
            self._problem, self._thread = problem, None
