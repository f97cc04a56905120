"""`PromotionScheduler`: the job table's other side, and what is due at a time, not at a call."""

from __future__ import annotations

import logging
import threading

from memos_vllm.control.expiry import MAX_AT_ONCE, ExpiryService
from memos_vllm.control.idempotency import IdempotencyService
from memos_vllm.control.jobs import JobService

logger = logging.getLogger(__name__)

# What has expired is not shown as active anyway; this is how soon it is written down.
_SWEEP_SECONDS = 2.0


class PromotionScheduler(JobService, ExpiryService, IdempotencyService):
    """Hands out jobs under leases, takes back what became of them, and archives what has expired.

    The workers are the API servers: a bake needs their engine. Holds nothing that a crash can
    lose: jobs and leases stand in the catalog, and the job of a worker that died is handed out
    again when its lease has run out.
    """

    def start(self) -> None:
        """Look for what is due, every few seconds, in a thread of its own."""
        self._stop = threading.Event()
        self._sweep = threading.Thread(target=self._run, name="memos-sweep", daemon=True)
        self._sweep.start()

    def close(self) -> None:
        """Stop looking, and close the catalog's idle connections."""
        self._stop.set()
        self._sweep.join()
        super().close()

    def _run(self) -> None:
        while not self._stop.wait(_SWEEP_SECONDS):
            try:
                while self.archive_expired() == MAX_AT_ONCE and not self._stop.is_set():
                    pass
            except Exception:
                # Whatever it is, expiry must not stand still until the server is started again.
                logger.exception("memos: expired memories were not archived; trying again")
