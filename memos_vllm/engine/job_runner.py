"""Claims jobs of the catalog and has them done, one at a time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Collection, Mapping

from memos_vllm.control.jobs import NEVER_GIVEN_UP
from memos_vllm.control.scheduler import PromotionScheduler
from memos_vllm.domain.job import Job, JobKind, JobState
from memos_vllm.errors import MemosError, NotFound, Unavailable

logger = logging.getLogger(__name__)

_LEASE_SECONDS = 30.0
_POLL_SECONDS = 1.0
# Also how soon a cancelled job stops when it reports nothing.
_RENEW_SECONDS = 5.0
# Nobody waits for these, so what is down is waited for: that long after each attempt but the last.
_PATIENT = frozenset({JobKind.EXTRACT})
_NEXT_ATTEMPT_SECONDS = (5.0, 20.0, 60.0, 300.0)

# Says how far a job is (0 to 1) and what it is doing.
Report = Callable[[float, str], None]
Handler = Callable[[Job, Report], Awaitable[str]]


class JobRunner:
    """Runs jobs until cancelled. Jobs of a process that died come back when their lease ends.

    Args:
        handlers: by kind of job; each returns what was done, for a person.
        kinds: take only jobs of these kinds; None for any, also of a kind that nobody does.
    """

    def __init__(
        self,
        scheduler: PromotionScheduler,
        handlers: Mapping[JobKind, Handler],
        *,
        kinds: Collection[JobKind] | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._handlers = dict(handlers)
        self._kinds = kinds
        self._owner = f"{socket.gethostname()}:{os.getpid()}"
        self._wake = asyncio.Event()

    def wake(self) -> None:
        """A job was queued; look for it now."""
        self._wake.set()

    async def run(self) -> None:
        """Do jobs until cancelled."""
        while True:
            # Before the look: what is queued during it wakes the next one.
            self._wake.clear()
            job = await self._claim()
            if job is not None:
                await self._do(job)
                continue
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), _POLL_SECONDS)

    async def _claim(self) -> Job | None:
        try:
            return await asyncio.to_thread(
                self._scheduler.claim_job,
                self._owner,
                lease_seconds=_LEASE_SECONDS,
                kinds=self._kinds,
            )
        except Exception:
            # Whatever it is, jobs must not stand still until the server is started again.
            logger.exception("memos: jobs cannot be claimed; trying again")
            await asyncio.sleep(_POLL_SECONDS)
            return None

    async def _do(self, job: Job) -> None:
        progress = _Progress()
        work = asyncio.ensure_future(self._handle(job, progress.report))
        renewal = asyncio.create_task(self._renew(job, progress, work))
        try:
            message = await work
            state, error = JobState.SUCCEEDED, None
        except asyncio.CancelledError:
            if progress.lost:
                logger.info("memos: job %s was cancelled or taken over", job.id)
                return
            if _is_cancelled():
                # The server stops; the next one finds the job when the lease has run out.
                work.cancel()
                raise
            state, message, error = _failed(job, "it was cut off by the engine")
        except NotFound as failure:
            state, message, error = JobState.CANCELLED, "what it works on is gone", str(failure)
        except Unavailable as failure:
            tried_out = job.attempts > len(_NEXT_ATTEMPT_SECONDS)
            if job.kind in NEVER_GIVEN_UP or (job.kind in _PATIENT and not tried_out):
                renewal.cancel()
                await self._put_off(job, failure)
                return
            state, message, error = _failed(job, str(failure))
        except MemosError as failure:
            state, message, error = _failed(job, str(failure))
        except Exception:
            # What a foreign error says may quote a memory.
            logger.exception("memos: job %s failed", job.id)
            state, message, error = _failed(job, "the server's log holds the reason")
        finally:
            renewal.cancel()
        await self._finish(job, state, message, error)

    async def _put_off(self, job: Job, failure: Unavailable) -> None:
        """Let the job's lease run out later, so that it is claimed again."""
        seconds = _NEXT_ATTEMPT_SECONDS[min(job.attempts, len(_NEXT_ATTEMPT_SECONDS)) - 1]
        logger.warning("memos: job %s is tried again in %.0f s: %s", job.id, seconds, failure)
        # Where this fails as well, the lease runs out by itself.
        with contextlib.suppress(Unavailable):
            await asyncio.to_thread(
                self._scheduler.renew_job,
                job.id,
                self._owner,
                lease_seconds=seconds,
                progress=0.0,
                message=f"tried again in {seconds:.0f} s: {failure}",
            )

    async def _finish(self, job: Job, state: JobState, message: str, error: str | None) -> None:
        try:
            await asyncio.to_thread(
                self._scheduler.finish_job,
                job.id,
                self._owner,
                state=state,
                message=message,
                error=error,
            )
        except MemosError:
            logger.exception("memos: the end of job %s was not noted; it runs again", job.id)

    async def _handle(self, job: Job, report: Report) -> str:
        handler = self._handlers.get(job.kind)
        if handler is None:
            raise MemosError(f"this server does not do {job.kind.value} jobs")
        return await handler(job, report)

    async def _renew(self, job: Job, progress: _Progress, work: asyncio.Future[str]) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(progress.changed.wait(), _RENEW_SECONDS)
            progress.changed.clear()
            try:
                ours = await asyncio.to_thread(
                    self._scheduler.renew_job,
                    job.id,
                    self._owner,
                    lease_seconds=_LEASE_SECONDS,
                    progress=progress.fraction,
                    message=progress.message,
                )
            except Unavailable as error:
                logger.warning("memos: the lease of job %s was not renewed yet: %s", job.id, error)
                ours = True
            if not ours:
                progress.lost = True
                work.cancel()
                return
            # A second between two reports is often enough for a person who watches.
            await asyncio.sleep(_POLL_SECONDS)


class _Progress:
    """What a handler last said of its job."""

    def __init__(self) -> None:
        self.fraction = 0.0
        self.message = "under way"
        self.lost = False
        self.changed = asyncio.Event()

    def report(self, fraction: float, message: str) -> None:
        self.fraction, self.message = fraction, message
        self.changed.set()


def _failed(job: Job, error: str) -> tuple[JobState, str, str]:
    return JobState.FAILED, f"the {job.kind.value} job failed", error


def _is_cancelled() -> bool:
    """Whether this very task was, and not only what it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
